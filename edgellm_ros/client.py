"""A client of the node, in Python: streams that lose nothing, whole answers, typed errors.

    from edgellm_ros.client import LLM

    with LLM("/llm") as llm:
        print(llm.ask("bring me the red cup").text)
        for piece in llm.pieces("tell me a story"):
            print(piece, end="", flush=True)

and in asyncio::

    async with LLM("/llm") as llm:
        async for piece in llm.stream(messages=[{"role": "user", "content": "hello"}], deadline=10.0):
            print(piece, end="", flush=True)

Pieces are read from the action's feedback, which DDS may drop when a reader is slow: sequence numbers are compared, and
from the first gap on the rest of the text is taken from the result. Joined, the pieces are always the result's text.
Leaving an iterator early cancels the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any

import rclpy
from rclpy.action import ActionClient
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from edgellm_ros import qos
from edgellm_ros.action import Generate
from edgellm_ros.msg import ChatMessage, ErrorCode

_CHECK_INTERVAL = 0.5  # s between two looks whether the node is still there
_CLOSING = 1.0  # s that the node has to answer cancels when a client is closed
_LOOK = object()  # an event that asks for such a look
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_new_tokens")

Messages = str | Sequence[dict[str, str] | ChatMessage]


class LLMError(Exception):
    """Why there is no answer, in one sentence. ``code``: a constant of ``ErrorCode``; 0 where no node gave one."""

    def __init__(self, message: str, code: int = ErrorCode.NONE) -> None:
        super().__init__(message)
        self.code = code


class UnavailableError(LLMError):
    """No node offers the action, or it has gone."""


class InvalidRequestError(LLMError):
    """The request is at fault; sent again unchanged it fails again."""


class PromptTooLongError(InvalidRequestError):
    """The conversation does not fit into the node's max_context."""


class NotActiveError(LLMError):
    """The node is not active; the same request may succeed later."""


class QueueFullError(LLMError):
    """The node has no place for another request; the same request may succeed later."""


class EngineError(LLMError):
    """The engine failed, or its configuration is at fault."""


def error_of(code: int, message: str) -> LLMError:
    """Return the exception of a constant of ``ErrorCode``."""
    exact = {
        ErrorCode.PROMPT_TOO_LONG: PromptTooLongError,
        ErrorCode.NOT_ACTIVE: NotActiveError,
        ErrorCode.QUEUE_FULL: QueueFullError,
    }
    if code in exact:
        return exact[code](message, code)
    return (InvalidRequestError if code < ErrorCode.NOT_ACTIVE else EngineError)(message, code)


class PieceText:
    """The text that has been given out so far, from pieces of which some may be lost."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._expected = 0
        self._has_gap = False

    def piece(self, sequence: int, text: str) -> str:
        """Return what can be given out for a piece: nothing from the first gap on."""
        self._has_gap = self._has_gap or sequence != self._expected
        self._expected = sequence + 1
        if self._has_gap:
            return ""
        self._parts.append(text)
        return text

    def rest(self, whole: str) -> str:
        """Return what is missing of the result's text."""
        return whole[len("".join(self._parts)) :]


