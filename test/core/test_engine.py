"""The engine over a backend whose tokens depend on the whole KV cache: a wrong position changes the text."""

from __future__ import annotations

import itertools
import json
import threading
import time

import pytest

import vocab_checkpoints
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.config import EngineConfig
from engine_core.errors import (
    EmptyPromptError,
    EngineFaultError,
    InvalidRequestError,
    InvalidSamplingError,
    InvalidSchemaError,
    InvalidTextError,
    PromptTooLongError,
)
from engine_core.formats.companions import model_sampling
from engine_core.request import ChatMessage, FinishReason, GenerationRequest, Piece, SamplingParams
from engine_core.serving.engine import CancelToken, Engine
from fakes import END, EOS, text_ids

NAN, INF = float("nan"), float("inf")


def ask(text="hello", *, messages=None, stop=(), json_schema="", stream_interval=0.0, **sampling) -> GenerationRequest:
    messages = (ChatMessage("user", text),) if messages is None else tuple(messages)
    return GenerationRequest(
        "r", messages=messages, stop=stop, json_schema=json_schema, stream_interval=stream_interval,
        sampling=SamplingParams(**{"max_new_tokens": 32, **sampling}),
    )  # fmt: skip


def run(engine, request, cancel=None):
    pieces: list[Piece] = []
    return pieces, engine.answer(request, pieces.append, cancel)


def test_an_answer_ends_at_the_end_token_and_adds_up(open_engine):
    pieces, result = run(open_engine([*text_ids("Grüße 🤖"), END]), ask())
    assert result.text == "Grüße 🤖" == "".join(piece.text for piece in pieces)
    assert result.finish_reason is FinishReason.STOP
    assert result.token_ids == tuple(text_ids("Grüße 🤖")) == tuple(i for p in pieces for i in p.token_ids)
    assert result.generated_tokens == len(result.token_ids) + 1
    assert [piece.sequence for piece in pieces] == list(range(len(pieces)))
    assert 0 < result.time_to_first_token <= result.total_time and result.tokens_per_second > 0


def test_length_ends_it_at_max_new_tokens_and_at_max_context(open_engine):
    engine = open_engine(max_context=64)
    _, result = run(engine, ask(max_new_tokens=5))
    assert (result.finish_reason, result.generated_tokens) == (FinishReason.LENGTH, 5)
    _, result = run(engine, ask(max_new_tokens=1000))
    assert result.finish_reason is FinishReason.LENGTH
    assert result.prompt_tokens + result.generated_tokens == 64
    _, result = run(engine, ask(max_new_tokens=1))
    assert result.generated_tokens == 1 and result.tokens_per_second == 0


def test_ignore_eos_and_further_stop_ids(open_engine):
    engine = open_engine([65, EOS, 66, END, 67, 68])
    assert run(engine, ask(ignore_eos=True, max_new_tokens=6))[1].text == "ABCD"
    assert run(engine, ask(ignore_eos=True, stop_token_ids=(67,)))[1].text == "AB"


def test_a_stop_string_ends_it_without_leaking(open_engine):
    engine = open_engine([*text_ids("one END two"), END])
    pieces, result = run(engine, ask(stop=("END",)))
    assert result.text == "one " == "".join(piece.text for piece in pieces)
    assert result.finish_reason is FinishReason.STOP


def test_reused_prefixes_give_the_text_a_fresh_engine_gives(open_engine):
    """Every request order, with system prompts that compete for two slots: same text as computed from scratch."""
    system = [f"You are robot number {i}, and you are very helpful." for i in range(3)]
    requests = [
        ask(messages=[ChatMessage("system", system[i]), ChatMessage("user", user)], max_new_tokens=8)
        for i, user in itertools.product(range(3), ("go", "come here"))
    ]
    fresh = [run(open_engine(), request)[1].text for request in requests]
    assert len(set(fresh)) == len(fresh)
    engine = open_engine()
    cached = 0
    for index in [0, 1, 2, 0, 4, 4, 1, 5, 3, 0, 2, 5]:
        _, result = run(engine, requests[index])
        assert result.text == fresh[index]
        cached += result.cached_tokens
    kinds = [call[0] for call in engine._backend.calls]
    assert "load" in kinds and kinds.count("save") >= 3 and cached > 200


def test_kv_is_reused_for_the_adapter_it_was_computed_with_and_no_other(open_engine):
    """One conversation by turns with and without adapters gives the text of an engine that has cached nothing."""
    config = {"lora_adapters": ["sea:x", "hill:y"]}
    messages = [ChatMessage("system", "You are a robot with a long description."), ChatMessage("user", "go")]
    requests = [ask(messages=messages, max_new_tokens=8).replace(adapter=name) for name in ("", "sea", "hill")]
    fresh = [run(open_engine(config=config), request)[1].text for request in requests]
    assert len(set(fresh)) == 3
    engine = open_engine(config=config)
    assert engine.adapters == ("sea", "hill")
    engine.warm_system_prompt(messages[0].content)
    cached = {}
    for index in (1, 0, 1, 2, 2, 0, 1):
        _, result = run(engine, requests[index])
        assert result.text == fresh[index]
        cached.setdefault(index, []).append(result.cached_tokens)
    assert [counts[0] > 0 for counts in (cached[0], cached[1], cached[2])] == [True, False, False]
    assert cached[1][1] > 0 and cached[2][1] > 0, "kept for each adapter"


