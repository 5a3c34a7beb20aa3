"""Forms of answers with anything in them: a refusal in one sentence, or an answer that the form allows."""

from __future__ import annotations

import json
import math
import re

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_core.errors import InvalidSchemaError
from engine_core.request import ChatMessage, GenerationRequest, Tool
from engine_core.serving.constraint import ConstraintFactory, Demand
from engine_core.serving.tools import checked_tool
from engine_core.text.answer import AnswerReader, ExpectedAnswer
from engine_core.text.call_formats import Arguments
from engine_core.text.tokenizer import Tokenizer
from fakes import END, EOS, VOCAB_SIZE
from fuzzing import any_text, fuzz, fuzz_slow, refusal
from tool_templates import TEMPLATES, write

MAX_TOKENS = 300
CLOSING = {*b'"}]', EOS, END}
names = (
    st.sampled_from(["a", "b", "plan", "größe", "名前", "🤖", "", "$ref", "a/b~c", '"', "\\", "\n", "type"]) | any_text
)
numbers = (
    st.integers(-5, 5) | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([1e308, 5e-324, 1e-7, 2**53])
)
sizes = st.integers(0, 4) | st.sampled_from([-1, 50, 10_000, 2**31, 2**64, 1.5])
values = st.recursive(
    st.none() | st.booleans() | numbers | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)
# The first ones mean the same to ECMA 262, to Python and to the grammar library.
PATTERNS = ["^[a-c]{1,3}$", "^x?y*z+$", "^(on|off)$", "^[0-9]{2}:[0-9]{2}$", "^$", "^.$"]
patterns = (
    st.sampled_from(PATTERNS)
    | st.sampled_from(
        [
            "(",
            "[z-a]",
            "a{1000}{1000}",
            "^(a|aa)+$",
            "(?=a)b",
            "\\p{L}+",
            "\\d+$",
            "(a*)*b",
            "\\1",
            "^\U0001f916$",
            "^a{0,70000}$",
        ]
    )
    | any_text
)
references = (
    st.sampled_from(
        [
            "#",
            "#/$defs/a",
            "#/$defs/b",
            "#/$defs/a/items",
            "#/properties/a",
            "#/$defs/c",
            "#/",
            "##",
            "",
            "a.json",
            "#a",
        ]
    )
    | any_text
)
formats = st.sampled_from(
    ["date", "date-time", "time", "email", "uri", "uuid", "ipv4", "ipv6", "hostname", "robot", ""]
)
types = st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])


def number_schemas():
    keys = {
        "minimum": numbers, "maximum": numbers, "exclusiveMinimum": numbers, "exclusiveMaximum": numbers,
        "multipleOf": st.sampled_from([1, 2, 0.5, 7, 9999991, 0, -1, 1e-300, 1e300]),
    }  # fmt: skip
    return st.fixed_dictionaries({"type": st.sampled_from(["integer", "number"])}, optional=keys)


def string_schemas():
    keys = {"minLength": sizes, "maxLength": sizes, "pattern": patterns, "format": formats}
    return st.fixed_dictionaries({"type": st.just("string")}, optional=keys)


def nested(inner):
    """Return a strategy of schemas whose parts are schemas of ``inner``."""
    by_name = st.dictionaries(names, inner, max_size=3)
    array = st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={
            "items": inner, "prefixItems": st.lists(inner, max_size=3), "minItems": sizes, "maxItems": sizes,
            "uniqueItems": st.booleans(), "contains": inner,
        },
    )  # fmt: skip
    of_objects = {
        "properties": by_name, "required": st.lists(names, max_size=3), "additionalProperties": inner | st.booleans(),
        "patternProperties": st.dictionaries(patterns, inner, max_size=2), "minProperties": sizes,
        "maxProperties": sizes, "propertyNames": inner, "dependentRequired": st.dictionaries(names, st.lists(names)),
    }  # fmt: skip
    objects = st.fixed_dictionaries({"type": st.just("object")}, optional=of_objects)
    several = st.lists(inner, min_size=1, max_size=3)
    combined = st.fixed_dictionaries({}, optional={"anyOf": several, "oneOf": several, "allOf": several, "not": inner})
    defined = st.fixed_dictionaries({}, optional={"$ref": references, "$defs": by_name})
    return array | objects | combined | defined


