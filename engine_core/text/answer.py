"""Part an answer into reasoning, text and tool calls while it is generated.

Markers that are one token of the model are found by their ids, so that text that spells one is text; others are found
in the text. Whatever the cut of the stream, the parts add up to the same.
"""

from __future__ import annotations

import copy
import enum
import json
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine_core.request import ToolCall
from engine_core.text.call_formats import AnswerFormat, Marker, UnmarkedCalls
from engine_core.text.call_reader import CallReader, StringParameters
from engine_core.text.detokenizer import Decoder, Detokenizer, StopStrings, overlap

_WHITE_SPACE = b" \t\r\n"
_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9  # what Mistral's templates take; the others take anything


class Phase(enum.Enum):
    """The kind of an answer's part."""

    REASONING = "reasoning"
    TEXT = "text"
    CALLS = "calls"


@dataclass(frozen=True)
class ExpectedAnswer:
    """Parts that an answer may have, by the model and the request. Without arguments: text alone."""

    format: AnswerFormat = field(default_factory=AnswerFormat)
    begins_reasoning: bool = False  # the prompt has begun the reasoning
    may_call: bool = False
    is_value: bool = False  # the text is a JSON value
    unmarked: tuple[str, ...] = ()  # tools that may be called without the markers of calls
    strings: StringParameters = field(default_factory=dict)

    @property
    def token_markers(self) -> dict[int, str]:
        """Token id → text of the markers that this answer may have."""
        calls = self.format.calls if self.may_call else None
        reasoning = self.format.reasoning
        markers: list[Marker] = [] if calls is None else calls.markers
        markers += [] if reasoning is None else [reasoning.begin, reasoning.end]
        return {index: m.text for m in markers if (index := self.format.id_of(m)) is not None}


