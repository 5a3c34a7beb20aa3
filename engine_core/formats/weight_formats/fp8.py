"""8-bit floats: OCP E4M3 without infinities ("e4m3fn", Micikevicius et al. 2022, arXiv 2209.05433), one scale a row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine_core.formats.number_formats import (
    E4M3,
    FP8_MAX,
    ScaledFloat,
    from_16_bit,
    inverse_of,
    to_16_bit,
    to_minifloat,
)
from engine_core.formats.weight_formats.base import SCALE_TYPES, QuantizedFormat, Rounding, Shape


@dataclass(frozen=True)
class Fp8(QuantizedFormat[ScaledFloat]):
    """See the module."""

    def quantize(self, weights: np.ndarray, rounding: Rounding) -> ScaledFloat:
        scales = np.abs(weights).max(axis=1, keepdims=True) / FP8_MAX
        scales = from_16_bit(to_16_bit(scales, rounding.scale_type))
        return ScaledFloat(to_minifloat(weights * inverse_of(scales), E4M3), scales, E4M3, weights.shape[1])

    def pack(self, values: np.ndarray) -> np.ndarray:
        return values

    def unpack(self, stored: np.ndarray, count: int) -> np.ndarray:
        return stored[..., :count]

    def tensors(self, name: str, shape: tuple[int, int], rounding: Rounding) -> dict[str, tuple[str, Shape]]:
        return {name: ("F8_E4M3", shape), f"{name}_scale": (SCALE_TYPES[rounding.scale_type], (shape[0], 1))}

    def store(self, name: str, quantized: ScaledFloat, rounding: Rounding) -> dict[str, np.ndarray]:
        return {name: self.pack(quantized.codes), f"{name}_scale": to_16_bit(quantized.scales, rounding.scale_type)}

    def config(self, rounding: Rounding) -> dict:
        return {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}


FORMAT = Fp8(
    name="fp8", kind="fp8", bits=8, has_fixed_group=True, scale_bytes=2, least_capability=89, layout="float-quantized"
)
