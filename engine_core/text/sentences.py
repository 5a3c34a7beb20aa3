"""Whole sentences out of a stream of pieces, for speech: what is ready to be spoken, as soon as it is sure."""

from __future__ import annotations

import re

# Marks that end a sentence only where white space follows: "3.5", "e.g.", "?!" may go on.
_SOFT = ".!?…"
# Marks that always end one: Unicode's property Sentence_Terminal without the soft ones, and the Tibetan shad.
_HARD = (
    "\u0589\u061d-\u061f\u06d4\u0700-\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965\u0f0d\u0f0e\u104a\u104b"
    "\u1362\u1367\u1368\u166e\u1735\u1736\u17d4\u17d5\u1803\u1809\u1944\u1945\u1aa8-\u1aab\u1b5a\u1b5b\u1b5e\u1b5f"
    "\u1c3b\u1c3c\u1c7e\u1c7f\u203c\u203d\u2047-\u2049\u2e2e\u2e3c\u3002\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877"
    "\ua8ce\ua8cf\ua92f\ua9c8\ua9c9\uaa5d-\uaa5f\uaaf0\uaaf1\uabeb\ufe12\ufe15\ufe16\ufe56\ufe57\uff01\uff1f\uff61"
)
_WIDE_POINT = "\uff0e\ufe52"  # the point of scripts without spaces; between digits it is a decimal point
_CLOSE = "\"'”’»)\\]」』】）〉》›﹂﹄｣］｝"
_BREAK = "\n\r\v\f\x85\u2028\u2029"
_MARKS = _SOFT + _HARD + _WIDE_POINT
# A run of marks is looked at from its beginning only: an answer of nothing but marks would cost its square otherwise.
_END = re.compile(
    rf"(?<![{_MARKS}])(?:"
    rf"[{_SOFT}]+[{_CLOSE}]*(?=\s)"
    rf"|[{_SOFT}{_WIDE_POINT}]*[{_HARD}][{_MARKS}]*[{_CLOSE}]*(?=[^{_MARKS}{_CLOSE}])"
    rf"|[{_WIDE_POINT}]+[{_CLOSE}]*(?=[^\d{_MARKS}{_CLOSE}])"
    rf")|[{_BREAK}]+"
)
_TAIL = re.compile(rf"[{_MARKS}{_CLOSE}]")  # at the end of the text: only what follows says if it ends a sentence
_IS_WHOLE = re.compile(rf"[!?{_HARD}][{_CLOSE}]*\Z")
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st no vs etc e.g i.e approx ca fig jr sr inc ltd z.b bzw nr d.h usw".split()
)


class SentenceSplitter:
    """Feed pieces, get sentences. A number's point, an initial and common abbreviations do not end one.

    Scripts without a mark for the end of a sentence (Thai) are split at line breaks only.
    """

    def __init__(self) -> None:
        self._text = ""
        self._searched = 0  # characters in which every sentence end has been looked at: an answer may have none

    def feed(self, text: str) -> list[str]:
        """Return the sentences that ``text`` completes, without the white space around them."""
        self._text += text
        sentences, start, search = [], 0, self._searched
        while match := _END.search(self._text, search):
            search = match.end()
            if self._is_end(match, start):
                sentences.append(self._text[start : match.end()].strip())
                start = match.end()
        self._text = self._text[start:]
        self._searched = len(self._text) - _tail_length(self._text)
        return [sentence for sentence in sentences if sentence]

    def flush(self, cut: bool = False) -> list[str]:
        """Return the rest at the end of the answer: one sentence or none.

        ``cut``: the answer was ended in the middle. The rest is given only if its mark says that it is whole.
        """
        rest, self._text, self._searched = self._text.strip(), "", 0
        return [rest] if rest and not (cut and not _IS_WHOLE.search(rest[-32:])) else []

    def _is_end(self, match: re.Match[str], start: int) -> bool:
        mark = match.group().rstrip("\"'”’»)]")
        if mark != ".":
            return True
        before = self._text[start : match.start()]
        word = (before.split()[-1:] or [""])[0].lstrip("(\"'“‘[")
        if word.lower() in _ABBREVIATIONS or (len(word) == 1 and word.isupper() and word != "I"):
            return False
        # "1." or "a." at the start of a sentence numbers a list; elsewhere it ends one ("in room 3.").
        numbers = word.isdigit() or (len(word) == 1 and word.islower() and word != "i")
        return not (numbers and not before[: len(before) - len(word)].strip())


def _tail_length(text: str) -> int:
    """Characters at the end of ``text`` that are marks and closing quotes."""
    length = 0
    while length < len(text) and _TAIL.match(text[-1 - length]):
        length += 1
    return length