class AnswerScanner:
    """Follows the bytes and markers of an answer. ``phase``: of the next byte; ``in_value``: it is in a JSON value."""

    def __init__(self, expected: ExpectedAnswer) -> None:
        self._expected = expected
        self._form = expected.format
        self.phase = Phase.REASONING if expected.begins_reasoning else Phase.TEXT
        self.has_reasoning = expected.begins_reasoning
        self._label = b""  # of the reasoning's first marker, what has yet to come
        self._held = b""  # the beginning of a marker, maybe
        self._has_text = False
        self._calls: CallReader | None = None
        self._unmarked = UnmarkedCalls(expected.unmarked) if expected.unmarked else None
        self._at_line_start = True

    def fork(self) -> AnswerScanner:
        """Return a scanner of the same answer so far."""
        other = copy.copy(self)
        other._calls = None if self._calls is None else self._calls.fork()
        return other

    @property
    def in_value(self) -> bool:
        if self.phase is Phase.CALLS:
            return self._calls is not None and self._calls.in_value
        return self.phase is Phase.TEXT and self._expected.is_value

    @property
    def num_values(self) -> int:
        """The number of JSON values that have begun, by which one is told from the next."""
        return 0 if self._calls is None else self._calls.num_values

    @property
    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        return [] if self._calls is None else self._calls.calls

    def feed(self, data: bytes) -> list[tuple[Phase, bytes]]:
        """Go on by text. Returns the parts of it that are known: of calls, the bytes inside JSON values alone."""
        data, self._held = self._held + data, b""
        found: list[tuple[Phase, bytes]] = []
        while data:
            if self.phase is Phase.CALLS:
                assert self._calls is not None
                found.append((Phase.CALLS, self._calls.feed(data)))
                break
            if self._label and self._label.startswith(data[: len(self._label)]):
                size = min(len(self._label), len(data))
                self._label, data = self._label[size:], data[size:]
                continue
            self._label = b""
            if self._begins_bare(data):
                self._begin_calls().skip_before()
                data = data.lstrip(_WHITE_SPACE)
                continue
            part, data = self._up_to_marker(data)
            if self._unmarked is not None and self.phase is Phase.TEXT:
                part, rest = self._up_to_unmarked(part, data)
                if rest is not None:
                    found.append((Phase.TEXT, part))
                    data = rest
                    continue
            if part:
                self._has_text = self._has_text or bool(part.strip(_WHITE_SPACE))
                found.append((self.phase, part))
            if self._held:
                break
            if data:
                data = self._pass_marker(data)
        return [(phase, part) for phase, part in found if part]

    def marker(self, text: str) -> list[tuple[Phase, bytes]]:
        """Go on by a marker that is one token. One that has no meaning where it stands is passed over.

        Returns what was held before it.
        """
        held, self._label = self.flush(), b""
        reasoning = self._form.reasoning
        if self.phase is Phase.CALLS:
            assert self._calls is not None
            self._calls.marker(text)
        elif self.phase is Phase.REASONING:
            if reasoning is not None and text == reasoning.end.text:
                self.phase, self._has_text = Phase.TEXT, False
        elif reasoning is not None and text == reasoning.begin.text:
            if not self._has_text and not self.has_reasoning:
                self._begin_reasoning()
        elif self._opening == text:
            self._begin_calls().marker(text)
        return held

    def flush(self) -> list[tuple[Phase, bytes]]:
        """Return what was held, at the end of an answer."""
        held, self._held = self._held, b""
        return [(self.phase, held)] if held else []

    # --- helpers ------------------------------------------------------------------------------------------

    @property
    def _opening(self) -> str:
        calls = self._form.calls if self._expected.may_call else None
        return calls.opening.text if calls is not None and isinstance(calls.opening, Marker) else ""

    def _begin_reasoning(self) -> None:
        assert self._form.reasoning is not None
        self.phase, self.has_reasoning = Phase.REASONING, True
        self._label = self._form.reasoning.label.encode()

    def _begin_calls(self) -> CallReader:
        assert self._form.calls is not None
        self.phase = Phase.CALLS
        tokens = frozenset(self._form.token_ids)
        self._calls = CallReader(self._form.calls, tokens, self._expected.strings)
        return self._calls

    def _begins_bare(self, data: bytes) -> bool:
        calls = self._form.calls
        if self.phase is not Phase.TEXT or self._has_text or not self._expected.may_call:
            return False
        if calls is None or not calls.may_be_bare:
            return False
        return (data.lstrip(_WHITE_SPACE) if self.has_reasoning else data)[:1] == b"{"

    def _awaited(self) -> list[bytes]:
        """Return the markers that are text and may come now."""
        reasoning, markers = self._form.reasoning, []
        if self.phase is Phase.REASONING:
            markers = [] if reasoning is None else [reasoning.end.text]
        else:
            if reasoning is not None and not self._has_text and not self.has_reasoning:
                markers.append(reasoning.begin.text)
            if self._opening:
                markers.append(self._opening)
        return [text.encode() for text in markers if text not in self._form.token_ids]

    def _up_to_marker(self, data: bytes) -> tuple[bytes, bytes]:
        """Return what comes before the first marker, and the rest, which begins with it; holds the start of one."""
        awaited = self._awaited()
        if starts := [start for marker in awaited if (start := data.find(marker)) >= 0]:
            return data[: min(starts)], data[min(starts) :]
        keep = max((overlap(data, marker) for marker in awaited), default=0)
        self._held = data[len(data) - keep :]
        return data[: len(data) - keep], b""

    def _up_to_unmarked(self, part: bytes, after: bytes) -> tuple[bytes, bytes | None]:
        """Return what of a text comes before an unmarked call, and what follows the call's beginning; None without one.

        ``after``: what follows the text, a marker. Holds what may become such a beginning.
        """
        assert self._unmarked is not None
        text = part if after else part + self._held
        start, end, name = self._unmarked.find(text, self._at_line_start)
        if name:
            rest, self._held = text[end:] + after, b""
            self._begin_calls().begin_unmarked(name, self._unmarked.rest(name))
            return part[:start], rest
        if end == 0 and start < len(text) and not after:
            start = min(start, len(part))
            part, self._held = part[:start], text[start:]
        if part:
            self._at_line_start = part.rstrip(b" \t\r").endswith(b"\n") or (
                self._at_line_start and not part.strip(_WHITE_SPACE)
            )
        return part, None

    def _pass_marker(self, data: bytes) -> bytes:
        """Take the marker that ``data`` begins with; return the rest."""
        reasoning = self._form.reasoning
        marker = next(marker for marker in self._awaited() if data.startswith(marker))
        if self.phase is Phase.REASONING:
            self.phase, self._has_text = Phase.TEXT, False
        elif reasoning is not None and not self._has_text and marker == reasoning.begin.text.encode():
            self._begin_reasoning()
        else:
            self._begin_calls()
            return data  # the reader of calls reads their first marker
        return data[len(marker) :]


