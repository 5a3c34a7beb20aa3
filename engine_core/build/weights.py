"""The weights a graph writer asks for, read from the checkpoint a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine_core.build.checkpoint import Checkpoint
from engine_core.build.model import LinearSpec, ModelSpec

_BLOCK_BYTES = 16 << 20  # float32 rows read at a time: bounds the memory of a build, whatever the model's size


class Weights:
    """``vocab_map``: int32 [rows], the full ids an LM head of fewer rows keeps, or None."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, vocab_map: np.ndarray | None = None) -> None:
        self._checkpoint = checkpoint
        self.spec = spec
        self.vocab_map = vocab_map

    def norm(self, name: str) -> np.ndarray:
        """float32 [size], the architecture's offset added."""
        return self._checkpoint.read(name) + np.float32(self.spec.norm_offset)

    def linear_shape(self, linear: LinearSpec) -> tuple[int, int]:
        shapes = [self._checkpoint.shape(part) for part in linear.parts]
        return sum(shape[0] for shape in shapes), shapes[0][1]

    def linear(self, linear: LinearSpec) -> Iterator[np.ndarray]:
        """Blocks of rows, float32 [n, in_features], in order."""
        for part in linear.parts:
            yield from self._rows(part)

    def bias(self, linear: LinearSpec) -> np.ndarray | None:
        """float32 [out_features], or None."""
        if not linear.biases:
            return None
        return np.concatenate([self._checkpoint.read(bias) for bias in linear.biases])

    def embedding(self) -> Iterator[np.ndarray]:
        yield from self._rows(self.spec.embedding)

    @property
    def head_rows(self) -> int:
        return self.spec.vocab_size if self.vocab_map is None else len(self.vocab_map)

    def head(self) -> Iterator[np.ndarray]:
        """Blocks of the LM head's rows, those of ``vocab_map`` only if there is one."""
        if self.vocab_map is None:
            yield from self._rows(self.spec.head)
            return
        step = self._step(self.spec.hidden_size)
        for start in range(0, len(self.vocab_map), step):
            yield self._checkpoint.read(self.spec.head, self.vocab_map[start : start + step])

    def head_bias(self) -> np.ndarray | None:
        if not self.spec.head_bias:
            return None
        bias = self._checkpoint.read(self.spec.head_bias)
        return bias if self.vocab_map is None else bias[self.vocab_map]

    def _rows(self, name: str) -> Iterator[np.ndarray]:
        rows, columns = self._checkpoint.shape(name)
        step = self._step(columns)
        for start in range(0, rows, step):
            yield self._checkpoint.read(name, slice(start, start + step))

    @staticmethod
    def _step(columns: int) -> int:
        return max(1, _BLOCK_BYTES // (4 * columns))
