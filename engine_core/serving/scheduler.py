"""The choice of the sequences that run: a bounded queue by priority in front of the slots of the KV cache."""

from __future__ import annotations

import heapq
import itertools
import threading
import time

from engine_core.config import BUSY_POLICIES
from engine_core.errors import ConfigurationError, QueueFullError
from engine_core.serving.sequence import Sequence


class Scheduler:
    """The sequences that wait and those that run. Thread-safe.

    The highest priority takes a free slot first, equal ones in order of arrival. ``changed`` guards everything and is
    notified when a sequence is added; whoever has to do several things at once may hold it.

    ``busy_policy`` is for a request that comes while all slots are taken: ``queue`` lets up to ``queue_depth`` requests
    wait; ``reject`` refuses it; ``preempt`` ends what waits and what is in its way, of no higher priority than its own;
    ``preempt_lower`` the same of a lower priority only.
    """

    def __init__(self, num_slots: int, *, queue_depth: int = 8, busy_policy: str = "queue") -> None:
        """Raises ConfigurationError."""
        self.num_slots = num_slots
        self.changed = threading.Condition()
        self._waiting: list[tuple[int, int, Sequence]] = []  # a heap of (-priority, number, sequence)
        self._running: list[Sequence] = []
        self._numbers = itertools.count()
        self._queue_depth = 0
        self._busy_policy = ""
        self.update(queue_depth=queue_depth, busy_policy=busy_policy)

    def update(self, *, queue_depth: int | None = None, busy_policy: str | None = None) -> None:
        """Takes new settings for the requests to come. Raises ConfigurationError."""
        if busy_policy is not None and busy_policy not in BUSY_POLICIES:
            raise ConfigurationError(f"busy_policy is {busy_policy!r}, expected one of {', '.join(BUSY_POLICIES)}.")
        if queue_depth is not None and queue_depth < 0:
            raise ConfigurationError(f"queue_depth is {queue_depth}, expected 0 or more.")
        with self.changed:
            self._queue_depth = self._queue_depth if queue_depth is None else queue_depth
            self._busy_policy = self._busy_policy if busy_policy is None else busy_policy

    @property
    def running(self) -> list[Sequence]:
        """Those that hold a slot, a copy."""
        return self._running.copy()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def has_free_slot(self) -> bool:
        return len(self._running) < self.num_slots

    @property
    def is_full(self) -> bool:
        """Every slot is taken, or will be by those that wait."""
        return len(self._waiting) + len(self._running) >= self.num_slots

    @property
    def free_slots(self) -> list[int]:
        taken = {sequence.slot for sequence in self.running}
        return [slot for slot in range(self.num_slots) if slot not in taken]

    @property
    def sequences(self) -> list[Sequence]:
        """Those that hold a slot, then those that wait, the next one first."""
        running, waiting = self.running_and_waiting
        return [*running, *waiting]

    @property
    def running_and_waiting(self) -> tuple[list[Sequence], list[Sequence]]:
        """Those that hold a slot and those that wait at the same moment, the next one first."""
        with self.changed:
            waiting = [entry[2] for entry in sorted(self._waiting, key=lambda entry: entry[:2])]
            return list(self._running), waiting

    @property
    def longest_wait(self) -> float:
        """Seconds that the oldest waiting request has waited; 0 if none waits."""
        with self.changed:
            return max((time.monotonic() - sequence.arrival for _, _, sequence in self._waiting), default=0.0)

    @property
    def policy(self) -> str:
        """The settings that decide what may wait, for people."""
        return f"busy_policy {self._busy_policy} and queue_depth {self._queue_depth}"

    def preempts_up_to(self, priority: int) -> int:
        """Return the highest priority of what a request of ``priority`` may end; -1: it may end nothing."""
        return {"preempt": priority, "preempt_lower": priority - 1}.get(self._busy_policy, -1)

    def room(self, priority: int) -> int:
        """Return how many requests of ``priority`` could be added now, by the busy policy."""
        with self.changed:
            limit = self.preempts_up_to(priority)
            others = [entry[2] for entry in self._waiting] + self._running
            if limit >= 0:
                others = [other for other in others if other.priority > limit and other.cancel.reason is None]
            depth = 0 if self._busy_policy == "reject" else self._queue_depth
            return max(0, self.num_slots + depth - len(others))

    def admit(self, priority: int) -> list[Sequence]:
        """Decide by the busy policy whether a request of ``priority`` may be added; return those that make room.

        Raises QueueFullError.
        """
        with self.changed:
            others = [entry[2] for entry in self._waiting] + self._running
            if len(others) >= self.num_slots and self._busy_policy == "reject":
                raise QueueFullError("A request is running and busy_policy is reject; try again when it is done.")
            preempted = []
            if len(others) >= self.num_slots and self._busy_policy in ("preempt", "preempt_lower"):
                limit = self.preempts_up_to(priority)
                others = [other for other in others if other.cancel.reason is None]  # the rest leaves already
                preempted = [other for other in others if other.slot is None and other.priority <= limit]
                running = [other for other in others if other.slot is not None and other.priority <= limit]
                num_in_the_way = len(others) - len(preempted) + 1 - self.num_slots
                preempted += sorted(running, key=lambda s: s.priority)[: max(0, num_in_the_way)]
            num_queued = len(others) - len(preempted) + 1 - self.num_slots
            if num_queued > self._queue_depth:
                raise QueueFullError(
                    f"{num_queued - 1} requests are waiting and queue_depth is {self._queue_depth}; try again later."
                )
            return preempted

    def add(self, sequence: Sequence) -> None:
        with self.changed:
            heapq.heappush(self._waiting, (-sequence.priority, next(self._numbers), sequence))
            self.changed.notify_all()

    def start_next(self) -> Sequence | None:
        """Return the waiting sequence that runs from now on; None if none waits or no slot is free."""
        if not self._waiting:
            return None
        with self.changed:
            if not self._waiting or not self.has_free_slot:
                return None
            sequence = heapq.heappop(self._waiting)[2]
            self._running.append(sequence)
            return sequence

    def withdraw(self, sequence: Sequence) -> bool:
        """Take ``sequence`` out of the queue; False if it does not wait."""
        with self.changed:
            for entry in self._waiting:
                if entry[2] is sequence:
                    self._waiting.remove(entry)
                    heapq.heapify(self._waiting)
                    return True
            return False

    def remove(self, sequence: Sequence) -> None:
        """Free the slot of a running ``sequence``."""
        with self.changed:
            self._running.remove(sequence)

    def clear_waiting(self) -> list[Sequence]:
        """Take all out of the queue and return them in order."""
        with self.changed:
            waiting, self._waiting = self._waiting, []
        return [entry[2] for entry in sorted(waiting, key=lambda entry: entry[:2])]