def test_an_adapter_that_is_not_loaded_is_refused(open_engine):
    for config, words in (({}, "it has none"), ({"lora_adapters": ["sea:x", "hill:y"]}, "it has sea, hill.")):
        engine = open_engine(config=config)
        with pytest.raises(InvalidRequestError, match=f"The adapter 'lake' is not loaded in this engine; {words}"):
            engine.prepare(ask().replace(adapter="lake"))
        with pytest.raises(InvalidRequestError, match="65 characters in its adapter's name, but at most 64"):
            engine.prepare(ask().replace(adapter="x" * 65))


def test_a_conversation_goes_on_from_the_live_cache(open_engine):
    engine = open_engine([*text_ids("Sure."), END])
    messages = [ChatMessage("user", "bring me the cup")]
    _, first = run(engine, ask(messages=messages))
    messages += [ChatMessage("assistant", first.text), ChatMessage("user", "now put it back")]
    _, second = run(engine, ask(messages=messages))
    assert second.cached_tokens >= first.prompt_tokens + len(first.token_ids)


def test_the_same_prompt_again_computes_one_token(open_engine):
    engine = open_engine()
    first, again = run(engine, ask())[1], run(engine, ask())[1]
    assert again.text == first.text
    assert again.cached_tokens == again.prompt_tokens - 1


def test_warming_a_system_prompt_saves_its_kv(open_engine):
    engine = open_engine()
    length = engine.warm_system_prompt("You are a robot in a small house.")
    _, result = run(engine, ask(messages=[ChatMessage("system", "You are a robot in a small house."), *ask().messages]))
    assert result.cached_tokens == length > 20
    assert result.text == run(open_engine(), ask(messages=[
        ChatMessage("system", "You are a robot in a small house."), *ask().messages]))[1].text  # fmt: skip
    assert open_engine(config={"prompt_cache_entries": 0}).warm_system_prompt("You are a robot.") == 0


def test_a_cancel_gives_the_partial_text_and_keeps_the_kv(open_engine):
    engine = open_engine(step_time=0.01)
    cancel = CancelToken()
    generator = engine.generate(engine.prepare(ask(max_new_tokens=300)), cancel)
    for _ in range(3):
        next(generator)
    cancel.cancel()
    began = time.monotonic()
    rest = []
    while True:
        try:
            rest.append(next(generator))
        except StopIteration as stop:
            result = stop.value
            break
    assert time.monotonic() - began < 0.2
    assert result.finish_reason is FinishReason.CANCELLED
    assert 3 <= result.generated_tokens <= 5, "within one token, plus the one under way"
    cancel.cancel(FinishReason.TIMEOUT)
    assert cancel.reason is FinishReason.CANCELLED
    assert run(engine, ask())[1].cached_tokens == result.prompt_tokens - 1


def test_a_cancel_before_the_first_token_ends_the_prefill(open_engine):
    engine = open_engine(step_time=0.05)
    cancel = CancelToken()
    cancel.cancel(FinishReason.TIMEOUT)
    _, result = run(engine, ask(), cancel)
    assert (result.finish_reason, result.generated_tokens, result.text) == (FinishReason.TIMEOUT, 0, "")
    assert engine._backend.num_steps == 0
    assert run(engine, ask())[1].text == run(open_engine(), ask())[1].text


def test_a_late_cancel_does_not_meet_the_next_request(open_engine):
    engine = open_engine()
    old = CancelToken()
    expected = run(engine, ask(), old)[1].text
    generator = engine.generate(engine.prepare(ask()), CancelToken())
    next(generator)
    old.cancel()
    with pytest.raises(StopIteration) as stop:
        while True:
            next(generator)
    assert stop.value.value.text == expected


def test_leaving_the_generator_early_leaves_the_engine_usable(open_engine):
    engine = open_engine(step_time=0.005)
    expected = run(open_engine(), ask())[1].text
    generator = engine.generate(engine.prepare(ask()), CancelToken())
    next(generator)
    generator.close()
    assert run(engine, ask())[1].text == expected


def test_pieces_are_coalesced_by_the_interval(open_engine):
    engine = open_engine(step_time=0.002)
    every = run(engine, ask(max_new_tokens=60))
    few = run(engine, ask(max_new_tokens=60, stream_interval=0.05))
    assert few[1].text == every[1].text == "".join(piece.text for piece in few[0])
    assert len(every[0]) >= 50 and len(few[0]) <= 10


