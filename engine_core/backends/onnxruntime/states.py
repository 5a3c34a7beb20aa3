"""The states that layers keep of each sequence beside KV, and copies of them at earlier positions.

KV can be gone on from at any position; a state holds for one. So the state before the last run is kept, for a step that
the engine has queued too far, and those that ``mark`` was called for, from which other sequences go on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine_core.backends.kv_pool import NUM_MARKS
from engine_core.errors import EngineFaultError
from engine_core.models.spec import StateSpec

COPIES = 2 + NUM_MARKS  # of a slot's state: now, before the last run, and the marks
_UNKNOWN = -1
_BEFORE = 0  # the index of the state before the last run; the marks follow it


def state_bytes(specs: Sequence[StateSpec]) -> int:
    """Return the bytes of the state of one sequence at one position."""
    return sum(4 * int(np.prod(spec.shape)) for spec in specs)


class LayerStates:
    """``now``: name of the graph's input, without "past_" → float32 [slots, …], which a run reads and writes in place.

    Copies have the position that they are of. For one thread, but ``positions``, which may be asked of a slot that
    nothing runs in. Falsy for a model whose layers keep none.
    """

    def __init__(self, specs: Sequence[StateSpec], num_slots: int, num_places: int = 0) -> None:
        """``num_places``: of the pool."""
        self.now = {f"{spec.name}.{spec.layer}": np.zeros((num_slots, *spec.shape), np.float32) for spec in specs}
        self._kept = [np.zeros((num_slots, 1 + NUM_MARKS, *spec.shape), np.float32) for spec in specs]
        self._pool = [np.zeros((num_places, *spec.shape), np.float32) for spec in specs]
        self._at = [0] * num_slots  # positions of ``now``
        self._kept_at = [[_UNKNOWN] * (1 + NUM_MARKS) for _ in range(num_slots)]
        self._next_mark = [0] * num_slots
        for array in (*self._kept, *self._pool):
            array.fill(0)  # takes the pages now

    def __bool__(self) -> bool:
        return bool(self.now)

    def positions(self, slot: int, *, marked: bool = False) -> list[int]:
        """Return the positions above 0 whose states ``slot`` has; ``marked``: those that further runs leave alone."""
        kept = self._kept_at[slot]
        found = kept[_BEFORE + 1 :] if marked else [self._at[slot], *kept]
        return [position for position in found if position > 0]

    def reset(self, slot: int, position: int = 0) -> None:
        """Make the state that of a sequence's start, as if it were that of ``position``; forget the others."""
        for array in self.now.values():
            array[slot] = 0
        self._at[slot] = position
        self._kept_at[slot] = [_UNKNOWN] * (1 + NUM_MARKS)

    def begin(self, slot: int, position: int) -> None:
        """Have the state of ``position``, with which a run begins. Raises EngineFaultError if there is none."""
        if position == 0:
            self.reset(slot)
        kept = self._kept_at[slot]
        if position != self._at[slot]:
            if position not in kept:
                raise EngineFaultError(
                    f"A sequence cannot go on from position {position}: the states of its layers are there for "
                    f"{sorted(self.positions(slot)) or 'none'}."
                )
            self._copy(self._now(slot), self._of(slot, kept.index(position)))
        for index, other in enumerate(kept):  # what is written now makes them those of another text
            kept[index] = other if other <= position else _UNKNOWN
        self._copy(self._of(slot, _BEFORE), self._now(slot))
        kept[_BEFORE] = position
        self._at[slot] = _UNKNOWN  # until the run has ended

    def end(self, slot: int, position: int) -> None:
        """Note that a run has made the state that of ``position``."""
        self._at[slot] = position

    def mark(self, slot: int) -> None:
        """Keep the state that is there now, in place of the oldest mark."""
        kept, position = self._kept_at[slot], self._at[slot]
        if position in kept[_BEFORE + 1 :]:
            return
        free = [index for index in range(_BEFORE + 1, len(kept)) if kept[index] == _UNKNOWN]
        index = free[0] if free else _BEFORE + 1 + self._next_mark[slot]
        self._next_mark[slot] = (index - _BEFORE) % NUM_MARKS
        self._copy(self._of(slot, index), self._now(slot))
        kept[index] = position

    def save(self, slot: int, position: int, place: int) -> None:
        """Copy the state of ``position`` to a place of the pool."""
        is_now = self._at[slot] == position
        source = self._now(slot) if is_now else self._of(slot, self._kept_at[slot].index(position))
        self._copy([array[place] for array in self._pool], source)

    def load(self, slot: int, position: int, place: int) -> None:
        """Make a place of the pool the state of ``position``, and mark it; forget the others of ``slot``."""
        self._copy(self._now(slot), [array[place] for array in self._pool])
        self._at[slot] = position
        self._kept_at[slot] = [_UNKNOWN] * (1 + NUM_MARKS)
        self.mark(slot)

    def _now(self, slot: int) -> list[np.ndarray]:
        return [array[slot] for array in self.now.values()]

    def _of(self, slot: int, index: int) -> list[np.ndarray]:
        return [array[slot, index] for array in self._kept]

    @staticmethod
    def _copy(targets: list[np.ndarray], sources: list[np.ndarray]) -> None:
        for target, source in zip(targets, sources):
            np.copyto(target, source)