schemas = st.recursive(
    number_schemas()
    | string_schemas()
    | st.builds(lambda kind: {"type": kind}, types | st.lists(types, max_size=3))
    | st.builds(lambda value: {"const": value}, values)
    | st.builds(lambda found: {"enum": found}, st.lists(values, max_size=4))
    | st.builds(lambda reference: {"$ref": reference}, references)
    | st.booleans(),
    nested,
    max_leaves=8,
)
# Wrong types in place of what a keyword expects.
broken = st.dictionaries(
    st.sampled_from(
        ["type", "properties", "items", "required", "enum", "$ref", "$defs", "anyOf", "pattern", "minItems"]
    ),
    values | st.integers(),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def factory(tokenizer_dir):
    made = ConstraintFactory(Tokenizer(tokenizer_dir), VOCAB_SIZE, (EOS, END))
    yield made
    made.close()


def walk(constraint, seed: int) -> str | None:
    """Return the text of a random answer; None if it was not complete after MAX_TOKENS."""
    rng = np.random.default_rng(seed)
    text = bytearray()
    for _ in range(MAX_TOKENS):
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[:VOCAB_SIZE])
        # Mostly what closes a value: texts stay short.
        closing = [i for i in allowed if i in CLOSING]
        token = int(rng.choice(closing if closing and rng.random() < 0.5 else allowed))
        assert token < 256 or token in (EOS, END)
        constraint.accept(token)
        if token < 256:
            text.append(token)
        if token in (EOS, END) or constraint.complete:
            return text.decode("utf-8")
    return None


def parse(text: str) -> object:
    def finite(number: str) -> float:
        assert math.isfinite(value := float(number)), number
        return value

    return json.loads(text, parse_float=finite, parse_constant=lambda name: pytest.fail(f"{name} in {text}"))


def means_the_same_elsewhere(schema: object) -> bool:
    """Return True if a validator is sure to read ``schema`` as the grammar library does."""
    if isinstance(schema, list):
        return all(map(means_the_same_elsewhere, schema))
    if not isinstance(schema, dict):
        return True
    if (
        schema.keys() & {"format", "patternProperties", "multipleOf", "$ref"}
        or schema.get("pattern", "^$") not in PATTERNS
    ):
        return False
    return all(map(means_the_same_elsewhere, schema.values()))


def check(factory, text: str, schema: object, seed: int) -> None:
    """Compile ``text``: it is refused, or a random walk through its grammar gives JSON that ``schema`` allows."""
    answers = []
    request = GenerationRequest("r", prompt="p", json_schema=text)
    if refusal(request.validate) is not None:
        return
    error = refusal(lambda: answers.append(walk(factory.compile(text), seed)))
    assert error is None or isinstance(error, InvalidSchemaError)
    if error is None and answers[0] is not None:
        value = parse(answers[0])
        if means_the_same_elsewhere(schema):
            jsonschema.Draft202012Validator(schema).validate(value)


@pytest.fixture(scope="module", params=["hermes", "qwen3_coder", "functiongemma"])
def family(request, tmp_path_factory):
    """A factory for tokens that are bytes and markers, and how answers with a call are read."""
    tokenizer = write(tmp_path_factory.mktemp("model"), *TEMPLATES[request.param])
    made = ConstraintFactory(tokenizer, tokenizer.vocab_size, (EOS,))
    yield made, tokenizer
    made.close()


