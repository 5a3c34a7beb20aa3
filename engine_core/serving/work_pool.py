"""Threads for work that takes long, beside the thread that takes requests."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)


class WorkPool:
    """Runs callables in a few threads, so that one that takes long does not hold up the others."""

    def __init__(self, name: str, num_threads: int = 8) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Daemons: a call that hangs in a native library must not keep the process alive.
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-{number}", daemon=True) for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, call: Callable[[], None]) -> None:
        """Have ``call`` run. From any thread. What it raises is logged: it has to tell its owner itself."""
        self._calls.put(call)

    def close(self, timeout: float = 2.0) -> bool:
        """Ends the threads after what has been given to them; False if one still runs after ``timeout`` seconds."""
        for _ in self._threads:
            self._calls.put(None)
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except BaseException:  # a panic of a native library is no Exception, and ends no thread
                _log.exception("Work in a thread raised")
            del call  # keep nothing alive while waiting
