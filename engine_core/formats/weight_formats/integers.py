"""Weights as unsigned integers with a scale, and a zero point if asked for, for each group of columns of a row."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from engine_core.formats.number_formats import (
    QuantizedTensor,
    expand_groups,
    from_16_bit,
    inverse_of,
    pack_int32,
    pack_nibbles,
    to_16_bit,
    unpack_nibbles,
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
class IntegerFormat(QuantizedFormat[QuantizedTensor]):
    """w = (value - zero) * scale; quantized values are 0 to 2^bits - 1, the zero 2^(bits - 1) where it is symmetric."""

    scale_bytes: int = 2
    layout: str = "pack-quantized"
    has_zero_points: bool = False  # whether 'edgellm quantize' writes it asymmetric, too
    asymmetric: bool = False  # whether an engine's groups have zero points
    half_scales: bool = False  # whether an engine in bf16 has scales in fp16
    lowest: int = 0  # the least value that rounding gives where it is symmetric

    @property
    def zero(self) -> int:
        """The quantized value that stands for 0 where it is symmetric."""
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        """The highest quantized value."""
        return (1 << self.bits) - 1

    def in_groups(self, group_size: int, asymmetric: bool = False, half_scales: bool = False) -> IntegerFormat:
        if group_size in (0, self.group_size) and not asymmetric and not half_scales:
            return self
        held = dataclasses.replace(self, asymmetric=asymmetric, half_scales=half_scales)
        return dataclasses.replace(held, group_size=group_size, has_fixed_group=True)

    def scale_type(self, dtype: str) -> str:
        """Return the type of an engine's scales, whose other weights are ``dtype``, fp16 or bf16."""
        return "fp16" if self.half_scales else dtype

    def keeps(self, stored: WeightFormat, group_size: int) -> bool:
        """Return True if values ``stored`` in groups of ``group_size`` columns are this format's as they are."""
        return stored.kind == self.kind and not (self.has_fixed_group and group_size % (self.group_size or group_size))

    # --- rounding -------------------------------------------------------------------------------------

    @abstractmethod
    def symmetric_scales(self, grouped: np.ndarray) -> np.ndarray:
        """Return float32 [rows, groups] for weights [rows, groups, group_size] that nothing is to be clipped of."""

    def quantize(self, weights: np.ndarray, rounding: Rounding) -> QuantizedTensor:
        """Return the nearest values. The last group of a row may have fewer columns. Raises BuildError on overflow."""
        group_size = rounding.group_size or weights.shape[1]
        groups = grouped(weights, group_size)
        zeros = None
        if rounding.symmetric:
            scales = self.symmetric_scales(groups)
        else:
            scales, zeros = self._asymmetric_scales(groups)
        if rounding.ratios is not None:
            scales = scales * rounding.ratios
        if rounding.scale_type != "fp32":
            scales = from_16_bit(to_16_bit(scales, rounding.scale_type))
        return self.round(weights, scales, zeros, group_size)

    def round(
        self, weights: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, group_size: int
    ) -> QuantizedTensor:
        """Return the nearest values for given scales, float32, and zero points, uint8, both [rows, groups]."""
        columns = weights.shape[1]
        middle = np.float32(self.zero) if zeros is None else expand_groups(zeros, group_size, columns)
        values = np.rint(weights * expand_groups(inverse_of(scales), group_size, columns)) + middle
        values = np.clip(values, self.lowest if zeros is None else 0, self.top).astype(np.uint8)
        return QuantizedTensor(values, scales, zeros, self.bits, group_size)

    def _asymmetric_scales(self, grouped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (float32 scales, uint8 zeros) for the range from the smallest to the largest value, 0 in it."""
        low, high = np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)
        scales = ((high - low) / np.float32(self.top)).astype(np.float32)
        return scales, np.clip(np.rint(-low * inverse_of(scales)), 0, self.top).astype(np.uint8)

    # --- storage --------------------------------------------------------------------------------------

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Return uint8 [..., n * bits / 8] of values [..., n]; the first of two in a byte is in its low half."""
        return pack_nibbles(values) if self.bits == 4 else values

    def unpack(self, stored: np.ndarray, count: int) -> np.ndarray:
        return unpack_nibbles(stored, count) if self.bits == 4 else stored[..., :count]

    def tensors(self, name: str, shape: tuple[int, int], rounding: Rounding) -> dict[str, tuple[str, Shape]]:
        rows, columns = shape
        words, groups = 32 // self.bits, self.num_groups(columns, rounding.group_size)
        found: dict[str, tuple[str, Shape]] = {
            f"{name}_packed": ("I32", (rows, -(-columns // words))),
            f"{name}_scale": (SCALE_TYPES[rounding.scale_type], (rows, groups)),
        }
        if not rounding.symmetric:
            found[f"{name}_zero_point"] = ("I32", (-(-rows // words), groups))
        return found | {f"{name}_shape": ("I64", (2,))}

    def store(self, name: str, quantized: QuantizedTensor, rounding: Rounding) -> dict[str, np.ndarray]:
        found = {
            f"{name}_packed": pack_int32(quantized.values, self.bits),
            f"{name}_scale": to_16_bit(quantized.scales, rounding.scale_type),
        }
        if quantized.zeros is not None:
            zeros = pack_int32(np.ascontiguousarray(quantized.zeros.T), self.bits)
            found[f"{name}_zero_point"] = np.ascontiguousarray(zeros.T)
        return found | {f"{name}_shape": np.array(quantized.values.shape, dtype=np.int64)}

    def config(self, rounding: Rounding) -> dict:
        values = {"num_bits": self.bits, "type": "int", "symmetric": rounding.symmetric, "dynamic": False}
        if rounding.group_size:
            return values | {"strategy": "group", "group_size": rounding.group_size}
        return values | {"strategy": "channel"}
