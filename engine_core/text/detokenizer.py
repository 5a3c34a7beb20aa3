"""From token ids to the text that may be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import AnyStr, Protocol

_REPLACEMENT = "\ufffd"
# A character has at most four bytes. When this many tokens have come without completing one, the bytes are
# not UTF-8 and are given up on, so that a model that babbles bytes cannot make each step slower.
_MAX_PENDING_TOKENS = 12


class Decoder(Protocol):
    """The part that makes text of token ids, as ``Tokenizer`` does."""

    def decode(self, ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Incremental decoding. Text is what a longer run of ids decodes to beyond what a shorter one does.

    Two offsets keep the cost of a step constant: ids before ``_prefix`` never matter again, ids from ``_prefix`` to
    ``_read`` give the decoder its context (the white space some decoders strip at the start), ids from ``_read``
    on have not been shown. A tail that ends in U+FFFD may be half a character, so it waits. Bytes that are no
    character are left out, in the middle as at the end: an answer can always be sent back as a message.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._prefix = 0
        self._read = 0

    def feed(self, token_id: int) -> str:
        """Return the whole characters that ``token_id`` completes; often one token's text, sometimes nothing."""
        self._ids.append(token_id)
        text = self._unread(len(self._ids))
        if not text.endswith(_REPLACEMENT):
            return self._take(text, len(self._ids)) if text else ""
        if len(self._ids) - self._read < _MAX_PENDING_TOKENS:
            return ""
        for end in range(len(self._ids) - 1, len(self._ids) - 4, -1):  # keep the start of one character
            text = self._unread(end)
            if text and not text.endswith(_REPLACEMENT):
                return self._take(text, end)
        return self.flush()

    def flush(self) -> str:
        """Return the whole characters that are left at the end."""
        return self._take(self._unread(len(self._ids)), len(self._ids))

    def _unread(self, end: int) -> str:
        context = self._tokenizer.decode(self._ids[self._prefix : self._read])
        return self._tokenizer.decode(self._ids[self._prefix : end])[len(context) :]

    def _take(self, text: str, end: int) -> str:
        self._prefix, self._read = self._read, end
        if self._prefix > 256:  # forget what no longer matters
            del self._ids[: self._prefix]
            self._read -= self._prefix
            self._prefix = 0
        return text.replace(_REPLACEMENT, "")


class StopStrings:
    """Holds back text that could be the start of a stop string, and cuts at the first one that is whole."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Return the text that can be shown by now. Sets ``found`` once a stop string is complete; what follows is
        dropped."""
        if not self._stop or self.found:
            return "" if self.found else text
        text = self._held + text
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = max(overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the held text, at the end of an answer that no stop string ended."""
        held, self._held = self._held, ""
        return held


def overlap(text: AnyStr, stop: AnyStr) -> int:
    """Return the length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
