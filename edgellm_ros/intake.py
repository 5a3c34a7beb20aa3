"""From a message to an accepted request and its awaited result: what service, action and topic have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rclpy.node import Node

from edgellm_ros.conversions import error_message, refused, to_messages, to_request
from edgellm_ros.parameters import Settings
from edgellm_ros.streams import RequestStream, Topics
from edgellm_ros.threads import SerialThread, complete, new_future
from engine_core.errors import NotActiveError
from engine_core.request import GenerationRequest, GenerationResult, Piece
from engine_core.serving.engine import Engine
from engine_core.serving.worker import Ticket, Worker

_QUICK_CHARS = 4096
_QUICK_MESSAGES = 32
# Seconds the executor leaves Python to the worker when it begins with a request: the executor's next rounds would take
# 0.6 ms of the first token's way.
_HEAD_START = 0.005


def _is_quick(request: GenerationRequest) -> bool:
    if len(request.messages) > _QUICK_MESSAGES or request.json_schema:
        return False
    return len(request.prompt) + sum(len(message.content) for message in request.messages) <= _QUICK_CHARS


class Intake:
    """Takes requests while ``worker`` is set; used from the executor's thread only.

    Long texts and JSON schemas are worked on in a thread of its own, so that the executor stays free; what takes
    less than a millisecond is not worth the way there and back.
    """

    def __init__(self, node: Node, topics: Topics, settings: Settings, before_request: Callable[[], None]) -> None:
        """``before_request`` is called first of all for each request: ``settings`` have to be the newest then."""
        self._node = node
        self._topics = topics
        self._before_request = before_request
        self._thread = SerialThread(node, "edgellm-intake")
        self.engine: Engine | None = None  # set while configured
        self.worker: Worker | None = None  # set while active
        self.settings = settings
        self.num_open = 0  # requests whose answer has not been returned yet
        self.num_refused = 0

    @property
    def accepts(self) -> bool:
        return self.worker is not None

    async def answer(
        self,
        message: Any,
        *,
        on_ticket: Callable[[Ticket], None] | None = None,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> GenerationResult:
        """The result of a ``Generate`` request or goal; what cannot be accepted is answered with its error.

        ``on_ticket`` gets the accepted request, for cancelling; ``on_piece`` each piece, in the worker's thread.
        """
        arrival = time.monotonic()
        self.num_open += 1
        try:
            self._before_request()
            return await self._answer(message, on_ticket, on_piece, arrival)
        except Exception as error:
            self.num_refused += 1
            self._node.get_logger().warning(f"Request refused: {error_message(error)}")
            return refused(message.request_id, error)
        finally:
            self.num_open -= 1

    async def _answer(self, message, on_ticket, on_piece, arrival) -> GenerationResult:
        worker = self._worker_or_raise()
        request = to_request(message, self.settings)
        stream = RequestStream(self._topics, request.request_id, on_piece)
        done = new_future(self._node)

        def on_done(result: GenerationResult) -> None:
            try:
                stream.done(result)
            finally:
                complete(self._node, done, result)

        submit = partial(worker.submit, request, on_piece=stream.piece, on_done=on_done, arrival=arrival)
        ticket = submit() if _is_quick(request) else await self._thread.run(submit)
        if on_ticket is not None:
            on_ticket(ticket)
        if self.num_open == 1:
            stream.begun.wait(_HEAD_START)
        return await done

    async def tokenize(self, text: str, messages: Sequence[Any]) -> tuple[list[int], list[str]]:
        """Token ids and the text of each. Raises RequestError; NotActiveError while nothing is configured."""
        engine = self.engine
        if engine is None:
            raise NotActiveError("Nothing is configured; configure the node first.")

        def work() -> tuple[list[int], list[str]]:
            ids = engine.tokenize(text, to_messages(messages))
            return ids, engine.token_texts(ids)

        return await self._thread.run(work)

    def close(self) -> None:
        self._thread.close()

    def _worker_or_raise(self) -> Worker:
        if self.worker is None:
            state = "unconfigured; configure and activate" if self.engine is None else "inactive; activate"
            raise NotActiveError(f"The node is {state} it first.")
        return self.worker
