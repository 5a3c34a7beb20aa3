"""The one way of a request to the worker, whichever front it came in by: ROS, HTTP.

A front makes a ``GenerationRequest`` of what its client sent and calls ``Intake.take``; pieces and the result come back
through callbacks. Duplicate ids, cancelling by id, the threads that prepare, refusals and what listens to all answers
are the same for all fronts because they are here.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from engine_core.errors import InvalidRequestError, NotActiveError, QueueFullError, as_exception
from engine_core.request import LIMITS, FinishReason, GenerationRequest, GenerationResult, Piece, RequestDefaults
from engine_core.serving.engine import Engine
from engine_core.serving.preparation import Place, PreparationLine
from engine_core.serving.worker import LONGEST_TIMER, Ticket, Worker

# What is prepared on the caller's thread: less than a millisecond is not worth the way to another one and back.
_QUICK_CHARS = 4096
_QUICK_MESSAGES = 64
_READ_AT_ONCE = 2
_NUM_THREADS = 8
_WAITING_CHARS = 64 << 20  # of all texts that wait to be prepared, images apart
_numbers = itertools.count()


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


class ImageSource(Protocol):
    """The images of a request that are read in a preparing thread."""

    @property
    def count(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...  # that they take until they are read

    def read_images(self, request: GenerationRequest, go_on: Callable[[], None]) -> GenerationRequest:
        """Return ``request`` with its images. Raises RequestError, and what ``go_on``, called before each, raises."""
        ...


class _EndedEarly(Exception):
    """A request was cancelled while it was being prepared."""


class OpenRequest:
    """A request that has not been answered yet."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.number = next(_numbers)  # in order of arrival
        self.begun = threading.Event()  # the first piece is out, or there will be none
        self.ending: FinishReason | None = None  # why it is to end, if somebody ends it
        self._ticket: Ticket | None = None
        self._end_waiting: Callable[[FinishReason], None] | None = None  # if it waits for a thread that prepares it

    def cancel(self) -> None:
        """End the request at once while it waits, within one token while it runs, or as soon as it has been prepared.

        From any thread, and more than once.
        """
        self.end(FinishReason.CANCELLED)

    def end(self, reason: FinishReason) -> None:
        """Cancel it for another reason. The first reason stays."""
        self.ending = self.ending or reason
        end_waiting, ticket = self._end_waiting, self._ticket  # read once: other threads change them
        if end_waiting is not None:
            end_waiting(self.ending)
        if ticket is not None:
            ticket.cancel(reason)

    def _accepted(self, ticket: Ticket) -> None:
        self._ticket = ticket
        if self.ending is not None:  # while it was being prepared
            ticket.cancel(self.ending)


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
        texts = PreparationLine("edgellm-intake", _NUM_THREADS, _WAITING_CHARS)
        # New ones can take seconds, which no text waits for.
        schemas = PreparationLine("edgellm-schema", _NUM_THREADS, _WAITING_CHARS)
        # Pixels take megabytes before they are scaled down, so that few requests have them at a time, and many images
        # take seconds, which no text waits for.
        images = PreparationLine("edgellm-images", _READ_AT_ONCE, LIMITS.image_bytes)
        self._texts, self._schemas, self._images = self._lines = texts, schemas, images
        self.pool = texts.pool  # for other work, too
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
        images: ImageSource | None = None,
    ) -> OpenRequest:
        """Take a request; ``on_done`` gets its result once, after its last ``on_piece``, also when it is refused.

        Long texts, answers with a form and requests with ``images`` are prepared in threads of their own, the rest
        before this returns. Where too many of them, or too many bytes, wait for such a thread, the request is refused
        at once. Callbacks come from the worker's thread, a preparing one, or this one.
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
        submit = partial(self._submit, opened, request, on_piece, on_done, time.monotonic(), images)
        if images is None and _is_quick(request):
            submit()
            return opened
        try:
            self._start(opened, request, on_done, submit, images)
        except Exception as error:
            self._close(opened)
            on_done(self.refuse(request.request_id, error))
        return opened

    def refuse(self, request_id: str, error: Exception) -> GenerationResult:
        """Return the result of a request that is not accepted; it is counted and told."""
        with self._lock:
            self.num_refused += 1
        error.with_traceback(None)  # its frames hold the request with its images, and what gets the result
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
        for line in self._lines:
            line.close()

    def _start(
        self,
        opened: OpenRequest,
        request: GenerationRequest,
        on_done: Callable[[GenerationResult], None],
        submit: Callable[[], None],
        images: ImageSource | None,
    ) -> None:
        """Have ``submit`` run in a thread; until one is free, the request may be cancelled or time out.

        Raises RequestError for what can be refused before that.
        """
        worker = self.worker_or_raise()
        request.check_sizes()
        worker.check_admission(request.priority)
        if images is None:
            line, num_bytes = self._line_for(request), request.num_chars
        else:
            line, num_bytes = self._images, request.num_chars + images.num_bytes
            if (engine := self.state.engine) is not None:
                engine.check_images(request, images.count)
        arrival = time.monotonic()
        timer: threading.Timer | None = None

        def prepare() -> None:
            opened._end_waiting = None
            if timer is not None:
                timer.cancel()
            submit()

        def end_waiting(reason: FinishReason) -> None:
            if line.leave(place):
                if timer is not None:
                    timer.cancel()
                self._end_early(opened, request, on_done, reason, arrival)

        place = Place(opened.number, request.priority, num_bytes, prepare=prepare, end=opened.end)
        opened._end_waiting = end_waiting
        if 0 < request.timeout <= LONGEST_TIMER:
            timer = threading.Timer(request.timeout, opened.end, (FinishReason.TIMEOUT,))
            timer.daemon = True
            timer.start()
        try:
            line.enter(place, worker.scheduler)
        except QueueFullError:
            if timer is not None:
                timer.cancel()
            raise
        if opened.ending is not None:  # before it was in the line
            end_waiting(opened.ending)

    def _end_early(
        self,
        opened: OpenRequest,
        request: GenerationRequest,
        on_done: Callable[[GenerationResult], None],
        reason: FinishReason,
        arrival: float,
        listener: Listener | None = None,
    ) -> None:
        """Answer a request that ends before the worker has it. ``listener``: its own, if it has been made."""
        waited = time.monotonic() - arrival
        result = GenerationResult(request.request_id, finish_reason=reason, queue_time=waited, total_time=waited)
        if listener is None and self._listen is not None:
            listener = self._listen(request)
        self._done(opened, listener, on_done, result)

    def _done(
        self,
        opened: OpenRequest,
        listener: Listener | None,
        on_done: Callable[[GenerationResult], None],
        result: GenerationResult,
    ) -> None:
        """Tell all that ``opened`` has its result."""
        self._close(opened)
        try:
            if listener is not None:
                listener.done(result)
            self._tell_watch(result)
        finally:
            on_done(result)

    def _submit(
        self,
        opened: OpenRequest,
        request: GenerationRequest,
        on_piece: Callable[[Piece], None] | None,
        on_done: Callable[[GenerationResult], None],
        arrival: float,
        images: ImageSource | None,
    ) -> None:
        def go_on() -> None:
            if opened.ending is None and 0 < request.timeout <= time.monotonic() - arrival:
                opened.ending = FinishReason.TIMEOUT
            if opened.ending is not None:
                raise _EndedEarly

        listener: Listener | None = None
        try:
            worker = self.worker_or_raise()
            if images is not None:
                worker.check_admission(request.priority)
                request.validate(num_unread=images.count)
                request = images.read_images(request, go_on)
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

            done = partial(self._done, opened, listener, on_done)
            ticket = worker.submit(request, on_piece=piece, on_done=done, arrival=arrival, check=go_on)
        except _EndedEarly:
            assert opened.ending is not None
            self._end_early(opened, request, on_done, opened.ending, arrival, listener)
        except BaseException as error:  # a panic of a native library, too, is this request's answer
            self._close(opened)
            on_done(self.refuse(request.request_id, as_exception(error)))
        else:
            opened._accepted(ticket)
            if worker.scheduler.is_full:  # it is newer than what is still being prepared
                limit = worker.scheduler.preempts_up_to(request.priority)
                for line in self._lines if limit >= 0 else ():
                    line.end_older(opened.number, limit)

    def _tell_watch(self, result: GenerationResult) -> None:
        watch = self.watch  # read once: another thread may set it to None
        if watch is not None:
            watch(result)

    def _close(self, opened: OpenRequest) -> None:
        with self._lock:
            del self._open[opened.request_id]
        opened._end_waiting = None
        opened.begun.set()

    def _line_for(self, request: GenerationRequest) -> PreparationLine:
        engine = self.state.engine
        return self._schemas if engine is not None and not engine.knows(request) else self._texts


def _is_quick(request: GenerationRequest) -> bool:
    if len(request.messages) > _QUICK_MESSAGES or request.has_form or request.session:
        return False
    if request.tools or request.thinking_budget or request.images:
        return False
    return len(request.prompt) + request.num_template_chars <= _QUICK_CHARS
