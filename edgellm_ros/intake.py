"""From a message to an accepted request and its awaited result: what service, action and topic have in common."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rclpy.node import Node

from edgellm_ros import latency
from edgellm_ros.conversions import error_message, refused, to_messages, to_request
from edgellm_ros.msg import GenerationRequest as GenerationRequestMessage
from edgellm_ros.state import NodeState
from edgellm_ros.streams import RequestStream, Topics
from edgellm_ros.threads import WorkPool, complete, new_future
from engine_core.errors import InvalidRequestError, NotActiveError
from engine_core.request import LIMITS, GenerationRequest, GenerationResult, Piece
from engine_core.serving.worker import Ticket, Worker

_QUICK_CHARS = 4096
_QUICK_MESSAGES = 64


def _is_quick(request: GenerationRequest) -> bool:
    if len(request.messages) > _QUICK_MESSAGES or request.json_schema or request.session:
        return False
    if request.tools or request.thinking_budget:
        return False
    return len(request.prompt) + request.num_template_chars <= _QUICK_CHARS


_WARNING_INTERVAL = 1.0  # s


class DuplicateRequestError(InvalidRequestError):
    """The id of a request is that of a running one."""


@dataclass
class _Open:
    """A request that has not been answered yet."""

    ticket: Ticket | None = None
    cancelled: bool = False


class Intake:
    """Takes requests while the node is active; used from the executor's thread only.

    Long texts and JSON schemas are worked on in threads of their own, so that the executor stays free; what takes
    less than a millisecond is not worth the way there and back.
    """

    def __init__(self, node: Node, topics: Topics, state: NodeState, before_request: Callable[[], None]) -> None:
        """``before_request`` is called first of all for each request: the settings have to be the newest then."""
        self._node = node
        self._topics = topics
        self._before_request = before_request
        self._pool = WorkPool(node, "edgellm-intake")
        self._schemas = WorkPool(node, "edgellm-schema")  # new ones can take seconds, which no text waits for
        self._state = state
        self.num_open = 0  # requests whose answer has not been returned yet
        self.num_refused = 0
        self._open: dict[str, _Open] = {}  # request id → what is known of it
        self._last_warning = -_WARNING_INTERVAL  # s, time.monotonic
        self._num_unlogged = 0

    async def answer(
        self,
        message: GenerationRequestMessage,
        *,
        on_ticket: Callable[[Ticket], None] | None = None,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> GenerationResult:
        """Return the result of a request; what cannot be accepted is answered with its error.

        ``on_ticket`` gets the accepted request, for cancelling; ``on_piece`` each piece, in the worker's thread.
        """
        self.num_open += 1
        message.request_id = request_id = message.request_id or uuid.uuid4().hex
        entry = _Open()
        try:
            if request_id in self._open:
                raise DuplicateRequestError(f"A request with the id {request_id[:64]!r} is running; give another id.")
            self._open[request_id] = entry
            self._before_request()
            return await self._answer(message, entry, on_ticket, on_piece)
        except Exception as error:
            return self._refuse(request_id, error)
        finally:
            self.num_open -= 1
            if self._open.get(request_id) is entry:
                del self._open[request_id]

    def refuses_goal(self, message: GenerationRequestMessage) -> bool:
        """Return whether the node is not active. ``message`` ends then: a rejected goal has no other answer."""
        try:
            self._worker_or_raise()
        except NotActiveError as error:
            self._refuse(message.request_id or uuid.uuid4().hex, error)
            return True
        return False

    def _refuse(self, request_id: str, error: Exception) -> GenerationResult:
        """Log, count and end a request; return its result.

        It ends on every topic, also while the node is not active. A duplicate of a running request ends on ~/stats
        alone: its id belongs to the one that runs.
        """
        self.num_refused += 1
        result = refused(request_id[: LIMITS.request_id_chars], error)
        self._warn(result.request_id, error)
        if isinstance(error, DuplicateRequestError):
            self._topics.publish_stats(result)
        else:
            RequestStream(self._topics, result.request_id).done(result)
        return result

    def cancel(self, request_id: str) -> int:
        """End the request of this id, or with an empty one all; return how many were told to end."""
        found = [entry for name, entry in self._open.items() if request_id in ("", name)]
        for entry in found:
            entry.cancelled = True
            if entry.ticket is not None:
                entry.ticket.cancel()
        return len(found)

    def _warn(self, request_id: str, error: Exception) -> None:
        """Log a refusal, at most one a second; the next line says how many were left out."""
        now = time.monotonic()
        if now - self._last_warning < _WARNING_INTERVAL:
            self._num_unlogged += 1
            return
        more = f" ({self._num_unlogged} more were refused since the last line)" if self._num_unlogged else ""
        self._last_warning, self._num_unlogged = now, 0
        self._node.get_logger().warning(f"Request {request_id[:64]!r} refused: {error_message(error)[:500]}{more}")

    async def _answer(self, message, entry, on_ticket, on_piece) -> GenerationResult:
        arrival = time.monotonic()
        worker = self._worker_or_raise()
        request = to_request(message, self._state.settings)
        stream = RequestStream(self._topics, request.request_id, on_piece, spoken=not request.json_schema)
        done = new_future(self._node)

        def on_done(result: GenerationResult) -> None:
            try:
                stream.done(result)
            finally:
                complete(self._node, done, result)

        submit = partial(worker.submit, request, on_piece=stream.piece, on_done=on_done, arrival=arrival)
        ticket = submit() if _is_quick(request) else await self._pool_for(request).run(submit)
        entry.ticket = ticket
        if entry.cancelled:  # while it was being prepared
            ticket.cancel()
        if on_ticket is not None:
            on_ticket(ticket)
        if self.num_open == 1:
            stream.begun.wait(latency.HEAD_START)
        return await done

    async def tokenize(self, text: str, messages: Sequence[Any]) -> tuple[list[int], list[str]]:
        """Token ids and the text of each. Raises RequestError; NotActiveError while nothing is configured."""
        engine = self._state.engine
        if engine is None:
            raise NotActiveError("Nothing is configured; configure the node first.")

        def work() -> tuple[list[int], list[str]]:
            ids = engine.tokenize(text, to_messages(messages))
            return ids, engine.token_texts(ids)

        return await self._pool.run(work)

    def close(self) -> None:
        self._pool.close()
        self._schemas.close()

    def _pool_for(self, request: GenerationRequest) -> WorkPool:
        engine = self._state.engine
        return self._schemas if engine is not None and not engine.knows(request) else self._pool

    def _worker_or_raise(self) -> Worker:
        worker, engine = self._state.worker, self._state.engine
        if worker is None:
            state = "unconfigured; configure and activate" if engine is None else "inactive; activate"
            raise NotActiveError(f"The node is {state} it first.")
        return worker
