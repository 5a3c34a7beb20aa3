"""Sessions: conversations whose history the engine keeps, and what is left out of one that no longer fits.

A request that names a session brings only its new messages; a ``Turn`` puts the history before them, and adds them and
the answer to the history when the answer is there. A session that gets no first answer ends with its request. It is
the text alone. Its KV is found by content in the ``SessionPool``; where it was dropped there, it is computed again.
"""

from __future__ import annotations

import bisect
import dataclasses
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine_core.errors import InvalidSessionError, SessionBusyError
from engine_core.request import ChatMessage, GenerationResult, check_session_name
from engine_core.vision.images import Image

Messages = tuple[ChatMessage, ...]
Images = tuple[Image, ...]
_MOST_IMAGE_BYTES = 512 << 20  # of the images of all sessions


@dataclass
class _Session:
    messages: Messages = ()
    images: Images = ()  # those of the messages, in their order
    num_turns: int = 0  # answers in the history or once in it
    num_tokens: int = 0  # of the last prompt and its answer
    used: float = field(default_factory=time.monotonic)  # s, when it was used last


@dataclass(frozen=True)
class SessionInfo:
    """A session, for people."""

    name: str
    is_answering: bool
    messages: Messages
    num_turns: int
    num_tokens: int  # of the last prompt and its answer
    idle: float  # s since its last answer, or since it was made


class Turn:
    """The part that one request has in a session. No other request of the session is taken until it has ended.

    It ends with ``end`` or ``leave``, or when nobody holds it any more.
    """

    def __init__(self, sessions: Sessions, name: str, messages: Messages, images: Images = ()) -> None:
        self._sessions = sessions
        self.name = name
        self.images = images  # those of the messages, in their order
        self.messages = messages  # the whole conversation up to the question; without what is left out of it
        self.is_kept = False  # the answer is in the history

    def end(self, result: GenerationResult) -> GenerationResult:
        """Add question and answer to the history, and return the result with the session's turns.

        An answer that was cancelled or is late counts as far as it was spoken. A request that failed, or ended before
        its first text or call, leaves the history as it was; so does one whose session was reset meanwhile. To be
        called once, or ``leave``.
        """
        has_answer = result.error is None and bool(result.text or result.tool_calls)
        num_turns = self._sessions._end(self, result) if has_answer else 0
        self.is_kept = num_turns > 0
        if not has_answer:
            self.leave()
        return dataclasses.replace(result, session_turns=num_turns)

    def leave(self) -> None:
        """End it with the history as it was. May be called again."""
        self._sessions._leave(self)


