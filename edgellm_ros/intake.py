"""From a message to its awaited result: what service, action and topic have in common."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from rclpy.node import Node
from std_msgs.msg import Header

from edgellm_ros import latency
from edgellm_ros.conversions import error_message, to_messages, to_request
from edgellm_ros.frames import FrameTopics
from edgellm_ros.images import gather_images
from edgellm_ros.msg import GenerationRequest as GenerationRequestMessage
from edgellm_ros.state import NodeState
from edgellm_ros.streams import RequestStream, Topics
from edgellm_ros.threads import complete, new_future, run_in
from engine_core.errors import NotActiveError
from engine_core.request import GenerationRequest, GenerationResult, Piece
from engine_core.serving.intake import DuplicateRequestError, Intake, OpenRequest

_WARNING_INTERVAL = 1.0  # s


class Answer(NamedTuple):
    """The answer to a request of ROS."""

    result: GenerationResult
    image_headers: Sequence[Header] = ()  # of the images that were decoded for it


class RosIntake:
    """Hands messages to ``requests``, the intake of all fronts, and publishes every answer.

    Used from the executor's thread only, where nothing else is said.
    """

    def __init__(
        self, node: Node, topics: Topics, frames: FrameTopics, state: NodeState, before_request: Callable[[], None]
    ) -> None:
        """``before_request`` is called first of all for each request: the settings have to be the newest then."""
        self._node = node
        self._topics = topics
        self._frames = frames
        self._before_request = before_request
        self._state = state
        self.requests = Intake(state, listen=self._listen, on_refused=self._on_refused)
        self.num_open = 0  # requests of ROS whose answer has not been returned yet
        self._warning_lock = threading.Lock()
        self._last_warning = -_WARNING_INTERVAL  # s, time.monotonic
        self._num_unlogged = 0

    async def answer(
        self,
        message: GenerationRequestMessage,
        *,
        on_taken: Callable[[OpenRequest], None] | None = None,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> Answer:
        """Return the answer to a request; what cannot be accepted is answered with its error.

        ``on_taken`` gets the open request, for cancelling; ``on_piece`` each piece, in the worker's thread.
        """
        self.num_open += 1
        message.request_id = message.request_id or uuid.uuid4().hex
        try:
            self._before_request()
            self.requests.worker_or_raise()
            settings = self._state.settings
            request = to_request(message, settings)
            images = gather_images(message, self._frames, settings.max_image_age, self._node.get_clock())
        except Exception as error:
            self.num_open -= 1
            return Answer(self.requests.refuse(message.request_id, error))
        message.images, message.compressed_images = [], []  # they are let go when they have been decoded
        try:
            done = new_future(self._node)
            opened = self.requests.take(
                request, on_piece=on_piece, on_done=partial(complete, self._node, done), images=images
            )
            if on_taken is not None:
                on_taken(opened)
            if self.requests.num_open == 1 and images is None:
                opened.begun.wait(latency.HEAD_START)
            result = await done
            return Answer(result, () if images is None else images.headers)
        finally:
            self.num_open -= 1

    def refuses_goal(self, message: GenerationRequestMessage) -> bool:
        """Return whether the node is not active. ``message`` ends then: a rejected goal has no other answer."""
        try:
            self.requests.worker_or_raise()
        except NotActiveError as error:
            self.requests.refuse(message.request_id or uuid.uuid4().hex, error)
            return True
        return False

    async def tokenize(self, text: str, messages: Sequence[Any]) -> tuple[list[int], list[str]]:
        """Token ids and the text of each. Raises RequestError; NotActiveError while nothing is configured."""
        engine = self._state.engine
        if engine is None:
            raise NotActiveError("Nothing is configured; configure the node first.")

        request = GenerationRequest("", to_messages(messages), text)
        request.check_sizes()  # it may have to wait

        def work() -> tuple[list[int], list[str]]:
            ids = engine.tokenize(request.prompt, request.messages)
            return ids, engine.token_texts(ids)

        return await run_in(self.requests.pool, self._node, work)

    def close(self) -> None:
        self.requests.close()

    # --- any thread -----------------------------------------------------------------------------------

    def _listen(self, request: GenerationRequest) -> RequestStream:
        return RequestStream(self._topics, request.request_id, spoken=not request.is_json)

    def _on_refused(self, result: GenerationResult, error: Exception) -> None:
        """Log a refusal and end it on every topic, also while the node is not active.

        A duplicate of a running request ends on ~/stats alone: its id belongs to the one that runs.
        """
        self._warn(result.request_id, error)
        if isinstance(error, DuplicateRequestError):
            self._topics.publish_stats(result)
        else:
            RequestStream(self._topics, result.request_id).done(result)

    def _warn(self, request_id: str, error: Exception) -> None:
        """Log a refusal, at most one a second; the next line says how many were left out."""
        with self._warning_lock:
            now = time.monotonic()
            if now - self._last_warning < _WARNING_INTERVAL:
                self._num_unlogged += 1
                return
            more = f" ({self._num_unlogged} more were refused since the last line)" if self._num_unlogged else ""
            self._last_warning, self._num_unlogged = now, 0
        self._node.get_logger().warning(f"Request {request_id[:64]!r} refused: {error_message(error)[:500]}{more}")
