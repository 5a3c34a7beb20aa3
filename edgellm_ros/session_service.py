"""~/sessions: list, reset, fork, save and load the conversations whose history the engine keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.node import Node

from edgellm_ros import qos
from edgellm_ros.conversions import error_code, error_message, to_message
from edgellm_ros.msg import SessionInfo as SessionInfoMessage
from edgellm_ros.srv import Sessions as SessionsService
from edgellm_ros.state import NodeState
from edgellm_ros.threads import SerialThread
from engine_core.errors import InvalidRequestError, InvalidSessionError, NotActiveError
from engine_core.paths import expand_user
from engine_core.serving.engine import Engine
from engine_core.serving.session_files import SavedSession, load_session, save_session
from engine_core.serving.sessions import SessionInfo


class SessionService:
    """Answers ~/sessions while the node is configured, in a thread of its own: a disk may take its time."""

    def __init__(self, node: Node, state: NodeState, directory: str) -> None:
        """``directory``: where sessions are saved; "" = nowhere."""
        self._state = state
        self._directory = expand_user(directory) if directory else None
        self._thread = SerialThread(node, "edgellm-sessions")
        node.create_service(
            SessionsService,
            "~/sessions",
            self._answer,
            qos_profile=qos.SERVICE,
            callback_group=ReentrantCallbackGroup(),
        )
        self._commands: dict[int, Callable[[Engine, SessionsService.Request], list[SessionInfo]]] = {
            SessionsService.Request.LIST: self._list,
            SessionsService.Request.RESET: self._reset,
            SessionsService.Request.FORK: self._fork,
            SessionsService.Request.SAVE: self._save,
            SessionsService.Request.LOAD: self._load,
        }

    def close(self) -> None:
        self._thread.close()

    async def _answer(
        self, request: SessionsService.Request, response: SessionsService.Response
    ) -> SessionsService.Response:
        try:
            response.sessions = await self._thread.run_for_client(partial(self._run, request))
        except Exception as error:
            response.error_code, response.error_message = error_code(error), error_message(error)
        return response

    def _run(self, request: SessionsService.Request) -> list[SessionInfoMessage]:
        engine, command = self._state.engine, self._commands.get(request.command)
        if engine is None:
            raise NotActiveError("Nothing is configured; configure the node first.")
        if command is None:
            raise InvalidRequestError(f"The command {request.command} is unknown; see edgellm_ros/srv/Sessions.")
        return [_to_message(engine, info, with_history=bool(request.session)) for info in command(engine, request)]

    # --- commands -------------------------------------------------------------------------------------

    def _list(self, engine: Engine, request: SessionsService.Request) -> list[SessionInfo]:
        return [engine.sessions.info(request.session)] if request.session else engine.sessions.list()

    def _reset(self, engine: Engine, request: SessionsService.Request) -> list[SessionInfo]:
        return [engine.reset_session(request.session)] if request.session else engine.reset_sessions()

    def _fork(self, engine: Engine, request: SessionsService.Request) -> list[SessionInfo]:
        engine.sessions.fork(request.session, request.new_session)
        return [engine.sessions.info(request.new_session)]

    def _save(self, engine: Engine, request: SessionsService.Request) -> list[SessionInfo]:
        info = engine.sessions.info(request.session)
        if not info.messages:
            raise InvalidSessionError(f"The session {info.name!r} has no answer yet; save it once it has one.")
        saved = SavedSession(info.messages, info.num_turns, info.num_tokens)
        save_session(self._directory_or_raise(), request.session, saved, engine.hash)
        return [info]

    def _load(self, engine: Engine, request: SessionsService.Request) -> list[SessionInfo]:
        saved = load_session(self._directory_or_raise(), request.session, engine.hash)
        engine.sessions.put(request.session, saved.messages, saved.num_turns, saved.num_tokens)
        return [engine.sessions.info(request.session)]

    def _directory_or_raise(self) -> Path:
        if self._directory is None:
            raise InvalidSessionError("The node saves no sessions; start it with the parameter sessions_dir.")
        return self._directory


def _to_message(engine: Engine, info: SessionInfo, *, with_history: bool) -> SessionInfoMessage:
    messages = info.messages if with_history else ()
    return SessionInfoMessage(
        name=info.name,
        answering=info.is_answering,
        num_turns=info.num_turns,
        num_tokens=info.num_tokens,
        kept_tokens=min(engine.pool.kept_tokens(info.name), info.num_tokens),
        idle=info.idle,
        messages=[to_message(message) for message in messages],
    )
