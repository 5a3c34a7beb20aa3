"""The rings of short convolutions: where each slot can go on from, and copies of the rings at earlier positions.

A ring has the inputs of the last tokens, by their positions (``short_conv.cu``), one more than the next token sees. So
a sequence goes on from where its last step ended, or from a token before. Further back it goes on from a mark, which
is a copy of its ring, or from a place of the pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine_core.backends.kv_pool import NUM_MARKS
from engine_core.errors import EngineFaultError

_BACK = 1  # tokens that a ring can go back by
Place = tuple[Any, ...]  # the name of an array, and indices in it


@dataclass
class _Slot:
    """``first`` to ``last``: the positions that its ring can go on from; ``marks``: those of its marks, 0 = none."""

    first: int = 0
    last: int = 0
    marks: list[int] = field(default_factory=lambda: [0] * NUM_MARKS)
    next_mark: int = 0


class RingStates:
    """Where the slots can go on from. It queues copies in the order of the steps that the caller queues.

    ``copy(target, source)`` queues the copy of the rings of all layers; either is the name of an array and indices in
    it: ("states", slot), ("state_marks", slot, mark) or ("state_pool", place).
    """

    def __init__(self, num_slots: int, copy: Callable[[Place, Place], None]) -> None:
        self._slots = [_Slot() for _ in range(num_slots)]
        self._copy = copy

    def positions(self, slot: int, *, marked: bool = False) -> list[int]:
        """Return the positions above 0 that ``slot`` can go on from; ``marked``: of those the marks."""
        known = self._slots[slot]
        own = () if marked else range(known.first, known.last + 1)
        return [position for position in (*own, *known.marks) if position > 0]

    def begin(self, slot: int, position: int) -> None:
        """Have the ring of ``position``, with which a step begins. Raises EngineFaultError if there is none."""
        known = self._slots[slot]
        if position == 0:
            known.first = 0
        elif not known.first <= position <= known.last:
            if position not in known.marks:
                raise EngineFaultError(
                    f"A sequence cannot go on from position {position}: the states of its layers are there for "
                    f"{sorted(set(self.positions(slot))) or 'none'}."
                )
            self._copy(("states", slot), ("state_marks", slot, known.marks.index(position)))
            known.first = position
        known.last = position
        # What is written now makes marks behind it those of another text.
        known.marks = [mark if mark <= position else 0 for mark in known.marks]

    def end(self, slot: int, position: int) -> None:
        """Note that a step has made the ring that of ``position``."""
        known = self._slots[slot]
        known.first, known.last = max(known.first, position - _BACK), position

    def is_at(self, slot: int, position: int) -> bool:
        """Return whether the last step of ``slot`` ended at ``position``."""
        return self._slots[slot].last == position

    def mark(self, slot: int) -> None:
        """Keep the ring that is there now, in place of the oldest mark."""
        known = self._slots[slot]
        if known.last in known.marks:
            return
        index = known.marks.index(0) if 0 in known.marks else known.next_mark
        known.next_mark = (index + 1) % NUM_MARKS
        self._copy(("state_marks", slot, index), ("states", slot))
        known.marks[index] = known.last

    def save(self, slot: int, position: int, place: int) -> None:
        """Copy the ring of one of ``positions`` to a place of the pool."""
        known = self._slots[slot]
        is_there = known.first <= position <= known.last
        source = ("states", slot) if is_there else ("state_marks", slot, known.marks.index(position))
        self._copy(("state_pool", place), source)

    def load(self, slot: int, position: int, place: int) -> None:
        """Make a place of the pool the ring of ``position``, and mark it; forget the others of ``slot``."""
        self._copy(("states", slot), ("state_pool", place))
        self._slots[slot] = _Slot(position, position)
        self.mark(slot)
