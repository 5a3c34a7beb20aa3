"""Whatever is sampled under a schema's masks fits the schema, by the library jsonschema."""

from __future__ import annotations

import json
import random
import re
from decimal import Decimal

import numpy as np
import pytest

import fakes
from engine_core.errors import InvalidSchemaError
from engine_core.serving.constraint import ConstraintFactory
from engine_core.serving.json_text import JsonText
from engine_core.text.tokenizer import Tokenizer

jsonschema = pytest.importorskip("jsonschema")

EOS = [fakes.EOS, fakes.END]
ENDS = {*EOS, *b'"}]'}
STRING = {"type": "string", "maxLength": 3}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}


@pytest.fixture(scope="module")
def factory(tokenizer_dir):
    made = ConstraintFactory(Tokenizer(tokenizer_dir), fakes.VOCAB_SIZE, EOS)
    yield made
    made.close()


def sample(constraint, rng: random.Random, limit: int = 500) -> str | None:
    """Return a random text under the constraint, more likely a short one; None if it does not end."""
    text = bytearray()
    while len(text) < limit and not constraint.complete:
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")[: fakes.VOCAB_SIZE]
        allowed = np.flatnonzero(bits).tolist()
        ends = [i for i in allowed if i in ENDS]
        plain = [i for i in allowed if i < 128 and chr(i).isalnum()]
        hurry = 0.3 if len(text) < 80 else 0.95
        choice = ends if ends and rng.random() < hurry else plain if plain and rng.random() < 0.5 else allowed
        token = rng.choice(choice)
        if token in EOS:
            return text.decode()
        constraint.accept(token)
        text.append(token)
    return text.decode() if constraint.complete else None


def parse(text: str):
    def unique(pairs):
        assert len(dict(pairs)) == len(pairs), f"a key stands twice in {text}"
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique, parse_constant=lambda name: pytest.fail(name))


SCHEMAS = {
    "command": {
        "type": "object", "additionalProperties": False, "required": ["go", "to"],
        "properties": {"go": {"type": "boolean"}, "to": {"enum": ["küche", "台所", "🛑"]}, "n": DIGIT},
    },
    "nested": {
        "type": "array", "maxItems": 2,
        "items": {"type": "object", "properties": {"a": {"type": "array", "items": DIGIT, "maxItems": 2}},
                  "required": ["a"], "additionalProperties": False},
    },
    "free keys": {"type": "object", "additionalProperties": DIGIT, "minProperties": 2, "maxProperties": 4},
    "open object": {"type": "object", "properties": {"go": {"type": "boolean"}}, "required": ["go"]},
    "keys of a pattern": {"type": "object", "patternProperties": {"^[ab]{1,9}$": DIGIT}, "additionalProperties": False,
                          "minProperties": 2},
    "keys with marks": {"type": "object", "properties": {'q"': DIGIT, "\n": DIGIT, "": DIGIT, "🔑": DIGIT},
                        "required": ["", "\n"], "additionalProperties": False},
    "constants": {"enum": ["<end>", "k\u2126", "e\u0301", '"\\', "\u0000", 0.1, -0.0, 1e-7, None, [1, {}], 2**53]},
    "pattern": {"type": "string", "pattern": r"^[A-Z]{2}-\d{3}$"},
    "two patterns": {"allOf": [{"type": "string", "pattern": "a"}, {"pattern": "b"}], "maxLength": 6},
    "length in characters": {"type": "string", "minLength": 2, "maxLength": 2},
    "tuple": {"type": "array", "prefixItems": [DIGIT, STRING], "items": False, "minItems": 2},
    "tree": {"$ref": "#/$defs/n", "$defs": {"n": {
        "type": "object", "properties": {"v": DIGIT, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}},
        "required": ["v", "next"], "additionalProperties": False}}},
    "types": {"type": ["integer", "null", "string"], "maxLength": 3, "minimum": 0},
    "multiples": {"type": "number", "multipleOf": 0.25, "minimum": -2, "maximum": 2},
    "anything": {},
    **{form: {"type": "string", "format": form} for form in ("date", "time", "date-time", "uuid", "ipv4", "ipv6")},
}  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_answer_fits(factory, schema):
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    text, finished = json.dumps(schema), 0
    for number in range(15):
        answer = sample(factory.compile(text), random.Random(number))
        if answer is not None:
            finished += 1
            value = parse(answer)
            validator.validate(value)
            json.dumps(value, ensure_ascii=False).encode()  # no half surrogates
    assert finished >= 5


