"""Count the bytes that the CPU backend's weights would have: a graph is written as for an engine, its data counted.

The exporter that writes an engine is the one that is counted here, so that the two cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from engine_core.backends.onnxruntime.build import has_int8_encoder
from engine_core.backends.onnxruntime.encoder_graph import write_encoder
from engine_core.backends.onnxruntime.exporter import OrtExporter, Packing, Precision
from engine_core.formats.onnx_graph import write_decoder
from engine_core.formats.onnx_writer import GraphWriter
from engine_core.formats.weights import Weights
from engine_core.models.rope import RopeSpec
from engine_core.models.shapes import SpecTensors
from engine_core.models.spec import ModelSpec


class _CountingFile:
    """The data file that is only as long as what would be in it."""

    def __init__(self) -> None:
        self._length = 0

    def tell(self) -> int:
        return self._length

    def write(self, data: bytes | memoryview) -> None:
        self._length += memoryview(data).nbytes

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class _CountingWriter(GraphWriter):
    """Writes nothing, and takes no block: what is left of a tensor is its shape, as zeros nobody touches."""

    def _open_data(self) -> _CountingFile:
        return _CountingFile()

    @property
    def num_bytes(self) -> int:
        return self._data.tell()

    def stream(self, name: str, dtype: np.dtype, shape: Sequence[int], blocks: Iterable[np.ndarray]) -> str:
        return super().stream(name, dtype, shape, [np.zeros(shape, dtype)])

    def save(self, *args, **options) -> None:
        pass


class _ZeroRope(RopeSpec):
    """A table of the same size that is not computed."""

    def table(self, max_context: int) -> tuple[np.ndarray, np.ndarray]:
        shape = (max_context, self.dim // 2)
        table = np.broadcast_to(np.float32(0), shape)  # without memory of its own
        return table, table


def count_encoder(tensors: SpecTensors, spec: ModelSpec, precision: Precision) -> int:
    """Return the size of encoder.onnx.data; 0 for a model without one."""
    if spec.vision is None:
        return 0
    writer = _CountingWriter(Path(), spec.architecture)
    write_encoder(writer, tensors, spec.vision, int8=has_int8_encoder(precision))
    return writer.num_bytes


def count_data(
    tensors: SpecTensors, spec: ModelSpec, precision: Precision, max_context: int, head_rows: int
) -> tuple[int, Packing]:
    """Size of model.onnx.data, and what of it is packed.

    ``head_rows``: of the LM head, spec.vocab_size without a vocabulary map.
    """
    ropes = tuple(_ZeroRope(**{f.name: getattr(rope, f.name) for f in dataclasses.fields(rope)}) for rope in spec.ropes)
    kept = None if head_rows == spec.vocab_size else np.arange(head_rows, dtype=np.int32)
    weights = Weights(tensors, dataclasses.replace(spec, ropes=ropes), kept)
    writer = _CountingWriter(Path(), spec.architecture)
    exporter = OrtExporter(writer, weights, precision, max_context)
    write_decoder(weights.spec, exporter)
    return writer.num_bytes, exporter.packing
