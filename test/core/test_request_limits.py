"""What a client can make large or absurd is refused before the work, or clamped; a request's fault stays its own."""

from __future__ import annotations

import json
import math
import threading
import time

import numpy as np
import pytest

import fakes
from engine_core.errors import (
    EngineFaultError,
    InvalidRequestError,
    InvalidSamplingError,
    InvalidSchemaError,
    InvalidTextError,
    PromptTooLongError,
    refusing_panics,
    sentence_of,
)
from engine_core.request import (
    LIMITS,
    ChatMessage,
    FinishReason,
    GenerationRequest,
    Piece,
    RequestLimits,
    SamplingParams,
    ToolCall,
    parse_arguments,
)
from engine_core.sampling import Sampler
from engine_core.serving.worker import Worker
from engine_core.text.tokenizer import Prompt
from fakes import text_ids

WAIT = 10.0


class Panic(BaseException):
    """Like pyo3's PanicException, which is no Exception."""


def ask(text="hello", **changes) -> GenerationRequest:
    sampling = SamplingParams(**{"max_new_tokens": 8, **changes.pop("sampling", {})})
    return GenerationRequest("r", (ChatMessage("user", text),), sampling=sampling, **changes)


def run(engine, request):
    pieces: list[Piece] = []
    return pieces, engine.answer(request, pieces.append)


def finished(worker, request, **options):
    done, results = threading.Event(), []
    worker.submit(request, on_done=lambda result: (results.append(result), done.set()), **options)
    assert done.wait(WAIT)
    assert len(results) == 1
    return results[0]


@pytest.fixture
def worker(open_engine):
    made = Worker(open_engine())
    yield made
    assert made.close()


LARGE = [
    (ask("x" * (1 << 20) + "x"), PromptTooLongError, "1048577 bytes"),
    (ask("é" * (1 << 19) + "x"), PromptTooLongError, "1048577 bytes"),
    (GenerationRequest("r", prompt=" " * 3_000_000 + "x"), PromptTooLongError, "3000001"),
    (GenerationRequest("r", (ChatMessage("user", "x"),) * 1025), InvalidRequestError, "1025 messages"),
    (ask(stop=("a",) * 17), InvalidRequestError, "17 stop strings"),
    (ask(stop=("a" * 257,)), InvalidRequestError, "257 characters in a stop string"),
    (ask(sampling={"logit_bias": ((1, 1.0),) * 1025}), InvalidRequestError, "1025 logit biases"),
    (ask(sampling={"stop_token_ids": (1,) * 1025}), InvalidRequestError, "1025 stop token ids"),
    (ask().replace(request_id="i" * 257), InvalidRequestError, "257 characters in its id"),
    (ask(priority=256), InvalidRequestError, "priority is 256"),
    (ask(priority=-1), InvalidRequestError, "priority is -1"),
    (ask(json_schema="{" + " " * (1 << 18)), InvalidSchemaError, "bytes"),
    (ask(sampling={"repetition_penalty": 1e-45}), InvalidSamplingError, "repetition_penalty"),
    (ask(sampling={"logit_bias": ((1, math.nan),)}), InvalidSamplingError, "nan"),
    (ask(timeout=math.nan), InvalidRequestError, "nan"),
    (ask(timeout=-1e-9), InvalidRequestError, "deadline"),
    (ask(timeout=math.inf), InvalidRequestError, "inf"),
]


@pytest.mark.parametrize(("request_", "error", "words"), LARGE, ids=lambda value: getattr(value, "__name__", None))
def test_what_is_too_large_is_refused_before_the_work(request_, error, words):
    began = time.monotonic()
    with pytest.raises(error, match=words) as raised:
        request_.validate()
    assert time.monotonic() - began < 0.2
    assert len(str(raised.value)) < 300


def test_limits_are_one_object_and_the_largest_allowed_passes():
    ask("x" * LIMITS.text_bytes, stop=("a" * 256,) * 16, priority=255).validate()
    with pytest.raises(PromptTooLongError, match="at most 4"):
        ask("xxxxx").validate(RequestLimits(text_bytes=4))


def test_tokenize_has_the_same_limits(open_engine):
    engine = open_engine()
    with pytest.raises(PromptTooLongError):
        engine.tokenize("x" * 3_000_000)
    with pytest.raises(InvalidRequestError, match="messages"):
        engine.tokenize(messages=(ChatMessage("user", "x"),) * 30_000)
    assert len(engine.tokenize("x" * LIMITS.tokens_listed)) == LIMITS.tokens_listed
    with pytest.raises(PromptTooLongError, match="listed"):
        engine.tokenize("x" * (LIMITS.tokens_listed + 1))