@fuzz_slow
@given(
    schema=st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(names, schemas, max_size=2)},
        optional={"required": st.lists(names, max_size=2), "$defs": st.dictionaries(names, schemas, max_size=1)},
    )
    | schemas
    | broken,
    seed=st.integers(0, 3),
)
def test_a_call_fits_the_parameters_of_its_tool(family, schema, seed):
    factory, tokenizer = family
    form, tool = tokenizer.answer_format, Tool("x", "", json.dumps(schema))
    if refusal(GenerationRequest("r", (ChatMessage("user", "a"),), tools=(tool,)).validate) is not None:
        return
    answers = []

    def answer():
        strings = {"x": checked_tool(tool).strings} if form.calls.arguments is Arguments.XML else {}
        expected = ExpectedAnswer(form, may_call=True, strings=strings)
        demand = Demand(tools=(tool,), tool_choice="required", parallel_tool_calls=False)
        answers.append((expected, walk_ids(factory.compile(demand, expected=expected), seed, tokenizer.vocab_size)))

    error = refusal(answer)
    assert error is None or isinstance(error, InvalidSchemaError)
    if error is None and answers[0][1] is not None:
        reader = AnswerReader(tokenizer, answers[0][0])
        for token in answers[0][1]:
            reader.feed(token)
        (call,) = reader.take().calls
        arguments = parse(call.arguments)
        if means_the_same_elsewhere(schema):
            jsonschema.Draft202012Validator(schema).validate(arguments)


def walk_ids(constraint, seed: int, size: int) -> list[int] | None:
    """Return the ids of a random answer without its end; None if it was not complete after MAX_TOKENS."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(MAX_TOKENS):
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[:size])
        closing = [i for i in allowed if i in CLOSING or i > END or i in b"<>/\n"]
        token = int(rng.choice(closing if closing and rng.random() < 0.5 else allowed))
        if token == EOS:
            return found
        constraint.accept(token)
        found.append(token)
        if constraint.complete:
            return found
    return None


@fuzz
@given(schema=schemas, seed=st.integers(0, 3))
def test_an_answer_fits_its_schema(factory, schema, seed):
    check(factory, json.dumps(schema), schema, seed)


@fuzz
@given(schema=broken, seed=st.integers(0, 3))
def test_wrong_types_are_told_in_one_sentence(factory, schema, seed):
    check(factory, json.dumps(schema), {"format": "unknown"}, seed)


@fuzz
@given(
    text=any_text | st.sampled_from(["[" * 5000, '{"a":' * 5000, "1e999", "-", "nul", '{"type":"string"} x', "\ud800"])
)
def test_any_text_is_a_schema_or_told_in_one_sentence(factory, text):
    check(factory, text, {"format": "unknown"}, 0)


def answer_of(factory, form: dict, seed: int) -> str | None:
    """Return a random answer of a form; None if it is refused or the answer does not end soon."""
    answers = []
    if refusal(GenerationRequest("r", prompt="p", **form).validate) is not None:
        return None
    error = refusal(lambda: answers.append(walk(factory.compile(Demand(**form)), seed)))
    assert error is None or isinstance(error, InvalidSchemaError)
    return answers[0] if error is None else None


@fuzz_slow
@given(pattern=patterns | st.text("ab(|)[]*+?{1,}.\\/^$\n", max_size=12), seed=st.integers(0, 3))
def test_an_answer_is_matched_by_its_regular_expression(factory, pattern, seed):
    answer = answer_of(factory, {"regex": pattern}, seed)
    if answer is not None and pattern in PATTERNS:
        assert re.fullmatch(pattern, answer)


@fuzz
@given(texts=st.lists(any_text, min_size=1, max_size=4), seed=st.integers(0, 3))
def test_an_answer_is_one_of_its_choices(factory, texts, seed):
    answer = answer_of(factory, {"choices": tuple(texts)}, seed)
    assert answer is None or answer in texts


@fuzz
@given(text=st.text("ab AB:|()[]{}*+?/\\\"\n%@<>#,1", max_size=30) | any_text, seed=st.integers(0, 3))
def test_any_text_is_a_grammar_or_told_in_one_sentence(factory, text, seed):
    for grammar in (text, f"start: {text}", f'start: "a" b\nb: {text}\nA: /x/\nB: "b"\na: A B\n'):
        answer_of(factory, {"grammar": grammar}, seed)
