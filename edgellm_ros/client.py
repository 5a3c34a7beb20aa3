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

A model that sees takes images: files, arrays, messages, or the newest frame of a camera that the node listens to::

    print(llm.ask("what is on the table?", images=["table.jpg"]).text)
    print(llm.ask("what do you see?", image_topics=["camera/image_raw"]).text)

An answer can be a message of any type, held to its fields while it is generated::

    pose = llm.ask_for(PoseStamped, "two metres ahead", fields=["pose.position"], deadline=10.0)

Pieces are read from the action's feedback, which DDS may drop when a reader is slow: sequence numbers are compared, and
from the first gap on the rest of the text is taken from the result. Joined, the pieces are always the result's text.
Leaving an iterator early cancels the request.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import rclpy
from action_msgs.msg import GoalStatus
from rclpy.action import ActionClient
from rclpy.action.client import ClientGoalHandle
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.task import Future

from edgellm_ros import qos
from edgellm_ros.action import Generate
from edgellm_ros.client_errors import (
    EngineError,
    InvalidImageError,
    InvalidRequestError,
    InvalidSessionError,
    LLMError,
    NoFrameError,
    NoMessageError,
    NotActiveError,
    PromptTooLongError,
    QueueFullError,
    SessionBusyError,
    UnavailableError,
    error_of,
)
from edgellm_ros.client_images import to_image_messages
from edgellm_ros.client_sessions import AsyncSessions, Sessions, SessionService
from edgellm_ros.msg import ChatMessage, ErrorCode, FinishReason, GenerationRequest, GenerationResult, Tool, ToolCall
from edgellm_ros.sampling_options import OPTION_TYPES
from engine_core.message_types import MessageValueError, message_of, schema_of

__all__ = [
    "LLM", "EngineError", "InvalidImageError", "InvalidRequestError", "InvalidSessionError", "LLMError",
    "NoFrameError", "NoMessageError", "NotActiveError", "PieceText", "Pieces", "PromptTooLongError", "QueueFullError",
    "SessionBusyError", "Stream", "UnavailableError", "error_of", "make_goal",
]  # fmt: skip

_CHECK_INTERVAL = 0.5  # s between two looks whether the node is still there
_CLOSING = 1.0  # s that the node has to answer cancels when a client is closed
_SEND_LIMIT = 30.0  # s that the node has to accept or reject a request
_RESULT_DELAY = 1.0  # s that a result may come after the news that it exists, before it is asked for again
_LOOK = object()  # an event that asks for a look whether the node is still there
_CANCEL = object()  # an event that asks for the end of the request
_TERMINAL = (GoalStatus.STATUS_SUCCEEDED, GoalStatus.STATUS_CANCELED, GoalStatus.STATUS_ABORTED)

Messages = str | Sequence[dict[str, Any] | ChatMessage]


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


# One context, which is one participant of DDS, for all clients of the process that have no node of their own: with
# ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST only the first 32 participants of a machine find each other.
_own_context: list[Context] = []  # once for each client that uses it
_own_context_lock = threading.Lock()


def _take_context() -> Context:
    with _own_context_lock:
        if _own_context and _own_context[0].ok():
            context = _own_context[0]
        else:
            _own_context.clear()
            context = Context()
            rclpy.init(context=context)
        _own_context.append(context)
        return context


def _give_back(context: Context) -> None:
    with _own_context_lock:
        if context in _own_context:
            _own_context.remove(context)
        if context not in _own_context:
            context.try_shutdown()