class Sessions:
    """The sessions of an engine, ``max_sessions`` at most. Thread-safe."""

    def __init__(self, max_sessions: int) -> None:
        self.max_sessions = max_sessions
        self._lock = threading.Lock()
        self._sessions: dict[str, _Session] = {}
        # Of sessions that answer, and of those that begin with this answer. A turn that was dropped is not in it.
        self._open: weakref.WeakValueDictionary[str, Turn] = weakref.WeakValueDictionary()

    def begin(self, name: str, messages: Messages, default_system: str = "", images: Images = ()) -> Turn:
        """Return the turn of a request with ``messages``: new ones, or the whole conversation, history included.

        ``images``: those of the messages, in their order.

        System messages at their beginning take the place of the session's; a session that begins without one gets
        ``default_system``. Raises InvalidSessionError if there are too many sessions, SessionBusyError if the session
        is answering another request.
        """
        with self._lock:
            if name in self._open:
                raise SessionBusyError(f"The session {name!r} is answering another request; send this one after it.")
            session = self._sessions.get(name)
            if session is None:
                self._check_room()
            history = () if session is None else session.messages
            system, new = _parted(messages)
            past_system, past = _parted(history)
            past_images = () if session is None else session.images
            new = new[_end_of(_seen(past, past_images), _seen(new, images)) :]
            images = past_images + images[len(images) - _num_images(new) :]
            self._check_image_bytes(name, images)
            if not system:
                is_first = session is None and default_system
                system = (ChatMessage("system", default_system),) if is_first else past_system
            turn = self._open[name] = Turn(self, name, (*system, *past, *new), images)
            return turn

    def __contains__(self, name: str) -> bool:
        """Return whether there is a session of this name that has an answer."""
        with self._lock:
            return name in self._sessions

    def list(self) -> list[SessionInfo]:
        """Return all sessions, those that begin with an answer under way included; the one used last first."""
        with self._lock:
            return [*self._list()]

    def info(self, name: str) -> SessionInfo:
        """Raises InvalidSessionError if there is no session of this name."""
        with self._lock:
            return self._info(name)

    def reset(self, name: str) -> SessionInfo:
        """Forget a session; return what it was. What it answers now is added to no history.

        Raises InvalidSessionError if there is none of this name.
        """
        with self._lock:
            info = self._info(name)
            self._sessions.pop(name, None)
            self._open.pop(name, None)
            return info

    def reset_all(self) -> Sequence[SessionInfo]:
        """Forget all sessions; return what they were, the one used last first."""
        with self._lock:
            infos = self._list()
            self._sessions.clear()
            self._open.clear()
            return infos

    def fork(self, name: str, new_name: str) -> None:
        """Make a second session with the history of the first. Raises InvalidSessionError."""
        check_session_name(new_name)
        with self._lock:
            source = self._info(name)
            if not source.messages:
                raise InvalidSessionError(f"The session {name!r} has no answer yet; fork it once it has one.")
            self._check_new(new_name)
            images = self._sessions[name].images
            self._sessions[new_name] = _Session(source.messages, images, source.num_turns, source.num_tokens)

    def put(self, name: str, messages: Messages, num_turns: int, num_tokens: int) -> None:
        """Make a session of a history that was saved. Raises InvalidSessionError if there is one of this name."""
        with self._lock:
            self._check_new(name)
            self._sessions[name] = _Session(messages, (), num_turns, num_tokens)

    # --- of a turn ------------------------------------------------------------------------------------

    def _end(self, turn: Turn, result: GenerationResult) -> int:
        """Return the session's turns with this one; 0 if the session was reset meanwhile."""
        with self._lock:
            if self._open.get(turn.name) is not turn:
                return 0
            del self._open[turn.name]
            session = self._sessions.setdefault(turn.name, _Session())
            answer = ChatMessage("assistant", result.text, tool_calls=result.tool_calls, reasoning=result.reasoning)
            session.messages = (*turn.messages, answer)
            session.images = turn.images
            session.num_tokens = result.prompt_tokens + len(result.token_ids)
            session.num_turns += 1
            session.used = time.monotonic()
            return session.num_turns

    def _leave(self, turn: Turn) -> None:
        with self._lock:
            if self._open.get(turn.name) is turn:
                del self._open[turn.name]

    # --- helpers: the lock is held --------------------------------------------------------------------

    def _list(self) -> Sequence[SessionInfo]:
        infos = [self._info(name) for name in {*self._sessions, *self._open}]
        return sorted(infos, key=lambda info: info.idle)

    def _info(self, name: str) -> SessionInfo:
        session, is_answering = self._sessions.get(name), name in self._open
        if session is None:
            if not is_answering:
                raise InvalidSessionError(
                    f"There is no session {name[:64]!r}; a session begins with the first request that names it."
                )
            session = _Session()
        idle = time.monotonic() - session.used
        return SessionInfo(name, is_answering, session.messages, session.num_turns, session.num_tokens, idle)

    def _check_new(self, name: str) -> None:
        if name in self._sessions or name in self._open:
            raise InvalidSessionError(f"There is a session {name!r} already; reset it first, or take another name.")
        self._check_room()

    def _check_image_bytes(self, name: str, images: Images) -> None:
        """Raises InvalidSessionError if the images of all sessions take too much memory with these of ``name``."""
        others: list[_Session | Turn] = [each for key, each in self._sessions.items() if key != name]
        others += list(self._open.values())  # ``name`` is not among them
        # A fork shares its images; equal ones that came twice take memory twice.
        kept = {id(image): image for each in others for image in each.images}
        kept |= {id(image): image for image in images}
        if sum(image.pixels.nbytes for image in kept.values()) > _MOST_IMAGE_BYTES:
            raise InvalidSessionError(
                f"The images of all sessions take more than {_MOST_IMAGE_BYTES >> 20} MiB; reset a session that has "
                "some, or send smaller ones."
            )

    def _check_room(self) -> None:
        if len({*self._sessions, *self._open}) >= self.max_sessions:
            raise InvalidSessionError(
                f"There are {self.max_sessions} sessions already, as many as max_sessions allows; reset one of them."
            )