def test_a_json_schema_holds_whatever_the_model_would_say(open_engine):
    """The fake model babbles; the answer is a value of the schema all the same, and generation ends with it."""
    schema = {
        "type": "object",
        "properties": {"do": {"enum": ["navigate", "pick"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["do", "count"],
        "additionalProperties": False,
    }
    for seed in range(5):
        request = ask(json_schema=json.dumps(schema), temperature=1.0, seed=seed, max_new_tokens=99)
        _, result = run(open_engine(), request)
        value = json.loads(result.text)
        assert value["do"] in ("navigate", "pick") and 1 <= value["count"] <= 9 and set(value) == {"do", "count"}
        assert result.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("config", "taken"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}, {"temperature": 0.6, "top_k": 20}),
        ({"do_sample": True, "top_k": -1, "min_p": "x"}, {"temperature": 1.0, "top_k": 0, "min_p": 0.0}),
        ({"temperature": 0.6, "repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({}, {"temperature": 0.0}),
    ],
)
def test_a_temperature_of_nan_is_the_models_sampling(open_engine, tmp_path, config, taken):
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    engine = open_engine()
    engine.model_sampling = model_sampling(tmp_path)
    sampling = engine.prepare(ask(temperature=NAN, top_p=0.5)).sampling
    assert {name: getattr(sampling, name) for name in taken} == taken and sampling.top_p == 0.5
    assert engine.prepare(ask(temperature=0.3)).sampling.top_k == 0


def test_an_opened_engine_has_the_sampling_of_its_checkpoint(tmp_path):
    checkpoint = vocab_checkpoints.write_checkpoint(tmp_path / "model", "byte_level")
    (checkpoint / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7, "min_p": 0.1}')
    build_engine(checkpoint, tmp_path / "engine", quantization="fp32")
    engine = Engine.open(EngineConfig(tmp_path / "engine"), lambda line: None)
    try:
        assert engine.model_sampling == {"temperature": 0.7, "min_p": 0.1}
    finally:
        engine.close()


BAD = [
    (ask(messages=()), EmptyPromptError, "nothing to answer"),
    (ask("  "), EmptyPromptError, "empty"),
    (ask(messages=[ChatMessage("system", "be nice")]), EmptyPromptError, "empty"),
    (ask(messages=[ChatMessage("robot", "hi")]), InvalidRequestError, "'robot'"),
    (ask(messages=[ChatMessage("tool", "hi")]), InvalidRequestError, "no tools here"),
    (ask().replace(prompt="x"), InvalidRequestError, "both"),
    (ask("a\ud800b"), InvalidTextError, "UTF-8"),
    (ask("a\ufffdb"), InvalidTextError, "U+FFFD"),
    (ask(stop=("",)), InvalidSamplingError, "stop string"),
    (ask(temperature=-0.1), InvalidSamplingError, "temperature is -0.1"),
    (ask(temperature=INF), InvalidSamplingError, "temperature is inf"),
    (ask(top_p=0.0), InvalidSamplingError, "top_p"),
    (ask(top_p=NAN), InvalidSamplingError, "top_p"),
    (ask(top_k=-1), InvalidSamplingError, "top_k"),
    (ask(min_p=1.0), InvalidSamplingError, "min_p"),
    (ask(repetition_penalty=0.0), InvalidSamplingError, "repetition_penalty"),
    (ask(max_new_tokens=0), InvalidSamplingError, "max_new_tokens"),
    (ask(seed=2**64), InvalidSamplingError, "seed"),
    (ask(logit_bias=((260, 1.0),)), InvalidSamplingError, "260"),
    (ask(logit_bias=((1, NAN),)), InvalidSamplingError, "nan"),
    (ask(stop_token_ids=(-1,)), InvalidSamplingError, "-1"),
    (ask().replace(timeout=-1.0), InvalidRequestError, "-1.0 s"),
    (ask("x" * 600), PromptTooLongError, "512"),
    (ask("x" * 1_000_000), PromptTooLongError, "at least"),
    (ask(json_schema="{"), InvalidSchemaError, "does not parse"),
    (ask(json_schema="[1]"), InvalidSchemaError, "list"),
    (ask(json_schema='{"type": "banana"}'), InvalidSchemaError, "banana"),
    (ask(json_schema="[" * 100_000), InvalidSchemaError, ""),
]


@pytest.mark.parametrize(("request_", "error", "words"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_bad_requests_are_refused_with_one_sentence(open_engine, request_, error, words):
    engine = open_engine()
    with pytest.raises(error) as raised:
        engine.prepare(request_)
    message = str(raised.value)
    assert words in message and len(message) < 400 and "\n" not in message
    assert engine._backend.calls == []


def test_the_prompt_that_is_too_long_is_told_both_numbers(open_engine):
    engine = open_engine()
    with pytest.raises(PromptTooLongError, match=r"The prompt has 619 tokens, but max_context is 512"):
        engine.prepare(ask("x" * 600))


def test_a_failing_device_is_an_engine_fault(open_engine):
    engine = open_engine(fail_at=4)
    with pytest.raises(EngineFaultError, match="fell off"):
        run(engine, ask())


def test_requests_can_be_prepared_while_one_runs(open_engine):
    engine = open_engine(step_time=0.002)
    expected = engine.prepare(ask("something else")).token_ids.tolist()
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(engine.prepare(ask("something else")).token_ids.tolist() for _ in range(20))
    )
    thread.start()
    run(engine, ask())
    thread.join()
    assert found == [expected] * 20