class _ActionClient(ActionClient):
    """An ActionClient that may be destroyed while a thread of the executor is about to take what has arrived for it.

    An executor of several threads chooses what is ready in one of them and takes it in another; rclpy's own ends such
    an executor with "action client pointer is invalid".
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._taking = threading.Lock()
        self._is_gone = False
        super().__init__(*arguments, **options)

    def take_data(self) -> Any:
        with self._taking:
            return {} if self._is_gone else super().take_data()

    def destroy(self) -> None:
        with self._taking:
            self._is_gone = True
            super().destroy()


class _Action:
    """The action's client, whose calls may be made from any thread.

    rclpy's ActionClient is not made for that: a response that arrives while ``send_goal_async`` is still noting its
    sequence number is dropped. Calls therefore run in the executor, in the callback group of the ActionClient.
    """

    def __init__(self, node: Node, name: str) -> None:
        group = self.group = MutuallyExclusiveCallbackGroup()
        self.name = name
        self._node = node
        self._feedback_topic = f"{name}/_action/feedback"
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._guard = node.create_guard_condition(self._run_calls, callback_group=group)
        # All clients' responses arrive at every client, so that rclpy's depth of 10 is not enough for many of them.
        self.client = _ActionClient(
            node, Generate, name, callback_group=group, feedback_sub_qos_profile=qos.STREAM,
            goal_service_qos_profile=qos.SERVICE, result_service_qos_profile=qos.SERVICE,
            cancel_service_qos_profile=qos.SERVICE,
        )  # fmt: skip

    def run(self, call: Callable[[], None]) -> None:
        """Have the executor run ``call`` soon; from any thread."""
        self._calls.append(call)
        self._guard.trigger()

    def _run_calls(self) -> None:
        while self._calls:
            self._calls.popleft()()

    def servers(self) -> set[bytes]:
        """Return the identities of those who serve the action; a node that was started again has another."""
        return {bytes(info.endpoint_gid) for info in self._node.get_publishers_info_by_topic(self._feedback_topic)}

    def destroy(self, spins: bool, also: Callable[[], None]) -> None:
        """Take it from the node. ``spins``: an executor spins the node, so it is done there, between two waits.

        ``also`` is called at the same place.
        """
        done = threading.Event()
        guard = threading.Lock()

        def destroy() -> None:
            with guard:
                if not done.is_set():
                    self.client.destroy()
                    also()
                    done.set()

        if spins:
            self.run(destroy)
            done.wait(_CLOSING)
        destroy()
        self._node.destroy_guard_condition(self._guard)


class _Piece(NamedTuple):
    sequence: int
    text: str
    reasoning: str


class _Call:
    """One request on its way. ``put`` gets a ``_Piece`` for each piece, then a result or an LLMError."""

    def __init__(
        self, action: _Action, goal: Generate.Goal, put: Callable[[Any], None], forget: Callable[[_Call], None]
    ) -> None:
        """``forget`` is called with this call when it has ended."""
        self._action = action
        self._put = put
        self._forget = forget
        self._servers = action.servers()
        self._sent = time.monotonic()
        self._handle: ClientGoalHandle | None = None  # this and what follows belongs to the executor's thread
        self._was_sent = self._cancelled = self._cancel_answered = self._ended = False
        self._terminal_since: float | None = None
        action.run(partial(self._send, goal))

    def cancel(self) -> None:
        """End the request if it runs; from any thread, at once."""
        self._action.run(self._cancel)

    @property
    def is_settled(self) -> bool:
        """The request has ended, or the node has heard that it is to end."""
        return self._ended or self._cancel_answered

    def check(self) -> None:
        """Raise UnavailableError if nothing will come any more; to be called now and then while waiting."""
        if self._ended:
            return
        if not self._action.client.server_is_ready() or not self._servers & self._action.servers():
            raise UnavailableError(f"The node that offered {self._action.name} is gone.")
        if self._handle is None and time.monotonic() - self._sent > _SEND_LIMIT:
            limit = f"{_SEND_LIMIT:.0f} s"
            if self._was_sent:
                raise UnavailableError(f"{self._action.name} has not answered for {limit}.")
            raise UnavailableError(f"The request was not sent in {limit}: no executor spins the client's node.")
        self._action.run(self._look_for_result)

    # --- in the executor's thread ---------------------------------------------------------------------

    def _send(self, goal: Generate.Goal) -> None:
        self._was_sent = True
        if self._cancelled:
            self._end(UnavailableError("The request was cancelled before it was sent."))
            return
        try:
            sent = self._action.client.send_goal_async(goal, feedback_callback=self._on_feedback)
        except Exception as error:  # text that is no Unicode, say
            self._end(InvalidRequestError(f"The request could not be sent ({error})."))
            return
        sent.add_done_callback(self._on_sent)

    def _cancel(self) -> None:
        self._cancelled = True
        if self._handle is not None and not self._ended:
            self._handle.cancel_goal_async().add_done_callback(self._on_cancelled)

    def _on_cancelled(self, _future: Future) -> None:
        self._cancel_answered = True

    def _on_feedback(self, message: Any) -> None:
        feedback = message.feedback
        self._put(_Piece(feedback.sequence, feedback.text, feedback.reasoning))

    def _on_sent(self, future: Future) -> None:
        try:
            handle = future.result()
            if not handle.accepted:
                self._end(NotActiveError("The node is not active; configure and activate it.", ErrorCode.NOT_ACTIVE))
                return
            self._handle = handle
            if self._cancelled:
                self._cancel()
            handle.get_result_async().add_done_callback(self._on_result)
        except Exception as error:
            self._end(UnavailableError(f"The request could not be sent ({error})."))

    def _look_for_result(self) -> None:
        """Ask again for a result that has been there for a while without arriving: middleware may drop a response."""
        if self._ended or self._handle is None or self._handle.status not in _TERMINAL:
            return
        now = time.monotonic()
        if self._terminal_since is None:
            self._terminal_since = now
        elif now - self._terminal_since > _RESULT_DELAY:
            self._terminal_since = now
            self._handle.get_result_async().add_done_callback(self._on_result)

    def _on_result(self, future: Future) -> None:
        if self._ended:
            return
        try:
            answer = future.result()
            if answer.status not in _TERMINAL:
                raise LookupError("the node does not know it any more")
            result = answer.result.result
            failed = result.error_code != ErrorCode.NONE
            self._end(error_of(result.error_code, result.error_message) if failed else result)
        except Exception as error:
            self._end(UnavailableError(f"The answer was lost ({error})."))

    def _end(self, outcome: Any) -> None:
        self._ended = True
        self._forget(self)
        self._put(outcome)


class Stream:
    """The pieces of one answer, an async iterator of str. ``result``: the whole answer, once it has ended."""

    def __init__(self, llm: LLM, goal: Generate.Goal, on_reasoning: Callable[[str], None] | None = None) -> None:
        self._llm = llm
        self._goal = goal
        self._on_reasoning = on_reasoning
        self.result: GenerationResult | None = None

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
                is_piece = isinstance(event, _Piece)
                if is_piece and event.reasoning and self._on_reasoning is not None:
                    self._on_reasoning(event.reasoning)
                given = text.piece(event.sequence, event.text) if is_piece else text.rest(event.text)
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


class Pieces:
    """The pieces of one answer, an iterator of str. ``result``: the action's result, once it has ended.

    The request is sent when the first piece is asked for. ``close`` leaves the iterator and cancels the request.
    """

    def __init__(self, llm: LLM, goal: Generate.Goal, on_reasoning: Callable[[str], None] | None = None) -> None:
        self.result: GenerationResult | None = None
        self._on_reasoning = on_reasoning
        self._llm = llm
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        self._pieces = self._receive(goal)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the request if it runs, and the iterator."""
        self._pieces.close()

    def cancel(self) -> None:
        """End the request; the iterator goes on to its end and gives a result with what there was.

        May be called from any thread and from a signal handler."""
        self._events.put(_CANCEL)

    def _receive(self, goal: Generate.Goal) -> Generator[str, None, None]:
        self._llm.wait()
        call = self._llm._send(goal, self._events.put)
        text, ended = PieceText(), False
        try:
            while not ended:
                try:
                    event = self._events.get(timeout=_CHECK_INTERVAL)
                except queue.Empty:
                    self._llm._check(call)
                    continue
                if event is _CANCEL:
                    call.cancel()
                    continue
                ended = not isinstance(event, _Piece)
                if isinstance(event, LLMError):
                    raise event
                if ended:
                    self.result = event
                if not ended and event.reasoning and self._on_reasoning is not None:
                    self._on_reasoning(event.reasoning)
                if given := text.rest(event.text) if ended else text.piece(event.sequence, event.text):
                    yield given
        finally:
            if not ended:
                call.cancel()


