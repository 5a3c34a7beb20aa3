"""The tools of a request, checked and ready for the grammar that holds calls to them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from engine_core.errors import InvalidSchemaError
from engine_core.request import Tool
from engine_core.serving.json_schema import COMPACT, parse_schema
from engine_core.text.call_formats import Arguments, CallFormat, bare_order

Schema = dict[str, Any]

# Where one of these says which keys an object has, no others are shut out: they would have to be known.
_OTHER_KEYS = frozenset(
    "additionalProperties patternProperties unevaluatedProperties propertyNames allOf anyOf oneOf $ref "
    "$dynamicRef dependentSchemas if".split()
)
_DESCRIPTIONS = frozenset("type title description default examples $schema $id $comment nullable deprecated".split())
_STRING_KEYWORDS = _DESCRIPTIONS | {"enum", "const", "minLength", "maxLength"}
_ARRAY_KEYWORDS = _DESCRIPTIONS | {"items", "minItems", "maxItems"}
_OBJECT_KEYWORDS = _DESCRIPTIONS | {"properties", "required", "additionalProperties"}
_DEFINITIONS = ("$defs", "definitions")
_MAX_REFERENCES = 16  # one behind the other, and of objects and arrays inside each other
_MAX_KEPT_CHARS = 1 << 14
_XML_NAME = re.compile(r"[^<>\n]+")
_BARE_NAME = re.compile(r"[^:,{}\[\]\s]+")


def checked_tool(tool: Tool) -> CheckedTool:
    """Return ``tool`` with its parameters parsed; once for the same tool, unless it is large.

    Raises InvalidSchemaError.
    """
    is_large = sum(map(len, tool.texts)) > _MAX_KEPT_CHARS  # many of these would fill the memory
    return CheckedTool.of(tool) if is_large else _kept_tool(tool)


@lru_cache(maxsize=512)
def _kept_tool(tool: Tool) -> CheckedTool:
    return CheckedTool.of(tool)


@dataclass(frozen=True)
class CheckedTool:
    """A tool whose parameters are the schema of an object. Raises InvalidSchemaError through ``of``."""

    name: str
    schema: Schema  # mended for the grammar library, without keys that are not named

    @classmethod
    def of(cls, tool: Tool) -> CheckedTool:
        try:
            schema = parse_schema(tool.parameters) if tool.parameters.strip() else {}
        except InvalidSchemaError as error:
            reason = str(error).replace("The JSON schema", "it", 1)
            raise InvalidSchemaError(f"The parameters of the tool {tool.name!r} cannot be used: {reason}") from None
        if schema.get("type", "object") != "object":
            raise InvalidSchemaError(
                f"The parameters of the tool {tool.name!r} are a schema of {json.dumps(schema['type'])[:64]}, but they "
                "must be that of an object."
            )
        schema = {"type": "object", **schema}
        names, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(names, dict) or not (isinstance(required, list) and all(type(n) is str for n in required)):
            raise InvalidSchemaError(
                f"The parameters of the tool {tool.name!r} cannot be used: their properties must be an object, and "
                "what is required a list of names."
            )
        if not schema.keys() & _OTHER_KEYS:
            schema.setdefault("properties", {})
        _shut(schema)
        return cls(tool.name, schema)

    @property
    def json_grammar(self) -> str:
        """The arguments as JSON, as a part of a Lark grammar."""
        return json_rule({**self.schema, "x-guidance": COMPACT})

    @cached_property
    def strings(self) -> frozenset[str]:
        """The parameters that are written without quotes where the format has Arguments.XML."""
        return frozenset(name for name, schema in self._properties.items() if _is_string(self._resolved(schema, name)))

    @property
    def _properties(self) -> dict[str, Schema]:
        return self.schema.get("properties", {})

    @property
    def _required(self) -> frozenset[str]:
        return frozenset(self.schema.get("required", ()))

    def rules(self, form: CallFormat, prefix: str, quote: str = "") -> Iterator[str]:
        """Yield the rules of a Lark grammar for the arguments; the first one is ``prefix``.

        ``quote``: the quote marker in the grammar, for Arguments.BARE. Raises InvalidSchemaError.
        """
        if form.arguments is Arguments.JSON:
            yield f"{prefix}: {self.json_grammar}"
            return
        if unknown := sorted(self.schema.keys() - _OBJECT_KEYWORDS - {*_DEFINITIONS}):
            raise self._unsupported(unknown[0])
        if self._required - self._properties.keys():
            raise self._unsupported("required")
        if form.arguments is Arguments.XML:
            yield from self._xml_rules(prefix)
        else:
            yield from self._bare_object(self.schema, prefix, quote)

    # --- Arguments.XML ------------------------------------------------------------------------------------

    def _xml_rules(self, prefix: str) -> Iterator[str]:
        parts = []
        for index, (name, schema) in enumerate(self._properties.items()):
            rule, resolved = f"{prefix}_{index}", self._resolved(schema, name)
            if not _XML_NAME.fullmatch(name):
                raise self._unsupported(name)
            parts.append(rule if name in self._required else f"{rule}?")
            begin, end = quoted(f"<parameter={name}>\n"), quoted("\n</parameter>\n")
            if not _is_string(resolved):
                inner = {**self._definitions, **resolved, "x-guidance": COMPACT}
                yield f"{rule}: {begin} {rule}_v {end}"
                yield f"{rule}_v: {json_rule(inner)}"
            elif (values := _values(resolved)) is not None:
                yield f"{rule}: {begin} ({' | '.join(map(quoted, values))}) {end}"
            else:
                yield f"{rule}: {begin} {rule}_v"
                yield f"{rule}_v[lazy]: /{self._string_pattern(resolved)}\\n<\\/parameter>\\n/"
        yield f"{prefix}: {' '.join(parts)}" if parts else f'{prefix}: ""'

    @property
    def _definitions(self) -> Schema:
        return {key: self.schema[key] for key in _DEFINITIONS if key in self.schema}

    def _resolved(self, schema: object, name: str) -> Schema:
        """Return the schema of ``name``, behind its references into the definitions. Raises InvalidSchemaError."""
        for _ in range(_MAX_REFERENCES):
            if not isinstance(schema, dict):
                break
            reference = schema.get("$ref")
            if reference is None:
                return schema
            parts = str(reference).split("/")
            if len(parts) != 3 or parts[0] != "#" or parts[1] not in _DEFINITIONS:
                raise self._unsupported("$ref")
            found = self.schema.get(parts[1])
            schema = found.get(parts[2]) if isinstance(found, dict) else None
        if schema is True:
            return {}
        raise self._unsupported("$ref" if isinstance(schema, dict) else name)

    # --- Arguments.BARE -----------------------------------------------------------------------------------

    def _bare_object(self, schema: Schema, rule: str, quote: str, depth: int = 0) -> Iterator[str]:
        """Yield the rules of name:value,name:value, with what is optional left out anywhere."""
        required, properties = schema.get("required", ()), schema.get("properties", {})
        if not isinstance(required, (list, tuple)) or not isinstance(properties, dict):
            raise self._unsupported("properties")
        if any(name not in properties for name in required):
            raise self._unsupported("required")
        names = bare_order(properties)
        yield f"{rule}: {rule}_first_0"
        for index, name in enumerate(names):
            if not _BARE_NAME.fullmatch(name):
                raise self._unsupported(name)
            member, following = f"{rule}_{index}", f"{rule}_rest_{index + 1}"
            is_optional = name not in required
            yield f"{member}: {quoted(name + ':')} {member}_v"
            yield from self._bare_value(self._resolved(properties[name], name), f"{member}_v", quote, depth + 1)
            first = f"{member} {following}"
            yield f"{rule}_first_{index}: {first}" + (f" | {rule}_first_{index + 1}" if is_optional else "")
            rest = f'"," {member} {following}'
            yield f"{rule}_rest_{index}: {rest}" + (f" | {following}" if is_optional else "")
        yield f'{rule}_first_{len(names)}: ""'
        yield f'{rule}_rest_{len(names)}: ""'

    def _bare_value(self, schema: Schema, rule: str, quote: str, depth: int) -> Iterator[str]:
        kind = schema.get("type")
        if depth > _MAX_REFERENCES:
            raise self._unsupported("$ref")
        if _is_string(schema):
            if (values := _values(schema)) is not None:
                yield f"{rule}: {quote} ({' | '.join(map(quoted, values))}) {quote}"
            else:
                yield f"{rule}: {quote} {rule.upper()}? {quote}"
                yield f"{rule.upper()}: /{self._string_pattern(schema)}/"
        elif kind == "array" and not schema.keys() - _ARRAY_KEYWORDS and isinstance(schema.get("items"), dict):
            low, high = self._sizes(schema, "minItems", "maxItems")
            more = f"{{{max(0, low - 1)},{'' if high is None else max(0, high - 1)}}}"
            items = f'{rule}_item ("," {rule}_item){more}'
            yield f'{rule}: "[" {items if low else f"({items})?"} "]"' if high != 0 else f'{rule}: "[]"'
            yield from self._bare_value(self._resolved(schema["items"], "items"), f"{rule}_item", quote, depth + 1)
        elif kind == "object" and not schema.keys() - _OBJECT_KEYWORDS and schema.get("properties"):
            yield f'{rule}: "{{" {rule}_o "}}"'
            yield from self._bare_object(schema, f"{rule}_o", quote, depth)
        elif kind in ("number", "integer", "boolean", "null"):
            yield f"{rule}: {json_rule({**schema, 'x-guidance': COMPACT})}"
        else:
            raise self._unsupported(next(iter(sorted(schema.keys() - _DESCRIPTIONS)), f"type {kind}"))

    # --- helpers ------------------------------------------------------------------------------------------

    def _string_pattern(self, schema: Schema) -> str:
        # "allOf" may be what a format was mended with.
        if unknown := sorted(schema.keys() - _STRING_KEYWORDS, key=lambda key: (key == "allOf", key)):
            raise self._unsupported(unknown[0])
        low, high = self._sizes(schema, "minLength", "maxLength")
        return "(?s:.*)" if high is None and not low else f"(?s:.{{{low},{'' if high is None else high}}})"

    def _sizes(self, schema: Schema, low: str, high: str) -> tuple[int, int | None]:
        """Return the values of two keywords that are sizes. Raises InvalidSchemaError."""
        found = schema.get(low, 0), schema.get(high)
        if type(found[0]) is not int or found[0] < 0:
            raise self._unsupported(low)
        if found[1] is not None and (type(found[1]) is not int or found[1] < found[0]):
            raise self._unsupported(high)
        return found

    def _unsupported(self, keyword: str) -> InvalidSchemaError:
        return InvalidSchemaError(
            f"The parameters of the tool {self.name!r} use {keyword[:64]!r}, to which calls cannot be held as this "
            "model writes them; leave it out."
        )


def quoted(text: str) -> str:
    """Return ``text`` as a string of a Lark grammar."""
    return _as_lark(json.dumps(text, ensure_ascii=False))


def json_rule(schema: Schema) -> str:
    """Return the values of ``schema`` as a part of a Lark grammar."""
    return f"%json {_as_lark(json.dumps(schema))}"


def _as_lark(text: str) -> str:
    """Return ``text``, which is JSON, for a Lark grammar: the library's lexer takes no delete character in a string."""
    return text.replace("\x7f", "\\u007f")


def _is_string(schema: Schema) -> bool:
    """Return True if every value of the schema is a string."""
    if not isinstance(schema, dict):
        return False
    values = _values(schema)
    return all(isinstance(value, str) for value in values) if values is not None else schema.get("type") == "string"


def _values(schema: Schema) -> list[Any] | None:
    """Return the constants that a schema allows; None if it names none."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) and values else None


def _names_all(properties: object, required: object) -> bool:
    """Return whether there are properties, and all that are required are among them."""
    if not isinstance(properties, dict) or not isinstance(required, list):
        return False
    return all(isinstance(name, str) and name in properties for name in required)


def _shut(schema: object) -> None:
    """Let objects have no keys but those that are named, where nothing is said about others."""
    waiting = [schema]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, dict):
            if not item.keys() & _OTHER_KEYS and _names_all(item.get("properties"), item.get("required", [])):
                item["additionalProperties"] = False
            for key, value in item.items():
                if key in ("properties", "$defs", "definitions") and isinstance(value, dict):
                    waiting.extend(value.values())
                elif key in ("items", "prefixItems", "anyOf", "oneOf", "allOf", "not", "then", "else"):
                    waiting.append(value)
