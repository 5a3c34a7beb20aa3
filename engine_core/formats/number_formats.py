"""The numbers that quantized weights are made of, in plain numpy: 16-bit and smaller floats, packed integers, and the
dequantization that every fused path is compared with.

Which formats there are, and how weights are rounded to them, is in ``weight_formats``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from engine_core.errors import BuildError

FP16_MAX, FP8_MAX, FP4_MAX = np.float32(65504), np.float32(448), np.float32(6)


def _minifloats(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """float32 [2^bits]: the value of each code of a sign, exponent and mantissa without infinities."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = codes & ((1 << mantissa_bits) - 1)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
    values = np.ldexp(fraction, np.maximum(exponent, 1) - bias)
    return np.where(codes >> (exponent_bits + mantissa_bits), -values, values).astype(np.float32)


E4M3 = _minifloats(4, 3)
E4M3[[0x7F, 0xFF]] = np.nan
E2M1 = _minifloats(2, 1)


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [rows, columns] in integers; ``dequantize`` says what they stand for.

    ``values``: uint8 [rows, columns] below 2^bits. ``scales``: float32 [rows, groups]. ``zeros``: uint8 [rows, groups],
    or None: 2^(bits-1) everywhere. A group is ``group_size`` consecutive columns, the last one what is left.
    """

    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    bits: int
    group_size: int

    def dequantize(self) -> np.ndarray:
        """Return float32 [rows, columns]."""
        columns = self.values.shape[1]
        zeros = np.float32(1 << (self.bits - 1))
        if self.zeros is not None:
            zeros = expand_groups(self.zeros, self.group_size, columns).astype(np.float32)
        return (self.values.astype(np.float32) - zeros) * expand_groups(self.scales, self.group_size, columns)

    def regrouped(self, group_size: int) -> QuantizedTensor:
        """Return these weights with smaller groups, each with its old group's scale and zero."""
        if group_size == self.group_size:
            return self
        columns = self.values.shape[1]
        assert self.group_size % group_size == 0 or self.group_size >= columns
        old = np.arange(0, columns, group_size) // self.group_size
        zeros = None if self.zeros is None else self.zeros[:, old]
        return QuantizedTensor(self.values, self.scales[:, old], zeros, self.bits, group_size)


@dataclass(frozen=True)
class ScaledFloat:
    """A weight [rows, columns] in small floats: w = value of its code * scale of its block of a row.

    ``codes``: uint8 [rows, columns], indices of ``table``, which is E4M3 or E2M1. ``scales``: float32 [rows, blocks],
    for nvfp4 the products of ``block_scales`` (E4M3 codes, uint8 [rows, blocks]) and ``global_scale``, one number or
    [rows, 1], which fp8 lacks.
    """

    codes: np.ndarray
    scales: np.ndarray
    table: np.ndarray
    block_size: int  # columns that share a scale
    block_scales: np.ndarray | None = None
    global_scale: np.float32 | np.ndarray = np.float32(1)

    def dequantize(self) -> np.ndarray:
        """Return float32 [rows, columns]."""
        return self.table[self.codes] * expand_groups(self.scales, self.block_size, self.codes.shape[1])


def expand_groups(per_group: np.ndarray, group_size: int, columns: int) -> np.ndarray:
    """Expand [rows, groups] → [rows, columns], or [rows, 1] if one group covers all."""
    if per_group.shape[1] == 1:
        return per_group
    return np.repeat(per_group, group_size, axis=1)[:, :columns]


def inverse_of(scales: np.ndarray) -> np.ndarray:
    """Return 1 / scales in the same type, 0 where a scale is 0."""
    return np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)


# --- rounding ---------------------------------------------------------------------------------------


def to_16_bit(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 as fp16, or as bf16 carried as uint16, rounded to nearest even. Raises BuildError on overflow."""
    if dtype == "bf16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        result = values.astype(np.float16)
    if np.isinf(result).any():
        raise BuildError("A weight is too large for fp16; build with the type bf16.")
    return result


def from_16_bit(values: np.ndarray) -> np.ndarray:
    """fp16, or bf16 carried as uint16, as float32."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def to_minifloat(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return codes (uint8) of the nearest values of ``table`` (E4M3 or E2M1), ties to even; saturating.

    ``values``: float32, of any shape. A NaN becomes the largest value.
    """
    codes_of = _minifloat_codes(len(table))
    halves = np.ascontiguousarray(values, dtype="<f4").reshape(-1, 1).view("<u2")
    codes = np.empty(len(halves), dtype=np.uint8)
    for start in range(0, len(codes), _BLOCK):
        low, high = halves[start : start + _BLOCK].T
        codes[start : start + _BLOCK] = codes_of[high | (low != 0)]
    return codes.reshape(np.shape(values))


_BLOCK = 1 << 16  # values at a time, so that what lies between stays in the cache


@functools.cache
def _minifloat_codes(size: int) -> np.ndarray:
    """uint8 [65536]: codes in the table of ``size`` values, by the upper 16 bits of a float32, whose last one is set if
    any bit below is.

    That one is far below those that a code keeps, so it says all that rounding asks: whether something is left over.
    """
    table = {len(each): each for each in (E4M3, E2M1)}[size]
    half = size // 2
    positive = table[:half]
    positive = positive[~np.isnan(positive)].astype(np.float64)  # in which the middles are exact
    middles = (positive[1:] + positive[:-1]) / 2
    values = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)).view(np.float32)
    magnitude = np.where(np.isnan(values), np.inf, np.abs(values))
    codes = np.searchsorted(middles, magnitude)
    is_tie = np.append(middles, np.nan)[codes] == magnitude
    codes += is_tie & (codes & 1 == 1)
    return (codes | np.where(np.signbit(values), half, 0)).astype(np.uint8)


# --- packing ----------------------------------------------------------------------------------------


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """Pack uint8 [..., n] below 16 → uint8 [..., ceil(n / 2)], two to a byte, the first in the low nibble."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return values[..., 0::2] | (values[..., 1::2] << 4)


def unpack_nibbles(packed: np.ndarray, count: int) -> np.ndarray:
    """Return the inverse of ``pack_nibbles``: uint8 [..., count]."""
    values = np.stack([packed & 15, packed >> 4], axis=-1)
    return values.reshape(*packed.shape[:-1], -1)[..., :count]


def pack_int32(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 [rows, columns] → int32 [rows, ceil(columns * bits / 32)], 4 or 8 bits, the first in the lowest
    bits."""
    rows, columns = values.shape
    padded = np.zeros((rows, -(-columns * bits // 32) * 32 // bits), dtype=np.uint8)
    padded[:, :columns] = values
    return np.ascontiguousarray(pack_nibbles(padded) if bits == 4 else padded).view("<i4")


def unpack_int32(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Return uint8 [rows, columns], the inverse of ``pack_int32``."""
    values = np.ascontiguousarray(packed, dtype="<i4").view(np.uint8)
    return unpack_nibbles(values, columns) if bits == 4 else values[:, :columns]
