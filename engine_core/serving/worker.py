"""The one thread that touches the engine, and the bounded queue in front of it."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engine_core.config import BUSY_POLICIES
from engine_core.errors import (
    ConfigurationError,
    DeadlinePassedError,
    EngineFaultError,
    NotActiveError,
    QueueFullError,
    RequestError,
    as_exception,
)
from engine_core.request import FinishReason, GenerationRequest, GenerationResult, Piece
from engine_core.serving.cancellation import CancelToken
from engine_core.serving.engine import Engine, PreparedRequest

_NO_DEADLINE = 1e8  # s; three years, and less than any platform's threading.TIMEOUT_MAX

_log = logging.getLogger(__name__)


@dataclass(order=True)
class _Job:
    """An accepted request; ordered by priority, then by arrival."""

    rank: tuple[int, int]  # (-priority, number)
    prepared: PreparedRequest = field(compare=False)
    on_piece: Callable[[Piece], None] | None = field(compare=False)
    on_done: Callable[[GenerationResult], None] = field(compare=False)
    arrival: float = field(compare=False)  # s, time.monotonic
    cancel: CancelToken = field(compare=False, default_factory=CancelToken)
    deadline: threading.Timer | None = field(compare=False, default=None)

    @property
    def priority(self) -> int:
        return -self.rank[0]

    @property
    def request_id(self) -> str:
        return self.prepared.request.request_id


class Ticket:
    """An accepted request, as its owner holds it."""

    def __init__(self, worker: Worker, job: _Job) -> None:
        self._worker = worker
        self._job = job
        self.request_id = job.request_id

    def cancel(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Ends the request within one token, or takes it out of the queue; ``on_done`` gets what there is of it."""
        self._worker._cancel(self._job, reason)