# --- what does not fit ----------------------------------------------------------------------------------------


def without_oldest(messages: Messages, num_turns: int) -> Messages:
    """Return ``messages`` without the ``num_turns`` oldest turns; system messages at the beginning stay.

    A turn is a user's message with all that comes before the next user's.
    """
    first = _num_system(messages)
    starts = _turn_starts(messages)
    return messages[:first] + messages[starts[num_turns] :] if num_turns else messages


def fit_turns(
    messages: Messages, num_tokens: Callable[[Messages], int | None], limit: int, target: int
) -> tuple[Messages, int]:
    """Leave out the oldest turns until the rest has ``limit`` tokens at most, if it has more.

    ``num_tokens`` returns the length of a conversation, or None if it is far too long to be worth tokenizing. Where
    anything is left out, so much is that the rest has ``target`` tokens at most, so that not every following turn has
    to be computed from its start. A turn whose tool calls are answered in a later one leaves with that. The last turn
    always stays, even if it is too long. Returns the messages and the number of turns that were left out.
    """

    def fits(messages: Messages, most: int) -> bool:
        count = num_tokens(messages)
        return count is not None and count <= most

    if fits(messages, limit):
        return messages, 0
    cuts = _cuts(messages)  # the fewest turns that are enough are above cuts[low], up to cuts[high]
    low, high = 0, len(cuts) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if fits(without_oldest(messages, cuts[middle]), target):
            high = middle
        else:
            low = middle
    return without_oldest(messages, cuts[high]), cuts[high]


def _cuts(messages: Messages) -> list[int]:
    """Return the numbers of oldest turns that may be left out, ascending from 0: no tool's answer loses its call.

    The largest is all turns but the last, where a late answer to a call of another turn may stay alone.
    """
    starts = _turn_starts(messages)
    apart: set[int] = set()  # numbers of turns without which an answer stays and its call does not
    turns_of_calls: dict[str, int] = {}
    for index, message in enumerate(messages):
        turn = bisect.bisect_right(starts, index) - 1
        turns_of_calls.update((call.id, turn) for call in message.tool_calls)
        if message.tool_call_id in turns_of_calls:
            apart.update(range(turns_of_calls[message.tool_call_id] + 1, turn + 1))
    last = max(0, len(starts) - 1)
    return [*(count for count in range(last) if count not in apart), last]


def _num_system(messages: Sequence[ChatMessage]) -> int:
    """Return the number of system messages at the beginning."""
    return next((index for index, message in enumerate(messages) if message.role != "system"), len(messages))


def _parted(messages: Messages) -> tuple[Messages, Messages]:
    """Return the system messages at the beginning, and the rest."""
    first = _num_system(messages)
    return messages[:first], messages[first:]


_Seen = tuple[tuple[ChatMessage, Images], ...]  # messages with their images


def _num_images(messages: Messages) -> int:
    return sum(len(message.images) for message in messages)


def _seen(messages: Messages, images: Images) -> _Seen:
    """Return each message, without reasoning, with its images."""
    found, start = [], 0
    for message in _without_reasoning(messages):
        found.append((message, images[start : start + len(message.images)]))
        start += len(message.images)
    return tuple(found)


def _end_of(past: _Seen, messages: _Seen) -> int:
    """Return the index in ``messages`` behind their last part that is ``past``; 0 if they have none.

    A client that sends whole conversations also sends the turns that were left out of the history, and need not send
    what the model thought.
    """
    starts = range(len(messages) - len(past), -1, -1) if past else ()
    return next((start + len(past) for start in starts if messages[start : start + len(past)] == past), 0)


def _without_reasoning(messages: Messages) -> Messages:
    return tuple(dataclasses.replace(each, reasoning="") if each.reasoning else each for each in messages)


def _turn_starts(messages: Sequence[ChatMessage]) -> list[int]:
    first = _num_system(messages)
    starts = [index for index, message in enumerate(messages) if message.role == "user"]
    if not starts or starts[0] > first:  # what an assistant said first belongs to the first turn
        starts = [first, *starts[1:]]
    return starts
