"""Layers that keep a state beside KV (LFM2's short convolutions): on the CPU, and in what is kept of prompts."""

from __future__ import annotations

import itertools
from contextlib import closing

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import fakes
from batch_steps import Requests
from engine_core import cli
from engine_core.backends import SequenceStep
from engine_core.backends.capabilities import capabilities_of
from engine_core.backends.kv_pool import pool_tokens, state_places
from engine_core.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.backends.onnxruntime.states import COPIES, LayerStates, state_bytes
from engine_core.config import EngineConfig
from engine_core.errors import BuildError, ConfigurationError, EngineFaultError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.measure.random_checkpoint import write_random_adapter, write_random_checkpoint
from engine_core.models.reader import read_spec
from engine_core.models.shapes import spec_of
from engine_core.models.spec import StateSpec
from engine_core.quantize import quantize_checkpoint
from engine_core.request import ChatMessage, GenerationRequest, SamplingParams
from engine_core.serving.cancellation import CancelToken
from engine_core.serving.engine import Engine
from engine_core.serving.session_pool import SessionPool

VOCAB, CONTEXT, COUNT = 320, 256, 12
CONFIG = dict(
    architectures=["Lfm2ForCausalLM"], model_type="lfm2", hidden_size=64, intermediate_size=240, num_hidden_layers=4,
    vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2,
    full_attn_idxs=[1], tie_embedding=False, block_multiple_of=32,
)  # fmt: skip
PROMPTS = [np.random.default_rng(i).integers(3, VOCAB, 6 + 17 * i).astype(np.int32) for i in range(3)]
REQUESTS = Requests(PROMPTS, [(SamplingParams(seed=i, temperature=i / 2), None) for i in range(3)], COUNT)
GREEDY = SamplingParams(seed=0)
SYSTEM = ChatMessage("system", "You are a robot in a house with many rooms.")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = write_random_checkpoint(tmp_path_factory.mktemp("lfm2") / "checkpoint", CONFIG, scale=0.25)
    fakes.write_tokenizer(directory)
    fakes.write_calibration(directory)
    return directory


@pytest.fixture(scope="module")
def variant(checkpoint):
    directory = checkpoint.parent / "int8"
    return directory, build_engine(checkpoint, directory, quantization="int8", max_context=CONTEXT)


@pytest.fixture(scope="module")
def four(variant):
    """A backend with four slots and a pool."""
    config = EngineConfig(
        variant[0], max_batch=4, num_threads=1, prefill_chunk=16, prompt_cache_entries=2, prompt_cache_tokens=64
    )
    with closing(OnnxRuntimeBackend.load(*variant, config)) as backend:
        yield backend


def feed(backend, slot, ids, position=0, **options):
    return backend.step([SequenceStep(slot, ids, position, **options)])[0].result()


def go_on(backend, slot, ids, position, count=COUNT) -> list[int]:
    """Return the greedy tokens of a sequence whose first ``position`` tokens are there."""
    backend.begin(slot, GREEDY, ids)
    tokens = [feed(backend, slot, ids[position:], position)]
    return tokens + [backend.step([SequenceStep(slot)])[0].result() for _ in range(count - 1)]


def test_the_layers_are_data(checkpoint):
    spec = read_spec(Checkpoint(checkpoint))
    assert [layer.conv_kernel for layer in spec.layers] == [3, 0, 3, 3] and spec.kv_layers == (1,)
    assert spec.states == tuple(StateSpec(layer, "conv", (2, 64)) for layer in (0, 2, 3))
    assert spec.intermediate_size == 160, "two thirds"
    assert spec_of(CONFIG | {"layer_types": ["conv", "full_attention", "conv", "conv"]}) == spec
    assert spec_of(CONFIG | {"conv_L_cache": 1}).states == ()


def test_tensorrt_refuses_it_by_name():
    assert capabilities_of("cuda").model_refusal(spec_of(CONFIG)) is None
    reason = capabilities_of("tensorrt").model_refusal(spec_of(CONFIG))
    does_not = "which the tensorrt backend does not run; use the backend cuda or onnxruntime."
    assert reason == f"Lfm2ForCausalLM has short convolutions, {does_not}"
    reason = capabilities_of("cuda").model_refusal(spec_of(CONFIG | {"conv_L_cache": 9}))
    assert reason is not None and "over more than 8 tokens, which the cuda backend does not run" in reason


