"""Whole sentences out of a stream of pieces, for speech: what is ready to be spoken, as soon as it is sure."""

from __future__ import annotations

import re

# Ends that white space follows: Latin, Armenian, Arabic, Urdu, Devanagari, Ethiopic, Khmer, Burmese, Tibetan.
_SPACED = ".!?…։՜՞؟۔।॥።፧។៕။༎‼⁇⁈⁉"
# Sentence ends: a run of end marks with closing quotes or brackets, then white space; a CJK end mark; a line break.
_END = re.compile(rf"[{_SPACED}]+[\"'”’»)\]]*(?=\s)|[。！？｡．]+[」』”’）]*|\n+")
_MAY_GO_ON = _SPACED + "\"'”’»)]"  # at the end of the text: only what follows says whether it ends a sentence
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st no vs etc e.g i.e approx ca fig jr sr inc ltd z.b bzw nr d.h usw".split()
)


class SentenceSplitter:
    """Feed pieces, get sentences. A number's point, an initial and common abbreviations do not end one."""

    def __init__(self) -> None:
        self._text = ""
        self._searched = 0  # characters in which every sentence end has been looked at: an answer may have none

    def feed(self, text: str) -> list[str]:
        """The sentences that ``text`` completes, without the white space around them."""
        self._text += text
        sentences, start, search = [], 0, self._searched
        while match := _END.search(self._text, search):
            search = match.end()
            if self._is_end(match, start):
                sentences.append(self._text[start : match.end()].strip())
                start = match.end()
        self._text = self._text[start:]
        self._searched = len(self._text.rstrip(_MAY_GO_ON))
        return [sentence for sentence in sentences if sentence]

    def flush(self) -> list[str]:
        """The rest at the end of the answer: one sentence or none."""
        rest, self._text, self._searched = self._text.strip(), "", 0
        return [rest] if rest else []

    def _is_end(self, match: re.Match[str], start: int) -> bool:
        if match.group()[0] != "." or match.group().startswith(".."):
            return True
        word = self._text[start : match.start()].split()[-1:] or [""]
        word = word[0].lstrip("(\"'“‘[").lower()
        if word in _ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word != "i"):
            return False
        # "1." at the start of a sentence numbers a list; elsewhere it ends one ("in room 3.").
        return not (word.isdigit() and not self._text[start : match.start() - len(word)].strip())