def test_other_threads_run_while_a_long_text_is_tokenized(open_engine):
    engine = open_engine()
    rounds, ended = 0, threading.Event()

    def count():
        nonlocal rounds
        while not ended.wait(0.001):
            rounds += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = rounds
    engine.tokenizer.encode("x" * 1_000_000)
    during = rounds - before
    ended.set()
    thread.join()
    assert during > 10
    short, text = "a b\u00e9 " * 800, "a b\u00e9 " * 1600
    whole = engine.tokenize(text)
    assert whole == engine.tokenizer.fast.encode(text).ids and len(whole) > len(engine.tokenize(short))


def test_a_system_prompt_beyond_the_context_is_not_tokenized(open_engine, monkeypatch):
    engine = open_engine()
    monkeypatch.setattr(engine.tokenizer, "encode", lambda *_, **__: pytest.fail("tokenized"))
    assert engine.warm_system_prompt("x" * engine.tokenizer.max_token_chars * engine.max_context) == 0


def test_a_system_prompt_with_which_every_request_is_refused_is_told(open_engine, caplog):
    engine = open_engine()
    fits = "x" * (engine.max_context // 2)
    assert engine.warm_system_prompt(fits) > 0 and not caplog.records
    for text in ("x" * engine.max_context, "x" * engine.tokenizer.max_token_chars * engine.max_context):
        caplog.clear()
        assert engine.warm_system_prompt(text) == 0
        assert f"but max_context is {engine.max_context}" in caplog.text and "every request with it" in caplog.text
        with pytest.raises(PromptTooLongError):
            engine.prepare(GenerationRequest("r", (ChatMessage("system", text), ChatMessage("user", "hello"))))


def test_biases_are_summed_then_clamped_and_never_nan(open_engine):
    bias = ((7, 3e38), (7, 3e38), (7, -math.inf), (8, 1e308), (8, 1e308), (9, 2.0), (9, 1.5), (10, -3e38))
    biases = dict(SamplingParams(logit_bias=bias).biases())
    assert biases == {7: -math.inf, 8: 1e4, 9: 3.5, 10: -1e4}
    result = run(open_engine(), ask(sampling={"logit_bias": bias}))[1]
    assert result.generated_tokens == 8 and set(result.token_ids) == {8}


@pytest.mark.parametrize("temperature", [0.0, 1e-50, 1e-30, 9e-5])
def test_a_tiny_temperature_is_greedy(open_engine, temperature):
    greedy = run(open_engine(), ask())[1].token_ids
    assert run(open_engine(), ask(sampling={"temperature": temperature}))[1].token_ids == greedy
    assert SamplingParams(temperature=temperature).resolve().temperature == 0.0


@pytest.mark.parametrize("temperature", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_the_extremes_of_every_option_sample_a_token(temperature, penalty):
    params = SamplingParams(
        temperature=temperature, repetition_penalty=penalty, top_p=1e-300, min_p=0.999999999999, seed=3,
        logit_bias=((1, 3e38), (2, -3e38), (3, -math.inf)),
    )  # fmt: skip
    params.validate()
    sampler = Sampler(32)
    sampler.begin(params.resolve(), np.arange(32, dtype=np.int32))
    with np.errstate(over="raise", invalid="raise"):
        assert 0 <= sampler.sample(np.linspace(-100, 100, 32, dtype=np.float32)) < 32


@pytest.mark.parametrize("timeout", [1e300, 1e8 + 1, 1e10, 1e8])
def test_a_deadline_of_any_length_works(worker, timeout):
    assert finished(worker, ask(timeout=timeout)).finish_reason is FinishReason.LENGTH
    time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_the_deadline_counts_from_arrival_through_preparation(worker, monkeypatch):
    prepare = worker._engine.prepare
    monkeypatch.setattr(worker._engine, "prepare", lambda request: (time.sleep(0.1), prepare(request))[1])
    result = finished(worker, ask(timeout=0.05))
    assert result.finish_reason is FinishReason.TIMEOUT and result.generated_tokens == 0
    assert result.total_time >= 0.05
    assert finished(worker, ask(timeout=5.0), arrival=time.monotonic() - 6).finish_reason is FinishReason.TIMEOUT
    assert finished(worker, ask(timeout=5.0)).finish_reason is FinishReason.LENGTH


def test_an_id_beyond_the_vocabulary_is_refused(open_engine, monkeypatch):
    engine = open_engine()
    prompt = Prompt(np.array([65, 260], dtype=np.int32))
    monkeypatch.setattr(engine.tokenizer, "prompt", lambda *a, **k: prompt)
    with pytest.raises(InvalidTextError, match="id 260, but the model has ids from 0 to 259"):
        engine.prepare(ask())


def test_a_panic_in_prepare_is_one_refused_request(open_engine, monkeypatch):
    engine = open_engine()

    def panic(*arguments, **options):
        raise Panic("called `Result::unwrap()` on an `Err` value")

    with monkeypatch.context() as patch:
        patch.setattr(engine.tokenizer, "encode", panic)
        with pytest.raises(InvalidRequestError, match="unwrap"):
            engine.prepare(ask())
        with pytest.raises(InvalidRequestError, match="unwrap"):
            engine.tokenize("x")
    assert run(engine, ask())[1].generated_tokens == 8


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def test_twelve_million_blanks_are_one_refused_request(tmp_path):
    """Llama 3's pre-tokenizer makes a Rust panic of them, with its regular expression's limit of steps."""
    fakes.write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, values["pre_tokenizer"]]}
    path.write_text(json.dumps(values))
    engine = fakes.make_engine(fakes.ScriptedBackend(), tmp_path)
    try:
        text = " " * 12_000_000 + "x"
        for refused in (engine.tokenize, lambda text: engine.prepare(GenerationRequest("r", prompt=text))):
            with pytest.raises(PromptTooLongError):
                refused(text)
        with pytest.raises(InvalidRequestError, match="retry-limit"), refusing_panics("tokenizing"):
            engine.tokenizer.encode(text)  # were the limit on the bytes not there
        assert len(engine.tokenize(" " * 20_000 + "x")) == 20_001
    finally:
        engine.close()


