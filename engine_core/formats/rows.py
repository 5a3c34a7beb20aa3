"""Round-to-nearest group-wise quantization of weights to int4 and int8, and the plain dequantization beside it.

Symmetric, one float32 scale for ``group_size`` consecutive weights of a row. The stored form is that of ONNX Runtime's
MatMulNBits and GatherBlockQuantized: unsigned values around 2^(bits-1), two int4 values to a byte, low nibble first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class QuantizedRows:
    """``values``: uint8 [rows, groups, group_size * bits / 8]; ``scales``: float32 [rows, groups]."""

    values: np.ndarray
    scales: np.ndarray
    bits: int
    columns: int  # of the weights; the last group is padded with zeros


def quantize_rows(weights: np.ndarray, bits: int, group_size: int) -> QuantizedRows:
    """``weights``: float32 [rows, columns]. int4 maps the value of largest magnitude to -8: all 16 levels are used."""
    assert bits in (4, 8) and group_size % 16 == 0
    rows, columns = weights.shape
    groups = -(-columns // group_size)
    padded = np.zeros((rows, groups * group_size), dtype=np.float32)
    padded[:, :columns] = weights
    grouped = padded.reshape(rows, groups, group_size)
    if bits == 4:
        peak = np.take_along_axis(grouped, np.abs(grouped).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
        scales = peak / np.float32(-8)
    else:
        scales = np.abs(grouped).max(axis=2) / np.float32(127)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    zero, top = 1 << (bits - 1), (1 << bits) - 1
    levels = np.clip(np.rint(grouped * inverse[:, :, None]) + zero, 0, top).astype(np.uint8)
    if bits == 4:
        levels = levels[:, :, 0::2] | (levels[:, :, 1::2] << 4)
    return QuantizedRows(levels, scales.astype(np.float32), bits, columns)


def dequantize_rows(quantized: QuantizedRows) -> np.ndarray:
    """float32 [rows, columns]: what the stored values stand for."""
    levels = quantized.values
    if quantized.bits == 4:
        low, high = levels & 0x0F, levels >> 4
        levels = np.stack([low, high], axis=-1).reshape(*levels.shape[:2], -1)
    zero = np.float32(1 << (quantized.bits - 1))
    weights = (levels.astype(np.float32) - zero) * quantized.scales[:, :, None]
    return weights.reshape(len(weights), -1)[:, : quantized.columns]
