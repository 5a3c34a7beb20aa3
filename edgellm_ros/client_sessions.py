"""The part of the Python client that lists, resets, forks, saves and loads the node's sessions.

    with LLM("/llm") as llm:
        llm.ask("bring me the red cup", session="anna")
        llm.sessions.fork("anna", "ben")
        print([message.content for message in llm.sessions.get("ben").messages])

and in asyncio::

    await llm.async_sessions.fork("anna", "ben")
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.client import Client
from rclpy.node import Node
from rclpy.task import Future

from edgellm_ros import qos
from edgellm_ros.client_errors import InvalidSessionError, UnavailableError, error_of
from edgellm_ros.msg import ErrorCode, SessionInfo
from edgellm_ros.srv import Sessions as SessionsService

_LOOK_INTERVAL = 0.1  # s between two looks for the node
_ANSWER_LIMIT = 30.0  # s that the node has to answer


class SessionService:
    """Calls ~/sessions, from any thread. Its client of rclpy is made at the first call."""

    def __init__(
        self, node: Node, name: str, wait: float, group: CallbackGroup, run: Callable[[Callable[[], None]], None]
    ) -> None:
        """``wait``: s to look for the node. ``run`` has the executor run a function soon, in ``group``; it raises
        UnavailableError once the client is closed."""
        self._node = node
        self._name = name
        self._wait = wait
        self._group = group
        self._run = run
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._is_destroyed = False

    def call(self, command: int, session: str = "", new_session: str = "") -> list[SessionInfo]:
        """Raises LLMError."""
        self._wait_for_node()
        request = SessionsService.Request(command=command, session=session, new_session=new_session)
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._run(lambda: self._send(request, answers.put))
        end = time.monotonic() + _ANSWER_LIMIT
        while True:
            try:
                answer = answers.get(timeout=_LOOK_INTERVAL)
                break
            except queue.Empty:
                if not self._is_ready():
                    raise UnavailableError(f"The node that offered {self._name} is gone.") from None
                if time.monotonic() > end:
                    raise UnavailableError(f"{self._name} has not answered for {_ANSWER_LIMIT:.0f} s.") from None
        if isinstance(answer, Exception):
            raise answer
        if answer.error_code != ErrorCode.NONE:
            raise error_of(answer.error_code, answer.error_message)
        return list(answer.sessions)

    def destroy(self) -> None:
        """Take it from the node; in the executor's thread, if one spins."""
        with self._lock:
            self._is_destroyed = True
            if self._client is not None:
                self._node.destroy_client(self._client)
                self._client = None

    def _wait_for_node(self) -> None:
        end = time.monotonic() + self._wait
        while not self._is_ready():
            if time.monotonic() > end:
                raise UnavailableError(f"No node offers {self._name}; start it, or give another name.")
            time.sleep(_LOOK_INTERVAL)

    def _is_ready(self) -> bool:
        """Raises UnavailableError if the client is closed."""
        self._run(lambda: None)
        with self._lock:
            if self._is_destroyed:
                return False
            if self._client is None:
                self._client = self._node.create_client(
                    SessionsService, self._name, qos_profile=qos.SERVICE, callback_group=self._group
                )
            return self._client.service_is_ready()

    def _send(self, request: SessionsService.Request, put: Callable[[Any], None]) -> None:
        """Send the call; runs in the executor's thread."""

        def answered(future: Future) -> None:
            error = future.exception()
            put(future.result() if error is None else UnavailableError(f"The answer was lost ({error})."))

        try:
            with self._lock:
                if self._client is None:
                    return
                sent = self._client.call_async(request)
        except Exception as error:  # a name that is no Unicode, say
            put(InvalidSessionError(f"The request could not be sent ({error}).", ErrorCode.INVALID_SESSION))
            return
        sent.add_done_callback(answered)


class Sessions:
    """The node's sessions. Every method raises LLMError: InvalidSessionError for a name that is not allowed, not known
    or taken, or a file at fault; NotActiveError while the node is not configured; UnavailableError without a node."""

    def __init__(self, service: SessionService) -> None:
        self._service = service

    def list(self) -> list[SessionInfo]:
        """Return all sessions without their messages, the one used last first."""
        return self._service.call(SessionsService.Request.LIST)

    def get(self, name: str) -> SessionInfo:
        """Return one session with its messages."""
        return self._one(SessionsService.Request.LIST, name)

    def reset(self, name: str) -> SessionInfo:
        """Forget a session and its KV; return what it was. An answer under way is added to no history."""
        return self._one(SessionsService.Request.RESET, name)

    def reset_all(self) -> None:
        """Forget all sessions."""
        self._service.call(SessionsService.Request.RESET)

    def fork(self, name: str, new_name: str) -> SessionInfo:
        """Make a session with the history of another; return it."""
        return self._one(SessionsService.Request.FORK, name, new_name)

    def save(self, name: str) -> SessionInfo:
        """Have the node write the history to its sessions_dir, in the place of an older one; return the session."""
        return self._one(SessionsService.Request.SAVE, name)

    def load(self, name: str) -> SessionInfo:
        """Have the node make the session from its file; return it."""
        return self._one(SessionsService.Request.LOAD, name)

    def _one(self, command: int, name: str, new_name: str = "") -> SessionInfo:
        if not name or "\0" in name + new_name:  # "" stands for all of them, and a ROS string ends at a NUL
            problem = "has a NUL character" if name else "is empty"
            raise InvalidSessionError(f"The session's name {problem}; give another one.", ErrorCode.INVALID_SESSION)
        (info,) = self._service.call(command, name, new_name)
        return info


class AsyncSessions:
    """``Sessions`` in asyncio: the same methods and errors. A call that is cancelled is carried out all the same."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def list(self) -> list[SessionInfo]:
        return await asyncio.to_thread(self._sessions.list)

    async def get(self, name: str) -> SessionInfo:
        return await asyncio.to_thread(self._sessions.get, name)

    async def reset(self, name: str) -> SessionInfo:
        return await asyncio.to_thread(self._sessions.reset, name)

    async def reset_all(self) -> None:
        await asyncio.to_thread(self._sessions.reset_all)

    async def fork(self, name: str, new_name: str) -> SessionInfo:
        return await asyncio.to_thread(self._sessions.fork, name, new_name)

    async def save(self, name: str) -> SessionInfo:
        return await asyncio.to_thread(self._sessions.save, name)

    async def load(self, name: str) -> SessionInfo:
        return await asyncio.to_thread(self._sessions.load, name)
