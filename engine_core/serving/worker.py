"""The one thread that touches the engine, and what its clients are promised: one answer each, and in time."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from engine_core.errors import DeadlinePassedError, EngineFaultError, NotActiveError, RequestError, as_exception
from engine_core.request import FinishReason, GenerationRequest, GenerationResult, Piece
from engine_core.serving.engine import Engine
from engine_core.serving.scheduler import Scheduler
from engine_core.serving.sequence import PreparedRequest, Sequence

_CHANGE_INTERVAL = 1.0  # s between two calls of on_change while requests run
LONGEST_TIMER = 1e8  # s; a longer deadline is none. Three years, and less than any platform's threading.TIMEOUT_MAX

_log = logging.getLogger(__name__)


class Ticket:
    """An accepted request, as its owner holds it."""

    def __init__(self, worker: Worker, sequence: Sequence) -> None:
        self._worker = worker
        self.request_id = sequence.request_id
        self.sequence = sequence
        self.timer: threading.Timer | None = None

    def cancel(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Ends the request within one token, or takes it out of the queue; ``on_done`` gets what there is of it."""
        self._worker._cancel(self.sequence, reason)


class Worker:
    """Serves requests in a thread of its own: as many at a time as the engine has slots, the highest priority first.

    ``queue_depth``, ``busy_policy``: see ``Scheduler``. ``on_change()`` is called when ``busy`` or ``queued`` may have
    changed and once a second while requests run, ``on_fault(error)`` once when the engine has failed: every request has
    been answered by then and none is accepted any more. Callbacks come from the worker thread, or from the thread that
    cancels or submits; they must not block.
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
        """Raises ConfigurationError."""
        self._engine = engine
        self._scheduler = engine.scheduler
        self._on_change = on_change or (lambda: None)
        self._on_fault = on_fault or (lambda error: None)
        self._warm: str | None = None  # guarded by the scheduler's lock, as is:
        self._closed: str | None = None  # why nothing is accepted
        self._counts = (0, 0)  # running and waiting, when on_change was last called after a step
        self._scheduler.update(queue_depth=queue_depth, busy_policy=busy_policy)
        self._thread = threading.Thread(target=self._serve, name="edgellm-worker", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._scheduler.num_running > 0

    @property
    def queued(self) -> int:
        return self._scheduler.num_waiting

    @property
    def scheduler(self) -> Scheduler:
        return self._scheduler

    @property
    def longest_wait(self) -> float:
        """Seconds that the oldest waiting request has waited; 0 if none waits."""
        return self._scheduler.longest_wait

    def update(self, *, queue_depth: int | None = None, busy_policy: str | None = None) -> None:
        """Takes new settings for the requests to come. Raises ConfigurationError."""
        self._scheduler.update(queue_depth=queue_depth, busy_policy=busy_policy)

    def check_admission(self, priority: int) -> None:
        """Raises QueueFullError or NotActiveError if a request of this priority would not be accepted now."""
        if self._closed is not None:
            raise NotActiveError(self._closed)
        self._scheduler.admit(priority)

    def submit(
        self,
        request: GenerationRequest,
        *,
        on_piece: Callable[[Piece], None] | None = None,
        on_done: Callable[[GenerationResult], None],
        arrival: float | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Ticket:
        """Accepts a request, or raises at once: RequestError (invalid), QueueFullError, NotActiveError.

        Each accepted request gets exactly one ``on_done``, after its last ``on_piece``. ``arrival``: time.monotonic()
        when the request came, from where its deadline counts; None: now. One whose deadline has passed when it is
        prepared is answered with TIMEOUT before this returns. ``check`` is called when it has been prepared, before it
        is added or preempts anything: what it raises is raised here, and the request is not accepted.
        """
        arrival = time.monotonic() if arrival is None else arrival
        self.check_admission(request.priority)  # a full queue refuses before any work is done
        try:
            if 0 < request.timeout <= time.monotonic() - arrival:
                raise DeadlinePassedError("The deadline has passed.")
            prepared = self._engine.prepare(request)
        except DeadlinePassedError:
            prepared = PreparedRequest.unread(request)

        def done(result: GenerationResult) -> None:
            timer, ticket.timer = ticket.timer, None  # it holds the ticket
            if timer is not None:
                timer.cancel()
            on_done(result)

        tokenizer = self._engine.tokenizer
        sequence = Sequence(prepared, tokenizer, on_piece=on_piece, on_done=done, arrival=arrival)
        ticket = Ticket(self, sequence)
        if sequence.deadline is not None and sequence.deadline <= time.monotonic():
            sequence.drop(FinishReason.TIMEOUT)
            return ticket
        with contextlib.ExitStack() as undo, self._scheduler.changed:
            if prepared.turn is not None:
                undo.callback(prepared.turn.leave)
            if self._closed is not None:
                raise NotActiveError(self._closed)
            check()
            preempted = self._scheduler.admit(request.priority)
            self._start_timer(ticket)
            self._scheduler.add(sequence)
            undo.pop_all()
        for other in preempted:
            self._cancel(other, FinishReason.PREEMPTED)
        self._on_change()
        return ticket

    def _start_timer(self, ticket: Ticket) -> None:
        deadline = ticket.sequence.deadline
        if deadline is not None and deadline - ticket.sequence.arrival <= LONGEST_TIMER:
            remaining = deadline - time.monotonic()
            ticket.timer = threading.Timer(remaining, ticket.cancel, (FinishReason.TIMEOUT,))
            ticket.timer.daemon = True
            ticket.timer.start()

    def warm_system_prompt(self, text: str) -> None:
        """Has the KV of a system prompt computed as soon as a slot is free. Returns at once."""
        with self._scheduler.changed:
            self._warm = text
            self._scheduler.changed.notify_all()

    def close(self, *, drain: bool = False, timeout: float = 10.0) -> bool:
        """Accepts nothing more and answers everything. Returns False if the thread still runs after ``timeout`` s.

        Waiting requests are cancelled; the running ones too, or with ``drain`` they may finish within ``timeout``.
        """
        end = time.monotonic() + timeout
        self._stop_accepting("The node is not active; activate it first.")
        if drain:
            self._thread.join(max(0.0, timeout - 1.0))
        for sequence in self._scheduler.running:
            sequence.cancel.cancel(FinishReason.CANCELLED)
        if threading.current_thread() is not self._thread:
            self._thread.join(max(1.0, end - time.monotonic()))
        return not self._thread.is_alive()

    # --- the thread -----------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            reported = 0.0
            while self._serve_once():
                counts = (self._scheduler.num_running, self._scheduler.num_waiting)
                if counts != self._counts or time.monotonic() - reported > _CHANGE_INTERVAL:
                    self._counts, reported = counts, time.monotonic()
                    self._on_change()
        except BaseException as error:  # a Rust panic is no Exception; a thread that ends in silence answers nobody
            self._fail(as_exception(error))

    def _serve_once(self) -> bool:
        """Wait for work and do one step, or warm a prompt; False when nothing is left to do. Raises when the engine
        failed."""
        scheduler = self._scheduler
        if self._warm is None and scheduler.num_running:
            self._engine.step()
            return True
        with scheduler.changed:
            scheduler.changed.wait_for(lambda: scheduler.has_work or self._warm is not None or self._closed is not None)
            if self._closed is not None and not scheduler.has_work:
                return False
            warm = None
            if scheduler.has_free_slot:
                warm, self._warm = self._warm, None
        if warm is None:
            self._engine.step()
            return True
        try:
            self._engine.warm_system_prompt(warm)
        except RequestError as error:
            _log.warning("The system prompt is not kept: %s", error)
        return True

    def _fail(self, error: Exception) -> None:
        _log.error("The engine failed: %s", error, exc_info=not isinstance(error, EngineFaultError))
        for sequence in self._scheduler.running:
            self._scheduler.remove(sequence)
            sequence.cancel.detach()
            sequence.fail(error)
        self._stop_accepting(f"The engine has failed ({error}); configure the node again.", error)
        try:
            self._on_fault(error)
        except BaseException:
            _log.exception("A callback raised")

    def _stop_accepting(self, why: str, error: Exception | None = None) -> None:
        with self._scheduler.changed:
            if self._closed is None:
                self._closed = why
            waiting = self._scheduler.clear_waiting()
            self._scheduler.changed.notify_all()
        for sequence in waiting:
            sequence.cancel.cancel()
            if error is None:
                sequence.drop(FinishReason.CANCELLED)
            else:
                sequence.fail(error)

    # --- any thread -----------------------------------------------------------------------------------

    def _cancel(self, sequence: Sequence, reason: FinishReason) -> None:
        waits = self._scheduler.withdraw(sequence)
        sequence.cancel.cancel(reason)
        if waits:
            sequence.drop(sequence.cancel.reason or reason)
            self._on_change()