class LLM:
    """A client of the node ``name``. Without ``node`` it has a node and an executor thread of its own;
    such clients of one process share a context of rclpy.

    With ``node``, an executor has to spin that node in another thread than the one that waits here. A request takes:
    ``messages`` (a text, or turns of role and content) or ``prompt``, one of ``json_schema``, ``schema_name``,
    ``regex``, ``choices`` and ``grammar``, for JSON ``compact_json`` and ``max_string``, ``tools``, ``tool_choice``,
    ``parallel_tool_calls``, ``template_variables``, ``thinking``, ``thinking_budget``, ``adapter``, ``session``
    (``messages`` are then the new ones, the node has the others), ``context_policy``, ``images`` (paths of files,
    arrays, pictures of Pillow, messages), ``image_topics`` with ``frames_per_topic``, ``frames_span`` (s) and
    ``max_image_age`` (s), ``stop``, ``priority``, ``deadline`` (s), ``request_id``, ``allow_special``, and the options
    of msg/SamplingOptions that have one value. A turn may say where its images stand, in ``image_offsets``.
    Pieces are those of the text; a result has the reasoning and the tool calls, too. ``on_reasoning`` is called with
    each part of the reasoning, where the pieces are iterated; a part may be lost, the result has the whole.
    ``sessions`` lists, resets, forks, saves and loads the node's sessions, ``async_sessions`` does it in asyncio.
    Close it, or use it in a ``with`` or ``async with``.
    """

    def __init__(self, name: str = "/llm", *, node: Node | None = None, wait: float = 5.0) -> None:
        """``wait``: seconds to look for the node when a request is sent."""
        self._name = name if name.startswith("/") or node is not None else f"/{name}"
        self._wait = wait
        self._context: Context | None = None
        self._executor: SingleThreadedExecutor | None = None
        self._closing = False
        if node is None:
            self._context = _take_context()
            # It logs nothing; a second client with this name would make rcl warn of its topic /rosout.
            node = Node("llm_client", context=self._context, start_parameter_services=False, enable_rosout=False)
            self._executor = SingleThreadedExecutor(context=self._context)
            self._executor.add_node(node)
        self._node = node
        self._calls: set[_Call] = set()  # requests that have not ended
        self._action: _Action | None = _Action(node, f"{self._name}/generate")
        self._session_service = SessionService(node, f"{self._name}/sessions", wait, self._action.group, self._run)
        self.sessions = Sessions(self._session_service)
        self.async_sessions = AsyncSessions(self.sessions)
        if self._executor is not None:
            self._thread = threading.Thread(target=self._spin, name="llm-client", daemon=True)
            self._thread.start()

    def _spin(self) -> None:
        assert self._executor is not None and self._context is not None
        while not self._closing and self._context.ok():
            self._executor.spin_once(timeout_sec=_CHECK_INTERVAL)

    def close(self) -> None:
        """Cancel what still runs and give everything back; may be called twice."""
        action, self._action = self._action, None
        if action is None:
            return
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        end = time.monotonic() + _CLOSING
        while any(not call.is_settled for call in calls) and time.monotonic() < end:
            time.sleep(0.005)  # the executor's thread sends the cancels and hears that they have arrived
        if self._executor is not None:
            self._closing = True
            action.run(lambda: None)  # wakes it
            self._thread.join(2.0)
            self._executor.shutdown()
        action.destroy(spins=self._executor is None, also=self._session_service.destroy)
        if self._context is not None:
            self._node.destroy_node()
            _give_back(self._context)

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
        if not self._open_action().client.wait_for_server(self._wait):
            raise UnavailableError(f"No node offers {self._name}/generate; start it, or give another name.")

    # --- asyncio --------------------------------------------------------------------------------------

    def stream(
        self, messages: Messages = (), *, on_reasoning: Callable[[str], None] | None = None, **options: Any
    ) -> Stream:
        """Return the pieces of an answer as they come. Iterating raises LLMError."""
        return Stream(self, make_goal(messages, **options), on_reasoning)

    async def generate(self, messages: Messages = (), **options: Any) -> GenerationResult:
        """Return the whole answer, with its figures. Raises LLMError."""
        stream = self.stream(messages, **options)
        async for _ in stream:
            pass
        assert stream.result is not None
        return stream.result

    async def generate_for(
        self, message_type: type, messages: Messages = (), *, fields: Sequence[str] = (), **options: Any
    ) -> Any:
        """Return the answer as a message, as ``ask_for`` does."""
        return _message_in(await self.generate(messages, **_form_of(message_type, fields), **options), message_type)

    # --- without asyncio ------------------------------------------------------------------------------

    def pieces(
        self, messages: Messages = (), *, on_reasoning: Callable[[str], None] | None = None, **options: Any
    ) -> Pieces:
        """Return the pieces of an answer as they come. Iterating raises LLMError."""
        return Pieces(self, make_goal(messages, **options), on_reasoning)

    def ask(self, messages: Messages = (), **options: Any) -> GenerationResult:
        """Return the whole answer, with its figures. Raises LLMError."""
        pieces = self.pieces(messages, **options)
        for _ in pieces:
            pass
        assert pieces.result is not None
        return pieces.result

    def ask_for(
        self, message_type: type, messages: Messages = (), *, fields: Sequence[str] = (), **options: Any
    ) -> Any:
        """Return the answer as a message of ``message_type``, a class such as geometry_msgs' PoseStamped.

        ``fields``: dotted paths of those that the model fills in, such as ``pose.position``; the others keep their
        defaults. Without it, it fills in all. The model is not told what the fields are: say it in ``messages``.
        Raises LLMError; NoMessageError if the answer was cut; engine_core's MessageTypeError for an unknown field.
        """
        return _message_in(self.ask(messages, **_form_of(message_type, fields), **options), message_type)

    # --- helpers --------------------------------------------------------------------------------------

    def _open_action(self) -> _Action:
        if self._action is None:
            raise UnavailableError(f"The client of {self._name} is closed.")
        return self._action

    def _run(self, call: Callable[[], None]) -> None:
        self._open_action().run(call)

    def _send(self, goal: Generate.Goal, put: Callable[[Any], None]) -> _Call:
        call = _Call(self._open_action(), goal, put, self._calls.discard)
        self._calls.add(call)
        return call

    def _check(self, call: _Call) -> None:
        self._open_action()
        call.check()