class _Call:
    """One request on its way. ``put`` gets ``(sequence, text)`` for each piece, then a result or an LLMError."""

    def __init__(
        self,
        action: ActionClient,
        goal: Generate.Goal,
        put: Callable[[Any], None],
        forget: Callable[[_Call], None],
        find_servers: Callable[[], set[bytes]],
    ) -> None:
        """``forget`` is called with this call when it has ended; ``find_servers`` returns who serves the action."""
        self._action = action
        self._put = put
        self._forget = forget
        self._find_servers = find_servers
        self._servers = find_servers()
        self._cancel_answered = False
        self._lock = threading.Lock()
        self._handle = None
        self._cancelled = self._ended = False
        sent = action.send_goal_async(goal, feedback_callback=self._on_feedback)
        sent.add_done_callback(self._on_sent)

    def cancel(self) -> None:
        """End the request if it runs; from any thread, at once."""
        with self._lock:
            self._cancelled = True
            handle = None if self._ended else self._handle
        if handle is not None:
            self._send_cancel(handle)

    @property
    def is_settled(self) -> bool:
        """The request has ended, or the node has heard that it is to end."""
        return self._ended or self._cancel_answered

    def is_alone(self) -> bool:
        """The node is gone, or another has taken its place: nothing will come any more."""
        if self._ended:
            return False
        return not self._action.server_is_ready() or not self._servers & self._find_servers()

    def _send_cancel(self, handle) -> None:
        def answered(_future) -> None:
            self._cancel_answered = True

        handle.cancel_goal_async().add_done_callback(answered)

    def _on_feedback(self, message) -> None:
        self._put((message.feedback.sequence, message.feedback.text))

    def _on_sent(self, future) -> None:
        try:
            handle = future.result()
            if not handle.accepted:
                self._end(NotActiveError("The node is not active; configure and activate it.", ErrorCode.NOT_ACTIVE))
                return
            with self._lock:
                self._handle = handle
                cancelled = self._cancelled
            if cancelled:
                self._send_cancel(handle)
            handle.get_result_async().add_done_callback(self._on_result)
        except Exception as error:
            self._end(UnavailableError(f"The request could not be sent ({error})."))

    def _on_result(self, future) -> None:
        try:
            result = future.result().result
            failed = result.error_code != ErrorCode.NONE
            self._end(error_of(result.error_code, result.error_message) if failed else result)
        except Exception as error:
            self._end(UnavailableError(f"The answer was lost ({error})."))

    def _end(self, outcome: Any) -> None:
        with self._lock:
            self._ended = True
        self._forget(self)
        self._put(outcome)


def _publishers(node: Node, topic: str) -> set[bytes]:
    """Return the identities of those who publish ``topic``; a node that was started again has another."""
    return {bytes(info.endpoint_gid) for info in node.get_publishers_info_by_topic(topic)}


