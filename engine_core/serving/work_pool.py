"""Threads for work that takes long, beside the thread that takes requests."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)
_numbers = itertools.count()


class Work:
    """A call for a ``WorkPool``. The highest ``priority`` is made first, equal ones in the order they were made."""

    def __init__(self, call: Callable[[], None], priority: int = 0) -> None:
        self._call: Callable[[], None] | None = call
        self._order = (-priority, next(_numbers))

    def __lt__(self, other: Work) -> bool:
        return self._order < other._order

    def run(self) -> None:
        """Make the call, and let go of it."""
        call, self._call = self._call, None
        assert call is not None, "it was made before"
        call()


class WorkPool:
    """Runs work in a few threads, so that what takes long does not hold up the rest. Thread-safe."""

    def __init__(self, name: str, num_threads: int = 8) -> None:
        self._waiting: list[Work] = []  # a heap
        self._changed = threading.Condition()
        self._is_closed = False
        # Daemons: a call that hangs in a native library must not keep the process alive.
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-{number}", daemon=True) for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_waiting(self) -> int:
        """Work that waits for a thread."""
        return len(self._waiting)

    def start(self, work: Work) -> None:
        """Have ``work`` done. What it raises is logged: it has to tell its owner itself."""
        with self._changed:
            heapq.heappush(self._waiting, work)
            self._changed.notify()

    def withdraw(self, work: Work) -> bool:
        """Take back ``work`` that waits for a thread; False if it does not."""
        with self._changed:
            if work not in self._waiting:
                return False
            self._waiting.remove(work)
            heapq.heapify(self._waiting)
            return True

    def close(self, timeout: float = 2.0) -> bool:
        """Ends the threads after what has been given to them; False if one still runs after ``timeout`` seconds."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _serve(self) -> None:
        while (work := self._next()) is not None:
            try:
                work.run()
            except BaseException:  # a panic of a native library is no Exception, and ends no thread
                _log.exception("Work in a thread raised")
            del work  # keep nothing alive while waiting

    def _next(self) -> Work | None:
        """Wait for work and return it; None: there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            return heapq.heappop(self._waiting) if self._waiting else None
