"""Streams weights into an ONNX file in the form of MatMulNBits and GatherBlockQuantized: rounded here, or with the
values, scales and zeros a quantized checkpoint has already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from engine_core.errors import BuildError
from engine_core.formats.number_formats import QuantizedTensor
from engine_core.formats.onnx_writer import GraphWriter
from engine_core.formats.weight_formats.base import Rounding
from engine_core.formats.weight_formats.integers import IntegerFormat
from engine_core.formats.weights import Weights
from engine_core.models.spec import LinearSpec

BLOCK_SIZES = (256, 128, 64, 32, 16)  # what the two operators take
_FLOAT, _BYTES = np.dtype(np.float32), np.dtype(np.uint8)


@dataclass(frozen=True)
class PackedWeight:
    """Names of the graph's tensors: values uint8 [rows, groups, bytes], scales float32 [rows, groups], zeros uint8
    [rows, bytes of all groups] or ""."""

    values: str
    scales: str
    zeros: str
    format: IntegerFormat
    block_size: int


def packed_shape(shape: tuple[int, int], weight_format: IntegerFormat, block_size: int) -> tuple[int, int, int]:
    return shape[0], weight_format.num_groups(shape[1], block_size), block_size * weight_format.bits // 8


def rounded(
    writer: GraphWriter,
    name: str,
    shape: tuple[int, int],
    blocks: Iterator[np.ndarray],
    weight_format: IntegerFormat,
    block_size: int,
    flat: bool = False,
    on_rounded: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> PackedWeight:
    """Round float32 rows to the nearest quantized values.

    ``flat``: values are [rows, groups * bytes], as the lookup has them. ``on_rounded`` gets each block of rows before
    and after it, float32.
    """
    rows, groups, size = packed_shape(shape, weight_format, block_size)
    scales: list[np.ndarray] = []

    def values() -> Iterator[np.ndarray]:
        for block in blocks:
            quantized = weight_format.quantize(block, Rounding(block_size))
            scales.append(quantized.scales)
            if on_rounded is not None:
                on_rounded(block, quantized.dequantize())
            yield weight_format.pack(_padded(quantized, groups * block_size))

    writer.stream(name, _BYTES, (rows, groups * size) if flat else (rows, groups, size), values())
    writer.stream(_scales_name(name), _FLOAT, (rows, groups), scales)
    return PackedWeight(name, _scales_name(name), "", weight_format, block_size)


def own_block_size(weights: Weights, linear: LinearSpec, fallback: int) -> int:
    """Return the size of blocks for ``own_values``. Raises BuildError."""
    layout = weights.integer_layout(linear)
    assert layout is not None
    if layout.group_size >= weights.linear_shape(linear)[1]:
        return fallback
    for block_size in BLOCK_SIZES:
        if layout.group_size % block_size == 0:
            return block_size
    raise BuildError(
        f"{linear.parts[0]} has groups of {layout.group_size} weights, but the CPU's operators take multiples of "
        f"{BLOCK_SIZES[-1]}; build fp32, or int8, which rounds the weights anew."
    )


def own_values(writer: GraphWriter, name: str, weights: Weights, linear: LinearSpec, fallback: int) -> PackedWeight:
    """Write the checkpoint's own values, scales and zeros. ``fallback``: block size where a scale covers a whole row.

    Raises BuildError for groups the operators do not take.
    """
    layout = weights.integer_layout(linear)
    assert layout is not None
    shape = weights.linear_shape(linear)
    block_size = own_block_size(weights, linear, fallback)
    rows, groups, size = packed_shape(shape, layout.format, block_size)
    scales: list[np.ndarray] = []
    zeros: list[np.ndarray] = []

    def values() -> Iterator[np.ndarray]:
        for block in weights.integers(linear, block_size):
            scales.append(block.scales)
            if layout.has_zeros:
                zeros.append(layout.format.pack(_zeros_of(block)))
            yield layout.format.pack(_padded(block, groups * block_size))

    writer.stream(name, _BYTES, (rows, groups, size), values())
    writer.stream(_scales_name(name), _FLOAT, (rows, groups), scales)
    zeros_name = ""
    if layout.has_zeros:
        zeros_name = f"{_stem(name)}.zeros"
        writer.stream(zeros_name, _BYTES, (rows, -(-groups * layout.format.bits // 8)), zeros)
    return PackedWeight(name, _scales_name(name), zeros_name, layout.format, block_size)


def _zeros_of(block: QuantizedTensor) -> np.ndarray:
    middle = np.uint8(1 << (block.bits - 1))
    return np.full(block.scales.shape, middle, np.uint8) if block.zeros is None else block.zeros


def _padded(block: QuantizedTensor, columns: int) -> np.ndarray:
    """Return the quantized values, uint8 [rows, columns]; what is added stands for 0."""
    missing = columns - block.values.shape[1]
    if not missing:
        return block.values
    return np.concatenate([block.values, np.repeat(_zeros_of(block)[:, -1:], missing, axis=1)], axis=1)


def _stem(name: str) -> str:
    return name[: -len(".weight")] if name.endswith(".weight") else name


def _scales_name(name: str) -> str:
    return f"{_stem(name)}.scales"