@pytest.mark.parametrize("where", ["step", "on_change", "warm"])
def test_a_panic_in_the_workers_thread_is_a_fault_that_is_seen(open_engine, where):
    engine, faults, seen, armed = open_engine(), [], threading.Event(), []

    def panic(*arguments):
        raise Panic("the thread is dying")

    worker = Worker(
        engine, on_change=lambda: panic() if armed and threading.current_thread().name == "edgellm-worker" else None,
        on_fault=lambda error: (faults.append(error), seen.set()),
    )  # fmt: skip
    if where == "step":
        engine.step = panic
    if where == "warm":
        engine.warm_system_prompt = panic
        worker.warm_system_prompt("x")
    else:
        if where == "on_change":
            armed.append(True)
        result = finished(worker, ask())
        assert result.finish_reason is FinishReason.ERROR and isinstance(result.error, EngineFaultError)
    assert seen.wait(WAIT) and len(faults) == 1 and isinstance(faults[0], EngineFaultError)
    assert worker.close()


def test_an_answer_cut_inside_a_character_has_whole_ones_only_and_can_be_sent_back(open_engine):
    script = text_ids("ok 🤖")
    for count in range(3, 8):
        engine = open_engine(script)
        pieces, result = run(engine, ask(sampling={"max_new_tokens": count}))
        assert result.text == "".join(piece.text for piece in pieces) == ("ok 🤖" if count == 7 else "ok ")
        assert len(result.token_ids) == count
        turns = (ChatMessage("user", "hi"), ChatMessage("assistant", result.text), ChatMessage("user", "go on"))
        engine.prepare(ask().replace(messages=turns))


def test_a_request_with_a_seed_reuses_no_kv_unless_told(open_engine):
    seeded = ask(sampling={"seed": 5, "temperature": 1.0})
    engine = open_engine()
    first, again = run(engine, seeded)[1], run(engine, seeded)[1]
    assert (first.cached_tokens, again.cached_tokens) == (0, 0) and first.text == again.text
    assert run(engine, ask())[1].cached_tokens > 0
    engine = open_engine(config={"reproducible": False})
    run(engine, seeded)
    assert run(engine, seeded)[1].cached_tokens > 0


def test_a_sentence_is_bounded_whatever_it_quotes():
    with pytest.raises(InvalidRequestError) as refused:
        parse_arguments(ToolCall("1", "x" * 100_000, "{"))
    assert len(sentence_of(refused.value)) == 1000 == len(sentence_of(ValueError("y" * 5000)))
