"""Work beside the executor's thread, awaited by its coroutines.

rclpy resumes waiting coroutines on each pass of the executor, and an idle executor makes no pass: whoever completes
a future from another thread has to wake it. A coroutine that waits costs the executor one look per pass; it blocks
no thread, so any number of clients can wait.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from rclpy.node import Node
from rclpy.task import Future


def new_future(node: Node) -> Future:
    """A future for coroutines of ``node``'s executor; complete it with ``complete``."""
    return Future(executor=node.executor)


def complete(node: Node, future: Future, value: Any = None, error: Exception | None = None) -> None:
    """Completes ``future`` from any thread and has the executor look at once."""
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
    if (executor := node.executor) is not None:
        executor.wake()


class SerialThread:
    """Runs callables one after another, in order, in one thread of its own."""

    def __init__(self, node: Node, name: str) -> None:
        self._node = node
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        # A daemon: a call that hangs in a driver must not keep the process alive.
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def run(self, call: Callable[[], Any]) -> Future:
        """Has ``call`` run; its result or exception becomes the future's. From any thread."""
        future = new_future(self._node)
        self._calls.put((call, future))
        return future

    def close(self, timeout: float = 2.0) -> bool:
        """Ends the thread after what has been given to it; False if it still runs after ``timeout`` seconds."""
        self._calls.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while (item := self._calls.get()) is not None:
            call, future = item
            try:
                complete(self._node, future, call())
            except Exception as error:
                complete(self._node, future, error=error)
            del call, future, item  # keep nothing alive while waiting
