"""The grammar of a whole answer: reasoning, then text, a value of a form, or calls of tools."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from engine_core.serving.answer_value import AnswerValue
from engine_core.serving.tools import CheckedTool, quoted
from engine_core.text.call_formats import (
    AnswerFormat,
    Marker,
    Parts,
    Slot,
    UnmarkedCalls,
)
from engine_core.text.tokenizer import Reasoning


@dataclass(frozen=True)
class Calls:
    """The calls that an answer may have. ``required``: it has at least one."""

    tools: Sequence[CheckedTool]
    required: bool = False
    several: bool = True


class AnswerGrammar:
    """Writes the Lark grammar of one kind of answer.

    ``value``: the form of the answer, None for text. ``calls``: None without tools; an empty list of tools where none
    may be called, so that no text begins as a call does.
    ``token_markers``: False has all markers written as text, to try out what a grammar costs with another tokenizer.
    """

    def __init__(
        self,
        form: AnswerFormat,
        reasoning: Reasoning,
        value: AnswerValue | None,
        calls: Calls | None,
        token_markers: bool = True,
    ) -> None:
        self._form = form
        self._reasoning = reasoning
        self._value = value
        self._calls = calls
        self._token_markers = token_markers
        self._rules: list[str] = []

    def text(self) -> str:
        """Return the grammar, as the grammar library takes it.

        Raises InvalidSchemaError for a tool that the format of calls cannot be held to.
        """
        self._rules = ["%llguidance {}"]
        begin = self._begin()
        if self._value is not None and not self._value.is_json:  # white space may be a part of such a value
            begin = {"thought ": "thought gap? ", "think? ": "(think gap?)? "}.get(begin, begin)
        self._rules.append(f"start: {begin}content")
        alternatives = []
        if self._calls is not None and self._calls.tools:
            alternatives += self._call_alternatives(self._calls)
        if self._calls is None or not self._calls.required:
            alternatives += self._text_alternatives()
        self._rules.append(f"content: {' | '.join(alternatives)}")
        if self._reasoning is not Reasoning.NEVER:
            self._rules.append("gap: /[ \\n]{1,2}/")
        lark = "\n".join(self._rules) + "\n"
        return lark if self._value is None else self._value.whole(lark)

    # --- parts --------------------------------------------------------------------------------------------

    def _begin(self) -> str:
        """Return the reasoning that comes first, and add its rules."""
        form = self._form.reasoning
        if self._reasoning is Reasoning.NEVER or form is None:
            return ""
        if self._is_token(form.end):
            self._rules.append(f"thought: THOUGHT? {self._marker(form.end)}")
            self._rules.append("THOUGHT: /(?s:.+)/")
        else:
            self._rules.append(f"thought[lazy]: /(?s:.*){_escaped(form.end.text)}/")
        if self._reasoning is Reasoning.BEGUN:
            return "thought "
        label = f" {quoted(form.label)}" if form.label else ""
        if self._is_token(form.begin):
            self._rules.append(f"think: {self._marker(form.begin)}{label} thought")
        else:
            self._rules.append(f"think: think_begin{label} thought")
            self._rules.append(f"think_begin[lazy]: {quoted(form.begin.text)}")
        return "think? "

    def _text_alternatives(self) -> list[str]:
        if self._value is not None:
            self._rules += self._value.rules
            return [f"{self._gap}value" if self._value.is_json else "value"]
        self._rules.append(f"TEXT: {self._text_pattern()}")
        return ["TEXT?"]

    def _text_pattern(self) -> str:
        """Return the pattern of a text that is no call."""
        calls = self._form.calls if self._calls is not None else None
        if calls is None:
            return "/(?s:.+)/"
        pattern = "/(?s:.+)/"
        if calls.may_be_bare:
            pattern = r"/\s*[^{\s](?s:.*)/" if self._gap else "/[^{](?s:.*)/"
        opening, may_call = calls.opening, self._calls is not None and self._calls.tools
        if not may_call and isinstance(opening, Marker) and not self._is_token(opening):
            pattern += f" & ~/(?s:.*){_escaped(opening.text)}(?s:.*)/"
        return pattern

    def _call_alternatives(self, calls: Calls) -> list[str]:
        """Return what an answer with calls may be, and add its rules."""
        form = self._form.calls
        assert form is not None
        for index, tool in enumerate(calls.tools):
            self._rules += tool.rules(form, f"args_{index}", self._marker(form.quote) if form.quote else "")
        self._rules.append(f"call: {self._any_call(form.call, calls)}")
        repeated = f" ({self._join(form.between)} call)*" if calls.several and not self._form.one_call else ""
        rest = f"{repeated} {self._join(form.after)}"
        opening, has_text = form.opening, not calls.required and self._value is None
        assert isinstance(opening, Marker)
        if form.may_be_bare:
            found = [f"{self._gap}call{rest}"]
            if self._is_token(opening):
                found.append(f"{'TEXT? ' if has_text else self._gap}{self._marker(opening)} call{rest}")
            return found
        unmarked = [] if calls.required or self._value is not None else self._unmarked_calls(calls)
        if has_text and not self._is_token(opening):
            # The text before the first marker ends with it: the lexeme is as short as it can be.
            self._rules.append(f"opened[lazy]: /(?s:.*){_escaped(opening.text)}/")
            first = f"{self._join(form.before[1:])} call" if form.before else "first_call"
            if not form.before:
                self._rules.append(f"first_call: {self._any_call(form.call[1:], calls)}")
            return [f"opened {first}{rest}", *unmarked]
        before = "TEXT? " if has_text else self._gap
        return [f"{before}{self._join(form.before)} call{rest}", *unmarked]

    def _unmarked_calls(self, calls: Calls) -> list[str]:
        """Return the calls without markers that an answer may end with, and add their rules."""
        form = self._form.calls
        if form is None or not form.may_be_unmarked:
            return []
        self._rules.append(r"fence: /\s*```\s*/")
        unmarked = UnmarkedCalls(tool.name for tool in calls.tools)
        for index, tool in enumerate(calls.tools):
            self._rules.append(f"unmarked_{index}[lazy]: /{_slashed(unmarked.pattern(tool.name))}/")
        return [
            f"unmarked_{index} {self._join(unmarked.rest(tool.name), arguments=f'args_{index}')} fence?"
            for index, tool in enumerate(calls.tools)
        ]

    def _any_call(self, parts: Parts, calls: Calls) -> str:
        return " | ".join(
            f"({self._join(parts, tool.name, f'args_{index}')})" for index, tool in enumerate(calls.tools)
        )

    def _join(self, parts: Parts, name: str = "", arguments: str = "") -> str:
        """Return parts of the format in the grammar; text that follows text is one string."""
        found: list[str] = []
        text = ""
        for part in parts:
            if isinstance(part, Marker) and self._is_token(part):
                found += [quoted(text)] if text else []
                found.append(self._marker(part))
                text = ""
            elif part is Slot.ARGUMENTS or part is Slot.ID:
                found += [quoted(text)] if text else []
                found.append(arguments if part is Slot.ARGUMENTS else "/[A-Za-z0-9]{9}/")
                text = ""
            else:
                text += name if part is Slot.NAME else part.text if isinstance(part, Marker) else str(part)
        found += [quoted(text)] if text else []
        return " ".join(found)

    # --- helpers ------------------------------------------------------------------------------------------

    @property
    def _gap(self) -> str:
        return "" if self._reasoning is Reasoning.NEVER else "gap? "

    def _is_token(self, marker: Marker) -> bool:
        return self._form.id_of(marker) is not None

    def _marker(self, marker: Marker) -> str:
        index = self._form.id_of(marker)
        if index is None or not self._token_markers:
            return quoted(marker.text)
        return f"<[{index}]>"


def _slashed(pattern: str) -> str:
    """Return a regular expression as it stands between two slashes; "-" needs no escape in the library's syntax."""
    return pattern.replace("/", "\\/").replace("\\-", "-")


def _escaped(text: str) -> str:
    """Return ``text`` for a pattern of the grammar library."""
    return re.sub(r"([\[\](){}*+?.|^$/\\])", r"\\\1", text)
