"""Speculation changes no answer: the same ids with it and without, whatever is guessed."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter

import numpy as np
import pytest

from engine_core.backends import Draft, SequenceStep
from engine_core.errors import InvalidSamplingError
from engine_core.request import ChatMessage, FinishReason, GenerationRequest, Piece, SamplingParams
from engine_core.serving.drafts import Lookup
from engine_core.serving.engine import CancelToken
from engine_core.serving.worker import Worker
from fakes import END, VOCAB_SIZE, ScriptedBackend, text_ids

SAMPLINGS = [
    SamplingParams(max_new_tokens=60),
    SamplingParams(max_new_tokens=60, temperature=0.7, seed=3),
    SamplingParams(max_new_tokens=60, temperature=1.5, seed=9, top_k=30, repetition_penalty=1.3),
    SamplingParams(max_new_tokens=60, repetition_penalty=1.2, logit_bias=((97, 3.0), (98, -np.inf))),
]
NAMES = {
    "type": "array", "minItems": 3, "maxItems": 3,
    "items": {
        "type": "object", "additionalProperties": False, "required": ["first name", "is ready"],
        "properties": {"first name": {"enum": ["ann", "bob"]}, "is ready": {"type": "boolean"}},
    },
}  # fmt: skip


def ask(text="hello", **changes) -> GenerationRequest:
    request = GenerationRequest("r", messages=(ChatMessage("user", text),), sampling=SAMPLINGS[0])
    return request.replace(**changes)


def run(engine, request, cancel=None):
    pieces: list[Piece] = []
    return pieces, engine.answer(request, pieces.append, cancel)


@pytest.fixture
def pair(open_engine):
    """Makes two engines, without speculation and with it, of a model that repeats itself."""

    def make(script=None, **options):
        options = {"memory": 3, **options}
        return open_engine(script, **options), open_engine(script, max_draft=7, **options)

    return make


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("memory", [1, 3, 0])
def test_the_same_answers_whatever_is_looked_up(pair, sampling, memory):
    plain, fast = pair(memory=memory)
    for text in ("hello", "hello hello hello", "hello", "good bye", "hello"):
        expected, found = run(plain, ask(text, sampling=sampling)), run(fast, ask(text, sampling=sampling))
        assert found[1].token_ids == expected[1].token_ids and found[1].text == expected[1].text
        assert [piece.sequence for piece in found[0]] == list(range(len(found[0])))
        assert "".join(piece.text for piece in found[0]) == found[1].text
        assert tuple(i for piece in found[0] for i in piece.token_ids) == found[1].token_ids
        assert found[1].generated_tokens == expected[1].generated_tokens
    if memory:
        assert fast.speculation.counts.accepted > 20
        assert fast._backend.num_steps < plain._backend.num_steps - 20


@pytest.mark.parametrize("sampling", SAMPLINGS[:3])
def test_wrong_guesses_change_nothing(pair, sampling, monkeypatch):
    """Drafts that are right, wrong, and right up to some token, at random."""
    plain, fast = pair()
    expected = [run(plain, ask(text, sampling=sampling))[1].token_ids for text in ("a", "b", "c")]
    rng, answer = random.Random(0), []

    def guess(self):
        at = self._own.count + len(self._tail) - self._num_known - start
        right = answer[at] if 0 <= at < len(answer) and rng.random() < 0.8 else rng.randrange(128)
        return right, 0.9

    monkeypatch.setattr(Lookup, "guess", guess)
    for text, ids in zip(("a", "b", "c"), expected):
        request = ask(text, sampling=sampling)
        start, answer = len(fast.prepare(request).token_ids), list(ids)
        assert run(fast, request)[1].token_ids == ids
    stats = fast.speculation.counts
    assert 0 < stats.accepted < stats.drafted


def test_the_tokens_have_the_distribution_of_the_model(tokenizer_dir):
    """4,000 seeds: the second and third token, always drafted alike, against the softmax of their logits."""
    backend = ScriptedBackend(max_draft=2)
    backend.logits = lambda state: np.array([1.0, 0.5, 0.0, -0.5, *[-np.inf] * (VOCAB_SIZE - 4)], dtype=np.float32)
    found = [Counter(), Counter()]
    prompt, draft = np.array([5], dtype=np.int32), Draft(np.array([0, 1], dtype=np.int32), np.zeros(2, dtype=bool))
    for seed in range(4000):
        backend.begin(0, SamplingParams(temperature=1.0, seed=seed), prompt)
        first, rest = backend.step([SequenceStep(0, prompt, 0)]), backend.step([SequenceStep(0, draft=draft)])
        first[0].result()
        tokens = rest[0].result()
        while len(tokens) < 2:
            tokens = (*tokens, backend.step([SequenceStep(0)])[0].result())
        for counter, token in zip(found, tokens):
            counter[token] += 1
    backend.close()
    weights = np.exp([1.0, 0.5, 0.0, -0.5])
    for counter in found:
        for token, share in enumerate(weights / weights.sum()):
            assert abs(counter[token] / 4000 - share) < 4 * np.sqrt(share * (1 - share) / 4000)


def test_forced_text_is_fed_at_once_and_spelled_the_same(pair):
    plain, fast = pair(memory=0)
    request = ask(json_schema=json.dumps(NAMES), sampling=SamplingParams(max_new_tokens=300))
    expected, found = run(plain, request)[1], run(fast, request)[1]
    assert found.token_ids == expected.token_ids and len(json.loads(found.text)) == 3
    assert fast.speculation.counts.forced > 40
    assert fast._backend.num_steps * 2 < plain._backend.num_steps


def test_a_token_that_the_bias_excludes_is_not_forced(pair):
    """Only spellings without it are left, or none: then the request ends as without speculation."""
    for engine in pair():
        with pytest.raises(InvalidSamplingError):
            sampling = SamplingParams(max_new_tokens=300, logit_bias=((ord("f"), -np.inf),))
            run(engine, ask(json_schema=json.dumps(NAMES), sampling=sampling))


def test_stop_strings_stop_ids_and_lengths_end_it_within_a_draft(pair):
    script = [*text_ids("abcdefgh abcdefgh abcdefgh END abcdefgh"), END]
    for changes in (
        {"stop": ("gh a",)}, {"stop": ("END",)}, {"sampling": SamplingParams(stop_token_ids=(ord("E"),))},
        {"sampling": SamplingParams(max_new_tokens=21)}, {"sampling": SamplingParams(max_new_tokens=1)}, {},
    ):  # fmt: skip
        plain, fast = pair(script)
        for _ in range(2):
            expected, found = run(plain, ask(**changes))[1], run(fast, ask(**changes))[1]
            assert (found.text, found.finish_reason, found.generated_tokens) == (
                expected.text, expected.finish_reason, expected.generated_tokens,
            )  # fmt: skip


def test_the_context_is_filled_to_the_last_token(pair):
    plain, fast = pair(max_context=48, memory=1)
    request = ask(sampling=SamplingParams(max_new_tokens=1000))
    expected, found = run(plain, request)[1], run(fast, request)[1]
    assert found.token_ids == expected.token_ids and found.prompt_tokens + found.generated_tokens == 48


def test_a_conversation_goes_on_from_kv_that_drafts_have_left(pair):
    plain, fast = pair(memory=2)
    messages = [ChatMessage("user", "hello hello")]
    for _ in range(4):
        expected, found = (run(engine, ask(messages=tuple(messages)))[1] for engine in (plain, fast))
        assert found.text == expected.text and found.cached_tokens == expected.cached_tokens
        messages += [ChatMessage("assistant", found.text), ChatMessage("user", "more")]


def test_cancelling_gives_a_beginning_of_the_answer(pair):
    plain, fast = pair(memory=2, step_time=0.001)
    expected = run(plain, ask())[1].token_ids
    for count in (1, 7, 20):
        cancel, seen = CancelToken(), []
        for piece in (generator := fast.generate(fast.prepare(ask()), cancel)):
            seen += piece.token_ids
            if len(seen) >= count:
                cancel.cancel()
        generator.close()
        assert seen == list(expected[: len(seen)]) and count <= len(seen) < 60


def test_several_at_a_time_have_the_answers_they_have_alone(open_engine):
    schema = json.dumps(NAMES)
    requests = [
        ask(f"hello {i % 3}", request_id=str(i), sampling=SAMPLINGS[i % 4], json_schema=schema if i % 5 == 0 else "")
        for i in range(12)
    ]
    alone = open_engine(memory=3)
    expected = {request.request_id: run(alone, request)[1].token_ids for request in requests}
    engine = open_engine(memory=3, max_draft=7, num_slots=3, prefill_chunk=4)
    found, done = {}, threading.Event()

    def note(result) -> None:
        found[result.request_id] = result.token_ids if result.error is None else result.error
        if len(found) == len(requests):
            done.set()

    worker = Worker(engine, queue_depth=20)
    try:
        for request in requests:
            worker.submit(request, on_done=note)
        assert done.wait(60)
    finally:
        worker.close()
    assert found == expected and engine.speculation.counts.accepted > 50


def test_no_drafts_where_they_do_not_pay(pair):
    _, fast = pair(row_cost=1.0)
    run(fast, ask("hello hello hello"))
    assert fast.speculation.counts.steps == 0


def test_where_rounding_may_differ_drafts_depend_on_the_request_alone(open_engine):
    """A repeated request has the drafts it had first, whatever came between."""
    for exact in (False, True):
        engine, kinds = open_engine(memory=1, max_draft=7, exact_drafts=exact), []
        for sampling in (SAMPLINGS[0], SAMPLINGS[1], SAMPLINGS[0]):
            before = len(engine._backend.drafts)
            run(engine, ask(sampling=sampling))
            kinds.append(engine._backend.drafts[before:])
        assert (kinds[0] == kinds[2]) == (not exact) and kinds[0] != kinds[1] and sum(kinds[0]) > 0


def test_an_interrupt_ends_a_sequence_whose_draft_is_on_its_way(pair):
    _, fast = pair(memory=1, step_time=0.02)
    cancel = CancelToken()
    timer = threading.Timer(0.15, cancel.cancel, (FinishReason.TIMEOUT,))
    timer.start()
    _, result = run(fast, ask(sampling=SamplingParams(max_new_tokens=400)), cancel)
    assert result.finish_reason is FinishReason.TIMEOUT
    assert run(fast, ask())[1].finish_reason is FinishReason.LENGTH


def test_the_masks_of_a_draft_count_where_their_time_is_known(pair, monkeypatch):
    """Masks that take longer than steps leave few drafts."""
    names = json.dumps({"type": "array", "minItems": 3, "items": {"type": "string", "minLength": 9}})
    counts = []
    for seconds in (0.0, 1.0):
        _, fast = pair(step_time=0.0)
        monkeypatch.setattr(fast.speculation, "_mask_cost", seconds / 0.01)
        for _ in range(3):
            run(fast, ask("hello", json_schema=names, sampling=SamplingParams(max_new_tokens=60, seed=4)))
        counts.append(fast.speculation.counts)
    assert counts[0].drafted > 2 * counts[1].drafted


def test_a_factory_times_a_mask_inside_a_string(open_engine):
    engine = open_engine(max_draft=7)
    assert 0.0 < engine._constraints.mask_seconds() < 1.0


def test_an_engine_that_can_write_no_quote_opens(open_engine, monkeypatch):
    monkeypatch.setattr(ScriptedBackend, "kept_ids", np.array([i for i in range(VOCAB_SIZE) if chr(i) != '"']))
    assert open_engine(max_draft=7)._constraints.mask_seconds() == 0.0
