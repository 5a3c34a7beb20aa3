"""Answers of a form: a regular expression, choices, a grammar, a named schema; JSON on one line, strings that end."""

from __future__ import annotations

import json
import re
import threading

import numpy as np
import pytest

pytest.importorskip("llguidance")

import fakes
from engine_core.errors import ConfigurationError, InvalidRequestError, InvalidSamplingError, InvalidSchemaError
from engine_core.request import ChatMessage, FinishReason, GenerationRequest, SamplingParams, Tool
from engine_core.serving.answer_value import AnswerValue
from engine_core.serving.constraint import ConstraintFactory, Demand
from engine_core.serving.tools import checked_tool
from engine_core.serving.worker import Worker
from engine_core.text.answer import ExpectedAnswer
from engine_core.text.tokenizer import Reasoning, Tokenizer
from tool_templates import TEMPLATES, write

USER = (ChatMessage("user", "where to?"),)
GRAMMAR = 'start: verb " " NAME\nverb: "go to" | "bring" // what to do\nNAME: /[a-z]+/\n'
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "name": {"type": "string"}},
    "required": ["x", "name"],
}
# Form, answers of it, texts with which no answer begins.
TABLE = [
    ({"regex": r"\d{1,3}(\.\d)? m/s"}, ["12 m/s", "1.5 m/s"], ["1234", "m", "1.5 m/s "]),
    ({"regex": "^(left|right)$"}, ["left", "right"], ["l eft", "lefty"]),
    ({"regex": r"[$]\d\$"}, ["$5$"], ["5", "$5$$"]),
    ({"regex": r"a\/b/c"}, ["a/b/c"], ["a\\"]),
    ({"regex": "x*"}, ["", "xx"], ["y"]),
    ({"choices": ("kitchen", "kitchen table", 'the "dock"\n')}, ["kitchen", "kitchen table", 'the "dock"\n'], ["hall"]),
    ({"choices": ("été", "-1e9999")}, ["été", "-1e9999"], ["ete"]),
    ({"choices": ("\x7f\x80", "\\\x7f")}, ["\x7f\x80", "\\\x7f"], ["\x80", "\\u007f"]),
    ({"grammar": GRAMMAR}, ["go to hall", "bring cup"], ["go hall", "bring 3"]),
    ({"grammar": 'start: "[" [INT ("," INT)*] "]"\n%import common.INT'}, ["[]", "[1,22]"], ["[,"]),
    ({"grammar": 'start: "p=" pose\npose: %json {"type": "object", "properties": {"<x>": {"type": "integer"}}}'},
     ['p={"<x>":1}'], ["p=1"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def factory(tokenizer_dir):
    made = ConstraintFactory(Tokenizer(tokenizer_dir), fakes.VOCAB_SIZE, [fakes.EOS])
    yield made
    made.close()


def allowed(constraint, size=fakes.VOCAB_SIZE):
    return np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")[:size]).tolist()


def length_of(constraint, ids):
    """Return how many of ``ids`` the answer may begin with."""
    for count, token in enumerate(ids):
        if constraint.complete or token not in allowed(constraint):
            return count
        constraint.accept(token)
    return len(ids)


def may_end(constraint):
    return constraint.complete or fakes.EOS in allowed(constraint)


@pytest.mark.parametrize("form, answers, others", TABLE, ids=lambda value: str(value)[:40])
def test_an_answer_has_its_form(factory, form, answers, others):
    for answer in answers:
        constraint = factory.compile(Demand(**form))
        assert length_of(constraint, answer.encode()) == len(answer.encode()) and may_end(constraint), answer
    for other in others:
        constraint = factory.compile(Demand(**form))
        assert length_of(constraint, other.encode()) < len(other.encode()), other


@pytest.mark.parametrize(
    "form, words",
    [
        ({"regex": "["}, "unclosed character class"),
        ({"regex": r"\bgo"}, "The regular expression cannot be used"),
        ({"regex": "(?=a)a"}, "look-around"),
        ({"regex": "a\\"}, "single backslash"),
        ({"regex": "^$"}, "matches no text"),
        ({"regex": "a{1000000}"}, "cannot be used"),
        ({"grammar": 'root ::= "a"'}, "The grammar cannot be used"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": "nothing: /a/"}, "start"),
        ({"grammar": 'start: "a" <|end|>'}, "special token '<|end|>'"),
        ({"grammar": "start: @other"}, "other"),
        ({"grammar": 'start: "a" // "\nb: <[256]> // "'}, "special token '<[256]>'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_form_that_cannot_be_used_is_refused_in_one_sentence(factory, form, words):
    for _ in range(2):  # the second time from the cache
        with pytest.raises(InvalidSchemaError) as error:
            factory.compile(Demand(**form))
        assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_grammar_cannot_write_special_tokens(factory, monkeypatch):
    monkeypatch.setattr(AnswerValue, "lark", classmethod(lambda cls, text: cls(("value: @answer",), text)))
    constraint = factory.compile(Demand(grammar=f'start: "a" (<[{fakes.BOS}]> | "b")'))
    constraint.accept(ord("a"))
    assert allowed(constraint) == [ord("b")]
    constraint = factory.compile(Demand(grammar=f"start: <[{fakes.BOS}]>"))
    assert constraint.forced is None
    with pytest.raises(InvalidSchemaError, match="no token of this model"):
        constraint.mask()


def test_answers_are_spelled_with_kept_tokens_alone(tokenizer_dir):
    kept = np.array([i for i in range(fakes.VOCAB_SIZE) if i != ord("k")])
    factory = ConstraintFactory(Tokenizer(tokenizer_dir), fakes.VOCAB_SIZE, [fakes.EOS], kept)
    assert allowed(factory.compile(Demand(choices=("kitchen", "dock")))) == [ord("d")]
    forms = [
        {"choices": ("kitchen", "kiosk")}, {"choices": ("dock",)}, {"regex": "k[ai]"}, {"regex": "[ai]k"},
        {"grammar": 'start: "dock" /[0-9]/'}, {"json_schema": '{"enum": ["kitchen", "kiosk"]}'},
    ]  # fmt: skip
    for form in forms:
        constraint = factory.compile(Demand(**form))
        with pytest.raises(InvalidSchemaError, match="no token of this model"):
            while not constraint.complete:
                constraint.accept(allowed(constraint)[0])
    factory.close()


@pytest.mark.parametrize("form", [{"regex": "a+"}, {"choices": ("a", "aa")}, {"grammar": "start: /a+/"}], ids=str)
@pytest.mark.parametrize("tokens", [True, False])
def test_reasoning_comes_before_an_answer_of_a_form(tmp_path, form, tokens):
    template, markers = TEMPLATES["hermes"]
    tokenizer = write(tmp_path, template, markers if tokens else ())
    factory = ConstraintFactory(tokenizer, tokenizer.vocab_size, [fakes.EOS])
    reasoning = tokenizer.answer_format.reasoning

    def ids(*parts):
        for part in parts:
            index = None if isinstance(part, str) else tokenizer.answer_format.id_of(part)
            yield from list((part if isinstance(part, str) else part.text).encode()) if index is None else [index]

    def length(kind, *parts):
        expected = ExpectedAnswer(tokenizer.answer_format, begins_reasoning=kind is Reasoning.BEGUN)
        constraint = factory.compile(Demand(**form, reasoning=kind), expected=expected)
        sequence = list(ids(*parts))
        for count, token in enumerate(sequence):
            if constraint.complete or token not in allowed(constraint, tokenizer.vocab_size):
                return count - len(sequence)
            constraint.accept(token)
        return 0

    begun, maybe = Reasoning.BEGUN, Reasoning.MAYBE
    assert length(begun, "1e999 <b>", reasoning.end, "\n\naa") == 0
    assert length(maybe, reasoning.begin, "b", reasoning.end, "a") == 0
    assert length(maybe, "aa") == 0
    assert length(maybe, "\naa") == -3
    assert length(begun, "b", reasoning.end, "b") == -1
    assert length(maybe, "b") == -1
    factory.close()


def test_any_character_can_stand_in_json_beside_calls(factory):
    """The grammar library's lexer takes no delete character, which json.dumps leaves as it is."""
    schema = json.dumps({"const": {"\x7f": "\x7f\x80\u2028\\"}})
    tool = Tool("a", "", json.dumps({"type": "object", "properties": {"b": {"enum": ["\x7f"]}}}))
    for demand in (Demand(json_schema=schema, reasoning=Reasoning.MAYBE), Demand(tools=(tool,), tool_choice="none")):
        factory.compile(demand)
    (rule,) = AnswerValue.json(schema).rules
    assert "\x7f" not in rule and "\x7f" not in checked_tool(tool).json_grammar
    assert json.loads(rule.removeprefix("value: %json "))["const"] == {"\x7f": "\x7f\x80\u2028\\"}


def test_json_is_written_on_one_line_and_its_strings_end(factory):
    text = json.dumps({"x": 1, "name": "abc"})
    compact = Demand(json.dumps(POINT), compact_json=True, max_string=3)
    constraint = factory.compile(compact)
    assert length_of(constraint, text.encode()) == len(text) and constraint.complete
    for other in ('{"x":1', "{ ", '{"x": 1,"', '{"x": 1, "name": "abcd'):
        assert length_of(factory.compile(compact), other.encode()) == len(other) - 1, other
    flexible = '{"x":1,\n"name" : "abcd"}'
    assert length_of(factory.compile(Demand(json.dumps(POINT))), flexible.encode()) == len(flexible)
    bounded = json.dumps({"type": "array", "items": {"type": ["string", "null"], "minLength": 4}})
    text = '["abcde'
    assert length_of(factory.compile(Demand(bounded, max_string=2)), text.encode()) == len(text) - 1


def ask(**fields):
    return GenerationRequest("1", **{"messages": USER, "sampling": SamplingParams(max_new_tokens=40), **fields})


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({"regex": "a", "choices": ("a",)}, InvalidRequestError, "a regular expression and choices"),
        ({"json_schema": "{}", "schema_name": "a"}, InvalidRequestError, "a JSON schema and the name of a schema"),
        ({"choices": ("a", "")}, InvalidSchemaError, "A choice is empty"),
        ({"choices": ("a",) * 1025}, InvalidRequestError, "1025 choices"),
        ({"choices": ("a" * 100_000,) * 3}, InvalidSchemaError, "The choices have at least 300000 bytes"),
        ({"regex": "a" * 300_000}, InvalidSchemaError, "The regular expression has at least 300000"),
        ({"grammar": "é" * 200_000}, InvalidSchemaError, "The grammar has at least 400000 bytes"),
        ({"schema_name": "a" * 65}, InvalidRequestError, "65 characters in its schema's name"),
        ({"grammar": "start: /a/", "stop": ("b",)}, InvalidSamplingError, "stop strings and a grammar"),
        ({"regex": "a", "tools": (Tool("drive"),)}, InvalidRequestError, "tools and a regular expression"),
        ({"regex": "a", "compact_json": True}, InvalidRequestError, "compact_json"),
        ({"json_schema": "{}", "max_string": -1}, InvalidRequestError, "max_string is -1"),
        ({"choices": ("\ufffd",)}, InvalidRequestError, "U+FFFD"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_forms_that_do_not_fit_a_request_are_refused(fields, error, words):
    with pytest.raises(error, match=words.replace("+", r"\+")):
        ask(**fields).validate()


@pytest.mark.parametrize("max_draft", [0, 4])
def test_an_engine_answers_in_the_form(open_engine, max_draft):
    engine = open_engine(None, max_draft=max_draft, max_context=1024)
    for _ in range(2):
        answer = engine.answer(ask(choices=("go to the kitchen", "stay"), session="a"))
        assert answer.text in ("go to the kitchen", "stay") and answer.finish_reason is FinishReason.STOP
    assert answer.session_turns == 2
    answer = engine.answer(ask(prompt="x", messages=(), regex="[a-c]{3}"))
    assert len(answer.text) == 3 and set(answer.text) <= set("abc")
    assert engine.answer(ask(grammar='start: "a" start "b" | "c"', sampling=SamplingParams(max_new_tokens=9))).text
    assert engine.answer(ask()).error is None


def test_requests_of_a_batch_have_forms_of_their_own(open_engine):
    worker = Worker(open_engine(None, num_slots=3, config={"max_batch": 3}), queue_depth=8)
    forms = [{"choices": ("left", "right")}, {"regex": "[xyz]{9}"}, {"grammar": GRAMMAR}, {}, {"json_schema": "{}"}]
    results, ended = {}, threading.Event()

    def on_done(result):
        results[result.request_id] = result
        if len(results) == len(forms):
            ended.set()

    for index, form in enumerate(forms):
        worker.submit(ask(**form).replace(request_id=str(index)), on_piece=lambda piece: None, on_done=on_done)
    assert ended.wait(20.0) and worker.close()
    texts = [results[str(index)].text for index in range(len(forms))]
    assert texts[0] in ("left", "right") and re.fullmatch("[xyz]{9}", texts[1]) and texts[3]
    assert re.match("go to |bring ", texts[2]) and re.match(r'[\s"\[{\dtfn-]', texts[4])


def test_one_spelling_of_json_is_drafted(open_engine):
    schema = json.dumps({"type": "object", "properties": {n: {"enum": [1, 2]} for n in "ab"}, "required": ["a", "b"],
                         "additionalProperties": False})  # fmt: skip
    engine = open_engine(None, max_draft=8)
    forced = {}
    for compact in (True, False):
        answer = engine.answer(ask(json_schema=schema, compact_json=compact))
        assert json.loads(answer.text).keys() == {"a", "b"}
        forced[compact] = answer.speculation.forced
    assert forced[True] > forced[False]


def test_schemas_of_a_directory_are_asked_for_by_name(open_engine, tmp_path):
    directory = tmp_path / "schemas"
    directory.mkdir()
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [7]}}}
    files = {
        "seven.json": json.dumps(wrapped), "point.schema.json": '{"const": "p"}', "readme.txt": "{",
        "broken.json": "{", "latin.json": b'{"const": "\xe9"}', "costly.json": '{"type": "integer", "multipleOf": 0}',
        "a b.json": "{}", "seven.schema.json": "{}", "long.json": " " * 300_000,
    }  # fmt: skip
    for name, text in files.items():
        (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (directory / "folder.json").mkdir()
    engine = open_engine(None, config={"schema_dir": str(directory)})
    told = []
    engine.read_schemas(told.append)
    assert engine.schemas.names == ["point", "seven"]
    bad = ["a b.json", "broken.json", "costly.json", "latin.json", "long.json", "seven.schema.json"]
    assert [line.split(f"{directory}/")[1].split(" is left out")[0] for line in told] == bad
    (directory / "seven.json").write_text("{}")  # read at configure alone
    request = ask(schema_name="seven")
    assert engine.knows(request) and engine.answer(request).text == "7"
    assert engine.answer(ask(schema_name="point")).text == '"p"'
    with pytest.raises(InvalidSchemaError, match="'three' in this engine; it has point, seven"):
        engine.answer(ask(schema_name="three"))
    with pytest.raises(ConfigurationError, match="schema_dir"):
        open_engine(None, config={"schema_dir": str(tmp_path / "none")}).read_schemas(told.append)


def test_long_forms_leave_the_cache_before_many_short_ones(factory, monkeypatch):
    def knows(form):
        return factory.knows(GenerationRequest("r", USER, regex=form))

    monkeypatch.setattr("engine_core.serving.constraint._CACHED_CHARS", 100)
    forms = [f"{letter * 40}" for letter in "abc"]
    for form in forms:
        factory.compile(Demand(regex=form))
    assert [knows(form) for form in forms] == [False, True, True]
    factory.compile(Demand(regex="d" * 200))  # alone it is kept
    assert knows("d" * 200) and not knows(forms[2])
