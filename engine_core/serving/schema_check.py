"""Compile a JSON schema in a process that can be killed, before it is compiled where it would block the engine.

Some schemas take the grammar library minutes and gigabytes (``{"multipleOf": 9999991}``), and a native call cannot be
interrupted. A ``SchemaChecker`` hands each schema that it has not seen to a worker process with a limit on memory and
waits for a limited time. Worker processes are started when first needed, kept for the next schema, and killed when they
take too long.

Slow schemas do not hold up quick ones. A schema begins in one of a few quick places, which it leaves for a slow place
as soon as it has had its share and another one waits. Where all slow places are taken, the schema that has been in one
longest is given up: its request is told to try again later.
"""

from __future__ import annotations

import contextlib
import io
import json
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from engine_core.errors import DeadlinePassedError, QueueFullError

_SCRIPT = str(Path(__file__).with_name("schema_process.py"))
_QUICK_PLACES = 2
_SLOW_PLACES = 2
_SHARE = 0.25  # s in a quick place that every schema has
_LOOK = 0.02  # s between two looks at whether another one waits
_START_LIMIT = 30.0  # s that a process has to start; a slow start is not the schema's fault
_TOO_LONG = "it takes too long to compile"
_TOO_LARGE = "it takes too much memory, or its references are too deep, to compile"


@dataclass(eq=False)
class _Check:
    """A schema that is being compiled."""

    worker: _Worker
    is_slow: bool = False
    is_given_up: bool = False


class SchemaChecker:
    """Thread-safe. ``timeout``: seconds a schema may take to compile, once it has begun."""

    def __init__(self, timeout: float = 5.0) -> None:
        self.timeout = timeout
        self._places = threading.Condition()  # guards everything below
        self._idle: list[_Worker] = []  # some may be starting yet
        self._num_quick = 0
        self._num_waiting = 0
        self._slow: list[_Check] = []  # the one that has been slow longest first
        self._closed = False

    def check(self, grammar: str, deadline: float | None = None) -> str:
        """Return why ``grammar`` (llguidance's JSON form) cannot be compiled within the limits; empty if it can.

        ``deadline``: of the request, s, time.monotonic; None: it has none. Raises DeadlinePassedError if it passes, and
        QueueFullError if the schema is given up for others or no process can be started.
        """
        self._enter(deadline)
        check = None
        try:
            check = _Check(self._take_worker(deadline))
            return self._run(check, grammar, deadline)
        finally:
            with self._places:
                if check is not None and check.is_slow:
                    with contextlib.suppress(ValueError):  # given up, and taken off by who did so
                        self._slow.remove(check)
                else:
                    self._num_quick -= 1
                self._places.notify_all()

    def close(self) -> None:
        """End the worker processes; may be called twice."""
        with self._places:
            self._closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()

    def _enter(self, deadline: float | None) -> None:
        """Take a quick place."""
        with self._places:
            self._num_waiting += 1
            try:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not self._places.wait_for(lambda: self._num_quick < _QUICK_PLACES, left):
                    raise DeadlinePassedError
                self._num_quick += 1
            finally:
                self._num_waiting -= 1

    def _make_room(self, check: _Check) -> None:
        """Move a check whose share is over to a slow place if another one waits for its quick place."""
        with self._places:
            if not self._num_waiting:
                return
            if len(self._slow) >= _SLOW_PLACES:
                oldest = self._slow.pop(0)
                oldest.is_given_up = True
                oldest.worker.process.kill()  # its own thread sees the end of the output
            check.is_slow = True
            self._slow.append(check)
            self._num_quick -= 1
            self._places.notify_all()

    def _take_worker(self, deadline: float | None) -> _Worker:
        """Return a process that waits for a grammar, an idle one or a new one."""
        with self._places:
            worker = self._idle.pop() if self._idle else None
        if worker is not None and worker.process.poll() is not None:
            worker.kill()
            worker = None
        try:
            worker = worker or _Worker()
        except OSError as error:
            raise QueueFullError(
                f"The process that compiles JSON schemas cannot be started ({error.strerror}); try again later."
            ) from None
        end = time.monotonic() + _START_LIMIT
        if worker.wait_ready(end if deadline is None else min(end, deadline)):
            return worker
        if not worker.ended and deadline is not None and time.monotonic() >= deadline:
            self._put_back(worker)
            raise DeadlinePassedError
        worker.kill()
        raise QueueFullError("The process that compiles JSON schemas does not start; try again later.")

    def _put_back(self, worker: _Worker) -> None:
        with self._places:
            if not self._closed:
                self._idle.append(worker)
                return
        worker.kill()

    def _run(self, check: _Check, grammar: str, deadline: float | None) -> str:
        worker, begin = check.worker, time.monotonic()
        end = begin + self.timeout
        limit = end if deadline is None else min(end, deadline)
        worker.send(grammar)
        answer = worker.read_until(min(limit, begin + _SHARE))
        while answer is None and not worker.ended and time.monotonic() < limit:
            if not check.is_slow:
                self._make_room(check)
            answer = worker.read_until(limit if check.is_slow else min(limit, time.monotonic() + _LOOK))
        if answer is not None and not check.is_given_up:
            self._put_back(worker)
            return answer
        died = worker.ended
        worker.kill()
        if check.is_given_up:
            raise QueueFullError("The JSON schema takes long to compile, and others wait; try again later.")
        if died:
            return _TOO_LARGE
        if time.monotonic() < end:
            raise DeadlinePassedError
        return _TOO_LONG


class _Worker:
    """A process that compiles schemas. Raises OSError if it cannot be started."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, _SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.ended = False
        self._is_ready = False
        self._data = b""

    def wait_ready(self, end: float) -> bool:
        """Wait until it has started, at most until ``end`` (time.monotonic)."""
        self._is_ready = self._is_ready or self.read_until(end) is not None
        return self._is_ready

    def send(self, grammar: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(grammar).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            self.ended = True

    def read_until(self, end: float) -> str | None:
        """Return its next answer; None if it ended or gave none until ``end`` (time.monotonic)."""
        output = self.process.stdout
        assert isinstance(output, io.BufferedReader)
        while not self._data.endswith(b"\n"):
            ready, _, _ = select.select([output], [], [], max(0.0, end - time.monotonic()))
            part = output.read1(65536) if ready else b""
            if not part:
                self.ended = bool(ready)
                return None
            self._data += part
        line, self._data = self._data, b""
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in filter(None, (self.process.stdin, self.process.stdout)):
            with contextlib.suppress(OSError):  # of what it had not read yet
                pipe.close()