class Worker:
    """Serves requests one after another, the highest priority first.

    ``busy_policy``: ``queue`` lets up to ``queue_depth`` requests wait; ``reject`` refuses while one runs; ``preempt``
    ends whatever has no higher priority than the new request, with its partial text; ``preempt_lower`` ends only what
    has a lower one.
    ``on_change()`` is called when ``busy`` or ``queued`` may have changed, ``on_fault(error)`` once when the engine
    has failed: every request has been answered by then and none is accepted any more.
    Callbacks come from the worker thread, or from the thread that cancels or submits; they must not block.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        queue_depth: int = 8,
        busy_policy: str = "queue",
        on_change: Callable[[], None] | None = None,
        on_fault: Callable[[Exception], None] | None = None,
    ) -> None:
        self._engine = engine
        self._queue_depth = 0
        self._busy_policy = ""
        self._on_change = on_change or (lambda: None)
        self._on_fault = on_fault or (lambda error: None)
        self._wake = threading.Condition()  # guards everything below
        self._waiting: list[_Job] = []  # a heap
        self._running: _Job | None = None
        self._warm: str | None = None
        self._closed: str | None = None  # why nothing is accepted
        self._numbers = itertools.count()
        self.update(queue_depth=queue_depth, busy_policy=busy_policy)
        self._thread = threading.Thread(target=self._serve, name="edgellm-worker", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._running is not None

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def longest_wait(self) -> float:
        """Seconds that the oldest waiting request has waited; 0 if none waits."""
        with self._wake:
            return max((time.monotonic() - job.arrival for job in self._waiting), default=0.0)

    def update(self, *, queue_depth: int | None = None, busy_policy: str | None = None) -> None:
        """Takes new settings for the requests to come. Raises ConfigurationError."""
        if busy_policy is not None and busy_policy not in BUSY_POLICIES:
            raise ConfigurationError(f"busy_policy is {busy_policy!r}, expected one of {', '.join(BUSY_POLICIES)}.")
        if queue_depth is not None and queue_depth < 0:
            raise ConfigurationError(f"queue_depth is {queue_depth}, expected 0 or more.")
        with self._wake:
            self._queue_depth = self._queue_depth if queue_depth is None else queue_depth
            self._busy_policy = self._busy_policy if busy_policy is None else busy_policy

    def submit(
        self,
        request: GenerationRequest,
        *,
        on_piece: Callable[[Piece], None] | None = None,
        on_done: Callable[[GenerationResult], None],
        arrival: float | None = None,
    ) -> Ticket:
        """Accepts a request, or raises at once: RequestError (invalid), QueueFullError, NotActiveError.

        Each accepted request gets exactly one ``on_done``, after its last ``on_piece``. ``arrival``: time.monotonic()
        when the request came, from where its deadline counts; None: now. One whose deadline has passed when it is
        prepared is answered with TIMEOUT before this returns.
        """
        arrival = time.monotonic() if arrival is None else arrival
        if self._closed is not None:
            raise NotActiveError(self._closed)
        with self._wake:
            self._admit(request.priority)  # a full queue refuses before any work is done
        try:
            prepared = self._engine.prepare(request)
        except DeadlinePassedError:
            prepared = PreparedRequest.unread(request)
            is_late = True
        else:
            is_late = False
        job = _Job((-request.priority, next(self._numbers)), prepared, on_piece, on_done, arrival)
        with self._wake:
            if self._closed is not None:
                raise NotActiveError(self._closed)
            remaining = arrival + request.timeout - time.monotonic()
            is_late = is_late or (request.timeout > 0 and remaining <= 0)
            preempted = [] if is_late else self._admit(job.priority)
            if not is_late:
                if 0 < request.timeout <= _NO_DEADLINE:
                    job.deadline = threading.Timer(remaining, self._cancel, (job, FinishReason.TIMEOUT))
                    job.deadline.daemon = True
                    job.deadline.start()
                heapq.heappush(self._waiting, job)
                self._wake.notify_all()
        if is_late:
            job.cancel.cancel(FinishReason.TIMEOUT)
            self._answer(job, _unstarted(job, FinishReason.TIMEOUT))
            return Ticket(self, job)
        for other in preempted:
            self._cancel(other, FinishReason.PREEMPTED)
        self._on_change()
        return Ticket(self, job)

    def _admit(self, priority: int) -> list[_Job]:
        """Decides by the busy policy; returns the jobs that make room. Called under the lock."""
        others = [*self._waiting, *([self._running] if self._running else [])]
        preempted = []
        if others and self._busy_policy == "reject":
            raise QueueFullError("A request is running and busy_policy is reject; try again when it is done.")
        if self._busy_policy == "preempt":
            preempted = [other for other in others if other.priority <= priority]
        elif self._busy_policy == "preempt_lower":
            preempted = [other for other in others if other.priority < priority]
        staying = len(others) - len(preempted)  # one of them runs or is about to
        if staying > self._queue_depth:
            raise QueueFullError(
                f"{staying - 1} requests are waiting and queue_depth is {self._queue_depth}; try again later."
            )
        return preempted

    def warm_system_prompt(self, text: str) -> None:
        """Has the KV of a system prompt computed before the next request. Returns at once."""
        with self._wake:
            self._warm = text
            self._wake.notify_all()

    def close(self, *, drain: bool = False, timeout: float = 10.0) -> bool:
        """Accepts nothing more and answers everything. Returns False if the thread still runs after ``timeout`` s.

        Waiting requests are cancelled; the running one too, or with ``drain`` it may finish within ``timeout``.
        """
        end = time.monotonic() + timeout
        self._stop_accepting("The node is not active; activate it first.")
        if drain:
            self._thread.join(max(0.0, timeout - 1.0))
        with self._wake:
            running = self._running
        if running is not None:
            running.cancel.cancel(FinishReason.CANCELLED)
        if threading.current_thread() is not self._thread:
            self._thread.join(max(1.0, end - time.monotonic()))
        return not self._thread.is_alive()

    # --- the thread -----------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while self._serve_next():
                pass
        except BaseException as error:  # a Rust panic is no Exception; a thread that ends in silence answers nobody
            self._fail(as_exception(error))

    def _serve_next(self) -> bool:
        """Waits for one job or warm-up and does it; False when nothing is left to do. Raises when the engine failed."""
        with self._wake:
            while not self._waiting and self._warm is None and self._closed is None:
                self._wake.wait()
            warm, self._warm = self._warm, None
            if self._closed is not None and not self._waiting:
                return False
            self._running = heapq.heappop(self._waiting) if warm is None else None
        if warm is None:
            self._work(self._running)
            return True
        try:
            self._engine.warm_system_prompt(warm)
        except RequestError as error:
            _log.warning("The system prompt is not kept: %s", error)
        return True

    def _work(self, job: _Job) -> None:
        """Runs one job to its end. Raises only when the engine failed, with the job answered."""
        self._on_change()
        fault: Exception | None = None
        try:
            pieces = self._engine.generate(job.prepared, job.cancel, job.arrival)
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as stop:
                    result = stop.value
                    break
                if job.on_piece is not None:
                    _guarded(job.on_piece, piece)
        except RequestError as error:
            result = _failed(job, error)
        except BaseException as error:
            fault = as_exception(error)
            result = _failed(job, fault)
        with self._wake:
            self._running = None
        self._answer(job, result)
        self._on_change()
        if fault is not None:
            raise fault

    def _fail(self, error: Exception) -> None:
        _log.error("The engine failed: %s", error, exc_info=not isinstance(error, EngineFaultError))
        with self._wake:
            running, self._running = self._running, None
        if running is not None:  # what failed was not its work
            self._answer(running, _failed(running, error))
        self._stop_accepting(f"The engine has failed ({error}); configure the node again.", error)
        _guarded(self._on_fault, error)

    def _stop_accepting(self, why: str, error: Exception | None = None) -> None:
        with self._wake:
            if self._closed is None:
                self._closed = why
            waiting, self._waiting = self._waiting, []
            self._wake.notify_all()
        for job in waiting:
            job.cancel.cancel()
            self._answer(job, _failed(job, error) if error else _unstarted(job, FinishReason.CANCELLED))

    # --- any thread -----------------------------------------------------------------------------------

    def _cancel(self, job: _Job, reason: FinishReason) -> None:
        with self._wake:
            waits = job in self._waiting
            if waits:
                self._waiting.remove(job)
                heapq.heapify(self._waiting)
        job.cancel.cancel(reason)
        if waits:
            self._answer(job, _unstarted(job, job.cancel.reason or reason))
            self._on_change()

    @staticmethod
    def _answer(job: _Job, result: GenerationResult) -> None:
        if job.deadline is not None:
            job.deadline.cancel()
        _guarded(job.on_done, result)


def _guarded(callback: Callable, value: object) -> None:
    """A client's callback must not take the worker down."""
    try:
        callback(value)
    except BaseException:
        _log.exception("A callback raised")


def _unstarted(job: _Job, reason: FinishReason) -> GenerationResult:
    waited = time.monotonic() - job.arrival
    num_tokens = len(job.prepared.token_ids)
    return GenerationResult(
        job.request_id, finish_reason=reason, prompt_tokens=num_tokens, queue_time=waited, total_time=waited
    )


def _failed(job: _Job, error: Exception) -> GenerationResult:
    return dataclasses.replace(_unstarted(job, FinishReason.ERROR), error=error)
