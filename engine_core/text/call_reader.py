"""Read the calls of an answer as they are written, part by part of their format."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from engine_core.request import LIMITS, MAX_NESTING, nesting
from engine_core.text.call_formats import Arguments, CallFormat, Marker, Part, Parts, Slot

_QUOTE, _BACKSLASH = b'"\\'
_OPEN, _CLOSE = b"{[", b"}]"
_PARAMETER, _PARAMETER_END = b"<parameter=", b"\n</parameter>\n"

StringParameters = Mapping[
    str, frozenset[str]
]  # tool → the parameters whose values Arguments.XML writes without quotes


class CallReader:
    """Follows the calls from their first part on. ``calls``: (name, arguments) of each whose arguments are whole.

    What is fed has to keep to the format, as an answer does that is held to its grammar; a reader that finds something
    else reads nothing more, so that there is no call then. So does one that finds what no request could bring back:
    arguments of more than MAX_NESTING levels, or more than LIMITS.tool_calls calls.
    """

    def __init__(self, form: CallFormat, token_markers: frozenset[str], strings: StringParameters) -> None:
        """``token_markers``: the texts of markers that are one token. The others are read as text."""
        self._form = form
        self._token_markers = token_markers
        self._strings = strings
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.in_value = False  # the next byte belongs to a JSON value …
        self.num_values = 0  # … of which this is the number
        self._is_broken = False
        self._parts: Parts = (*form.before, *form.call)
        self._index = 0
        self._offset = 0  # in a part that is text
        self._name = b""
        self._between_calls = self._is_over = False
        # Of the arguments:
        self._text = bytearray()
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._parameter: str | None = None
        self._found: dict[str, Any] = {}
        self._items: list[bytes | None] = []  # Arguments.BARE: runs of bytes, None for a quote marker

    def fork(self) -> CallReader:
        """Return a reader of the same calls so far."""
        other = copy.copy(self)
        other.calls, other._found, other._items = self.calls[:], self._found.copy(), self._items[:]
        other._text = self._text[:]
        return other

    def skip_before(self) -> None:
        """Begin with the call itself: the answer has left out what comes before the calls."""
        self._index = len(self._form.before)

    def begin_unmarked(self, name: str, rest: Parts) -> None:
        """Begin behind the name of a call without markers, of which ``rest`` follows; no other one comes after it."""
        self._parts, self._index, self._is_over = tuple(part for part in rest if part), 0, True
        self._name = name.encode()

    def feed(self, data: bytes) -> bytes:
        """Go on by text; return what of it belongs to JSON values."""
        values = bytearray()
        try:
            for byte in data:
                if self.in_value:
                    values.append(byte)
                self._feed_byte(byte)
        except (ValueError, RecursionError):  # of a JSON value
            self._is_broken, self.in_value = True, False
        return bytes(values)

    def marker(self, text: str) -> None:
        """Go on by a marker that is one token."""
        form = self._form
        if self._is_broken:
            return
        if self._part is Slot.ARGUMENTS and form.quote is not None and text == form.quote.text:
            self._in_string = not self._in_string
            self._items.append(None)
            self.in_value = not self._in_string
            return
        if self._between_calls:
            self._choose(lambda part: isinstance(part, Marker) and part.text == text)
        if self._part in (Slot.NAME, Slot.ID):
            self._next()
        part = self._part
        if isinstance(part, Marker) and part.text == text:
            self._next()
        else:
            self._is_broken = True

    # --- parts ------------------------------------------------------------------------------------------

    @property
    def _part(self) -> Part | None:
        return self._parts[self._index] if self._index < len(self._parts) else None

    def _literal(self, part: Part | None) -> bytes:
        """Return a part that is read as text."""
        if isinstance(part, Marker):
            return b"" if part.text in self._token_markers else part.text.encode()
        return part.encode() if isinstance(part, str) else b""

    def _next(self) -> None:
        self._index += 1
        self._offset = 0
        self._name = b"" if self._part is Slot.NAME else self._name
        if self._part is Slot.ARGUMENTS:
            self._text.clear()
            self._depth, self._in_string, self._is_escaped = 0, False, False
            self._parameter, self._found, self._items = None, {}, []
            self.in_value = self._form.arguments is not Arguments.XML
            self.num_values += self.in_value
        elif self._part is None:
            self._between_calls = not self._is_over

    def _choose(self, begins: Any) -> None:
        """Between two calls: go on to the next one, or to what comes after them, by how it begins."""
        form, self._between_calls = self._form, False
        another = (*form.between, *form.call)
        self._is_over = not begins(another[0])
        self._parts = form.after if self._is_over else another
        self._index = self._offset = 0

    def _feed_byte(self, byte: int) -> None:
        if self._is_broken:
            return
        if self._between_calls:
            self._choose(lambda part: self._literal(part)[:1] == bytes((byte,)))
        part = self._part
        if part is Slot.ARGUMENTS:
            self._feed_arguments(byte)
            return
        if part in (Slot.NAME, Slot.ID):
            following = self._literal(self._parts[self._index + 1])
            if following[:1] != bytes((byte,)):
                self._name += bytes((byte,)) if part is Slot.NAME else b""
                return
            self._next()
            part = self._part
        text = self._literal(part)
        if text[self._offset : self._offset + 1] != bytes((byte,)):
            self._is_broken = True
            return
        self._offset += 1
        if self._offset == len(text):
            self._next()

    # --- arguments --------------------------------------------------------------------------------------

    def _end_arguments(self, arguments: dict[str, Any]) -> None:
        if nesting(arguments) > MAX_NESTING or len(self.calls) == LIMITS.tool_calls:
            raise ValueError("a request cannot have this call")
        self.in_value = False
        self.calls.append((self._name.decode(), arguments))
        self._next()

    def _feed_arguments(self, byte: int) -> None:
        if self._form.arguments is Arguments.XML:
            self._feed_xml(byte)
        elif self._form.arguments is Arguments.BARE:
            self._feed_bare(byte)
        else:
            self._feed_json(byte)

    def _feed_json(self, byte: int) -> None:
        self._text.append(byte)
        if self._in_string:
            self._in_string = byte != _QUOTE or self._is_escaped
            self._is_escaped = byte == _BACKSLASH and not self._is_escaped
        elif byte == _QUOTE:
            self._in_string = True
        elif byte in _OPEN:
            self._depth += 1
        elif byte in _CLOSE:
            self._depth -= 1
            if self._depth == 0:
                self._end_arguments(json.loads(bytes(self._text)))

    def _feed_xml(self, byte: int) -> None:
        text = self._text
        text.append(byte)
        if self._parameter is not None:
            if text.endswith(_PARAMETER_END):
                value, name = bytes(text[: -len(_PARAMETER_END)]).decode("utf-8", "replace"), self._parameter
                is_string = name in self._strings.get(self._name.decode(), ())
                self._found[name] = value if is_string else json.loads(value)
                text.clear()
                self._parameter, self.in_value = None, False
        elif text.startswith(_PARAMETER) and text.endswith(b">\n"):
            self._parameter = bytes(text[len(_PARAMETER) : -2]).decode("utf-8", "replace")
            text.clear()
            self.in_value = self._parameter not in self._strings.get(self._name.decode(), ())
            self.num_values += self.in_value
        elif not _PARAMETER.startswith(text[: len(_PARAMETER)]):  # the part after the arguments has begun
            rest = bytes(text)
            self._end_arguments(self._found)
            for each in rest:
                self._feed_byte(each)

    def _feed_bare(self, byte: int) -> None:
        if not self._in_string:
            if byte in _OPEN:
                self._depth += 1
            elif byte in _CLOSE and self._depth == 0:
                self._end_arguments(_parse_bare(self._items))
                self._feed_byte(byte)
                return
            elif byte in _CLOSE:
                self._depth -= 1
        if self._items and self._items[-1] is not None:
            self._items[-1] += bytes((byte,))
        else:
            self._items.append(bytes((byte,)))


class _BareText:
    """The arguments of one call, read from the left."""

    def __init__(self, items: list[bytes | None]) -> None:
        self._items = [*items]
        self._at = 0  # in the first run of bytes

    def peek(self) -> str:
        """Return the next character, a double quote for a quote marker; nothing at the end."""
        while self._items and self._items[0] is not None and self._at == len(self._items[0]):
            self._items.pop(0)
            self._at = 0
        if not self._items:
            return ""
        run = self._items[0]
        return '"' if run is None else chr(run[self._at])

    def take(self) -> str:
        found = self.peek()
        self._at += 1
        return found

    def until(self, ends: str) -> str:
        """Return the text before one of the characters ``ends``."""
        found = bytearray()
        while (character := self.peek()) and character not in ends:
            found.append(ord(self.take()))
        return found.decode("utf-8", "replace")

    def string(self) -> str:
        """Return the text between two quote markers."""
        assert self._items.pop(0) is None
        self._at = 0
        text = self._items.pop(0) if self._items and self._items[0] is not None else b""
        assert text is not None
        if self._items:
            self._items.pop(0)
        self._at = 0
        return text.decode("utf-8", "replace")


def _parse_bare(items: list[bytes | None]) -> dict[str, Any]:
    return _parse_members(_BareText(items))


def _parse_members(text: _BareText) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while text.peek() not in ("", "}"):
        name = text.until(":")
        text.take()
        found[name] = _parse_value(text)
        if text.peek() == ",":
            text.take()
    return found


def _parse_value(text: _BareText) -> Any:
    start = text.peek()
    if start == '"':
        return text.string()
    if start == "{":
        text.take()
        found = _parse_members(text)
        text.take()
        return found
    if start == "[":
        text.take()
        items = []
        while text.peek() not in ("", "]"):
            items.append(_parse_value(text))
            if text.peek() == ",":
                text.take()
        text.take()
        return items
    return json.loads(text.until(",}]"))
