"""How many bytes the CPU backend's weights would have: the graph is walked with a writer that only counts.

The dialect that writes an engine is the one that is counted here, so that the two cannot disagree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from engine_core.build.model import ModelSpec
from engine_core.build.onnx_graph import write_decoder
from engine_core.build.onnx_writer import ALIGNMENT, INLINE_BYTES
from engine_core.build.ort_dialect import OrtDialect, Precision
from engine_core.build.rope import RopeSpec
from engine_core.build.shapes import ConfigCheckpoint
from engine_core.build.weights import Weights


class _CountingWriter:
    """Takes ``GraphWriter``'s calls and adds up what it would write to the data file; reads no block."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._seen: set[str] = set()

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        return name

    def node(self, op: str, inputs: Sequence[str], output: str | Sequence[str], domain: str = "", **attributes) -> str:
        return output if isinstance(output, str) else output[0]

    def constant(self, name: str, value: np.ndarray) -> str:
        value = np.asarray(value)
        if name not in self._seen and value.nbytes > INLINE_BYTES:
            return self.stream(name, value.dtype, value.shape, ())
        self._seen.add(name)
        return name

    def stream(self, name: str, dtype: np.dtype, shape: Sequence[int], blocks: Iterable[np.ndarray]) -> str:
        self._seen.add(name)
        self.num_bytes += -self.num_bytes % ALIGNMENT + math.prod(shape) * np.dtype(dtype).itemsize
        return name

    def alias(self, name: str, of: str, shape: Sequence[int]) -> str:
        return name

    def add_to_attribute(self, attribute: str, amount: int) -> bool:
        return False

    def save(self, opsets: dict[str, int], name: str = "") -> None:
        pass


class _ZeroRope(RopeSpec):
    """A table of the same size that is not computed."""

    def table(self, max_context: int) -> tuple[np.ndarray, np.ndarray]:
        zeros = np.broadcast_to(np.float32(0), (max_context, self.dim // 2))
        return zeros, zeros


def data_bytes(
    checkpoint: ConfigCheckpoint, spec: ModelSpec, precision: Precision, max_context: int, head_rows: int
) -> int:
    """Size of model.onnx.data. ``head_rows``: of the LM head, spec.vocab_size without a vocabulary map.

    Raises UnsupportedModelError for what the runtime's operators cannot do.
    """
    ropes = tuple(_ZeroRope(**{f.name: getattr(rope, f.name) for f in dataclasses.fields(rope)}) for rope in spec.ropes)
    kept = None if head_rows == spec.vocab_size else np.arange(head_rows, dtype=np.int32)
    weights = Weights(checkpoint, dataclasses.replace(spec, ropes=ropes), kept)
    writer = _CountingWriter()
    write_decoder(weights.spec, OrtDialect(writer, weights, precision, max_context))
    return writer.num_bytes
