"""4-bit floats in NVIDIA's two-level form: E2M1 in blocks of 16 columns that share an E4M3 scale, times one float32
scale of the tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine_core.formats.number_formats import (
    E2M1,
    E4M3,
    FP4_MAX,
    FP8_MAX,
    ScaledFloat,
    expand_groups,
    inverse_of,
    pack_nibbles,
    to_minifloat,
    unpack_nibbles,
)
from engine_core.formats.weight_formats.base import QuantizedFormat, Rounding, Shape, grouped


@dataclass(frozen=True)
class Nvfp4(QuantizedFormat[ScaledFloat]):
    """See the module."""

    @property
    def kernel_defines(self) -> dict[str, int]:
        return {"BITS": 4, "FLOATS": 1}

    def quantize(self, weights: np.ndarray, rounding: Rounding) -> ScaledFloat:
        """Return the nearest codes. The last block of a row may have fewer columns."""
        columns = weights.shape[1]
        peak = np.abs(weights).max() if rounding.peak is None else rounding.peak
        global_scale = self.global_scale(peak)
        peaks = np.abs(grouped(weights, self.group_size)).max(axis=2)
        block_scales = to_minifloat(peaks / FP4_MAX / global_scale, E4M3)
        scales = E4M3[block_scales] * global_scale
        codes = to_minifloat(weights * expand_groups(inverse_of(scales), self.group_size, columns), E2M1)
        return ScaledFloat(codes, scales, E2M1, self.group_size, block_scales, global_scale)

    def global_scale(self, peak: float | np.ndarray) -> np.float32 | np.ndarray:
        """Return the scale, float32, for a largest magnitude of ``peak``: block scales then reach up to 448."""
        peaks = np.asarray(peak, dtype=np.float32)
        return np.where(peaks > 0, peaks / (FP8_MAX * FP4_MAX), np.float32(1))[()]

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Return uint8 [..., n / 2] of codes [..., n]; the first of two in a byte is in its low half."""
        return pack_nibbles(values)

    def unpack(self, stored: np.ndarray, count: int) -> np.ndarray:
        return unpack_nibbles(stored, count)

    def tensors(self, name: str, shape: tuple[int, int], rounding: Rounding) -> dict[str, tuple[str, Shape]]:
        rows, columns = shape
        return {
            f"{name}_packed": ("U8", (rows, columns // 2)),
            f"{name}_scale": ("F8_E4M3", (rows, columns // self.group_size)),
            f"{name}_global_scale": ("F32", (1,)),
        }

    def store(self, name: str, quantized: ScaledFloat, rounding: Rounding) -> dict[str, np.ndarray]:
        return {
            f"{name}_packed": self.pack(quantized.codes),
            f"{name}_scale": quantized.block_scales,
            # compressed-tensors keeps the factor that weights were multiplied by.
            f"{name}_global_scale": np.array([1 / quantized.global_scale], dtype=np.float32),
        }

    def config(self, rounding: Rounding) -> dict:
        return {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "dynamic": False,
            "strategy": "tensor_group",
            "group_size": self.group_size,
            "scale_dtype": "torch.float8_e4m3fn",
        }


FORMAT = Nvfp4(
    name="nvfp4",
    kind="nvfp4",
    bits=4,
    group_size=16,
    has_fixed_group=True,
    scale_bytes=1,
    least_capability=100,
    layout="nvfp4-pack-quantized",
)