class _Trimmed:
    """A text without white space at its end, and at its beginning if ``at_start``."""

    def __init__(self, at_start: bool) -> None:
        self._at_start = at_start
        self._held = ""

    def feed(self, text: str) -> str:
        """Return what can be shown by now; white space at the end waits."""
        text = self._held + text
        if self._at_start:
            text = text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self._at_start = self._at_start and not shown
        return shown

    def flush(self) -> str:
        """Return the white space at the end."""
        held, self._held = self._held, ""
        return held


@dataclass
class Parts:
    """New parts of an answer since it was last asked."""

    reasoning: str = ""
    text: str = ""
    calls: tuple[ToolCall, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.text or self.calls)


class AnswerReader:
    """Takes the tokens of an answer and gives out its parts, in whole characters and whole calls.

    White space between reasoning, text and calls is in none of them. ``stop`` looks at the text alone: it ends before
    the first of these strings, and ``stopped`` is set.
    """

    def __init__(self, tokenizer: Decoder, expected: ExpectedAnswer, stop: Sequence[str] = ()) -> None:
        self._markers: Mapping[int, str] = expected.token_markers
        self._scanner = AnswerScanner(expected)
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(stop)
        self._reasoning = _Trimmed(at_start=True)
        is_trimmed = expected.may_call or expected.format.thinks
        self._text: _Trimmed | None = _Trimmed(at_start=False) if is_trimmed else None
        self._follows_reasoning = False
        self._pending = Parts()
        self._num_calls = 0
        self.num_reasoning_tokens = 0

    @property
    def stopped(self) -> bool:
        return self._stop.found

    @property
    def has_parts(self) -> bool:
        """Something has come since ``take`` was called last."""
        return bool(self._pending)

    def feed(self, token_id: int) -> None:
        """Go on by a token."""
        was_reasoning = self._scanner.phase is Phase.REASONING
        marker = self._markers.get(token_id)
        if marker is None:
            self._scan(self._detokenizer.feed(token_id))
        else:
            self._scan(self._detokenizer.flush())
            self._take(self._scanner.marker(marker))
            self._note_phase()
        self.num_reasoning_tokens += was_reasoning or self._scanner.phase is Phase.REASONING

    def take(self) -> Parts:
        """Return what has come since this was called last."""
        found, self._pending = self._pending, Parts()
        return found

    def finish(self, cut: bool = False) -> None:
        """Take what is held as it is: the answer has ended.

        ``cut``: in its middle, so that the beginning of a marker is no text.
        """
        self._scan(self._detokenizer.flush())
        held = self._scanner.flush()
        self._take([] if cut else held)
        if self._text is not None and self._scanner.phase is Phase.TEXT:
            self._pending.text += self._stop.feed(self._text.flush())
        self._pending.text += self._stop.flush()

    # --- helpers ------------------------------------------------------------------------------------------

    def _scan(self, text: str) -> None:
        if text:
            self._take(self._scanner.feed(text.encode("utf-8", "surrogatepass")))
            self._note_phase()

    def _take(self, parts: list[tuple[Phase, bytes]]) -> None:
        for phase, data in parts:
            text = data.decode("utf-8", "surrogatepass")
            if phase is Phase.REASONING:
                self._pending.reasoning += self._reasoning.feed(text)
            elif phase is Phase.TEXT:
                if self._scanner.has_reasoning and not self._follows_reasoning:
                    self._text, self._follows_reasoning = _Trimmed(at_start=True), True
                shown = text if self._text is None else self._text.feed(text)
                self._pending.text += self._stop.feed(shown)

    def _note_phase(self) -> None:
        for name, arguments in self._scanner.calls[self._num_calls :]:
            text = _in_whole_characters(json.dumps(arguments, ensure_ascii=False))
            self._pending.calls += (ToolCall(_new_id(), name, text),)
            self._num_calls += 1
        if self._scanner.phase is Phase.CALLS:
            self._pending.text += self._stop.flush()


def _in_whole_characters(text: str) -> str:
    """Return ``text`` with U+FFFD for each half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _new_id() -> str:
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))
