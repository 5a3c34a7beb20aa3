"""The form of an answer as a part of a Lark grammar: JSON, a regular expression, choices, or a grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from engine_core.errors import InvalidSchemaError
from engine_core.serving.json_schema import COMPACT, FLEXIBLE, ends_escaped, parse_schema
from engine_core.serving.tools import json_rule, quoted

# Of a Lark grammar, what is no syntax: texts, regular expressions and comments.
_LITERALS = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|\#[^\n]*|/(?:\\.|[^/\\])+/', re.DOTALL)
_OWN_GRAMMAR = "answer"


@dataclass(frozen=True)
class AnswerValue:
    """The rule ``value`` of the grammar of an answer. ``grammar``: the Lark grammar that it stands for, if any."""

    rules: tuple[str, ...]
    grammar: str = ""
    is_json: bool = False

    @classmethod
    def json(cls, schema: str, compact: bool = False, max_string: int = 0) -> AnswerValue:
        """Return the values of a JSON schema; see ``GenerationRequest``. Raises InvalidSchemaError."""
        options = COMPACT if compact else FLEXIBLE
        value = {**parse_schema(schema, max_string), "x-guidance": options}
        return cls((f"value: {json_rule(value)}",), is_json=True)

    @classmethod
    def regex(cls, pattern: str) -> AnswerValue:
        """Return the texts that ``pattern`` matches as a whole. Raises InvalidSchemaError."""
        anchored = pattern.removeprefix("^")
        if anchored.endswith("$") and not ends_escaped(anchored[:-1]):
            anchored = anchored[:-1]
        if ends_escaped(anchored):
            raise InvalidSchemaError("The regular expression ends with a single backslash.")
        if not anchored:
            raise InvalidSchemaError("The regular expression matches no text; leave it out.")
        slashed = re.sub(r"\\.|/", lambda found: "\\/" if found[0] == "/" else found[0], anchored, flags=re.DOTALL)
        return cls(("value: VALUE", f"VALUE: /{slashed}/"))

    @classmethod
    def choices(cls, texts: Iterable[str]) -> AnswerValue:
        """Return the choice of one of ``texts``."""
        return cls(("value: VALUE", f"VALUE: {' | '.join(map(quoted, texts))}"))

    @classmethod
    def lark(cls, grammar: str) -> AnswerValue:
        """Return the texts of a Lark grammar. Raises InvalidSchemaError if it has tokens of the model."""
        syntax = _LITERALS.sub("", grammar)
        if (start := syntax.find("<")) >= 0:
            raise InvalidSchemaError(
                f"The grammar has the special token {syntax[start:].split()[0][:40]!r}, which an answer cannot have; "
                "write texts in quotes."
            )
        return cls((f"value: @{_OWN_GRAMMAR}",), grammar)

    def whole(self, lark: str) -> str:
        """Return the grammar ``lark``, which has the rules of this value, with all that they refer to."""
        if not self.grammar:
            return lark
        grammars = [{"lark_grammar": lark}, {"name": _OWN_GRAMMAR, "lark_grammar": self.grammar}]
        return json.dumps({"grammars": grammars})
