"""The one way of a request to the worker, whichever front it came in by: ROS, HTTP.

A front makes a ``GenerationRequest`` of what its client sent and calls ``Intake.take``; pieces and the result come back
through callbacks. Duplicate ids, cancelling by id, the threads that prepare, refusals and what listens to all answers
are the same for all fronts because they are here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from engine_core.errors import InvalidRequestError, NotActiveError, as_exception
from engine_core.request import LIMITS, FinishReason, GenerationRequest, GenerationResult, Piece, RequestDefaults
from engine_core.serving.engine import Engine
from engine_core.serving.work_pool import WorkPool
from engine_core.serving.worker import Ticket, Worker

# What is prepared on the caller's thread: less than a millisecond is not worth the way to another one and back.
_QUICK_CHARS = 4096
_QUICK_MESSAGES = 64


class DuplicateRequestError(InvalidRequestError):
    """The id of a request is that of a running one."""


class ServingState(Protocol):
    """The settings, engine and worker of a front. Each attribute is replaced as a whole; any thread reads them."""

    @property
    def settings(self) -> RequestDefaults: ...

    @property
    def engine(self) -> Engine | None: ...  # None: not configured

    @property
    def worker(self) -> Worker | None: ...  # None: not active


class Listener(Protocol):
    """Hears one answer beside the client: every piece, then the result once."""

    def piece(self, piece: Piece) -> None: ...

    def done(self, result: GenerationResult) -> None: ...


class OpenRequest:
    """A request that has not been answered yet."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.begun = threading.Event()  # the first piece is out, or there will be none
        self._ticket: Ticket | None = None
        self._is_cancelled = False

    def cancel(self) -> None:
        """End the request within one token, or as soon as it has been prepared. From any thread, and more than once."""
        self._is_cancelled = True
        if self._ticket is not None:
            self._ticket.cancel()

    def _accepted(self, ticket: Ticket) -> None:
        self._ticket = ticket
        if self._is_cancelled:  # while it was being prepared
            ticket.cancel()


class Intake:
    """Takes requests from any thread, while there is a worker.

    ``listen(request)`` makes the listener of an accepted request; ``on_refused(result, error)`` hears of the others.
    """

    def __init__(
        self,
        state: ServingState,
        *,
        listen: Callable[[GenerationRequest], Listener] | None = None,
        on_refused: Callable[[GenerationResult, Exception], None] | None = None,
    ) -> None:
        self.state = state
        self._listen = listen
        self._on_refused = on_refused
        self.pool = WorkPool("edgellm-intake")
        self._schemas = WorkPool("edgellm-schema")  # new ones can take seconds, which no text waits for
        self._lock = threading.Lock()
        self._open: dict[str, OpenRequest] = {}
        self.num_refused = 0
        self.watch: Callable[[GenerationResult], None] | None = None  # hears every result, the refused ones too

    @property
    def num_open(self) -> int:
        """Requests that have been taken and not answered."""
        return len(self._open)

    def take(
        self,
        request: GenerationRequest,
        *,
        on_done: Callable[[GenerationResult], None],
        on_piece: Callable[[Piece], None] | None = None,
    ) -> OpenRequest:
        """Take a request; ``on_done`` gets its result once, after its last ``on_piece``, also when it is refused.

        Long texts and JSON schemas are prepared in threads of their own, the rest before this returns. Callbacks come
        from the worker's thread, a preparing one, or this one.
        """
        opened = OpenRequest(request.request_id)
        with self._lock:
            is_duplicate = request.request_id in self._open
            if not is_duplicate:
                self._open[request.request_id] = opened
        if is_duplicate:
            error = DuplicateRequestError(
                f"A request with the id {request.request_id[:64]!r} is running; give another id."
            )
            opened.begun.set()
            on_done(self.refuse(request.request_id, error))
            return opened
        submit = partial(self._submit, opened, request, on_piece, on_done, time.monotonic())
        if _is_quick(request):
            submit()
        else:
            self._pool_for(request).start(submit)
        return opened

    def refuse(self, request_id: str, error: Exception) -> GenerationResult:
        """Return the result of a request that is not accepted; it is counted and told."""
        with self._lock:
            self.num_refused += 1
        result = GenerationResult(request_id[: LIMITS.request_id_chars], finish_reason=FinishReason.ERROR, error=error)
        if self._on_refused is not None:
            self._on_refused(result, error)
        self._tell_watch(result)
        return result

    def cancel(self, request_id: str) -> int:
        """End the request of this id, or with an empty one all; return how many were told to end."""
        with self._lock:
            found = [opened for name, opened in self._open.items() if request_id in ("", name)]
        for opened in found:
            opened.cancel()
        return len(found)

    def worker_or_raise(self) -> Worker:
        """Raises NotActiveError."""
        worker, engine = self.state.worker, self.state.engine
        if worker is None:
            state = "unconfigured; configure and activate" if engine is None else "inactive; activate"
            raise NotActiveError(f"The node is {state} it first.")
        return worker

    def close(self) -> None:
        self.pool.close()
        self._schemas.close()

    def _submit(
        self,
        opened: OpenRequest,
        request: GenerationRequest,
        on_piece: Callable[[Piece], None] | None,
        on_done: Callable[[GenerationResult], None],
        arrival: float,
    ) -> None:
        try:
            worker = self.worker_or_raise()
            listener = None if self._listen is None else self._listen(request)

            def piece(piece: Piece) -> None:
                try:
                    if on_piece is not None:
                        on_piece(piece)
                    if listener is not None:
                        listener.piece(piece)
                finally:
                    if piece.sequence == 0:
                        opened.begun.set()

            def done(result: GenerationResult) -> None:
                self._close(opened)
                try:
                    if listener is not None:
                        listener.done(result)
                    self._tell_watch(result)
                finally:
                    on_done(result)

            ticket = worker.submit(request, on_piece=piece, on_done=done, arrival=arrival)
        except BaseException as error:  # a panic of a native library, too, is this request's answer
            self._close(opened)
            on_done(self.refuse(request.request_id, as_exception(error)))
        else:
            opened._accepted(ticket)

    def _tell_watch(self, result: GenerationResult) -> None:
        watch = self.watch  # read once: another thread may set it to None
        if watch is not None:
            watch(result)

    def _close(self, opened: OpenRequest) -> None:
        with self._lock:
            del self._open[opened.request_id]
        opened.begun.set()

    def _pool_for(self, request: GenerationRequest) -> WorkPool:
        engine = self.state.engine
        return self._schemas if engine is not None and not engine.knows(request) else self.pool


def _is_quick(request: GenerationRequest) -> bool:
    if len(request.messages) > _QUICK_MESSAGES or request.json_schema or request.session:
        return False
    if request.tools or request.thinking_budget:
        return False
    return len(request.prompt) + request.num_template_chars <= _QUICK_CHARS