def test_speculation_and_calibrated_weights_are_refused(checkpoint, variant, tmp_path):
    with pytest.raises(ConfigurationError, match="'on', but Lfm2ForCausalLM has layers that keep a state, .* to auto"):
        OnnxRuntimeBackend.plan(*variant, EngineConfig(variant[0], speculation="on"))
    with pytest.raises(BuildError, match="Lfm2ForCausalLM has short convolutions"):
        quantize_checkpoint(checkpoint, tmp_path, method="int4_awq", group_size=32, report=lambda line: None)


def test_tables_of_memory_have_the_states(variant, capsys):
    assert cli.main(["inspect", str(variant[0])]) == 0
    assert "memory: states" in capsys.readouterr().out
    assert cli.main(["plan", str(variant[0]), "--memory", "1GiB", "--backend", "onnxruntime"]) == 0
    assert "\nstates " in capsys.readouterr().out


def test_the_plan_has_the_states_of_every_slot_and_of_the_pool(variant):
    config = EngineConfig(variant[0], max_batch=2, prompt_cache_entries=3, session_memory=1)
    plan = OnnxRuntimeBackend.plan(*variant, config)
    size = state_bytes(variant[1].model.states)
    token = plan.item("kv_cache") // (2 * CONTEXT)
    assert size == 3 * 2 * 64 * 4 and token == 2 * 2 * 16 * 4, "one layer has a KV cache"
    tokens = pool_tokens(config, CONTEXT, token, size)
    places = state_places(config, CONTEXT, tokens)
    assert plan.item("states") == size * (2 * COPIES + places)
    assert (plan.item("prefix_cache"), plan.item("states") // size > 5) == (tokens * token, True)
    of_sessions = tokens - 3 * CONTEXT
    assert of_sessions * token + (places - 3) * size <= 1 << 20 < (of_sessions + 32) * token + (places - 1) * size


class TestSlots:
    """Four slots of one engine with int8 weights."""

    def test_a_sequence_has_the_tokens_it_has_alone(self, four):
        assert four._session.can_batch(4)
        expected = [REQUESTS.alone(four, index) for index in range(3)]
        assert REQUESTS.together(four, {0: 3, 1: 1, 2: 2}) == dict(enumerate(expected))
        assert REQUESTS.together(four, {0: 1, 1: 0, 2: 2}, {1: 4})[1] == expected[1]

    def test_a_state_is_saved_from_one_slot_and_loaded_into_another(self, four):
        ids = PROMPTS[2]
        expected = go_on(four, 0, ids, 0)
        four.begin(1, GREEDY, ids)
        feed(four, 1, ids[:32], samples=False, marks=True)
        feed(four, 1, ids[32:], 32, marks=True)
        assert four.state_positions(1, marked=True) == [32, len(ids)]
        four.save_kv(1, 0, 16, 32)
        four.save_state(1, 32, 1)
        go_on(four, 2, PROMPTS[1], 0)
        four.load_kv(2, 0, 16, 32)
        four.load_state(2, 32, 1)
        assert go_on(four, 2, ids, 32) == expected
        assert go_on(four, 1, ids, 32) == expected, "of its own mark"
        assert four.state_positions(1, marked=True) == [32], "what lay behind was another text"

    def test_it_goes_on_after_a_step_that_was_queued_too_far(self, four):
        ids = PROMPTS[2]
        tokens = go_on(four, 0, ids, 0, 3)  # the last two of which were fed
        text = np.concatenate([ids, tokens[:1], PROMPTS[1]]).astype(np.int32)
        expected = go_on(four, 1, text, 0)
        go_on(four, 0, ids, 0, 3)
        assert len(ids) + 1 in four.state_positions(0)
        assert go_on(four, 0, text, len(ids) + 1) == expected

    def test_a_position_without_a_state_is_a_fault_of_the_step_alone(self, four):
        go_on(four, 0, PROMPTS[2], 0)
        with pytest.raises(EngineFaultError, match="cannot go on from position 9: .* there for"):
            go_on(four, 0, PROMPTS[2], 9)
        assert go_on(four, 1, PROMPTS[1], 0) == go_on(four, 0, PROMPTS[1], 0)

    def test_an_interrupted_prompt_leaves_what_its_marks_have(self, four):
        ids = PROMPTS[2]
        expected = go_on(four, 3, ids, 0)
        four.begin(0, GREEDY, ids)
        feed(four, 0, ids[:8], samples=False, marks=True)
        prefill = four._session.prefill

        def interrupted(*arguments):
            four._session.terminate(0, True)
            four._slots[0].interrupted = True
            prefill(*arguments)

        four._session.prefill = interrupted
        try:
            assert feed(four, 0, ids[8:], 8) is None
        finally:
            four._session.prefill = prefill
        assert four.state_positions(0) == [8, 8]
        assert go_on(four, 0, ids, 8) == expected


@pytest.mark.parametrize("kv_cache_type", ["fp16", "int8"])
def test_chunks_of_any_size_give_the_tokens_of_one_prefill(variant, kv_cache_type):
    found = set()
    for chunk in (64, 1, 7):
        config = EngineConfig(variant[0], kv_cache_type=kv_cache_type, prefill_chunk=chunk, num_threads=1)
        with closing(OnnxRuntimeBackend.load(*variant, config)) as backend:
            assert backend.max_draft == 0
            found.add(tuple(go_on(backend, 0, PROMPTS[2], 0)))
    assert len(found) == 1


def test_adapters_change_the_matrices_around_convolutions(checkpoint, variant, tmp_path):
    spec = read_spec(Checkpoint(checkpoint))
    write_random_adapter(tmp_path / "a", spec, "in_proj", "out_proj", "o_proj")
    config = EngineConfig(variant[0], lora_adapters=(f"a:{tmp_path / 'a'}",), num_threads=1)
    with closing(OnnxRuntimeBackend.load(*variant, config)) as backend:
        tokens = []
        for adapter in ("", "a", ""):
            backend.begin(0, GREEDY, PROMPTS[1], adapter)
            tokens.append([feed(backend, 0, PROMPTS[1]), *(backend.step([SequenceStep(0)])[0].result() for _ in "123")])
    assert tokens[0] == tokens[2] != tokens[1]


# --- the engine ---------------------------------------------------------------------------------------------


def open_engine(variant, **config):
    options = dict(num_threads=1, max_context=CONTEXT, verify_files=False, **config)
    return closing(Engine.open(EngineConfig(variant[0], **options), lambda line: None))


def ask(engine, messages, **options):
    sampling = SamplingParams(max_new_tokens=8)  # with a seed, prompts are computed as a whole
    return engine.answer(GenerationRequest("r", tuple(messages), sampling=sampling, **options))


def talk(engine, others: bool = True) -> list[tuple[tuple[int, ...], int, int]]:
    """Return (ids, cached tokens, tokens of the prompt) of the turns of two people and of what is asked between."""
    heard, messages = [], {name: [SYSTEM] for name in "ab"}
    for turn in range(3):
        for name in "ab":
            messages[name].append(ChatMessage("user", f"{name} {turn * 7}"))
            result = ask(engine, messages[name])
            heard.append((result.token_ids, result.cached_tokens, result.prompt_tokens))
            messages[name].append(ChatMessage("assistant", result.text))
            if others:
                ask(engine, [ChatMessage("user", f"what is {turn}?")])
    return heard


@pytest.fixture(scope="module")
def fresh(variant):
    """What is answered if nothing is kept."""
    with open_engine(variant, prompt_cache_entries=0) as engine:
        heard = talk(engine)
        assert not any(cached for _, cached, _ in heard[:2])
        return [ids for ids, *_ in heard]


@pytest.mark.parametrize("config", [dict(session_memory=1), dict(session_memory=1, max_batch=3), dict(max_batch=3)])
def test_conversations_go_on_from_what_is_kept(variant, fresh, config):
    with open_engine(variant, prompt_cache_entries=2, **config) as engine:
        assert engine.warm_system_prompt(SYSTEM.content)
        heard = talk(engine)
        shared = len(engine.tokenizer.system_prefix(SYSTEM.content))
    assert [ids for ids, *_ in heard] == fresh
    assert [cached for _, cached, _ in heard[:2]] == [shared, shared]
    if "session_memory" in config:  # random texts are tokenized otherwise when they come back: the prompt's end is left
        for (_, _, before), (_, cached, _) in zip(heard, heard[2:]):
            assert cached >= before


def test_it_goes_on_after_a_cancelled_request_and_a_stop_text(variant, fresh):
    with open_engine(variant, prompt_cache_entries=1) as engine:
        first = [SYSTEM, ChatMessage("user", "a 0")]
        cancel = CancelToken()
        answer = engine.generate(engine.prepare(GenerationRequest("r", tuple(first), stream_interval=0.0)), cancel)
        next(answer)
        cancel.cancel()
        assert sum(1 for _ in answer) <= 2
        result = ask(engine, first)
        assert result.token_ids == fresh[0] and result.cached_tokens > 0
        whole = ask(engine, first).text
        stopped = ask(engine, first, stop=(whole[2:4],))
        assert whole.startswith(stopped.text) and len(stopped.text) < len(whole)
        assert ask(engine, first).token_ids == fresh[0]


# --- the policy ---------------------------------------------------------------------------------------------


class Store:
    """Slots and a pool whose states are sums of the texts before, so that one of another text is noticed."""

    has_states, num_slots = True, 2

    def __init__(self, num_tokens: int, num_states: int) -> None:
        self.pool_tokens, self.state_places = num_tokens, num_states
        self.states = LayerStates((StateSpec(0, "conv", (1,)), StateSpec(2, "other", (2, 3))), 2, num_states)
        self.state_positions, self.save_state, self.load_state = (
            self.states.positions, self.states.save, self.states.load
        )  # fmt: skip

    def save_kv(self, slot, position, place, count) -> None:
        assert count > 0 and place + count <= self.pool_tokens

    load_kv = save_kv

    def compute(self, slot, position, ids, step: int) -> None:
        """Feed ``ids`` behind ``position``, ``step`` tokens at a time."""
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            self.states.begin(slot, position + start)
            for array in self.states.now.values():
                array[slot] += part.sum()
            self.states.end(slot, position + start + len(part))

    def check(self, slot, ids) -> None:
        """Raise AssertionError if the state of ``slot`` is not that of a sequence ``ids``."""
        self.states.begin(slot, len(ids))
        assert all((array[slot] == ids.sum()).all() for array in self.states.now.values())
        self.states.end(slot, len(ids))


@pytest.mark.parametrize("seed", range(4))
def test_what_a_sequence_goes_on_from_is_the_state_of_its_text(seed):
    """Turns of many conversations and forks of them, in a pool with too little room for all."""
    rng = np.random.default_rng(seed)
    store = Store(512, 9)
    pool = SessionPool(store, num_prompts=2, prompt_tokens=64, keeps_conversations=True)
    shared = [rng.integers(1, 50, 24).astype(np.int32) for _ in range(3)]
    texts, reused = list(shared), 0
    for number in itertools.count():
        if number == 150:
            break
        prefix = shared[rng.integers(len(shared))]
        start = texts[rng.integers(len(texts))] if rng.random() < 0.7 else prefix
        prompt = np.concatenate([start[: 250 - number % 9], rng.integers(1, 50, rng.integers(1, 30))]).astype(np.int32)
        slot, cached = pool.place(prompt, [0, 1] if rng.random() < 0.7 else [int(rng.integers(2))])
        store.check(slot, prompt[:cached])
        reused += cached > 0
        border = next((len(each) for each in shared if (prompt[: len(each)] == each).all()), 0)
        for stop in sorted({border, len(prompt)}):
            if stop > cached:
                store.compute(slot, cached, prompt[cached:stop], 8)
                store.states.mark(slot)
                cached = stop
        pool.keep_prompt(slot, prompt[:border])
        answer = rng.integers(1, 50, rng.integers(1, 12)).astype(np.int32)
        store.compute(slot, len(prompt), answer, 1)
        ids = np.concatenate([prompt, answer])[: len(prompt) + len(answer) - int(rng.integers(2))]
        pool.set_live(slot, ids)
        pool.keep_conversation(slot, len(prompt), session=("", "anna")[number % 5 == 0])
        texts = [*texts[-12:], ids]
        kept = [place for entry in pool._entries for place in entry.states.values()]
        assert sorted([*kept, *pool._free_states]) == list(range(9))
        assert all(max(entry.states) <= len(entry.ids) for entry in pool._entries if entry.states)
    assert reused > 75


def test_marks_are_the_last_ones_of_the_text():
    store = Store(64, 2)
    states = store.states
    ids = np.arange(1, 41)
    for start in range(0, 40, 10):
        store.compute(0, start, ids[start : start + 10], 5)
        states.mark(0)
    assert sorted(states.positions(0, marked=True)) == [30, 40] and 35 in states.positions(0)
    store.check(0, ids[:30])
    assert states.positions(0, marked=True) == [30]
    store.check(0, ids[:0])
    assert states.positions(0) == [] and not LayerStates((), 2)
