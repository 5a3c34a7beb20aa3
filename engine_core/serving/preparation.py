"""The lines of requests in front of the threads that prepare them: bounded, and the highest priority first."""

from __future__ import annotations

import threading
from collections.abc import Callable

from engine_core.errors import QueueFullError
from engine_core.request import FinishReason
from engine_core.serving.scheduler import Scheduler
from engine_core.serving.work_pool import Work, WorkPool


class Place:
    """A request in a line: it waits for a thread, or is being prepared."""

    def __init__(
        self,
        number: int,
        priority: int,
        num_bytes: int,
        *,
        prepare: Callable[[], None],
        end: Callable[[FinishReason], None],
    ) -> None:
        """``number``: ascends with the arrivals. ``num_bytes``: what the request keeps while it waits.

        ``prepare`` is called in a thread, once, unless the request leaves the line before. ``end`` is told when another
        request takes its place, from any thread.
        """
        self.number, self.priority, self.num_bytes, self.end = number, priority, num_bytes, end
        self.is_waiting = True
        self.is_evicted = False
        self.work: Work
        self._prepare: Callable[[], None] | None = prepare

    def take_prepare(self) -> Callable[[], None]:
        """Return what prepares it, which the place no longer keeps alive."""
        prepare, self._prepare = self._prepare, None
        assert prepare is not None, "it has left the line"
        return prepare

    def let_go(self) -> None:
        """Keep nothing alive of a request that has left the line: it may have hundreds of MiB."""
        self._prepare = None
        del self.work


class PreparationLine:
    """Requests that are prepared in threads of their own. Thread-safe.

    As many may wait there and be prepared as could be added to the scheduler at that moment, each of them alone with
    what is there; those that wait have ``max_bytes`` together at most, or are a single one.
    """

    def __init__(self, name: str, num_threads: int, max_bytes: int) -> None:
        self.pool = WorkPool(name, num_threads)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._places: list[Place] = []

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_bytes(self) -> int:
        """Bytes of those that wait for a thread."""
        return sum(place.num_bytes for place in self._places if place.is_waiting)

    def enter(self, place: Place, scheduler: Scheduler) -> None:
        """Have the request prepared as soon as a thread is free. Raises QueueFullError if the line is full.

        With a busy policy of preempting, waiting requests that the new one may end make room for it, the lowest
        priority first.
        """
        room, limit = scheduler.room(place.priority), scheduler.preempts_up_to(place.priority)
        with self._lock:
            preempted: list[Place] = []
            lower = [other for other in self._places if other.is_waiting and other.priority <= limit]
            for other in sorted(lower, key=lambda other: (other.priority, other.number)):
                if self._has_room(place, room, limit):
                    break
                if self.pool.withdraw(other.work):
                    self._places.remove(other)
                    preempted.append(other)
            if not self._has_room(place, room, limit):
                for other in preempted:  # for nothing
                    self._places.append(other)
                    self.pool.start(other.work)
                raise self._full(scheduler)
            place.work = Work(lambda: self._serve(place), place.priority)
            self._places.append(place)
            self.pool.start(place.work)
            for other in preempted:
                other.is_evicted = True
                other.let_go()
        for other in preempted:
            other.end(FinishReason.PREEMPTED)

    def leave(self, place: Place) -> bool:
        """Take a request out of the line. False if ``prepare`` has been called, or it has left already."""
        with self._lock:
            if place in self._places:
                if not self.pool.withdraw(place.work):
                    return False
                self._places.remove(place)
                place.let_go()
                return True
            was_evicted, place.is_evicted = place.is_evicted, False
            return was_evicted

    def end_older(self, number: int, limit: int) -> None:
        """End every request that came before the one with this number and has a priority of ``limit`` or less."""
        with self._lock:
            older = [place for place in self._places if place.number < number and place.priority <= limit]
        for place in older:
            place.end(FinishReason.PREEMPTED)

    def close(self) -> bool:
        """Ends the threads; False if one still runs."""
        return self.pool.close()

    def _has_room(self, place: Place, room: int, limit: int) -> bool:
        """``limit``: the highest priority that ``place`` may end, as it will what is being prepared now."""
        counted = sum(other.is_waiting or other.priority > limit for other in self._places)
        num_bytes = self.num_bytes
        return counted < room and (not num_bytes or num_bytes + place.num_bytes <= self._max_bytes)

    def _full(self, scheduler: Scheduler) -> QueueFullError:
        return QueueFullError(
            f"{len(self._places)} requests are being prepared or wait for it with {self.num_bytes} bytes, and no more "
            f"are taken with {scheduler.policy} and at most {self._max_bytes} bytes that wait; try again later."
        )

    def _serve(self, place: Place) -> None:
        with self._lock:
            place.is_waiting = False
        try:
            place.take_prepare()()
        finally:
            with self._lock:
                self._places.remove(place)
