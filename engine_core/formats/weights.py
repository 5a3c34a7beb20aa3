"""The weights a graph writer asks for, read from the checkpoint a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine_core.formats.number_formats import QuantizedTensor
from engine_core.formats.quantized_layouts import Rows, Stored
from engine_core.formats.weight_formats.integers import IntegerFormat
from engine_core.models.spec import LinearSpec, ModelSpec

_BLOCK_BYTES = 16 << 20  # float32 rows read at a time: bounds the memory of a build, whatever the model's size


class Tensors(Protocol):
    """The part of ``Checkpoint`` that ``Weights`` reads."""

    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, rows: Rows = ...) -> np.ndarray: ...
    def is_rounded(self, name: str) -> bool: ...
    def stored(self, name: str) -> Stored | None: ...
    def quantized(self, name: str, rows: Rows = ...) -> QuantizedTensor | None: ...


@dataclass(frozen=True)
class IntegerLayout:
    """The layout that the integers of all parts of a linear have in common."""

    format: IntegerFormat  # int4 or int8
    group_size: int  # columns that share a scale; the part with the smallest groups decides
    has_zeros: bool


class Weights:
    """``vocab_map``: int32 [rows], the full ids an LM head of fewer rows keeps, or None."""

    def __init__(self, checkpoint: Tensors, spec: ModelSpec, vocab_map: np.ndarray | None = None) -> None:
        self._checkpoint = checkpoint
        self.spec = spec
        self.vocab_map = vocab_map

    def norm(self, name: str, *, with_offset: bool = True) -> np.ndarray:
        """Return float32 [size], the architecture's offset added unless ``with_offset`` is False."""
        return self._checkpoint.read(name) + np.float32(self.spec.norm_offset if with_offset else 0)

    def matrix(self, name: str) -> np.ndarray:
        """Return float32 [rows, columns] of one tensor as a whole, such as a router."""
        return self._checkpoint.read(name)

    def linear_shape(self, linear: LinearSpec) -> tuple[int, int]:
        shapes = [self._checkpoint.shape(part) for part in linear.parts]
        return sum(shape[0] for shape in shapes), shapes[0][1]

    def linear(self, linear: LinearSpec) -> Iterator[np.ndarray]:
        """Blocks of rows, float32 [n, in_features], in order."""
        for part in linear.parts:
            yield from self._rows(part)

    def paired(self, linear: LinearSpec) -> Iterator[np.ndarray]:
        """Blocks of rows of the first half and of the second in turn: of gate and up, float32 [2 n, in_features]."""
        rows, columns = self.linear_shape(linear)
        half, step = rows // 2, max(1, self._step(columns) // 2)
        if len(linear.parts) == 1:
            places: tuple[tuple[str, int], ...] = ((linear.parts[0], 0), (linear.parts[0], half))
        else:
            places = tuple((part, 0) for part in linear.parts)
        for start in range(0, half, step):
            stop = min(half, start + step)
            both = [self._checkpoint.read(part, slice(first + start, first + stop)) for part, first in places]
            yield np.stack(both, axis=1).reshape(-1, columns)

    def integer_layout(self, linear: LinearSpec) -> IntegerLayout | None:
        """Return the layout of the parts; None unless every part is stored in integers of the same width, in groups of
        consecutive columns."""
        parts = [self._checkpoint.stored(part) for part in linear.parts]
        found = [part for part in parts if part is not None and part.order is None]
        if len(found) < len(parts):
            return None
        stored = found[0].format
        if not isinstance(stored, IntegerFormat) or any(part.format != stored for part in found):
            return None
        group_size = math.gcd(*(part.group_size for part in found))
        return IntegerLayout(stored, group_size, any(part.has_zeros for part in found))

    def is_rounded(self, name: str) -> bool:
        """Return True for a tensor that is stored quantized, in whatever format."""
        return self._checkpoint.is_rounded(name)

    def integers(self, linear: LinearSpec, group_size: int) -> Iterator[QuantizedTensor]:
        """Blocks of rows in order, as the checkpoint has them, in groups of ``group_size``; see ``integer_layout``."""
        for part in linear.parts:
            rows, columns = self._checkpoint.shape(part)
            step = self._step(columns)
            for start in range(0, rows, step):
                block = self._checkpoint.quantized(part, slice(start, start + step))
                assert block is not None, f"{part} is not stored in integers"
                yield block.regrouped(group_size)

    def bias(self, linear: LinearSpec) -> np.ndarray | None:
        """Return float32 [out_features], or None."""
        if not linear.biases:
            return None
        return np.concatenate([self._checkpoint.read(bias) for bias in linear.biases])

    def embedding(self) -> Iterator[np.ndarray]:
        """Yield blocks of the embedding's rows, float32 [n, hidden_size]. Raises CheckpointError."""
        yield from self._rows(self.spec.embedding)

    @property
    def head_rows(self) -> int:
        return self.spec.vocab_size if self.vocab_map is None else len(self.vocab_map)

    def head(self) -> Iterator[np.ndarray]:
        """Yield blocks of the LM head's rows, float32 [n, hidden_size]; only those of a ``vocab_map``."""
        if self.vocab_map is None:
            yield from self._rows(self.spec.head)
            return
        step = self._step(self.spec.hidden_size)
        for start in range(0, len(self.vocab_map), step):
            yield self._checkpoint.read(self.spec.head, self.vocab_map[start : start + step])

    def _rows(self, name: str) -> Iterator[np.ndarray]:
        rows, columns = self._checkpoint.shape(name)
        step = self._step(columns)
        for start in range(0, rows, step):
            yield self._checkpoint.read(name, slice(start, start + step))

    @staticmethod
    def _step(columns: int) -> int:
        return max(1, _BLOCK_BYTES // (4 * columns))
