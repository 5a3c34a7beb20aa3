"""The choice of the tokens that a reduced vocabulary keeps: the methods ``frequency`` and ``input_aware``.

``frequency`` keeps what is required, then what the texts have most. ``input_aware`` follows "vocabulary tailoring" of
arXiv 2508.15229: most of the room goes to tokens of the answers, those that also occur in the input first, and the rest
to neighbours of those ids: merges made one after the other are variants of one word or of one domain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

METHODS = ("frequency", "input_aware")
_CORE_SHARE = 0.9  # of the size, for required and ranked tokens; the rest is for neighbours
_TOLERANCE = 5  # ids to either side
FILLED = "lowest ids"  # of a byte-pair tokenizer: its earliest, so commonest, merges


class Selection:
    """A growing set of kept ids with the reason of each. ``allowed``: bool [vocab_size], ids the tokenizer has."""

    def __init__(self, required: dict[str, frozenset[int]], allowed: np.ndarray) -> None:
        self._allowed = allowed
        self.reasons: dict[str, int] = {}
        self._kept = np.zeros(len(allowed), dtype=bool)
        self._count = 0
        for reason, ids in required.items():
            for index in ids:
                self._kept[index] = True
            self.reasons[reason] = len(ids)
            self._count += len(ids)

    def __len__(self) -> int:
        return self._count

    @property
    def ids(self) -> np.ndarray:
        """int32 [n], ascending."""
        return np.flatnonzero(self._kept).astype(np.int32)

    def add(self, candidates: Iterable[int], size: int, reason: str) -> list[int]:
        """Keeps candidates in their order until there are ``size``; returns those that are new."""
        new: list[int] = []
        for index in candidates:
            if self._count >= size:
                break
            if 0 <= index < len(self._kept) and self._allowed[index] and not self._kept[index]:
                self._kept[index] = True
                self._count += 1
                new.append(int(index))
        if new:
            self.reasons[reason] = self.reasons.get(reason, 0) + len(new)
        return new


@dataclass(frozen=True)
class Chooser:
    """Chooses tokens. ``allowed``: bool [vocab_size], ids the tokenizer has; ``outputs`` and ``inputs``:
    int64 [vocab_size], how often each id is written and read."""

    method: str
    required: dict[str, frozenset[int]]
    allowed: np.ndarray
    outputs: np.ndarray
    inputs: np.ndarray

    @property
    def num_required(self) -> int:
        return sum(len(ids) for ids in self.required.values())

    @property
    def most(self) -> int:
        return max(self.num_required, int(np.count_nonzero(self.allowed)))

    def select(self, size: int) -> Selection:
        """Exactly ``size`` ids, for a size from ``num_required`` to ``most``."""
        selection = Selection(self.required, self.allowed)
        if self.method == "input_aware":
            self._input_aware(selection, size)
        selection.add(_ranked(self.outputs), size, "in answers")
        selection.add(_ranked(self.inputs), size, "in inputs")
        selection.add(range(len(self.allowed)), size, FILLED)
        return selection

    def _input_aware(self, selection: Selection, size: int) -> None:
        budget, seen = int(_CORE_SHARE * size), self.inputs > 0
        core = selection.add(_ranked(np.where(seen, self.outputs, 0)), budget, "in answers and inputs")
        core += selection.add(_ranked(np.where(seen, 0, self.outputs)), budget, "in answers")
        core += selection.add(_ranked(self.inputs), budget, "in inputs")
        selection.add(_neighbours(core), size, "neighbours")

    def smallest_size(self, share: float) -> int:
        """Return the least size whose tokens make up ``share``, 0 to 1, of what is written."""
        low, high = self.num_required, self.most
        wanted = share * int(self.outputs.sum()) * (1 - 1e-12)
        while low < high:
            middle = (low + high) // 2
            if int(self.outputs[self.select(middle).ids].sum()) >= wanted:
                high = middle
            else:
                low = middle + 1
        return low


def _ranked(counts: np.ndarray) -> np.ndarray:
    """Return the ids that occur, the most frequent first; equally frequent ones by id."""
    order = np.argsort(-counts, kind="stable")
    return order[: int(np.count_nonzero(counts))]


def _neighbours(core: list[int]) -> Iterator[int]:
    """Nearest first for each core id, the core in its order."""
    for index in core:
        for distance in range(1, _TOLERANCE + 1):
            yield index - distance
            yield index + distance
