"""Several sequences at a time on the CUDA backend, on a driver in host memory with the kernels' references."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import fakes
from batch_steps import Requests
from engine_core.backends import SequenceStep
from engine_core.backends.capabilities import capabilities_of
from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.layout import (
    CudaSpec,
    bytes_by_purpose,
    host_bytes,
    planned_bytes,
    weight_arrays,
    work_arrays,
)
from engine_core.cuda.driver import Device
from engine_core.cuda.kernels.launch_configs import MAX_SEQUENCES
from engine_core.formats.weight_formats import weight_format
from engine_core.models.shapes import spec_of
from engine_core.request import ChatMessage, GenerationRequest, SamplingParams
from engine_core.serving.sequence import Sequence

VOCAB, CONTEXT, HEAD_DIM, COUNT = 96, 96, 16, 12
MODEL = dict(
    architectures=["Qwen3ForCausalLM"],  # has norms of Q and K; the biases of QKV are added
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=HEAD_DIM,
    vocab_size=VOCAB,
    rms_norm_eps=1e-5,
)
PROMPTS = [np.random.default_rng(i).integers(0, VOCAB, 4 + 11 * i).astype(np.int32) for i in range(5)]
MASK = np.full(VOCAB // 32, 0x55555555, dtype=np.uint32)  # even ids
# Sampling and mask of each prompt. The stand-in's sampler is greedy.
REQUESTS = [
    (SamplingParams(seed=1), None),
    (SamplingParams(seed=2, repetition_penalty=1.4), None),
    (SamplingParams(seed=3), MASK),
    (SamplingParams(seed=4, logit_bias=((7, 0.3), (9, -5.0))), None),
    (SamplingParams(seed=5, repetition_penalty=1.1, logit_bias=((50, 0.2),)), MASK),
]
_ALL = Requests(PROMPTS, REQUESTS, COUNT)
alone, together = _ALL.alone, _ALL.together


def make_spec(
    max_batch: int, vocab_size: int = VOCAB, pool_on_host: bool = False, drafts: bool = False, **sizes: int
) -> CudaSpec:
    """Return the spec of MODEL with biases of QKV. ``sizes``: other entries of its configuration."""
    model = spec_of(MODEL | {"vocab_size": vocab_size} | sizes)
    return CudaSpec(
        model=dataclasses.replace(model, layers=tuple(dataclasses.replace(x, qkv_bias=True) for x in model.layers)),
        kv_int8=False,
        max_context=CONTEXT,
        head_rows=vocab_size,
        dtype="fp16",
        weight_format=weight_format("fp16"),
        chunk=32,
        pool_tokens=288 if pool_on_host else 96,
        max_batch=max_batch,
        pool_on_host=pool_on_host,
        drafts=drafts,
    )


@pytest.fixture
def load(driver):
    loaded = []

    def make(max_batch: int, use_cuda_graph: bool = True, vocab_size: int = VOCAB, **sizes: int) -> CudaBackend:
        spec, random = make_spec(max_batch, vocab_size, **sizes), np.random.default_rng(9)
        arrays = {
            name: (random.standard_normal(array.shape) * 0.3).astype(np.float16)
            for name, array in weight_arrays(spec).items()
        }
        angles = np.arange(CONTEXT)[:, None] * 100.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
        rope = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
        device = Device()
        source = lambda name, array: device.upload(array, arrays[name])  # noqa: E731
        loaded.append(CudaBackend(device, spec, source, rope, use_cuda_graph=use_cuda_graph))
        return loaded[-1]

    yield make
    for backend in loaded:
        backend.close()


@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_a_sequence_has_the_tokens_it_has_alone(load, use_cuda_graph):
    backend = load(1)
    expected = [alone(backend, index) for index in range(5)]
    assert all(None not in tokens and len(set(tokens)) > 1 for tokens in expected), expected
    assert all(token % 2 == 0 for index in (2, 4) for token in expected[index])
    backend = load(5, use_cuda_graph)
    assert backend.num_slots == 5
    found = together(backend, {index: index for index in range(5)})
    assert [found[index] for index in range(5)] == expected
    # Other slots, holes between them, some come later and some leave earlier; then each one alone.
    found = together(backend, {3: 0, 1: 1, 0: 4, 4: 2}, {1: 5, 0: 9, 4: 3}, {3: 10})
    assert found[3] == expected[3][:10] and [found[index] for index in (0, 1, 4)] == [expected[i] for i in (0, 1, 4)]
    assert [alone(backend, index, slot) for slot, index in enumerate((2, 3, 4, 0, 1))] == [
        expected[index] for index in (2, 3, 4, 0, 1)
    ]


def test_a_model_of_odd_sizes_has_the_logits_it_has_alone(load):
    """A norm's mean is over the model's hidden size, not over the one the kernels compute with."""
    rows = []
    for max_batch in (1, 2):
        backend = load(max_batch, hidden_size=66, intermediate_size=90, vocab_size=97)
        for slot in range(max_batch):
            backend.begin(slot, SamplingParams(seed=1), PROMPTS[1])
            backend.step([SequenceStep(slot, PROMPTS[1], 0)])[0].result()
        tokens = [each.result() for each in backend.step([SequenceStep(slot) for slot in range(max_batch)])]
        assert len(set(tokens)) == 1
        rows.append(backend._device.download(backend._work["logits"]).reshape(max_batch, -1))
    assert np.abs(rows[1] - rows[0]).max() < 0.01 * np.abs(rows[0]).max()


def test_a_step_is_the_graph_of_the_next_larger_size(load, driver):
    assert make_spec(16).batch_sizes == [1, 2, 4, 8, 16] and make_spec(6).batch_sizes == [1, 2, 4, 6]
    assert make_spec(1).batch_sizes == [1] and capabilities_of("cuda").max_batch == MAX_SEQUENCES == 16
    backend = load(6)
    sizes = []
    run = backend._graphs.run
    backend._graphs.run = lambda key: (sizes.append(key.batch) if key.rows == 1 else None, run(key))
    for slots in ((0,), (1,), (0, 2), (3, 1), (4,)):
        for slot in slots:
            backend.begin(slot, SamplingParams(seed=1), PROMPTS[0])
            backend.step([SequenceStep(slot, PROMPTS[0])])[0].result()
        driver.log.clear()
        pending = backend.step([SequenceStep(slot) for slot in slots])
        assert driver.log.count("cuGraphLaunch") == 1 and "cuLaunchKernelEx" not in driver.log
        assert None not in [each.result() for each in pending]
    assert sizes == [1, 2, 4, 4, 6]


def test_a_part_of_a_prompt_goes_with_the_steps_of_others(load):
    expected = alone(load(1), 4)
    backend, prompt = load(3), PROMPTS[4]
    sampling, mask = REQUESTS[4]
    first = together(backend, {0: 0})[0]
    backend.begin(0, REQUESTS[0][0], PROMPTS[0])
    other = [backend.step([SequenceStep(0, PROMPTS[0])])[0].result()]
    backend.begin(2, sampling, prompt)
    tokens = []
    for start in range(0, len(prompt), 16):
        part, is_last = prompt[start : start + 16], start + 16 >= len(prompt)
        steps = [SequenceStep(2, part, start, mask if is_last else None, is_last), SequenceStep(0)]
        fed, token = (pending.result() for pending in backend.step(steps))
        assert (fed is None) != is_last
        other.append(token)
    tokens.append(fed)
    while len(tokens) < COUNT:
        token, answer = (each.result() for each in backend.step([SequenceStep(0), SequenceStep(2, mask=mask)]))
        tokens.append(answer)
        other.append(token)
    assert tokens == expected and other[:COUNT] == first


def test_a_prefix_of_one_slot_is_loaded_into_another(load):
    backend = load(3)
    expected = alone(backend, 3, 2)
    backend.save_kv(2, 0, 48, 20)
    together(backend, {0: 0, 1: 1, 2: 2})
    backend.load_kv(1, 0, 48, 20)
    sampling, _ = REQUESTS[3]
    backend.begin(1, sampling, PROMPTS[3])
    tokens = [backend.step([SequenceStep(1, PROMPTS[3][20:], 20)])[0].result()]
    while len(tokens) < COUNT:
        tokens.append(backend.step([SequenceStep(1)])[0].result())
    assert tokens == expected


def test_an_interrupt_ends_one_sequence_and_no_other(load):
    backend = load(3)
    expected = alone(backend, 1, 1)
    for index in (0, 1):
        backend.begin(index, REQUESTS[index][0], PROMPTS[index])
    tokens = [each.result() for each in backend.step([SequenceStep(i, PROMPTS[i]) for i in (0, 1)])]
    ahead = backend.step([SequenceStep(0), SequenceStep(1)])
    backend.interrupt(0)
    answer = [tokens[1], ahead[1].result()]
    assert ahead[0].result() is None
    while len(answer) < COUNT:
        interrupted, going = backend.step([SequenceStep(0), SequenceStep(1)])
        assert interrupted.result() is None
        answer.append(going.result())
    assert answer == expected


def test_a_sequence_at_the_end_of_its_context_ends_and_no_other(load):
    backend = load(2)
    expected = alone(backend, 0, 0)
    long = np.resize(PROMPTS[4], CONTEXT - 2)
    backend.begin(0, REQUESTS[0][0], PROMPTS[0])
    backend.begin(1, SamplingParams(seed=1), long)
    tokens = [each.result() for each in backend.step([SequenceStep(0, PROMPTS[0]), SequenceStep(1, long)])]
    answers = [[tokens[0]], [tokens[1]]]
    while len(answers[0]) < COUNT:
        for answer, each in zip(answers, backend.step([SequenceStep(0), SequenceStep(1)])):
            answer.append(each.result())
    assert answers[0] == expected
    assert None not in answers[1][:3] and answers[1][3:] == [None] * (COUNT - 3)


def test_every_slot_is_planned_and_allocated_at_once(load, driver):
    totals = {}
    for count in (1, 2, 5):
        driver.log.clear()
        backend = load(count)
        assert driver.log.count("cuMemAlloc") == 1
        spec, num_sms = make_spec(count), backend._device.num_sms
        totals[count] = bytes_by_purpose(weight_arrays(spec), work_arrays(spec, num_sms))
        arena = max(buffer.nbytes for buffer in driver._buffers.values()) - 512
        assert arena == sum(totals[count].values())
        allocations = backend._device.allocations
        together(backend, {index: index for index in range(count)})
        assert backend._device.allocations == allocations
        backend.close()
    assert totals[5]["kv_cache"] == 5 * totals[1]["kv_cache"]
    assert totals[5]["weights"] == totals[1]["weights"] and totals[5]["prefix_cache"] == totals[1]["prefix_cache"]


SCHEMA = json.dumps({"type": "object", "properties": {"do": {"enum": ["go", "stop"]}}, "required": ["do"],
                     "additionalProperties": False})  # fmt: skip
TALK = [
    ("hello", "", {}),
    ("go to the kitchen, then come back and say what you saw", SCHEMA, {"max_new_tokens": 20}),
    ("hi", "", {"repetition_penalty": 1.5}),
    ("bring me the red cup", "", {"logit_bias": ((65, 0.3),), "seed": 4}),
    ("wait", SCHEMA, {"repetition_penalty": 1.1, "seed": 5}),
    ("stop", "", {"stop_token_ids": tuple(range(40, 90))}),
]


def test_an_engine_answers_all_as_it_answers_each(load, tokenizer_dir):
    """Through the scheduler: prompts in chunks between the steps of others, schemas, known prefixes."""

    def answers(max_batch: int) -> list[tuple[int, ...]]:
        backend = load(max_batch, vocab_size=fakes.VOCAB_SIZE)
        config = dict(prompt_cache_entries=2, prompt_cache_tokens=40, max_batch=max_batch)
        engine, results = fakes.make_engine(backend, tokenizer_dir, **config), {}
        for text, schema, sampling in TALK:
            messages = (ChatMessage("system", "Be kind."), ChatMessage("user", text))
            options = SamplingParams(**{"max_new_tokens": 12, "temperature": 0.0, **sampling})
            request = GenerationRequest(text, messages, sampling=options, json_schema=schema)
            done = lambda result: results.__setitem__(result.request_id, result)  # noqa: E731
            engine.scheduler.add(Sequence(engine.prepare(request), engine.tokenizer, on_piece=None, on_done=done))
        while engine.scheduler.has_work:
            engine.step()
        engine.close()
        assert [results[text].error for text, *_ in TALK] == [None] * len(TALK)
        return [results[text].token_ids for text, *_ in TALK]

    found = answers(4)
    assert found == answers(1) and all(found[:5])


def test_conversations_come_back_from_pinned_memory(load, driver, tokenizer_dir):
    """Two that take turns in one slot have the tokens and the KV they have in a slot each; nothing is allocated."""

    def answers(max_batch: int, **options) -> tuple[list[tuple[int, ...]], list[int], np.ndarray]:
        backend = load(max_batch, vocab_size=fakes.VOCAB_SIZE, **options)
        config = {"prompt_cache_entries": 0, "session_memory": int(bool(options)), "max_batch": max_batch}
        engine = fakes.make_engine(backend, tokenizer_dir, **config)
        talks: list[list[ChatMessage]] = [[], []]
        tokens, cached, taken = [], [], []
        for turn in range(6):
            talk = talks[turn % 2]
            talk.append(ChatMessage("user", f"{turn} go"))
            request = GenerationRequest("r", tuple(talk), sampling=SamplingParams(max_new_tokens=4))
            done: list = []
            sequence = Sequence(engine.prepare(request), engine.tokenizer, on_piece=None, on_done=done.append)
            engine.scheduler.add(sequence)
            while not done:
                engine.step()
            talk.append(ChatMessage("assistant", "ok"))
            tokens.append(done[0].token_ids)
            cached.append(done[0].cached_tokens)
            taken.append((backend._device.allocations, driver.used))
        assert len(set(taken)) == 1
        cache = backend._device.download(backend._work["kv_cache"]).astype(np.float32)
        cache = cache if max_batch == 1 else cache[sequence.slot]
        engine.close()
        return tokens, cached, cache[..., : len(sequence.live_ids()), :]

    tokens, cached, kv = answers(1, pool_on_host=True)
    expected, live, live_kv = answers(2)
    assert tokens == expected and cached[2:] == live[2:] and min(cached[2:]) > 20
    assert kv.shape == live_kv.shape and np.abs(kv - live_kv).max() < 1e-2 < np.abs(kv).max()


def test_the_pool_is_planned_where_it_lies(load, driver, tmp_path):
    on_host, on_device = make_spec(2, pool_on_host=True), make_spec(2)
    assert host_bytes(on_host) == {"prefix_cache": 288 * 2 * 2 * 2 * HEAD_DIM * 2} and host_bytes(on_device) == {}
    assert "prefix_cache" not in planned_bytes(on_host, 8) and planned_bytes(on_device, 8)["prefix_cache"]
    backend = load(2, pool_on_host=True)
    assert sum(array.host.nbytes for array in backend._host_pool.values()) == host_bytes(on_host)["prefix_cache"]
    driver.is_integrated = True
    assert not on_host.on(Device()).pool_on_host, "its memory is the host's: one of them is enough"
