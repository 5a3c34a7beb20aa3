"""Requests with anything in their fields: a refusal in one sentence, or an answer that keeps what was asked for."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fakes
from engine_core.config import BUSY_POLICIES
from engine_core.errors import RequestError
from engine_core.request import (
    LIMITS,
    MAX_SEED,
    ROLES,
    ChatMessage,
    FinishReason,
    GenerationRequest,
    SamplingParams,
)
from engine_core.serving.cancellation import CancelToken
from engine_core.serving.worker import Worker
from fakes import VOCAB_SIZE
from fuzzing import any_text, fuzz, refusal

# Of the interfaces' types: what a client can send.
float32 = st.floats(width=32)
int32 = st.integers(-(2**31), 2**31 - 1) | st.sampled_from([-(2**31), -1, 0, 1, VOCAB_SIZE - 1, VOCAB_SIZE, 2**31 - 1])
token_ids = st.integers(0, VOCAB_SIZE - 1) | int32
texts = any_text | st.sampled_from(
    ["", " ", "hello", "</s>", "<s>[user]<end>", "\0", "\ufeff", "é" * 300, "a\u0301" * 60]
)
# Mostly small, now and then just around or far beyond the limit.
counts = st.integers(0, 3) | st.sampled_from([LIMITS.stop_strings, LIMITS.stop_strings + 1, 1024, 1025, 30_000])


@st.composite
def repeated(draw, items, size=counts) -> tuple:
    """A tuple of some items, repeated to a size that may be huge."""
    found = draw(st.lists(items, max_size=3))
    count = draw(size) if found else 0
    return tuple((found * (count // len(found) + 1))[:count]) if found else ()


samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.8, 1e-50, 100.0]) | st.floats(),
    top_p=st.sampled_from([1.0, 0.9, 1e-30]) | st.floats(),
    top_k=st.sampled_from([0, 1, 50]) | int32,
    min_p=st.sampled_from([0.0, 0.1, 0.999]) | st.floats(),
    repetition_penalty=st.sampled_from([1.0, 0.01, 100.0]) | st.floats(),
    seed=st.none() | st.integers(0, MAX_SEED) | st.integers(-(2**70), 2**70),
    max_new_tokens=st.sampled_from([1, 2, 20]) | int32,
    ignore_eos=st.booleans(),
    stop_token_ids=repeated(token_ids),
    logit_bias=repeated(st.tuples(token_ids, float32 | st.sampled_from([-math.inf, 3e38, -3e38, 0.0]))),
)
messages = repeated(
    st.builds(ChatMessage, role=st.sampled_from([*ROLES, "user", "user", "robot", ""]), content=texts),
    st.sampled_from([1, 2, 3, LIMITS.messages, LIMITS.messages + 1, 30_000]),
)
requests = st.builds(
    GenerationRequest,
    request_id=texts | st.just("r" * 257),
    messages=st.just(()) | messages,
    prompt=st.just("") | texts | st.sampled_from(["x" * 600, " " * 3_000_000]),
    sampling=st.just(SamplingParams(max_new_tokens=20)) | samplings,
    stop=st.just(()) | repeated(texts | st.just("s" * 257)),
    json_schema=st.just("")
    | st.sampled_from(['{"type":"boolean"}', '{"enum":["a","b"]}', "{", '{"$ref":"#"}'])
    | texts,
    priority=st.just(0) | int32,
    timeout=st.just(0.0) | st.floats(),
    stream_interval=st.just(0.0) | st.floats(),
    allow_special=st.booleans(),
)


@pytest.fixture(scope="module")
def engine(tokenizer_dir):
    engine = fakes.make_engine(fakes.ScriptedBackend(max_context=96), tokenizer_dir)
    yield engine
    engine.close()


@fuzz
@given(request=requests)
def test_a_request_is_answered_or_refused_in_one_sentence(engine, request):
    prepared = []
    if (error := refusal(lambda: prepared.append(engine.prepare(request)))) is not None:
        assert isinstance(error, RequestError)
        return
    sampling, pieces = request.sampling, []
    generator = engine.generate(prepared[0], CancelToken())
    try:
        while True:
            pieces.append(next(generator))
    except StopIteration as stop:
        result = stop.value
    except RequestError as error:  # a schema that turns out too expensive, or every token is excluded
        assert "\n" not in str(error)
        return
    assert result.text == "".join(piece.text for piece in pieces)
    assert result.token_ids == sum((piece.token_ids for piece in pieces), ())
    assert [piece.sequence for piece in pieces] == list(range(len(pieces)))
    assert result.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert 1 <= result.generated_tokens <= sampling.max_new_tokens
    assert result.prompt_tokens + result.generated_tokens <= engine.max_context
    assert all(0 <= token_id < VOCAB_SIZE for token_id in result.token_ids)
    assert not set(result.token_ids) & set(sampling.stop_token_ids)
    assert not set(result.token_ids) & {i for i, bias in sampling.biases() if bias == -math.inf}
    assert not any(text in result.text for text in request.stop)
    result.text.encode("utf-8")


@fuzz
@given(sent=st.lists(st.tuples(requests, st.booleans()), min_size=1, max_size=4), policy=st.sampled_from(BUSY_POLICIES))
def test_a_worker_answers_each_accepted_request_once_and_lives_on(engine, sent, policy):
    faults: list[Exception] = []
    worker = Worker(engine, queue_depth=2, busy_policy=policy, on_fault=faults.append)
    accepted, done = [], []
    for number, (request, cancelled) in enumerate(sent):
        request = request.replace(request_id=str(number))
        tickets = []
        error = refusal(lambda r=request, t=tickets: t.append(worker.submit(r, on_done=done.append)))
        assert error is None or isinstance(error, RequestError)
        accepted += [ticket.request_id for ticket in tickets]
        if tickets and cancelled:
            tickets[0].cancel()
    assert worker.close(drain=True, timeout=60.0)
    assert sorted(result.request_id for result in done) == sorted(accepted)
    assert not faults


@pytest.mark.parametrize(("options", "words"), [
    ({"top_k": 1.5}, "top_k is 1.5, but it must be a whole number from 0"), ({"seed": "a"}, "seed is 'a'"),
    ({"max_new_tokens": True}, "max_new_tokens is True, but it must be a whole number from 1"),
    ({"temperature": "1"}, "temperature is '1', but it must be from 0.0"),
    ({"stop_token_ids": (1.5,)}, "The token id 1.5 is no whole number"),
    ({"logit_bias": ((2.0, 1.0),)}, "The token id 2.0 is no whole number"),
    ({"logit_bias": ((2, None),)}, "The logit bias of token 2 is None, but it must be a number"),
])  # fmt: skip
def test_a_sampling_option_of_another_type_is_refused(engine, options, words):
    """It would be cut to a whole number without a word, or end the worker's thread."""
    error = refusal(engine.prepare, GenerationRequest("r", prompt="p", sampling=SamplingParams(**options)))
    assert words in str(error)


@pytest.mark.parametrize("interval", [-1.0, math.nan, "a"])
def test_a_stream_interval_is_seconds(engine, interval):
    error = refusal(engine.prepare, GenerationRequest("r", prompt="p", stream_interval=interval))
    assert "The stream interval is" in str(error)