class Stream:
    """The pieces of one answer, an async iterator of str. ``result``: the action's result, once it has ended."""

    def __init__(self, llm: LLM, goal: Generate.Goal) -> None:
        self._llm = llm
        self._goal = goal
        self.result: Generate.Result | None = None

    async def __aiter__(self) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue = asyncio.Queue()
        await loop.run_in_executor(None, self._llm.wait)

        def put(event: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed, so nobody waits any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        call = self._llm._send(self._goal, put)
        text = PieceText()
        # Beside the queue instead of a time limit on it, which could swallow a cancellation (Python 3.10 and 3.11).
        watcher = asyncio.ensure_future(_look_now_and_then(events))
        try:
            while True:
                event = await events.get()
                if event is _LOOK:
                    self._llm._check(call)
                    continue
                if isinstance(event, LLMError):
                    raise event
                is_piece = isinstance(event, tuple)
                given = text.piece(*event) if is_piece else text.rest(event.text)
                if not is_piece:
                    self.result = event
                if given:
                    yield given
                if not is_piece:
                    return
        finally:
            watcher.cancel()
            if self.result is None:
                call.cancel()


async def _look_now_and_then(events: asyncio.Queue) -> None:
    while True:
        await asyncio.sleep(_CHECK_INTERVAL)
        events.put_nowait(_LOOK)


class LLM:
    """A client of the node ``name``. Without ``node`` it has a node and an executor thread of its own.

    With ``node``, an executor has to spin that node in another thread than the one that waits here. A request takes:
    ``messages`` (a text, or turns of role and content) or ``prompt``, ``json_schema``, ``stop``, ``priority``,
    ``deadline`` (s), ``request_id``, ``allow_special``, and the sampling options temperature, top_p, top_k, min_p,
    repetition_penalty, seed and max_new_tokens. Close it, or use it in a ``with`` or ``async with``.
    """

    def __init__(self, name: str = "/llm", *, node: Node | None = None, wait: float = 5.0) -> None:
        """``wait``: seconds to look for the node when a request is sent."""
        self._name = name if name.startswith("/") or node is not None else f"/{name}"
        self._wait = wait
        self._context: Context | None = None
        self._executor: SingleThreadedExecutor | None = None
        if node is None:
            self._context = Context()
            rclpy.init(context=self._context)
            node = Node("llm_client", context=self._context, start_parameter_services=False)
            self._executor = SingleThreadedExecutor(context=self._context)
            self._executor.add_node(node)
            self._thread = threading.Thread(target=self._executor.spin, name="llm-client", daemon=True)
            self._thread.start()
        self._node = node
        self._calls: set[_Call] = set()  # requests that have not ended
        self._action = ActionClient(node, Generate, f"{self._name}/generate", feedback_sub_qos_profile=qos.STREAM)

    def close(self) -> None:
        """Cancel what still runs and give everything back; may be called twice."""
        if self._action is None:
            return
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        end = time.monotonic() + _CLOSING
        while any(not call.is_settled for call in calls) and time.monotonic() < end:
            time.sleep(0.005)  # the executor's thread sends the cancels and hears that they have arrived
        if self._executor is not None:
            self._executor.shutdown()
            self._thread.join(2.0)
        self._action.destroy()
        self._action = None
        if self._context is not None:
            self._node.destroy_node()
            self._context.try_shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    async def __aenter__(self) -> LLM:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self.close()

    def wait(self) -> None:
        """Wait for the node. Raises UnavailableError if none offers the action in time."""
        if not self._action.wait_for_server(self._wait):
            raise UnavailableError(f"No node offers {self._name}/generate; start it, or give another name.")

    # --- asyncio --------------------------------------------------------------------------------------

    def stream(self, messages: Messages = (), **options: Any) -> Stream:
        """Return the pieces of an answer as they come. Iterating raises LLMError."""
        return Stream(self, make_goal(messages, **options))

    async def generate(self, messages: Messages = (), **options: Any) -> Generate.Result:
        """Return the whole answer, with its figures. Raises LLMError."""
        stream = self.stream(messages, **options)
        async for _ in stream:
            pass
        assert stream.result is not None
        return stream.result

    # --- without asyncio ------------------------------------------------------------------------------

    def pieces(self, messages: Messages = (), **options: Any) -> Iterator[str]:
        """Yield the pieces of an answer; the generator's return value is the result. Raises LLMError."""
        return self._pieces(make_goal(messages, **options))

    def ask(self, messages: Messages = (), **options: Any) -> Generate.Result:
        """Return the whole answer, with its figures. Raises LLMError."""
        pieces = self.pieces(messages, **options)
        while True:
            try:
                next(pieces)
            except StopIteration as stop:
                return stop.value

    def _pieces(self, goal: Generate.Goal) -> Iterator[str]:
        self.wait()
        events: queue.SimpleQueue = queue.SimpleQueue()
        call = self._send(goal, events.put)
        text, ended = PieceText(), False
        try:
            while True:
                try:
                    event = events.get(timeout=_CHECK_INTERVAL)
                except queue.Empty:
                    self._check(call)
                    continue
                ended = not isinstance(event, tuple)
                if isinstance(event, LLMError):
                    raise event
                if given := text.rest(event.text) if ended else text.piece(*event):
                    yield given
                if ended:
                    return event
        finally:
            if not ended:
                call.cancel()

    # --- helpers --------------------------------------------------------------------------------------

    def _send(self, goal: Generate.Goal, put: Callable[[Any], None]) -> _Call:
        if self._action is None:
            raise UnavailableError(f"The client of {self._name} is closed.")
        topic = f"{self._name}/generate/_action/feedback"
        call = _Call(self._action, goal, put, self._calls.discard, partial(_publishers, self._node, topic))
        self._calls.add(call)
        return call

    def _check(self, call: _Call) -> None:
        if self._action is None:
            raise UnavailableError(f"The client of {self._name} was closed.")
        if call.is_alone():
            raise UnavailableError(f"The node {self._name} is gone.")


def make_goal(
    messages: Messages = (),
    *,
    prompt: str = "",
    json_schema: str = "",
    stop: Sequence[str] = (),
    priority: int = 0,
    deadline: float = 0.0,
    request_id: str = "",
    allow_special: bool = False,
    **sampling: float | int,
) -> Generate.Goal:
    """Return the action's goal. Raises TypeError for an option that is not known."""
    if unknown := sorted(sampling.keys() - set(_SAMPLING)):
        raise TypeError(f"{unknown[0]!r} is no option of a request; sampling options are {', '.join(_SAMPLING)}.")
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    goal = Generate.Goal(
        messages=[turn if isinstance(turn, ChatMessage) else ChatMessage(**turn) for turn in turns],
        prompt=prompt, json_schema=json_schema, stop=list(stop), priority=priority, deadline=float(deadline),
        request_id=request_id, allow_special=allow_special,
    )  # fmt: skip
    for name, value in sampling.items():
        is_whole = name in ("top_k", "seed", "max_new_tokens")
        setattr(goal.sampling, name, [int(value) if is_whole else float(value)])
    return goal
