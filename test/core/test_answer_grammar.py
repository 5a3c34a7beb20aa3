"""The grammar of answers: every format's calls are held to their schemas, and what is no call stays text."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

import fakes
from engine_core.errors import InvalidSchemaError
from engine_core.request import Tool
from engine_core.serving.constraint import ConstraintFactory, Demand
from engine_core.serving.tools import CheckedTool
from engine_core.text.answer import AnswerReader, ExpectedAnswer
from engine_core.text.call_formats import Arguments
from engine_core.text.tokenizer import Reasoning
from test_answer import calls_as_parts
from tool_templates import TEMPLATES, write

jsonschema = pytest.importorskip("jsonschema")

PARAMETERS = {
    "drive_to": {
        "type": "object",
        "properties": {
            "place": {"type": "string", "enum": ["kitchen", "dock"]},
            "note": {"type": "string", "maxLength": 3},
            "speed": {"type": "number", "minimum": 0, "maximum": 2},
            "floor": {"type": "integer"},
            "via": {"type": "array", "items": {"type": "string", "enum": ["hall", "door"]}, "maxItems": 2},
            "stop": {"type": "object", "properties": {"now": {"type": "boolean"}}, "required": ["now"]},
        },
        "required": ["place", "floor", "via"],
    },
    "wait": {"type": "object", "properties": {"seconds": {"type": "integer", "minimum": 1, "maximum": 60}}},
    "halt": {"type": "object", "properties": {}},
}
TOOLS = tuple(Tool(name, "", json.dumps(schema)) for name, schema in PARAMETERS.items())
VALID = [
    ("drive_to", {"place": "dock", "note": "a b", "speed": 1.5, "floor": 3, "via": ["hall"], "stop": {"now": True}}),
    ("wait", {"seconds": 7}),
    ("halt", {}),
]
WRONG = [
    ("drive_to", {"place": "roof", "floor": 1, "via": []}),
    ("drive_to", {"place": "dock", "via": []}),
    ("drive_to", {"place": "dock", "floor": 1.5, "via": []}),
    ("wait", {"seconds": 61}),
    ("wait", {"seconds": 6, "minutes": 1}),
    ("fly", {}),
]
VARIANTS = [(name, True) for name in TEMPLATES] + [
    (name, False) for name in TEMPLATES if name not in ("phi4_mini", "functiongemma")
]


class Setting:
    """A model of one family: its tokenizer, whose tokens are bytes and markers, and its grammars."""

    def __init__(self, directory, name, tokens):
        template, markers = TEMPLATES[name]
        self.tokenizer = write(directory, template, markers if tokens else ())
        self.form = self.tokenizer.answer_format
        self.size = self.tokenizer.vocab_size
        self.factory = ConstraintFactory(self.tokenizer, self.size, [fakes.EOS])

    def expected(self, **fields):
        strings = {}
        if self.form.calls.arguments is Arguments.XML:
            strings = {tool.name: CheckedTool.of(tool).strings for tool in TOOLS}
        return ExpectedAnswer(self.form, **{"may_call": True, "strings": strings, **fields})

    def constraint(self, *, choice="auto", several=True, reasoning=Reasoning.NEVER, schema="", budget=0, **fields):
        demand = Demand(
            schema or None, tools=TOOLS, tool_choice=choice, parallel_tool_calls=several, reasoning=reasoning
        )
        begun = reasoning is Reasoning.BEGUN
        expected = self.expected(begins_reasoning=begun, is_value=bool(schema), **fields)
        return self.factory.compile(demand, expected=expected, budget=budget)

    def ids(self, *parts):
        found = []
        for part in parts:
            index = None if isinstance(part, str) else self.form.id_of(part)
            found += list((part if isinstance(part, str) else part.text).encode()) if index is None else [index]
        return found

    def call_ids(self, calls):
        parts = calls_as_parts(self.form.calls, calls)
        is_bare = self.form.calls.may_be_bare and not self.form.token_ids
        return self.ids(*parts[len(self.form.calls.before) * is_bare :])

    def allowed(self, constraint):
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")[: self.size]
        return np.flatnonzero(bits).tolist()

    def accepts(self, constraint, ids, ends=True):
        """Return whether the answer may be ``ids``, and, with ``ends``, nothing more."""
        for token in ids:
            if constraint.complete or token not in self.allowed(constraint):
                return False
            constraint.accept(token)
        return not ends or constraint.complete or fakes.EOS in self.allowed(constraint)

    def read(self, ids, **fields):
        reader = AnswerReader(self.tokenizer, self.expected(**fields))
        for token in ids:
            reader.feed(token)
        reader.finish()
        parts = reader.take()
        return parts.reasoning, parts.text, [(call.name, json.loads(call.arguments)) for call in parts.calls]


def name_of(variant):
    return f"{variant[0]}-{'tokens' if variant[1] else 'text'}"


@pytest.fixture(scope="module", params=VARIANTS, ids=name_of)
def setting(request, tmp_path_factory):
    made = Setting(tmp_path_factory.mktemp("model"), *request.param)
    yield made
    made.factory.close()


def test_calls_of_the_schemas_are_taken_and_no_others(setting):
    several = not setting.form.one_call
    valid = VALID if several else VALID[:1]
    ids = setting.call_ids(valid)
    assert setting.accepts(setting.constraint(choice="required"), ids)
    assert setting.accepts(setting.constraint(choice="auto"), ids)
    for call in WRONG:
        assert not setting.accepts(setting.constraint(), setting.call_ids([call])), call


def test_text_may_come_first_or_alone_but_not_where_a_call_is_required(setting):
    text = setting.ids("I go to {room} 3 < 4.\n")
    call = setting.call_ids(VALID[1:2])
    assert setting.accepts(setting.constraint(), text)
    assert setting.accepts(setting.constraint(), [])
    assert setting.accepts(setting.constraint(choice="none"), text)
    assert not setting.accepts(setting.constraint(choice="none"), call)
    for choice in ("required", "wait"):
        assert not setting.accepts(setting.constraint(choice=choice), text, ends=False)
        assert setting.accepts(setting.constraint(choice=choice), call)
    if not (setting.form.calls.may_be_bare and not setting.form.token_ids):
        tagged = setting.accepts(setting.constraint(), [*text, *call])
        assert tagged


def test_a_call_without_its_markers_is_held_to_its_schema_too(setting):
    if not setting.form.calls.may_be_unmarked:
        pytest.skip("its calls have no markers, or are no JSON")
    call = '{"name": "wait", "arguments": {"seconds": 7}}'
    for text in (call, f"```json\n{call}\n```", f"I wait.\n{call}", call.replace("{", "{\n  ", 1)):
        assert setting.accepts(setting.constraint(), setting.ids(text)), text
        assert not setting.accepts(setting.constraint(choice="required"), setting.ids(text))
        assert not setting.accepts(setting.constraint(), setting.ids(text.replace("7", "70")))
        assert not setting.accepts(setting.constraint(), setting.ids(text.replace("7}}", "7}")))
    name = call.replace("wait", "drive_to_the_dock")
    assert not setting.accepts(setting.constraint(), setting.ids(name)), "it is drive_to"
    for text in (call.replace("wait", "weight"), f"I say {call.replace('7', '70')}"):
        assert setting.accepts(setting.constraint(), setting.ids(text))


def test_the_number_and_the_name_of_calls_are_held(setting):
    two = setting.call_ids([VALID[1], VALID[2]])
    one = setting.call_ids([VALID[1]])
    assert setting.accepts(setting.constraint(several=False), one)
    assert not setting.accepts(setting.constraint(several=False), two)
    assert not setting.accepts(setting.constraint(choice="halt"), one)
    assert not setting.accepts(setting.constraint(choice="wait"), two)


def test_random_answers_are_calls_that_meet_their_schemas(setting):
    rng = random.Random(7)
    closing = {*b'}]"<\n;|/>'}
    for _ in range(6):
        constraint, ids = setting.constraint(choice="required"), []
        while not constraint.complete and len(ids) < 700:
            allowed = setting.allowed(constraint)
            if fakes.EOS in allowed and rng.random() < 0.5:
                break
            plain = [i for i in allowed if i != fakes.EOS]
            short = [i for i in plain if i in closing or i >= 256]
            token = rng.choice(short if short and rng.random() < 0.6 else plain)
            constraint.accept(token)
            ids.append(token)
        _, text, calls = setting.read(ids)
        assert text == "" and (calls or len(ids) == 700)
        for name, arguments in calls:
            jsonschema.validate(arguments, {**PARAMETERS[name], "additionalProperties": False})
            assert all(len(str(value)) < 30 for value in arguments.values() if isinstance(value, (int, float)))


# --- reasoning ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["tokens", "text"])
def thinker(request, tmp_path_factory):
    made = Setting(tmp_path_factory.mktemp("thinker"), "hermes", request.param)
    yield made
    made.factory.close()


def test_reasoning_comes_first_and_then_what_is_demanded(thinker):
    form, schema = thinker.form.reasoning, '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'
    call = calls_as_parts(thinker.form.calls, VALID[1:2])
    thought = [form.begin, "\nSo {x} 1 < 2.\n", form.end, "\n\n"]
    maybe, begun = Reasoning.MAYBE, Reasoning.BEGUN
    assert thinker.accepts(thinker.constraint(reasoning=maybe, choice="required"), thinker.ids(*thought, *call))
    assert thinker.accepts(thinker.constraint(reasoning=maybe, choice="required"), thinker.ids(*call))
    assert thinker.accepts(thinker.constraint(reasoning=maybe), thinker.ids(*thought, "Yes."))
    assert thinker.accepts(thinker.constraint(reasoning=begun), thinker.ids(*thought[1:], "Yes.\n", *call))
    assert not thinker.accepts(thinker.constraint(reasoning=begun), thinker.ids("Yes."))
    value = thinker.constraint(reasoning=begun, schema=schema)
    assert thinker.accepts(value, thinker.ids(*thought[1:], '{"a": 7}'))
    value = thinker.constraint(reasoning=begun, schema=schema)
    assert not thinker.accepts(value, thinker.ids(*thought[1:], '{"b": 7}'))
    ids = thinker.ids(*thought, '{"a": 7}')
    assert thinker.read(ids, is_value=True) == ("So {x} 1 < 2.", '{"a": 7}', [])


def test_the_budget_ends_the_reasoning_at_a_whole_character(thinker):
    for budget in (1, 5, 6):
        constraint = thinker.constraint(reasoning=Reasoning.BEGUN, choice="required", budget=budget)
        ids = []
        for token in "Nun: äöü".encode():
            if token not in thinker.allowed(constraint):
                break
            constraint.accept(token)
            ids.append(token)
        while len(allowed := thinker.allowed(constraint)) == 1:
            constraint.accept(allowed[0])
            ids.append(allowed[0])
        reasoning, text, _ = thinker.read(ids, begins_reasoning=True)
        assert reasoning == "Nun: ä"[:budget].strip() and text == ""


def test_a_budget_forces_no_token_that_the_request_forbids(thinker):
    for forbidden, is_free in (([], False), ([ord("\n")], True)):
        constraint = thinker.constraint(reasoning=Reasoning.BEGUN, choice="required", budget=1)
        constraint.exclude(forbidden)
        constraint.accept(ord("a"))
        assert (len(thinker.allowed(constraint)) > 1) is is_free


def test_digits_of_values_are_bounded_and_those_of_text_are_not(thinker):
    digits = "1" * 40
    assert thinker.accepts(thinker.constraint(), thinker.ids(digits))
    call = ("drive_to", {"place": "dock", "floor": 1, "via": []})
    begin = thinker.ids(*calls_as_parts(thinker.form.calls, [call]))
    start = bytes(i for i in begin if i < 256).decode().index('"floor": 1') + len('"floor": ')
    start += sum(i >= 256 for i in begin[:start])
    assert not thinker.accepts(thinker.constraint(), [*begin[:start], *digits.encode()], ends=False)


# --- what cannot be used --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters, reason",
    [
        ("{", "tool 'x' cannot be used: it does not parse as JSON"),
        ("[]", "tool 'x' cannot be used: it is a list"),
        ('{"type":"string"}', "tool 'x' are a schema of \"string\""),
        ('{"type":"object","properties":{"a":{"$ref":"#/$defs/none"}}}', "tool 'x' cannot be used"),
    ],
)
def test_parameters_that_are_no_schema_of_an_object_are_refused_by_name(thinker, parameters, reason):
    tools = (Tool("y", "", '{"type":"object","properties":{}}'), Tool("x", "", parameters))
    with pytest.raises(InvalidSchemaError, match=reason):
        thinker.factory.compile(Demand(tools=tools), expected=thinker.expected())


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    for name, schema in (
        ("qwen3_coder", {"properties": {"a": {"type": "string", "pattern": "b+"}}}),
        ("functiongemma", {"properties": {"a": {"type": "string", "format": "date"}}}),
        ("functiongemma", {"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}),
    ):
        setting = Setting(tmp_path / name, name, True)
        with pytest.raises(InvalidSchemaError, match="tool 'x' use '(pattern|format|anyOf)'"):
            setting.factory.compile(Demand(tools=(Tool("x", "", json.dumps(schema)),)), expected=setting.expected())
        setting.factory.close()
