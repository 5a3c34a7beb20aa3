"""What a client sends can end its own request, and nothing else: schemas, sampling values, texts, sizes, deadlines."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time

import numpy as np
import pytest
from tokenizers import normalizers

import fakes
from engine_core.backends.onnxruntime import plan as ort_plan
from engine_core.errors import (
    InvalidRequestError,
    InvalidSamplingError,
    InvalidSchemaError,
    InvalidTextError,
    PromptTooLongError,
)
from engine_core.request import LIMITS, ChatMessage, FinishReason, GenerationRequest, Piece, SamplingParams
from engine_core.serving import constraint as constraint_module
from engine_core.serving.constraint import ConstraintFactory, Demand
from engine_core.serving.json_schema import parse_schema
from engine_core.serving.worker import Worker
from engine_core.text.detokenizer import Detokenizer
from engine_core.text.tokenizer import Tokenizer

EOS = [fakes.EOS, fakes.END]


def ask(text="hello", **fields):
    return GenerationRequest("1", messages=(ChatMessage("user", text),), **fields)


@pytest.fixture
def factory(tokenizer_dir):
    made = ConstraintFactory(Tokenizer(tokenizer_dir), fakes.VOCAB_SIZE, EOS)
    yield made
    made.close()


def write(constraint, choose, limit=400) -> str:
    """Sample by ``choose(allowed ids)`` until the value is complete; return its text."""
    text = b""
    for _ in range(limit):
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
        allowed = [int(i) for i in np.flatnonzero(bits[: fakes.VOCAB_SIZE])]
        token = choose(allowed)
        if token in EOS:
            break
        constraint.accept(token)
        text += bytes((token,))
        if constraint.complete:
            break
    return text.decode()


def run(engine, request):
    """The whole text of a request; drives prepare and generate."""
    pieces: list[Piece] = []
    result = engine.answer(request, pieces.append)
    assert result.text == "".join(piece.text for piece in pieces)
    return result


EXPENSIVE = {
    "reference to itself": {"$ref": "#"},
    "a million characters": {"type": "string", "pattern": "^(a{1000}){1000}$"},
    "520 optional properties": {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(520)}},
    "lookahead": {"type": "string", "pattern": "(?=a)b"},
    "empty enum": {"enum": []},
    "contradiction": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "nested deeply": json.loads('{"items":' * 100 + "{}" + "}" * 100),
}


@pytest.mark.parametrize("schema", EXPENSIVE.values(), ids=EXPENSIVE)
def test_an_impossible_schema_ends_its_request_with_one_line(open_engine, schema):
    engine = open_engine()
    with pytest.raises(InvalidSchemaError) as raised:
        run(engine, ask(json_schema=json.dumps(schema)))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    assert run(engine, ask(json_schema='{"type":"boolean"}')).text in ("true", "false")


def test_a_schema_that_compiles_for_ever_is_abandoned_and_holds_up_nobody(factory):
    factory._checker.timeout = 1.0
    slow = json.dumps({"type": "integer", "multipleOf": 9999991})
    errors = []

    def compile_slow():
        try:
            factory.compile(slow)
        except InvalidSchemaError as error:
            errors.append(str(error))

    thread = threading.Thread(target=compile_slow)
    thread.start()
    start = time.monotonic()
    factory.compile('{"type":"boolean"}')
    alone = time.monotonic() - start
    thread.join(20.0)
    assert errors and "takes too" in errors[0]
    assert alone < 5.0
    start = time.monotonic()
    with pytest.raises(InvalidSchemaError):
        factory.compile(slow)  # the verdict is kept
    assert time.monotonic() - start < 0.5


def test_a_form_with_a_slow_step_is_refused(factory, monkeypatch):
    """All answers wait for a mask. Some forms compile in no time and take seconds for each."""
    for demand in (Demand(grammar="start: /a{800}/{800}"), Demand(json_schema=json.dumps({"const": "x" * 70_000}))):
        with pytest.raises(InvalidSchemaError, match="cannot be used: it forces a text of more than 65536 bytes"):
            factory.compile(demand)
    late = '{"const":"late"}'  # stands for one that is quick at first
    constraint = factory.compile(late)
    monkeypatch.setattr(constraint_module, "MASK_LIMIT", -1.0)
    with pytest.raises(InvalidSchemaError, match="takes too long"):
        constraint.mask()
    with pytest.raises(InvalidSchemaError, match="takes too long"):
        factory.compile(late)


def test_the_same_schema_is_compiled_once(factory, monkeypatch):
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
    factory.compile(schema)
    monkeypatch.setattr(factory, "_compile", lambda *_: pytest.fail("compiled again"))
    first, second = factory.compile(schema), factory.compile(schema)
    first.mask()
    first.accept(ord("{"))
    assert write(second, min).startswith("{")  # a state of its own


@pytest.mark.parametrize("value", ["<end>", "a</s>b", "k\u2126", "<s>", "\u00e9\u0301", '"\\'])
def test_a_constant_comes_out_as_it_is(tokenizer_dir, value):
    tokenizer = Tokenizer(tokenizer_dir)
    tokenizer.fast.normalizer = normalizers.NFC()
    factory = ConstraintFactory(tokenizer, fakes.VOCAB_SIZE, EOS)
    try:
        text = write(factory.compile(json.dumps({"const": value}, ensure_ascii=False)), min)
    finally:
        factory.close()
    assert json.loads(text) == value


def test_only_tokens_that_can_be_sampled_are_allowed(tokenizer_dir):
    kept = np.array([i for i in range(fakes.VOCAB_SIZE) if i != ord("z")], dtype=np.int32)
    factory = ConstraintFactory(Tokenizer(tokenizer_dir), fakes.VOCAB_SIZE, EOS, kept)
    try:
        assert write(factory.compile('{"const":"battery"}'), min) == '"battery"'
        with pytest.raises(InvalidSchemaError, match="cannot be met"):
            write(factory.compile('{"const":"zoo"}'), min)
    finally:
        factory.close()


@pytest.mark.parametrize("kind", ["integer", "number"])
def test_numbers_end_and_are_finite(factory, kind):
    def longest(allowed):
        return next((i for i in map(ord, "9e.") if i in allowed), fakes.END)

    text = write(factory.compile(json.dumps({"type": kind})), longest)
    assert len(text) <= constraint_module.MAX_DIGITS + 2 and math.isfinite(json.loads(text))


@pytest.mark.parametrize("wrap", [
    lambda schema: {"name": "x", "strict": True, "schema": schema},
    lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
])  # fmt: skip
def test_the_wrapper_of_openai_is_understood(factory, wrap):
    assert write(factory.compile(json.dumps(wrap({"const": "yes"}))), min) == '"yes"'


@pytest.mark.parametrize("schema", [
    '{"name":"move","description":"a tool","parameters":{"type":"object"}}',
    '{"title":"a typo","tpye":"integer"}',
    '{"type":"object","properties":{"a":{"tipe":"integer"}},"required":["a"]}',
    '{"type":"object","x-guidance":{"item_separator":";","lenient":true}}',
])  # fmt: skip
def test_what_constrains_nothing_or_steers_the_library_is_refused(factory, schema):
    with pytest.raises(InvalidSchemaError, match="leave it out|would allow every value"):
        factory.compile(schema)


def test_names_and_constants_are_not_taken_for_keywords(factory):
    schema = {
        "type": "object", "title": "t", "properties": {"tipe": {"const": {"banana": 1}}, "any": {"title": "free"}},
        "required": ["tipe"], "additionalProperties": False,
    }  # fmt: skip
    assert json.loads(write(factory.compile(json.dumps(schema)), max))["tipe"] == {"banana": 1}


def test_a_pattern_that_does_not_parse_is_refused_with_the_reason(factory):
    with pytest.raises(InvalidSchemaError, match="^[^\n]*look-around[^\n]*$"):
        factory.compile('{"type":"string","pattern":"(?=a)b"}')


def test_a_long_chain_of_references_overflows_no_stack(factory):
    """The worker's stack is a quarter of a thread's, so that what passes there has room in the engine's process."""

    def chain(length):
        links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
        return json.dumps({"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"const": 1}}})

    assert write(factory.compile(chain(200)), min) == "1"
    for length in (1500, 5000):
        with pytest.raises(InvalidSchemaError, match="references are too deep"):
            factory.compile(chain(length))


def test_a_schema_asked_for_by_many_at_once_is_compiled_once(factory, monkeypatch):
    calls, compile_one = [], factory._compile

    def slow(schema, timeout):
        calls.append(schema)
        time.sleep(0.3)
        return compile_one(schema, timeout)

    monkeypatch.setattr(factory, "_compile", slow)
    made = []
    threads = [threading.Thread(target=lambda: made.append(factory.compile('{"const":7}'))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert [write(constraint, min) for constraint in made] == ["7"] * 6 and len(calls) == 1
    assert factory.knows(ask(json_schema='{"const":7}')) and not factory.knows(ask(json_schema='{"const":8}'))


def tokenizer_with(tokenizer_dir, directory, token: str, token_id: int) -> Tokenizer:
    """Return the tokenizer with a further token of two characters; the special ones follow from 257 on."""
    shutil.copytree(tokenizer_dir, directory)
    path = directory / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["model"]["vocab"][token] = token_id
    values["model"]["merges"] = [list(token)]
    for added in values["added_tokens"]:
        added["id"] += 1
    path.write_text(json.dumps(values), encoding="utf-8")
    return Tokenizer(directory)


def allowed_ids(constraint) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")).tolist())


def test_a_token_with_an_exponent_begins_no_number(tokenizer_dir, tmp_path):
    """A vocabulary has tokens such as '1e', after which the digits of the exponent would have no bound."""
    tokenizer = tokenizer_with(tokenizer_dir, tmp_path / "tokenizer", "1e", 256)
    factory = ConstraintFactory(tokenizer, fakes.VOCAB_SIZE, [258, 259])
    try:
        at_start = allowed_ids(factory.compile('{"type":"number"}'))
        assert ord("1") in at_start and 256 not in at_start
        in_string = factory.compile('{"type":"string"}')
        in_string.mask()
        in_string.accept(ord('"'))
        assert 256 in allowed_ids(in_string)
    finally:
        factory.close()


def test_an_id_without_a_token_is_no_text(tokenizer_dir, tmp_path):
    """Ids between those of the tokens: llguidance would write them as '<[256]>'."""
    tokenizer = tokenizer_with(tokenizer_dir, tmp_path / "tokenizer", "1e", 260)
    gaps = set(range(270)) - set(tokenizer.fast.get_vocab(with_added_tokens=True).values())
    assert 256 in gaps
    factory = ConstraintFactory(tokenizer, 270, [258])
    try:
        constraint = factory.compile('{"type":"string"}')
        constraint.mask()
        constraint.accept(ord('"'))
        assert ord("a") in allowed_ids(constraint) and not allowed_ids(constraint) & gaps
    finally:
        factory.close()


def test_openais_json_object_is_any_object():
    assert parse_schema('{"type": "json_object"}') == {"type": "object"}


@pytest.mark.parametrize("schema", ['{"colour":"red"}', '{"name":"x","schema":{},"extra":1}', "false", '{"const":NaN}'])
def test_what_constrains_nothing_is_refused(factory, schema):
    with pytest.raises(InvalidSchemaError):
        factory.compile(schema)


def test_stop_strings_do_not_cut_a_value(open_engine):
    with pytest.raises(InvalidSamplingError, match="stop strings and a JSON schema"):
        open_engine().prepare(ask(json_schema='{"type":"string"}', stop=('"',)))


def test_stop_token_ids_do_not_cut_a_value(open_engine):
    engine, text = open_engine(), SamplingParams(stop_token_ids=(fakes.END, ord("t")))
    with pytest.raises(InvalidSamplingError, match=f"stop token id {ord('t')} is text"):
        engine.prepare(ask(json_schema='{"type":"boolean"}', sampling=text))
    with pytest.raises(InvalidSamplingError, match=f"stop token id {ord('t')} is text"):
        engine.prepare(ask(choices=("yes", "quiet"), sampling=text))
    engine.prepare(ask(sampling=text))
    engine.prepare(ask(json_schema='{"type":"boolean"}', sampling=SamplingParams(stop_token_ids=(fakes.END,))))


def test_extreme_biases_are_clamped_and_added_up(open_engine):
    bias = ((7, 3e38), (7, 3e38), (7, -math.inf), (8, -math.inf))
    engine = open_engine()
    prepared = engine.prepare(ask(sampling=SamplingParams(logit_bias=bias, repetition_penalty=100.0)))
    assert dict(prepared.sampling.logit_bias) == {7: -math.inf, 8: -math.inf}
    assert run(engine, prepared.request).finish_reason is FinishReason.LENGTH


def test_a_tiny_temperature_is_greedy(open_engine):
    assert open_engine().prepare(ask(sampling=SamplingParams(temperature=1e-50))).sampling.temperature == 0.0


def test_an_id_outside_the_model_is_refused(open_engine):
    engine = open_engine()
    engine.vocab_size = 100  # the tokenizer has more
    with pytest.raises(InvalidTextError, match="id 2|id 1"):
        engine.prepare(ask("\u00ff"))


TOO_LARGE = {
    "text": {"text": "a" * (LIMITS.text_bytes + 1)},
    "stop strings": {"stop": ("x",) * (LIMITS.stop_strings + 1)},
    "a stop string": {"stop": ("x" * (LIMITS.stop_chars + 1),)},
    "biases": {"sampling": SamplingParams(logit_bias=((1, 0.0),) * (LIMITS.logit_biases + 1))},
    "stop ids": {"sampling": SamplingParams(stop_token_ids=(1,) * (LIMITS.stop_token_ids + 1))},
}


@pytest.mark.parametrize("fields", TOO_LARGE.values(), ids=TOO_LARGE)
def test_what_is_too_large_is_refused_before_any_work(open_engine, fields):
    engine = open_engine()
    engine.tokenizer.encode = lambda *_, **__: pytest.fail("tokenized")
    with pytest.raises((InvalidRequestError, PromptTooLongError), match="at most"):
        engine.prepare(ask(**fields))


def test_too_many_messages_and_long_ids_are_refused(open_engine):
    engine = open_engine()
    with pytest.raises(InvalidRequestError, match="messages"):
        engine.prepare(GenerationRequest("1", (ChatMessage("user", "a"),) * (LIMITS.messages + 1)))
    with pytest.raises(InvalidRequestError, match="its id"):
        engine.prepare(GenerationRequest("x" * 1000, prompt="a"))
    with pytest.raises(PromptTooLongError):
        engine.tokenize("a" * (LIMITS.text_bytes + 1))


class Panic(BaseException):
    """Like pyo3's PanicException, which is no Exception."""


def test_a_panic_of_the_tokenizer_is_one_refused_request(open_engine):
    engine = open_engine()
    encode = engine.tokenizer.encode

    def panic(*_, **__):
        raise Panic("called unwrap on None\nat line 3")

    engine.tokenizer.encode = panic
    with pytest.raises(InvalidRequestError, match="called unwrap on None"):
        engine.prepare(ask())
    engine.tokenizer.encode = encode
    engine.prepare(ask())


def test_a_panic_of_the_engine_is_a_fault_that_is_seen(open_engine):
    engine = open_engine()

    def panic(*_):
        raise Panic("gone")

    engine.step = panic
    faults, results, done = [], [], threading.Event()
    worker = Worker(engine, on_fault=faults.append)
    worker.submit(ask(), on_done=lambda result: (results.append(result), done.set()))
    assert done.wait(10.0) and worker.close()
    assert results[0].finish_reason is FinishReason.ERROR and "Panic" in str(results[0].error)
    assert len(faults) == 1


@pytest.mark.parametrize(("timeout", "reason"), [(1e300, FinishReason.LENGTH), (1e-9, FinishReason.TIMEOUT)])
def test_every_deadline_is_taken(open_engine, timeout, reason):
    results, done = [], threading.Event()
    worker = Worker(open_engine(step_time=0.01))
    worker.submit(ask(timeout=timeout, sampling=SamplingParams(max_new_tokens=20)),
                  on_done=lambda result: (results.append(result), done.set()))  # fmt: skip
    assert done.wait(10.0) and worker.close()
    assert results[0].finish_reason is reason


def test_the_deadline_runs_from_arrival(open_engine):
    results, done = [], threading.Event()
    worker = Worker(open_engine(step_time=0.01))
    worker.submit(ask(timeout=5.0), arrival=time.monotonic() - 6.0,
                  on_done=lambda result: (results.append(result), done.set()))  # fmt: skip
    assert done.wait(10.0) and worker.close()
    assert results[0].finish_reason is FinishReason.TIMEOUT


def test_an_answer_cut_inside_a_character_ends_before_it(open_engine):
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", "replace")

    detokenizer = Detokenizer(Bytes())
    shown = "".join(detokenizer.feed(byte) for byte in "añ€".encode()[:-1])
    assert shown + detokenizer.flush() == "añ"


def test_threads_are_no_more_than_cores(caplog):
    cores = len(ort_plan.os.sched_getaffinity(0))
    assert ort_plan._num_threads(128 * cores, 10**9) == cores
    assert "cores" in caplog.text