def _form_of(message_type: type, fields: Sequence[str]) -> dict[str, Any]:
    return {"json_schema": json.dumps(schema_of(message_type, fields)), "compact_json": True}


def _message_in(result: GenerationResult, message_type: type) -> Any:
    if result.finish_reason != FinishReason.STOP:
        raise NoMessageError(f"The answer ended before it was whole (finish reason {result.finish_reason}).", result)
    try:
        return message_of(message_type, result.text)
    except MessageValueError as error:
        raise NoMessageError(str(error), result) from None


def make_goal(
    messages: Messages = (),
    *,
    prompt: str = "",
    json_schema: str | dict[str, Any] = "",
    schema_name: str = "",
    regex: str = "",
    choices: Sequence[str] = (),
    grammar: str = "",
    compact_json: bool = False,
    max_string: int = 0,
    tools: Sequence[dict[str, Any] | Tool] = (),
    tool_choice: str = "",
    parallel_tool_calls: bool = True,
    template_variables: dict[str, Any] | None = None,
    thinking: str = "",
    thinking_budget: int = 0,
    adapter: str = "",
    session: str = "",
    context_policy: str = "",
    images: Iterable[Any] = (),
    image_topics: Sequence[str] = (),
    frames_per_topic: int = 0,
    frames_span: float = 0.0,
    max_image_age: float = 0.0,
    stop: Sequence[str] = (),
    priority: int = 0,
    deadline: float = 0.0,
    request_id: str = "",
    allow_special: bool = False,
    **sampling: float | int,
) -> Generate.Goal:
    """Return the action's goal. Raises TypeError for an option that is not known.

    ``messages`` may be dicts, with ``tool_calls`` as dicts of msg/ToolCall's fields; ``tools`` dicts of msg/Tool's
    fields, where ``parameters`` may be a dict, too, and so may ``json_schema``. ``images`` and what they raise: see
    ``client_images.to_image_messages``.
    """
    if unknown := sorted(sampling.keys() - OPTION_TYPES.keys()):
        raise TypeError(f"{unknown[0]!r} is no option of a request; sampling options are {', '.join(OPTION_TYPES)}.")
    raw, compressed = to_image_messages(images)
    turns: Sequence[Any] = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    request = GenerationRequest(
        messages=[turn if isinstance(turn, ChatMessage) else _to_message(turn) for turn in turns],
        prompt=prompt, json_schema=json.dumps(json_schema) if isinstance(json_schema, dict) else json_schema,
        schema_name=schema_name, regex=regex, choices=list(choices), grammar=grammar, compact_json=compact_json,
        max_string=max_string, tools=[_to_tool(tool) for tool in tools], tool_choice=tool_choice,
        parallel_tool_calls=[] if parallel_tool_calls else [False],
        template_variables=json.dumps(template_variables) if template_variables else "", thinking=thinking,
        thinking_budget=thinking_budget, adapter=adapter, session=session, context_policy=context_policy,
        images=raw, compressed_images=compressed, image_topics=list(image_topics), frames_per_topic=frames_per_topic,
        frames_span=float(frames_span), max_image_age=float(max_image_age), stop=list(stop), priority=priority,
        deadline=float(deadline), request_id=request_id, allow_special=allow_special,
    )  # fmt: skip
    for name, value in sampling.items():
        setattr(request.sampling, name, [OPTION_TYPES[name](value)])
    return Generate.Goal(request=request)


def _to_message(turn: dict[str, Any]) -> ChatMessage:
    calls = [call if isinstance(call, ToolCall) else ToolCall(**call) for call in turn.get("tool_calls", ())]
    return ChatMessage(**{**turn, "tool_calls": calls})


def _to_tool(tool: dict[str, Any] | Tool) -> Tool:
    if isinstance(tool, Tool):
        return tool
    parameters = tool.get("parameters", "")
    return Tool(**{**tool, "parameters": json.dumps(parameters) if isinstance(parameters, dict) else parameters})
