"""Follow a JSON text as it grows: whether it ends inside a string or a number, and which keys its objects have."""

from __future__ import annotations

import copy

_QUOTE, _BACKSLASH, _COMMA, _COLON = b'"\\,:'
_OPEN_OBJECT, _CLOSE_OBJECT, _OPEN_ARRAY, _CLOSE_ARRAY = b"{}[]"
_NUMBER = b"0123456789.-"


class JsonText:
    """The end of a JSON text. Keys are compared as they are spelled: the grammar has one spelling of a character."""

    def __init__(self) -> None:
        self.in_string = False
        self.number = b""  # the number that the text ends with
        self._string = bytearray()  # what the open string has so far
        self._escaped = False
        self._is_key = False  # the open string
        self._expects_key = False  # the next string is one
        self._open: list[frozenset[bytes] | None] = []  # the keys of each open object; None: an array

    def fork(self) -> JsonText:
        """Return another text, the same so far."""
        other = copy.copy(self)
        other._string, other._open = self._string[:], self._open[:]
        return other

    @property
    def digits(self) -> int:
        """Digits of the number that the text ends with."""
        return sum(byte in b"0123456789" for byte in self.number)

    @property
    def taken(self) -> frozenset[bytes]:
        """The keys that the innermost object has, where another key may be under way or come next; else empty."""
        keys = self._open[-1] if self._open else None
        return keys if keys and (self._is_key or not self.in_string) else frozenset()

    @property
    def key(self) -> bytes | None:
        """The open key so far; None outside of one."""
        return bytes(self._string) if self.in_string and self._is_key else None

    def feed(self, text: bytes) -> None:
        """Go on by ``text``, which has to continue the JSON text."""
        for byte in text:
            if self.in_string:
                self._feed_string(byte)
            elif byte == _QUOTE:
                self.in_string, self._is_key, self.number = True, self._expects_key, b""
                self._string.clear()
            elif byte in _NUMBER:
                self.number += bytes((byte,))
            else:
                self.number = b""
                self._feed_structure(byte)

    def _feed_string(self, byte: int) -> None:
        if byte == _QUOTE and not self._escaped:
            self.in_string = False
            keys = self._open[-1] if self._open else None
            if self._is_key and keys is not None:
                self._open[-1] = keys | {bytes(self._string)}
            return
        self._escaped = not self._escaped and byte == _BACKSLASH
        self._string.append(byte)

    def _feed_structure(self, byte: int) -> None:
        if byte in (_OPEN_OBJECT, _OPEN_ARRAY):
            self._open.append(frozenset() if byte == _OPEN_OBJECT else None)
            self._expects_key = byte == _OPEN_OBJECT
        elif byte in (_CLOSE_OBJECT, _CLOSE_ARRAY):
            if self._open:
                self._open.pop()
            self._expects_key = False
        elif byte == _COMMA:
            self._expects_key = bool(self._open) and self._open[-1] is not None
        elif byte == _COLON:
            self._expects_key = False
