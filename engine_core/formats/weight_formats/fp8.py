"""8-bit floats: OCP E4M3 without infinities ("e4m3fn", Micikevicius et al. 2022, arXiv 2209.05433), one scale a row.

``BLOCKS`` is the same with a scale for 128 columns of a row, as an engine holds checkpoints whose blocks of rows and
columns have scales (DeepSeek-V3: arXiv 2412.19437; Qwen3).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from engine_core.formats.number_formats import (
    E4M3,
    FP8_MAX,
    ScaledFloat,
    expand_groups,
    from_16_bit,
    inverse_of,
    to_16_bit,
    to_minifloat,
)
from engine_core.formats.weight_formats.base import (
    SCALE_TYPES,
    QuantizedFormat,
    Rounding,
    Shape,
    WeightFormat,
    grouped,
)


@dataclass(frozen=True)
class Fp8(QuantizedFormat[ScaledFloat]):
    """See the module."""

    @property
    def kernel_defines(self) -> dict[str, int]:
        return {"BITS": 8, "FLOATS": 1, "GROUP_SCALES": int(self.group_size > 0)}

    def in_groups(self, group_size: int, asymmetric: bool = False, half_scales: bool = False) -> WeightFormat:
        return BLOCKS if group_size else FORMAT

    def quantize(self, weights: np.ndarray, rounding: Rounding) -> ScaledFloat:
        """Return the nearest codes. The last group of a row may have fewer columns."""
        columns = weights.shape[1]
        group_size = self.group_size or columns
        scales = np.abs(grouped(weights, group_size)).max(axis=2) / FP8_MAX
        if rounding.scale_type != "fp32":
            scales = from_16_bit(to_16_bit(scales, rounding.scale_type))
        codes = to_minifloat(weights * expand_groups(inverse_of(scales), group_size, columns), E4M3)
        return ScaledFloat(codes, scales, E4M3, group_size)

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
BLOCKS = dataclasses.replace(FORMAT, kind="fp8_blocks", group_size=128)
