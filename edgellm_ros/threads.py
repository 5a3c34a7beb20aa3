"""Work beside the executor's thread, awaited by its coroutines.

rclpy resumes waiting coroutines on each pass of the executor, and an idle executor makes no pass: whoever completes
a future from another thread has to wake it. A coroutine that waits costs the executor one look per pass; it blocks
no thread, so any number of clients can wait.
"""

from __future__ import annotations

import os
import queue
import select
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any

from rclpy.node import Node
from rclpy.task import Future

from engine_core.errors import QueueFullError
from engine_core.serving.work_pool import Work, WorkPool

_MOST_CALLS = 64  # of clients, that wait for a thread


def new_future(node: Node) -> Future:
    """Return a future for coroutines of ``node``'s executor; complete it with ``complete``."""
    return Future(executor=node.executor)


def complete(node: Node, future: Future, value: Any = None, error: Exception | None = None) -> None:
    """Completes ``future`` from any thread and has the executor look at once."""
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
    if (executor := node.executor) is not None:
        executor.wake()


class Started:
    """A coroutine whose first part runs at once, up to where it waits; the rest runs where this is awaited.

    To be awaited once. An exception of the coroutine, even an immediate one, is raised there.
    """

    def __init__(self, coroutine: Coroutine) -> None:
        self._coroutine = coroutine
        self._finished = False
        self._result: Any = None
        self._error: Exception | None = None
        self._waits_for = self._go_on()

    def __await__(self) -> Generator[Any, None, Any]:
        while not self._finished:
            yield self._waits_for
            self._waits_for = self._go_on()
        if self._error is not None:
            raise self._error
        return self._result

    def _go_on(self) -> Any:
        try:
            return self._coroutine.send(None)
        except StopIteration as stop:
            self._finished, self._result = True, stop.value
        except Exception as error:
            self._finished, self._error = True, error
        return None


class SerialThread:
    """Runs callables one after another, in order, in one thread of its own."""

    def __init__(self, node: Node, name: str) -> None:
        self._node = node
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        # A daemon: a call that hangs in a driver must not keep the process alive.
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def run_for_client(self, call: Callable[[], Any]) -> Future:
        """Run it as ``run`` does. Raises QueueFullError if too many calls wait."""
        _check_waiting(self._calls.qsize())
        return self.run(call)

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
            _answer(self._node, call, future)
            del call, future, item  # keep nothing alive while waiting


def run_in(pool: WorkPool, node: Node, call: Callable[[], Any]) -> Future:
    """Has ``call`` run in a thread of ``pool``; its result or exception becomes the future's. From any thread.

    Raises QueueFullError if too much waits for a thread.
    """
    _check_waiting(pool.num_waiting)
    future = new_future(node)
    pool.start(Work(partial(_answer, node, call, future)))
    return future


def _check_waiting(count: int) -> None:
    if count >= _MOST_CALLS:
        raise QueueFullError(f"{count} requests wait for a thread that answers them; try again later.")


def _answer(node: Node, call: Callable[[], Any], future: Future) -> None:
    """Completes ``future`` with what ``call`` gives; the thread goes on whatever it raises."""
    try:
        complete(node, future, call())
    except Exception as error:
        complete(node, future, error=error)
    except BaseException as error:  # such as a panic of a native library
        complete(node, future, error=RuntimeError(f"{type(error).__name__}: {error}"))


class Soon:
    """Makes a call ``delay`` s after it was asked for, once for all who ask until then, in a thread of its own.

    The call must not raise. It begins after the last ask it answers, so it sees what was done before that.
    """

    def __init__(self, name: str, call: Callable[[], None], delay: float) -> None:
        self._call, self._delay = call, delay
        self._asked = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Ask for a call; from any thread, returns at once."""
        self._asked.set()

    def close(self, timeout: float = 2.0) -> bool:
        """Makes a last call, without the delay, and ends the thread; False if it still runs after ``timeout`` s."""
        self._closed.set()
        self._asked.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        last = False
        while not last:
            self._asked.wait()
            last = self._closed.wait(self._delay)
            self._asked.clear()  # before the call: whoever asks while it is made gets another
            self._call()


_ONE_STOP = 1.0  # s


class StopSignal:
    """Set by a signal or from any thread; the main thread waits for it.

    A lock's wait ends early only if the main thread itself is interrupted, and a system may hand a signal to any thread
    (seen in containers). Python's C handler writes to the wake-up descriptor in whichever thread it runs.
    """

    def __init__(self, signums: tuple[signal.Signals, ...]) -> None:
        """Take these signals over; to be called from the main thread.

        Signals within ``_ONE_STOP`` seconds are one stop: launch forwards a Ctrl-C that the process has got already. A
        later one ends the process at once.
        """
        self._is_set = False
        self._first = 0.0  # s, time.monotonic, of the first signal
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)
        for signum in signums:
            signal.signal(signum, self._on_signal)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def _on_signal(self, signum, frame) -> None:
        now = time.monotonic()
        if self._first and now - self._first > _ONE_STOP:
            os._exit(128 + signum)  # asked twice
        self._first = self._first or now
        self._is_set = True

    def set(self) -> None:
        self._is_set = True
        os.write(self._writer, b"\0")

    def wait(self) -> None:
        while not self._is_set:
            select.select([self._reader], [], [])
            os.read(self._reader, 512)