POINTS = (0, 0.001, -0.001, 0.1, 1, -1, 1.5, 10, -10, 100.25, 1e-5, -0.5, 0.999, -99.75, 1000000, 1e-9, 10**12)


@pytest.mark.parametrize("seed", range(6))
def test_bounds_hold_to_the_last_digit(factory, seed):
    rng = random.Random(seed)
    for _ in range(8):
        low, high = sorted(rng.sample(POINTS, 2))
        kind, bounds = rng.choice(("number", "number", "integer")), {}
        if rng.random() < 0.9:
            bounds[rng.choice(("minimum", "exclusiveMinimum"))] = low
        if rng.random() < 0.9:
            bounds[rng.choice(("maximum", "exclusiveMaximum"))] = high
        schema = {"type": kind, **bounds}
        try:
            factory.compile(json.dumps(schema))
        except InvalidSchemaError as error:
            assert kind == "integer" and "contains no integer" in str(error), schema
            continue
        for number in range(6):
            answer = sample(factory.compile(json.dumps(schema)), random.Random(number), 60)
            if answer is not None:
                assert _within(Decimal(answer), bounds), (schema, answer)


def _within(value: Decimal, bounds: dict) -> bool:
    limits = {name: Decimal(str(limit)) for name, limit in bounds.items()}
    return (
        value >= limits.get("minimum", value)
        and value <= limits.get("maximum", value)
        and value > limits.get("exclusiveMinimum", value - 1)
        and value < limits.get("exclusiveMaximum", value + 1)
    )


@pytest.mark.parametrize("schema", [
    {"const": 12345678901234567890}, {"enum": [1, [2**53 + 1]]}, {"const": 1.5e300}, {"const": 1e17},
    {"type": "integer", "minimum": 2**53 + 1}, {"type": "integer", "maximum": -(2**53) - 1},
])  # fmt: skip
def test_a_number_that_a_double_does_not_hold_is_refused(factory, schema):
    with pytest.raises(InvalidSchemaError, match="a double cannot hold every digit"):
        factory.compile(json.dumps(schema))


def test_a_constant_is_written_as_it_is_or_refused(factory):
    """The library reads the digits of 0.7523…, more than a double holds, and rounds the quotient again."""
    drawn, refused = random.Random(5), 0
    numbers = [1801439850948199.0, 0.1, 5.0, -3.141592653589793, 1e16, *(drawn.uniform(-10, 10) for _ in range(30))]
    for number in numbers:
        try:
            constraint = factory.compile(json.dumps({"enum": [number]}))
        except InvalidSchemaError as error:
            refused += 1
            assert "the grammar cannot hold every digit" in str(error) and number not in numbers[:5]
        else:
            assert json.loads(sample(constraint, random.Random(0))) == number
    assert 0 < refused < 30


def test_bounds_that_no_number_reaches_are_as_none(factory):
    int64 = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    for schema in (int64, {"type": "number", "minimum": -1.7e308, "maximum": 1.7e308}):
        answers = [sample(factory.compile(json.dumps(schema)), random.Random(number)) for number in range(5)]
        assert all(re.fullmatch(r"-?\d+(\.\d+)?", answer) for answer in answers if answer is not None)


@pytest.mark.parametrize("multiple", [7, 0.25, 100])
@pytest.mark.parametrize("kind", ["integer", "number"])
def test_a_multiple_has_digits_that_every_parser_keeps(factory, kind, multiple):
    schema = json.dumps({"type": kind, "multipleOf": multiple})
    for seed in range(20):
        constraint, rng, text = factory.compile(schema), random.Random(seed), ""
        while not constraint.complete:  # digits as long as there may be any
            allowed = np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little"))
            digits = [token for token in allowed.tolist() if 48 <= token <= 57]
            if not digits:
                break
            text += chr(rng.choice(digits))
            constraint.accept(ord(text[-1]))
        value = Decimal(text)
        assert value % Decimal(str(multiple)) == 0 and abs(value) <= 2**53 and float(value) == value


