"""A session as a file: the history as JSON, with the hash of the engine that it was held with."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_core.errors import InvalidSessionError, first_line
from engine_core.formats.atomic import replaced_file
from engine_core.request import LIMITS, ROLES, ChatMessage, ToolCall, check_session_name

_VERSION = 1
# Most bytes of a file: every byte of the text escaped, and what JSON needs around each message.
_MAX_BYTES = 6 * LIMITS.text_bytes + 64 * LIMITS.messages


@dataclass(frozen=True)
class SavedSession:
    """The part of a session that a file holds."""

    messages: tuple[ChatMessage, ...]
    num_turns: int
    num_tokens: int  # of the last prompt and its answer


def save_session(directory: Path, name: str, session: SavedSession, engine_hash: str) -> None:
    """Write ``name``.json in ``directory``, whole or not at all. Raises InvalidSessionError."""
    path = _path(directory, name)
    if any(message.images for message in session.messages):
        raise InvalidSessionError(f"The session {name!r} has images, which are not saved; go on with it here.")
    content = {
        "version": _VERSION,
        "engine": engine_hash,
        "num_turns": session.num_turns,
        "num_tokens": session.num_tokens,
        "messages": [_to_json(message) for message in session.messages],
    }
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    try:
        directory.mkdir(0o700, parents=True, exist_ok=True)  # what people said is theirs
        with replaced_file(path) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidSessionError(f"The session {name!r} could not be saved ({error.strerror}): {path}.") from None


def load_session(directory: Path, name: str, engine_hash: str) -> SavedSession:
    """Read what ``save_session`` wrote. Raises InvalidSessionError if it is missing, damaged or of another engine."""
    path = _path(directory, name)
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidSessionError(f"{path} is not a saved session: it is no file.")
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise InvalidSessionError(f"No session {name!r} has been saved in {directory}.") from None
    except OSError as error:
        raise InvalidSessionError(f"The session {name!r} could not be read ({error.strerror}): {path}.") from None
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError("it is too large")
        content = json.loads(data)
        if content["version"] != _VERSION:
            raise ValueError(f"it has version {content['version']!r:.20}, expected {_VERSION}")
        if content["engine"] != engine_hash:
            raise InvalidSessionError(
                f"The session {name!r} was held with another engine ({content['engine']!r:.14}…, this one is "
                f"{engine_hash[:12]}…); configure that engine to go on with it."
            )
        return SavedSession(_messages(content["messages"]), _count(content["num_turns"]), _count(content["num_tokens"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise InvalidSessionError(f"{path} is not a saved session: {reason[:200]}.") from None


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for the other end of a named pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _path(directory: Path, name: str) -> Path:
    check_session_name(name)  # so that no name leads out of the directory
    return directory / f"{name}.json"


def _to_json(message: ChatMessage) -> dict[str, Any]:
    """Return the fields that are not empty."""
    values = dataclasses.asdict(message)
    return {name: value for name, value in values.items() if value or name in ("role", "content")}


def _messages(values: list) -> tuple[ChatMessage, ...]:
    messages = tuple(
        ChatMessage(**{**value, "tool_calls": tuple(ToolCall(**call) for call in value.get("tool_calls", ()))})
        for value in values
    )
    if not messages or not all(each.role in ROLES for each in messages):
        raise ValueError("its messages have no known role")
    for text in (text for each in messages for text in each.texts):
        if not isinstance(text, str):
            raise ValueError("its messages have no text")
        text.encode("utf-8")  # JSON can spell half a surrogate pair
    return messages


def _count(value: int) -> int:
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise ValueError(f"{value!r:.20} is not a count")
    return value
