"""Formats in which models write tool calls and reasoning: a table of public ones, and the choice for a template.

A format is a list of parts: text, markers, the name of a tool and its arguments. The same parts make the grammar that
holds an answer to it (``serving/answer_grammar.py``) and guide who reads the answer (``text/answer.py``).
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine_core.errors import InvalidRequestError

_PROBE = "edgellm_probe"
_PROBE_ARGUMENTS = {"a": "b"}
_THINKING_VARIABLES = ("enable_thinking", "thinking")
_ONE_CALL = "single tool-calls at once"  # what the templates of Llama 3 say when they refuse a second call


class Slot(enum.Enum):
    """A part of a call that differs from call to call."""

    NAME = "name"  # of the tool
    ARGUMENTS = "arguments"
    ID = "id"  # nine letters and digits, which the model writes and nobody reads


@dataclass(frozen=True)
class Marker:
    """A text that begins or ends something. It is one token where the tokenizer has it as one, and text elsewhere."""

    text: str


Part = str | Marker | Slot
Parts = tuple[Part, ...]


class Arguments(enum.Enum):
    """Formats of the arguments of a call."""

    JSON = "json"  # one JSON object
    XML = "xml"  # <parameter=name>\nvalue\n</parameter>\n for each; strings as they are, other values as JSON
    BARE = "bare"  # name:value,name:value with strings between quote markers


@dataclass(frozen=True)
class CallFormat:
    """The calls of an answer: ``before``, the calls with ``between`` between them, ``after``."""

    name: str
    call: Parts
    between: Parts = ()
    before: Parts = ()
    after: Parts = ()
    arguments: Arguments = Arguments.JSON
    quote: Marker | None = None  # around strings, with Arguments.BARE
    # The calls may begin without ``before``, with the first character of the answer: no other answer begins with it.
    may_be_bare: bool = False
    # What a model has that uses it: the first is in its template's text, the others there or among its tokens.
    signs: tuple[str, ...] = ()

    @property
    def markers(self) -> list[Marker]:
        """Every marker of the format, each once."""
        parts = (*self.before, *self.call, *self.between, *self.after, *((self.quote,) if self.quote else ()))
        return list(dict.fromkeys(part for part in parts if isinstance(part, Marker)))

    @property
    def may_be_unmarked(self) -> bool:
        """Return whether a call without its markers is one, too.

        Small models forget them, and write a JSON object at the beginning of a line, maybe in a code block. It is told
        from other JSON by the name of a tool (``UnmarkedCalls``).
        """
        return self.arguments is Arguments.JSON and not self.may_be_bare

    @property
    def opening(self) -> Part:
        """The first part of the calls."""
        return (self.before or self.call)[0]

    def written(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return a call as a model writes it."""
        return "".join(self._written(part, name, arguments) for part in self.call)

    def beginning(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return what an answer with a call begins with, up to the end of its arguments."""
        parts = (*(() if self.may_be_bare else self.before), *self.call)
        end = parts.index(Slot.ARGUMENTS) + 1
        return "".join(self._written(part, name, arguments) for part in parts[:end])

    def _written(self, part: Part, name: str, arguments: Mapping[str, Any]) -> str:
        if part is Slot.NAME:
            return name
        if part is Slot.ID:
            return "a1b2c3d4e"
        if part is Slot.ARGUMENTS:
            return self._write_arguments(arguments)
        return part.text if isinstance(part, Marker) else str(part)

    def _write_arguments(self, arguments: Mapping[str, Any]) -> str:
        if self.arguments is Arguments.XML:
            return "".join(
                f"<parameter={name}>\n{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n"
                "</parameter>\n"
                for name, value in arguments.items()
            )
        if self.arguments is Arguments.BARE:
            return ",".join(f"{name}:{self._write_bare(arguments[name])}" for name in bare_order(arguments))
        return json.dumps(arguments, ensure_ascii=False)

    def _write_bare(self, value: Any) -> str:
        assert self.quote is not None
        if isinstance(value, str):
            return f"{self.quote.text}{value}{self.quote.text}"
        if isinstance(value, Mapping):
            return "{" + ",".join(f"{name}:{self._write_bare(value[name])}" for name in bare_order(value)) + "}"
        if isinstance(value, Sequence):
            return "[" + ",".join(map(self._write_bare, value)) + "]"
        return json.dumps(value)


class UnmarkedCalls:
    """Finds the beginning of a JSON object that calls one of these tools, at the beginning of a line of a text.

    It ends with the tool's name; where that is a single word or the beginning of another one's, with the quote behind
    it, so that other JSON stays text. Small models go on behind a name: "drive_to" becomes "drive_to_kitchen".
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        # Without white space, which ``_patterns`` says where it may stand.
        self._heads = {
            f'{fence}{{"name":{self._quoted(name)}'.encode(): name
            for fence in ("", "```", "```json")
            for name in self._names
        }
        self._patterns = {name: re.compile(self._pattern(name).encode()) for name in self._names}

    def pattern(self, name: str) -> str:
        """Return the regular expression of a text up to the end of such a beginning."""
        return rf"((?s:.*)\n)?{_SPACE}{self._pattern(name)}"

    def _pattern(self, name: str) -> str:
        head = _SPACE.join(("", r"\{", '"name"', ":", re.escape(self._quoted(name))))
        return rf"(```(json)?)?{head}"

    def rest(self, name: str) -> Parts:
        """Return what follows such a beginning."""
        return ("" if self._ends_with_quote(name) else '"', ', "arguments": ', Slot.ARGUMENTS, "}")

    def _quoted(self, name: str) -> str:
        return f'"{name}"' if self._ends_with_quote(name) else f'"{name}'

    def _ends_with_quote(self, name: str) -> bool:
        others = (other for other in self._names if other != name)
        return name.isalnum() or any(other.startswith(name) for other in others)

    def find(self, text: bytes, is_start: bool) -> tuple[int, int, str]:
        """Return where the first beginning begins and ends, and the tool's name.

        One that may yet become one ends at 0; where there is none, it begins at the end of ``text``. ``is_start``: of a
        line.
        """
        for match in _LINE_STARTS.finditer(text):
            if match.start() == 0 and not is_start and text[:1] != b"\n":
                continue
            start = match.end()
            rest = b"".join(text[start:].split())
            if any(head.startswith(rest) for head in self._heads):
                return start, 0, ""
            for head, name in self._heads.items():
                if rest.startswith(head) and (found := self._patterns[name].match(text, start)):
                    return start, found.end(), name
        return len(text), len(text), ""


_SPACE = r"[ \t\r\n]*"
# With the white space behind it, if nothing or what an unmarked call begins with follows.
_LINE_STARTS = re.compile(rf"(?:\A|\n){_SPACE}(?=[`{{]|\Z)".encode())


def bare_order(names: Mapping[str, Any]) -> list[str]:
    """Return names in the order in which templates with bare arguments write them, which is that of ``dictsort``."""
    return sorted(names, key=str.lower)


def _json_call(key: str = "arguments") -> Parts:
    return ('{"name": "', Slot.NAME, f'", "{key}": ', Slot.ARGUMENTS, "}")


_TOOL_CALL, _TOOL_CALL_END = Marker("<tool_call>"), Marker("</tool_call>")
_TOOL_CALLS, _ARGS, _CALL_ID = Marker("[TOOL_CALLS]"), Marker("[ARGS]"), Marker("[CALL_ID]")
_BAR_CALL = Marker("<|tool_call|>")
_DEEPSEEK_BEGIN, _DEEPSEEK_END = Marker("<｜tool▁calls▁begin｜>"), Marker("<｜tool▁calls▁end｜>")
_DEEPSEEK_CALL, _DEEPSEEK_CALL_END = Marker("<｜tool▁call▁begin｜>"), Marker("<｜tool▁call▁end｜>")
_DEEPSEEK_SEPARATOR = Marker("<｜tool▁sep｜>")

# In the order in which they are tried.
FORMATS = (
    CallFormat(  # Qwen3-Coder, Nemotron 3
        "qwen3_coder",
        (_TOOL_CALL, "\n<function=", Slot.NAME, ">\n", Slot.ARGUMENTS, "</function>\n", _TOOL_CALL_END),
        between=("\n",),
        arguments=Arguments.XML,
        signs=("<tool_call>", "<function=", "<parameter="),
    ),
    CallFormat(  # Qwen 2.5 and 3, Hermes 2 and 3, SmolLM3, Granite 4
        "hermes",
        (_TOOL_CALL, "\n", *_json_call(), "\n", _TOOL_CALL_END),
        between=("\n",),
        signs=("<tool_call>", "</tool_call>"),
    ),
    CallFormat(
        "hermes_inline",
        (_TOOL_CALL, *_json_call(), _TOOL_CALL_END),
        between=("\n",),
        signs=("<tool_call>", "</tool_call>"),
    ),
    CallFormat(  # Mistral Small 3.2, Devstral
        "mistral_call_id",
        (_TOOL_CALLS, Slot.NAME, _CALL_ID, Slot.ID, _ARGS, Slot.ARGUMENTS),
        signs=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    ),
    CallFormat(  # Ministral 3, Devstral, Magistral
        "mistral_args",
        (_TOOL_CALLS, Slot.NAME, _ARGS, Slot.ARGUMENTS),
        signs=("[TOOL_CALLS]", "[ARGS]"),
    ),
    CallFormat(  # Mistral Nemo, Mistral Small 3.0 and 3.1, Ministral 8B
        "mistral",
        _json_call(),
        before=(_TOOL_CALLS, "["),
        between=(", ",),
        after=("]",),
        signs=("[TOOL_CALLS]",),
    ),
    CallFormat(  # Mistral 7B v0.3
        "mistral_spaced",
        _json_call(),
        before=(_TOOL_CALLS, " ["),
        between=(", ",),
        after=("]",),
        signs=("[TOOL_CALLS]",),
    ),
    CallFormat(
        "phi4_mini_single",
        (_BAR_CALL, *_json_call(), Marker("<|/tool_call|>")),
        signs=("<|tool_call|>{", "<|/tool_call|>"),
    ),
    CallFormat(  # Phi-4-mini
        "phi4_mini",
        _json_call(),
        before=(_BAR_CALL, "["),
        between=(", ",),
        after=("]", Marker("<|/tool_call|>")),
        signs=("<|tool|>", "<|tool_call|>", "<|/tool_call|>"),
    ),
    CallFormat(  # Granite 3
        "granite",
        _json_call(),
        before=(_BAR_CALL, "["),
        between=(", ",),
        after=("]",),
        signs=("<|tool_call|>",),
    ),
    CallFormat(  # Llama Nemotron
        "nemotron",
        _json_call(),
        before=(Marker("<TOOLCALL>"), "["),
        between=(", ",),
        after=("]", Marker("</TOOLCALL>")),
        signs=("<TOOLCALL>", "</TOOLCALL>"),
    ),
    CallFormat(  # DeepSeek R1 and what was distilled from it
        "deepseek",
        (_DEEPSEEK_CALL, "function", _DEEPSEEK_SEPARATOR, Slot.NAME, "\n```json\n", Slot.ARGUMENTS, "\n```",
         _DEEPSEEK_CALL_END),
        between=("\n",),
        before=(_DEEPSEEK_BEGIN,),
        after=(_DEEPSEEK_END,),
        signs=("<｜tool▁calls▁begin｜>", "```json"),
    ),
    CallFormat(
        "deepseek_v31",
        (_DEEPSEEK_CALL, Slot.NAME, _DEEPSEEK_SEPARATOR, Slot.ARGUMENTS, _DEEPSEEK_CALL_END),
        before=(_DEEPSEEK_BEGIN,),
        after=(_DEEPSEEK_END,),
        signs=("<｜tool▁calls▁begin｜>",),
    ),
    CallFormat(
        "functiongemma",
        (Marker("<start_function_call>"), "call:", Slot.NAME, "{", Slot.ARGUMENTS, "}", Marker("<end_function_call>")),
        arguments=Arguments.BARE,
        quote=Marker("<escape>"),
        signs=("<start_function_call>", "<escape>"),
    ),
    CallFormat(
        "gemma4",
        (Marker("<|tool_call>"), "call:", Slot.NAME, "{", Slot.ARGUMENTS, "}", Marker("<tool_call|>")),
        arguments=Arguments.BARE,
        quote=Marker('<|"|>'),
        signs=("<|tool_call>", "<tool_call|>"),
    ),
    CallFormat(  # Llama 3.1, 3.2 and 3.3
        "llama3",
        _json_call("parameters"),
        before=(Marker("<|python_tag|>"),),
        between=("; ",),
        may_be_bare=True,
        signs=('"parameters": ', "ipython"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class ReasoningFormat:
    """The markers of what a model thinks before it answers. ``label``: text that belongs to the first marker."""

    begin: Marker
    end: Marker
    label: str = ""

    def is_in(self, source: str, tokens: Mapping[str, int]) -> bool:
        """Return whether a model has them in its template or as tokens."""
        begin, end = self.begin.text, self.end.text
        return begin in source or end in source or (begin in tokens and end in tokens)


REASONING_FORMATS = (
    ReasoningFormat(Marker("<think>"), Marker("</think>")),
    ReasoningFormat(Marker("[THINK]"), Marker("[/THINK]")),
    ReasoningFormat(Marker("<|channel>"), Marker("<channel|>"), label="thought\n"),
)


class Templated(Protocol):
    """The part of ``Tokenizer`` that the search for a format needs."""

    @property
    def has_chat_template(self) -> bool: ...

    def template_source(self, *, with_tools: bool) -> str: ...

    def template_variables(self, *, with_tools: bool) -> frozenset[str]: ...

    def apply_template(self, conversation: list[dict], **variables: Any) -> str: ...

    def added_tokens(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class AnswerFormat:
    """Parts that an answer of a model may have beside text. ``plain()`` is that of a raw prompt: text alone."""

    calls: CallFormat | None = None  # None: the template has no tools, or writes calls in a way that is not known
    reasoning: ReasoningFormat | None = None
    token_ids: Mapping[str, int] = field(default_factory=dict)  # marker's text → id, of those that are one token
    has_tools: bool = False  # the template has tools
    one_call: bool = False  # the template refuses a second call in a message
    thinking_variable: str = ""  # of the template, true or false; "" = it has none

    @property
    def tools(self) -> str:
        """The name of the format of calls; "" = this model takes no tools."""
        return "" if self.calls is None else self.calls.name

    @property
    def thinks(self) -> bool:
        return self.reasoning is not None

    def id_of(self, marker: Marker) -> int | None:
        return self.token_ids.get(marker.text)

    @classmethod
    def of(cls, tokenizer: Templated) -> AnswerFormat:
        """Find the format of a model by its chat template and its tokens."""
        if not tokenizer.has_chat_template:
            return cls()
        tokens = tokenizer.added_tokens()
        source = tokenizer.template_source(with_tools=True)
        variables = tokenizer.template_variables(with_tools=True)
        has_tools = not variables.isdisjoint(TOOL_VARIABLES)
        calls = _find_calls(tokenizer, source, tokens) if has_tools else None
        plain_source = tokenizer.template_source(with_tools=False) + source
        reasoning = next((each for each in REASONING_FORMATS if each.is_in(plain_source, tokens)), None)
        markers = [] if calls is None else calls.markers
        markers += [] if reasoning is None else [reasoning.begin, reasoning.end]
        all_variables = variables | tokenizer.template_variables(with_tools=False)
        return cls(
            calls=calls,
            reasoning=reasoning,
            token_ids={marker.text: tokens[marker.text] for marker in markers if marker.text in tokens},
            has_tools=has_tools,
            one_call=_ONE_CALL in source,
            thinking_variable=next((name for name in _THINKING_VARIABLES if name in all_variables), ""),
        )


# Names under which templates read tools; all but the first are SmolLM3's and Granite's.
TOOL_VARIABLES = ("tools", "xml_tools", "available_tools")


def _find_calls(tokenizer: Templated, source: str, tokens: Mapping[str, int]) -> CallFormat | None:
    """Return the format that the template writes calls in; where it writes none, the first one whose signs it has."""
    found = [
        each
        for each in FORMATS
        if each.signs[0] in source and all(sign in source or sign in tokens for sign in each.signs[1:])
    ]
    rendered = _probe(tokenizer) if found else ""
    for each in found:
        if each.beginning(_PROBE, _PROBE_ARGUMENTS) in rendered:
            return each
    return found[0] if found and _PROBE not in rendered else None


def _probe(tokenizer: Templated) -> str:
    """Return a conversation with one call as the template writes it; "" if it refuses."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "description": "a"}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "other", "description": "other", "parameters": schema}}
    function = {"name": _PROBE, "arguments": _PROBE_ARGUMENTS}
    call = {"id": "a1b2c3d4e", "type": "function", "function": function}
    conversation: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        rendered = tokenizer.apply_template(
            conversation, add_generation_prompt=False, **{name: [tool] for name in TOOL_VARIABLES}
        )
    except InvalidRequestError:
        return ""
    return re.sub(r"\[CALL_ID\][A-Za-z0-9]{9}", "[CALL_ID]a1b2c3d4e", rendered)