@pytest.mark.parametrize(("schema", "words"), [
    ('{"type":"string","type":"integer"}', "there is an object with the key 'type' twice"),
    ("[1]", "is a list, but it must be an object"), ("null", "is null, but it must be an object"),
    ('{"type":"string","pattern":"\\\\"}', "which ends with a backslash"),
    ('{"type":"object","patternProperties":{"a\\\\":{}}}', "which ends with a backslash"),
    ('{"type":"number","multipleOf":1e400}', "'multipleOf' with a number beyond a double"),
    ('{"type":"array","items":{"type":"array","minItems":1e400}}', "'minItems' with a number beyond a double"),
    ('{"type":"string","minLength":4294967296}', "minLength 4294967296; no answer is as long"),
    ('{"oneOf":[{"type":"integer"},{"const":5}]}', "the schemas of a oneOf may allow the same value; use anyOf"),
    ('{"type":"string","pattern":"^a$","format":"ipv4"}', "no string meets all that it requires"),
    ('{"type":"integer","minimum":"5"}', "Expected a number for 'minimum'"),
    ("\ufeff{}", "Unexpected UTF-8 BOM: line 1 column 1"),
])  # fmt: skip
def test_what_is_wrong_with_a_schema_is_said_in_json_words(factory, schema, words):
    with pytest.raises(InvalidSchemaError) as error:
        factory.compile(schema)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_string_may_have_any_greatest_length(factory):
    assert takes(factory, {"type": "string", "maxLength": 2**64}, '"abc"')


@pytest.mark.parametrize(("form", "value", "good"), [
    ("date", "2023-02-28", True), ("date", "2024-02-29", True), ("date", "2000-02-29", True),
    ("date", "2023-02-29", False), ("date", "1900-02-29", False), ("date", "2023-04-31", False),
    ("date", "0000-01-01", False), ("time", "23:59:59Z", True), ("time", "12:00:60Z", False),
    ("date-time", "2023-02-29T10:00:00Z", False), ("date-time", "2024-02-29T10:00:00.5+01:00", True),
    ("date-time", "2024-02-28T10:00:60Z", False), ("date-time", "2024-02-28t10:00:00Z", False),
    ("time", "10:00:00z", False),
])  # fmt: skip
def test_dates_and_times_are_real_ones(factory, form, value, good):
    assert takes(factory, {"type": "string", "format": form}, json.dumps(value)) == good


def takes(factory, schema: dict, text: str) -> bool:
    """Return whether ``text`` can be written under the schema."""
    constraint = factory.compile(json.dumps(schema))
    for byte in text.encode():
        mask = constraint.mask()
        if not (mask[byte // 32] >> np.uint32(byte % 32)) & 1:
            return False
        constraint.accept(byte)
    return True


def test_no_key_is_written_twice(factory):
    schema = {"type": "object", "additionalProperties": DIGIT}
    assert takes(factory, schema, '{"a":1,"ab":2,"b":{') is False
    assert takes(factory, schema, '{"a":1,"ab":2,"b":3}')
    for twice in ('{"a":1,"a"', '{"a":1,"b":2,"a"', '{"":1,""', '{"\\n":1,"\\n"', '{"é":1,"é"', '{"\\"":1,"\\""'):
        assert not takes(factory, schema, twice), twice
    inner = {"type": "object", "additionalProperties": schema}
    assert takes(factory, inner, '{"a":{"a":1},"b":{"a":2}}')
    assert not takes(factory, inner, '{"a":{"b":1,"b"')
    values = {"type": "object", "additionalProperties": STRING}
    assert takes(factory, values, '{"a":"b","b":"a"}')


def test_a_json_text_is_followed():
    text = JsonText()
    text.feed(b'{"a":[1,{"x":"}\\"{"}],"b\\\\":-1')
    assert text.taken == {b"a", b"b\\\\"} and text.key is None and text.number == b"-1" and text.digits == 1
    text.feed(b'2.5,"c')
    assert text.key == b"c" and text.in_string and not text.number
    text.feed(b'":"c')
    assert text.key is None and text.in_string and not text.taken
