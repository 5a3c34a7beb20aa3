"""Read the JSON schema of a request: out of its wrapper, checked, and without what the grammar library gets wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal

from engine_core.errors import InvalidSchemaError
from engine_core.request import MAX_NESTING, nesting
from engine_core.text.strict_json import json_kind, parse_json

MAX_DIGITS = 17  # of a number: what a double can hold
# Options of the grammar library for the white space of JSON. Flexible: one optional space or line break where JSON
# allows any amount, since small models otherwise fill the context with it. Compact: as json.dumps writes it, which is
# how templates write calls; there is one spelling of what is between values, so that it need not be sampled.
FLEXIBLE = {"whitespace_pattern": r"[ \n]?"}
COMPACT = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
# Keywords that describe a schema and do not constrain a value.
_ANNOTATIONS = frozenset(
    "$schema $id $anchor $comment $vocabulary $dynamicAnchor id title description default examples readOnly writeOnly "
    "deprecated $defs definitions nullable discriminator contentEncoding contentMediaType".split()
)
# One of these has to be in a schema with unknown keywords, or it constrains nothing.
_CONSTRAINTS = frozenset(
    "$ref $dynamicRef type enum const anyOf oneOf allOf not if then else properties required additionalProperties "
    "patternProperties propertyNames minProperties maxProperties items prefixItems additionalItems minItems maxItems "
    "uniqueItems contains minContains maxContains minimum maximum exclusiveMinimum exclusiveMaximum multipleOf "
    "minLength maxLength pattern format dependentRequired dependentSchemas unevaluatedProperties "
    "unevaluatedItems".split()
)
# Where schemas lie inside a schema: one, a list of them, or an object of them by name.
_INNER = frozenset(
    "not if then else items additionalItems additionalProperties propertyNames contains unevaluatedProperties "
    "unevaluatedItems anyOf oneOf allOf prefixItems".split()
)
_INNER_BY_NAME = frozenset("properties patternProperties dependentSchemas $defs definitions".split())
_LARGEST_EXACT = 2**53  # a double holds every whole number up to it
_LARGEST_POWER = 308  # of ten, in a double
_WITH_NUMBERS = frozenset({"const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
_MULTIPLE_END = 2**53  # a multiple that nothing bounds lies between this and its negative: any parser keeps its digits
_LONGEST = 2**32 - 1  # characters; the grammar library counts no further
_LEAST = 1e-15  # the smallest number beside a bound of 0 that is left out
# What the library says of some schemas, and what clients are told.
_SAID = (
    ("NoExtension", "no value can be written that meets it"),
    ("Regex is empty", "no string meets all that it requires"),
    ("oneOf constraints are not supported", "the schemas of a oneOf may allow the same value; use anyOf"),
)
_YEAR = r"(?:[1-9]\d{3}|0[1-9]\d\d|00[1-9]\d|000[1-9])"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
    r"|(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26]|0[48])00)-02-29)"
)
# What a value has to match beside the library's pattern of its format, which takes leap days of any year and leap
# seconds of any minute, and small letters that many parsers refuse. The library's decides about the rest.
_FORMATS = {
    "date": rf"^{_DATE}$",
    "time": r"^\d\d:\d\d:[0-5]\d[^z]*$",
    "date-time": rf"^{_DATE}T\d\d:\d\d:[0-5]\d[^z]*$",
}


def parse_schema(schema: str, max_string: int = 0) -> dict:
    """Return the schema inside ``schema``, out of OpenAI's wrapper if it is in one. Raises InvalidSchemaError.

    ``max_string``: characters of a string that nothing bounds; 0 = no limit.
    """

    try:
        parsed = parse_json(schema)
    except (ValueError, RecursionError) as error:
        raise InvalidSchemaError(f"The JSON schema does not parse as JSON: {first_line(error)}.") from None
    if parsed == {"type": "json_object"}:
        return {"type": "object"}
    if isinstance(parsed, dict) and parsed.get("type") == "json_schema" and isinstance(parsed.get("json_schema"), dict):
        parsed = parsed["json_schema"]
    if isinstance(parsed, dict) and isinstance(parsed.get("schema"), dict) and not parsed.keys() & {"type", "$ref"}:
        unknown = sorted(parsed.keys() - {"name", "strict", "schema", "description"})
        if unknown:
            raise InvalidSchemaError(f"The JSON schema's wrapper has the unknown key {unknown[0]!r}.")
        parsed = parsed["schema"]
    if parsed is True:
        return {}
    if not isinstance(parsed, dict):
        raise InvalidSchemaError(f"The JSON schema is {json_kind(parsed)}, but it must be an object.")
    if (depth := nesting(parsed)) > MAX_NESTING:
        raise InvalidSchemaError(
            f"The JSON schema has {depth} levels of objects and arrays, but at most {MAX_NESTING} are accepted."
        )
    if "x-guidance" in parsed:  # llguidance's own options: separators that are no JSON, unknown keywords ignored
        raise InvalidSchemaError("The JSON schema has the key 'x-guidance', which is not accepted; leave it out.")
    for inner in _schemas(parsed):
        unknown = sorted(inner.keys() - _ANNOTATIONS - _CONSTRAINTS)
        if unknown and not inner.keys() & _CONSTRAINTS:
            raise InvalidSchemaError(
                "The JSON schema has a part without a keyword of JSON Schema that constrains it, only "
                f"{', '.join(map(repr, unknown[:3]))[:200]}; it would allow every value."
            )
        _mend(inner)
        if max_string and _is_unbounded_string(inner):
            inner["maxLength"] = max(max_string, _length(inner.get("minLength")))
    return parsed


def _is_unbounded_string(schema: dict) -> bool:
    kinds = schema.get("type")
    is_string = kinds == "string" or (isinstance(kinds, list) and "string" in kinds)
    return is_string and not schema.keys() & {"maxLength", "enum", "const", "pattern", "format"}


def _length(value: object) -> int:
    return value if type(value) is int else 0


def _mend(schema: dict) -> None:
    """Change what the library takes otherwise than JSON Schema says. Raises InvalidSchemaError where nothing helps."""
    pattern = _FORMATS.get(schema["format"]) if isinstance(schema.get("format"), str) else None
    others = schema.get("allOf", [])
    if pattern is not None and isinstance(others, list):
        schema["allOf"] = [*others, {"pattern": pattern}]
    schema.update({name: _with_whole_numbers(schema[name]) for name in _WITH_NUMBERS & schema.keys()})
    _mend_bounds(schema)
    _mend_lengths(schema)
    _check_patterns(schema)
    if endless := next((name for name, value in schema.items() if isinstance(value, float) and math.isinf(value)), ""):
        raise InvalidSchemaError(f"The JSON schema has {endless[:64]!r} with a number beyond a double; leave it out.")
    for value in _numbers([schema.get("const"), schema.get("enum")]):
        if not _is_exact(value):
            raise InvalidSchemaError(
                f"The JSON schema has the constant {str(value)[:40]}, of which {_who(value)} cannot hold every digit; "
                "give it as a string."
            )


def _mend_bounds(schema: dict) -> None:
    for name, sign in (("minimum", -1), ("exclusiveMinimum", -1), ("maximum", 1), ("exclusiveMaximum", 1)):
        value = schema.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if value * sign >= 10**MAX_DIGITS:  # no number that is written is beyond it
            del schema[name]
        elif not _is_exact(value):
            raise InvalidSchemaError(
                f"The JSON schema has the bound {str(value)[:40]}, of which {_who(value)} cannot hold every digit; "
                f"give one up to {_LARGEST_EXACT} of 15 digits at most."
            )
        elif (
            value == 0 and name.startswith("exclusive") and schema.get("type") != "integer"
        ):  # the library writes 0 where the other bound is below 1
            inclusive = name.removeprefix("exclusive").lower()
            own = schema.get(inclusive)
            if not isinstance(own, (int, float)) or own * sign >= 0:
                del schema[name]
                schema[inclusive] = -sign * _LEAST

    if _is_number(schema.get("multipleOf")):  # whose digits the grammar alone ends
        for name, end in (("minimum", -_MULTIPLE_END), ("maximum", _MULTIPLE_END)):
            if not _is_number(schema.get(name)) and not _is_number(schema.get(f"exclusive{name.capitalize()}")):
                schema[name] = end


def _mend_lengths(schema: dict) -> None:
    for name in ("minLength", "maxLength"):
        value = schema.get(name)
        if type(value) is not int or value <= _LONGEST:
            continue
        if name == "minLength":
            raise InvalidSchemaError(f"The JSON schema has minLength {str(value)[:40]}; no answer is as long.")
        del schema[name]


def _check_patterns(schema: dict) -> None:
    """Raises InvalidSchemaError for what the library takes as no pattern at all."""
    by_name = schema.get("patternProperties")
    for pattern in (schema.get("pattern"), *(by_name if isinstance(by_name, dict) else ())):
        if isinstance(pattern, str) and ends_escaped(pattern):
            raise InvalidSchemaError(f"The JSON schema has the pattern {pattern[:64]!r}, which ends with a backslash.")


def ends_escaped(pattern: str) -> bool:
    """Return whether a backslash at the end of ``pattern`` escapes what would follow."""
    return (len(pattern) - len(pattern.rstrip("\\"))) % 2 == 1


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _who(value: int | float) -> str:
    return "the grammar" if isinstance(value, float) else "a double"


def _with_whole_numbers(value: object) -> object:
    """Return ``value`` with 5.0 as 5, at any depth: the same number, of which the library keeps every digit."""
    if isinstance(value, dict):
        return {name: _with_whole_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_read(value: float) -> float:
    """Return the double that the grammar library reads where the JSON text of ``value`` stands: its digits as a double,
    times or divided by a power of ten, which rounds twice (serde_json without ``float_roundtrip``)."""
    sign, digits, exponent = Decimal(repr(value)).as_tuple()
    assert isinstance(exponent, int)
    found = float(int("".join(map(str, digits))))
    while exponent < -_LARGEST_POWER:
        found, exponent = found / 10.0**_LARGEST_POWER, exponent + _LARGEST_POWER
    found = found * float(f"1e{exponent}") if exponent >= 0 else found / float(f"1e{-exponent}")
    return -found if sign else found


def _is_exact(value: int | float) -> bool:
    if isinstance(value, float):
        return math.isfinite(value) and _as_read(value) == value
    size = abs(value)
    return size <= _LARGEST_EXACT or (size < 10**MAX_DIGITS and int(float(value)) == value)


def _numbers(value: object) -> Iterator[int | float]:
    """Yield every number inside constants."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, (int, float)) and not isinstance(item, bool):
            yield item


def _schemas(schema: dict) -> Iterator[dict]:
    """Yield ``schema`` and every schema inside it; constants, examples and the like are no schemas."""
    waiting: list[object] = [schema]
    while waiting:
        item = waiting.pop()
        if not isinstance(item, dict):
            continue
        yield item
        for key, value in item.items():
            if key in _INNER:
                waiting.extend(value if isinstance(value, list) else [value])
            elif key in _INNER_BY_NAME and isinstance(value, dict):
                waiting.extend(value.values())


def first_line(error: object) -> str:
    """Return the first line of a message, without its full stop, at most 300 characters."""
    lines = str(error).strip().splitlines()
    if lines and "regex parse error" in lines[0]:  # the pattern and a mark follow, and then the reason
        reason = next((line for line in lines if line.startswith("error: ")), "")
        lines[0] = f"a pattern does not parse: {reason.removeprefix('error: ')[:200]}" if reason else lines[0]
    line = (lines[0].strip().rstrip(".:")[:300] if lines else "") or type(error).__name__
    return next((said for found, said in _SAID if found in line), line).replace("Expected f64", "Expected a number")
