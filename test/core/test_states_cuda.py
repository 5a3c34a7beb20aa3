"""Short convolutions on the CUDA backend (LFM2): its rings of earlier inputs, on a driver in host memory."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from contextlib import closing

import numpy as np
import pytest

pytest.importorskip("onnxruntime")  # for the helpers

import quantized_checkpoints
import test_padding
from engine_core import cli
from engine_core.backends import SequenceStep
from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.build import build_cuda
from engine_core.backends.cuda.capabilities import CAPABILITIES
from engine_core.backends.cuda.layout import CudaSpec
from engine_core.backends.cuda.states import RingStates
from engine_core.backends.kv_pool import NUM_MARKS, pool_tokens, state_places
from engine_core.config import EngineConfig
from engine_core.cuda.kernels import reference
from engine_core.errors import BuildError, ConfigurationError, EngineFaultError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.manifest import read_manifest
from engine_core.measure.random_checkpoint import write_random_adapter
from engine_core.models.reader import read_spec
from engine_core.request import SamplingParams
from engine_core.serving.engine import Engine
from quantized_checkpoints import Scheme
from test_layer_states import CONTEXT, COUNT, PROMPTS, REQUESTS, SYSTEM, checkpoint, feed, go_on, talk  # noqa: F401

RING = 3 * 3 * 64 * 4  # bytes: of three layers, three tokens of 64 channels


@pytest.fixture(scope="module")
def built(checkpoint):  # noqa: F811
    build_cuda(checkpoint, checkpoint.parent / "cuda", max_context=CONTEXT)
    return checkpoint.parent / "cuda"


@pytest.fixture
def load(built, driver):
    opened = []

    def make(**config) -> CudaBackend:
        config = {"prompt_cache_entries": 2, "prompt_cache_tokens": 64, **config}
        config = EngineConfig(built, tune_kernels=False, **config)
        opened.append(CudaBackend.load(built, read_manifest(built), config))
        return opened[-1]

    yield make
    for backend in opened:
        backend.close()


def test_the_plan_has_the_rings_and_the_kv_of_the_layers_with_attention(built, driver, capsys):
    config = EngineConfig(built, max_batch=2, prompt_cache_entries=3, session_memory=1)
    manifest = read_manifest(built)
    spec = CudaSpec.create(manifest, config)
    token = 2 * 2 * 16 * 2
    tokens = pool_tokens(config, CONTEXT, token, RING)
    places = state_places(config, CONTEXT, tokens)
    assert (spec.state_bytes, spec.pool_tokens, spec.state_places) == (RING, tokens, places) and places > 5
    plan = CudaBackend.plan(built, manifest, config)
    assert plan.item("kv_cache") == 2 * CONTEXT * token
    # With this memory the pool is on the host, as the KV that goes with the states.
    assert plan.item("states") == RING * (2 * (1 + NUM_MARKS) + places)
    assert [each.bytes for each in plan.items if each.on_host and each.name == "states"] == [RING * places]
    for command in (["inspect", str(built)], ["plan", str(built), "--memory", "1GiB", "--backend", "cuda"]):
        assert cli.main(command) == 0
        assert "states" in capsys.readouterr().out


def test_drafts_are_refused(built, driver):
    config = EngineConfig(built, speculation="on")
    with pytest.raises(ConfigurationError, match="'on', but Lfm2ForCausalLM has layers that keep a state, .* to auto"):
        CudaBackend.plan(built, read_manifest(built), config)


@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_parts_of_any_size_give_the_tokens_of_one_prefill(load, use_cuda_graph):
    backend = load(use_cuda_graph=use_cuda_graph)
    ids, found = PROMPTS[2], set()
    assert backend.max_draft == 0 and backend.has_states
    for size in (len(ids), 1, 2, 3, 7):
        for start in range(0, len(ids) - size, size):
            feed(backend, 0, ids[start : start + size], start, samples=False)
        last = (len(ids) - 1) // size * size
        found.add(tuple(go_on(backend, 0, ids, last)))
    assert len(found) == 1
    with closing(load(prefill_chunk=32)) as other:
        assert tuple(go_on(other, 0, ids, 0)) in found


def test_a_sequence_has_the_tokens_it_has_alone(load):
    backend = load(max_batch=4)
    requests = REQUESTS.__class__(REQUESTS.prompts, [(SamplingParams(seed=1), None)] * 3, REQUESTS.count)
    expected = [requests.alone(backend, index) for index in range(3)]
    assert requests.together(backend, {0: 3, 1: 1, 2: 2}) == dict(enumerate(expected))
    assert requests.together(backend, {0: 1, 1: 0, 2: 2}, {1: 4})[1] == expected[1]
    with closing(load()) as alone:
        assert [requests.alone(alone, index) for index in range(3)] == expected


@pytest.mark.parametrize("session_memory", [0, 1])
def test_a_ring_is_saved_from_one_slot_and_loaded_into_another(load, session_memory):
    four, ids = load(max_batch=4, session_memory=session_memory), PROMPTS[2]
    assert ("state_pool" in four._host_pool) == (session_memory > 0)
    expected = go_on(four, 0, ids, 0)
    four.begin(1, SamplingParams(seed=0), ids)
    feed(four, 1, ids[:32], samples=False, marks=True)
    feed(four, 1, ids[32:], 32, marks=True)
    assert four.state_positions(1, marked=True) == [32, len(ids)]
    four.save_kv(1, 0, 16, 32)
    four.save_state(1, 32, 1)
    four.save_state(1, len(ids), 0)
    go_on(four, 2, PROMPTS[1], 0)
    four.load_kv(2, 0, 16, 32)
    four.load_state(2, 32, 1)
    assert four.state_positions(2) == [32, 32]
    assert go_on(four, 2, ids, 32) == expected
    assert go_on(four, 1, ids, 32) == expected, "of its own mark"
    assert four.state_positions(1, marked=True) == [32], "what lay behind was another text"


def test_it_goes_on_after_a_step_that_was_queued_too_far(load):
    backend, ids = load(max_batch=2), PROMPTS[2]
    tokens = go_on(backend, 0, ids, 0, 3)  # the last two of which were fed
    text = np.concatenate([ids, tokens[:1], PROMPTS[1]]).astype(np.int32)
    expected = go_on(backend, 1, text, 0)
    go_on(backend, 0, ids, 0, 3)
    assert len(ids) + 1 in backend.state_positions(0)
    assert go_on(backend, 0, text, len(ids) + 1) == expected


def test_a_position_without_a_ring_is_a_fault(load):
    backend = load(max_batch=2)
    go_on(backend, 0, PROMPTS[2], 0)
    with pytest.raises(EngineFaultError, match="cannot go on from position 9: .* there for"):
        go_on(backend, 0, PROMPTS[2], 9)
    assert go_on(backend, 1, PROMPTS[1], 0) == go_on(backend, 0, PROMPTS[1], 0)


def test_an_interrupted_prompt_leaves_what_was_queued_and_no_mark(load):
    backend, ids = load(max_batch=2, prefill_chunk=32), np.resize(PROMPTS[2], 100)
    expected = go_on(backend, 1, ids, 0)
    backend.begin(0, SamplingParams(seed=0), ids)
    feed(backend, 0, ids[:8], samples=False, marks=True)
    queue = backend._queue_chunk

    def interrupting(*arguments):
        queue(*arguments)
        backend.interrupt(0)

    backend._queue_chunk = interrupting
    assert feed(backend, 0, ids[8:], 8, marks=True) is None
    backend._queue_chunk = queue
    assert backend.state_positions(0, marked=True) == [8] and 40 in backend.state_positions(0)
    assert go_on(backend, 0, ids, 40) == expected
    assert go_on(backend, 0, ids, 8) == expected


@pytest.mark.parametrize("max_batch", [1, 2])
def test_adapters_change_the_matrices_around_convolutions(checkpoint, built, load, tmp_path, max_batch):  # noqa: F811
    write_random_adapter(tmp_path / "a", read_spec(Checkpoint(checkpoint)), "in_proj", "out_proj", "o_proj")
    backend, tokens = load(lora_adapters=(f"a:{tmp_path / 'a'}",), max_batch=max_batch), []
    for adapter in ("", "a", ""):
        backend.begin(0, SamplingParams(seed=0), PROMPTS[1], adapter)
        tokens.append([feed(backend, 0, PROMPTS[1]), *(backend.step([SequenceStep(0)])[0].result() for _ in "123")])
    assert tokens[0] == tokens[2] != tokens[1]
    # A prompt by its kernels of chunks, and token by token by those of steps of one.
    backend.begin(0, SamplingParams(seed=0), PROMPTS[1], "a")
    for start in range(len(PROMPTS[1]) - 1):
        feed(backend, 0, PROMPTS[1][start : start + 1], start, samples=False)
    assert feed(backend, 0, PROMPTS[1][-1:], len(PROMPTS[1]) - 1) == tokens[1][0]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("max_batch", [1, 3])
def test_layers_with_attention_can_have_a_smaller_cache(built, load, kind, max_batch):
    plain, small = (load(max_batch=max_batch, kv_cache_type=each) for each in ("fp16", kind))
    layers = [array.shape[-5:][0] for array in (plain._work["kv_cache"], small._work["kv_cache"])]
    assert layers == [1, 1] and small._work["kv_cache"].nbytes == plain._work["kv_cache"].nbytes // 2
    assert small._work["kv_scales"].shape[:-3] == small._work["kv_cache"].shape[:-4]
    ids, slot = PROMPTS[2], max_batch - 1
    expected = go_on(small, slot, ids, 0)
    feed(small, slot, ids[:9], samples=False)
    assert go_on(small, slot, ids, 9) == expected
    difference = small.log_probabilities(ids, 1) - plain.log_probabilities(ids, 1)
    assert 0 < np.abs(difference).max() < 0.1


@pytest.mark.parametrize("config", [{}, {"prefill_chunk": 32}, {"max_batch": 3}, {"kv_cache_type": "fp8"}])
def test_log_probabilities_begin_a_sequence(load, config):
    """Whatever was in the slot, of the text alone; and the rings are the text's afterwards."""
    backend, ids = load(**config), np.random.default_rng(8).integers(3, 320, 70).astype(np.int32)
    fresh = backend.log_probabilities(ids, 1)
    tokens = go_on(backend, 0, PROMPTS[2], 0)
    assert backend.log_probabilities(ids, 1).tolist() == fresh.tolist()
    assert backend.state_positions(0) == [len(ids) - 2, len(ids) - 1]
    assert backend.log_probabilities(ids[:40], 1) == pytest.approx(fresh[:39], abs=0.02)
    backend.begin(0, SamplingParams(seed=0), ids)
    for start in range(len(ids) - 1):  # what a step of one leaves
        feed(backend, 0, ids[start : start + 1], start, samples=False)
    feed(backend, 0, ids[:-1])
    logits = backend._device.download(backend._work["logits"]).reshape(-1, 320)[0].astype(np.float64)
    assert fresh[-1] == pytest.approx(reference.log_probability(logits, ids[-1]), abs=1e-3)
    assert go_on(backend, 0, PROMPTS[2], 0) == tokens


@pytest.mark.parametrize("act_order", [False, True])
def test_groups_of_a_checkpoint_are_kept_but_not_their_order(checkpoint, driver, tmp_path, caplog, act_order):  # noqa: F811
    """Convolutions put nothing in order, so that matrices are rounded anew, which the build tells, or refused."""
    scheme = Scheme("gptq", group_size=32, act_order=act_order)
    directory = quantized_checkpoints.quantize(checkpoint, tmp_path / "gptq", scheme)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((checkpoint / name).read_bytes())
    assert not CAPABILITIES.keeps_order(read_spec(Checkpoint(directory)))
    engine, kind = directory / "engine", "int4" if act_order else "int4_awq"
    manifest = build_cuda(directory, engine, quantization=kind, max_context=CONTEXT)
    spec, arrays, _ = test_padding.built(engine, manifest, EngineConfig(engine))
    with closing(CudaBackend.load(engine, manifest, EngineConfig(engine, tune_kernels=False))) as backend:
        assert len(go_on(backend, 0, PROMPTS[2], 0)) == COUNT
    names = {f"layers.{i}.{name}" for i in range(4) for name in spec.matrices_of(i)}
    assert set(manifest.options["rounding_errors"]) == (names if act_order else set())
    assert ("rounded anew" in caplog.text) == act_order and not manifest.options["ordered"]
    if not act_order:
        assert manifest.group_size == 32
        for layer, name in ((0, "in_proj"), (3, "in_proj"), (3, "out_proj")):
            own = Checkpoint(directory).read(f"model.layers.{layer}.conv.{name}.weight")
            assert np.allclose(arrays[f"layers.{layer}.conv_{name.removesuffix('_proj')}"], own, atol=1e-3 * own.std())
        return
    with pytest.raises(BuildError, match="not in consecutive groups"):
        build_cuda(directory, directory / "own", quantization="int4_awq", max_context=CONTEXT)


def test_prompts_are_not_multiplied_in_fp8(checkpoint, driver, tmp_path):  # noqa: F811
    """Though the checkpoint says that it is meant for fp8 activations; the engine does not say so."""
    directory = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (directory / "config.json").write_text(json.dumps(config))
    assert Checkpoint(directory).fp8_activations
    manifest = build_cuda(directory, tmp_path / "engine", quantization="fp8", max_context=CONTEXT)
    assert not manifest.options["fp8_activations"] and not any("activations" in note for note in manifest.notes)
    spec = CudaSpec.create(manifest, EngineConfig(tmp_path / "engine"))
    assert not dataclasses.replace(spec, fp8_activations=True).fp8_gemms
    with closing(CudaBackend.load(tmp_path / "engine", manifest, EngineConfig(tmp_path / "engine"))) as backend:
        assert len(go_on(backend, 0, np.resize(PROMPTS[2], 200), 0, 3)) == 3


@pytest.mark.parametrize("config", [dict(session_memory=1), dict(session_memory=1, max_batch=3), dict(max_batch=3)])
def test_conversations_go_on_from_what_is_kept(built, driver, config):
    def open_engine(**more):
        options = dict(max_context=CONTEXT, verify_files=False, backend="cuda", tune_kernels=False, **more)
        return closing(Engine.open(EngineConfig(built, **options), lambda line: None))

    with open_engine(prompt_cache_entries=0, max_batch=config.get("max_batch", 1)) as engine:
        fresh = [ids for ids, *_ in talk(engine)]
    with open_engine(prompt_cache_entries=2, **config) as engine:
        assert engine.warm_system_prompt(SYSTEM.content)
        heard = talk(engine)
        shared = len(engine.tokenizer.system_prefix(SYSTEM.content))
    assert [ids for ids, *_ in heard] == fresh
    assert [cached for _, cached, _ in heard[:2]] == [shared, shared]
    if "session_memory" in config:
        for (_, _, before), (_, cached, _) in zip(heard, heard[2:]):
            assert cached >= before


# --- the policy ---


class Rings:
    """Rings whose rows are sums of all tokens before, so that one of another text is noticed."""

    taps = 3

    def __init__(self, num_slots: int, num_places: int) -> None:
        sizes = {"states": (num_slots,), "state_marks": (num_slots, NUM_MARKS), "state_pool": (num_places,)}
        self.arrays = {name: np.full((*shape, self.taps), -1.0) for name, shape in sizes.items()}
        self.states = RingStates(num_slots, self.copy)

    def copy(self, target, source) -> None:
        self.arrays[target[0]][target[1:]] = self.arrays[source[0]][source[1:]]

    def feed(self, slot: int, text: np.ndarray, start: int, stop: int) -> None:
        self.states.begin(slot, start)
        self.check(slot, text, start)
        for position in range(max(start, stop - self.taps), stop):
            self.arrays["states"][slot, position % self.taps] = text[: position + 1].sum()
        self.states.end(slot, stop)

    def check(self, slot: int, text: np.ndarray, position: int) -> None:
        for earlier in range(max(0, position - self.taps + 1), position):
            assert self.arrays["states"][slot, earlier % self.taps] == text[: earlier + 1].sum()


@pytest.mark.parametrize("seed", range(4))
def test_every_position_that_is_told_is_there(seed):
    rng, rings = np.random.default_rng(seed), Rings(2, 5)
    texts = [rng.integers(1, 99, 60) for _ in range(2)]
    pool: dict[int, tuple[np.ndarray, int]] = {}
    gone_back = 0
    for number in itertools.count():
        if number == 600:
            break
        slot, action = int(rng.integers(2)), int(rng.integers(8))
        positions = rings.states.positions(slot)
        if action == 0 and positions:
            position, place = int(rng.choice(positions)), int(rng.integers(5))
            rings.states.save(slot, position, place)
            pool[place] = texts[slot][:position].copy(), position
        elif action == 1 and pool:
            place = int(rng.choice(list(pool)))
            known, position = pool[place]
            rings.states.load(slot, position, place)
            texts[slot] = np.concatenate([known, rng.integers(1, 99, 60 - position)])
        elif action == 2 and any(rings.states.is_at(slot, position) for position in positions):
            rings.states.mark(slot)
        else:
            start = int(rng.choice([*positions, 0] if action == 3 else [max(positions[:2], default=0)]))
            if start and start < max(positions):
                gone_back += 1
            texts[slot][start:] = rng.integers(1, 99, 60 - start)
            stop = min(60, start + int(rng.choice([1, 1, 1, 2, 5, 20])))
            if stop > start:
                rings.feed(slot, texts[slot], start, stop)
            else:
                rings.states.begin(slot, 0)
    assert gone_back > 15
    with pytest.raises(EngineFaultError, match="cannot go on from position 59"):
        rings.feed(0, texts[0], 0, 5), rings.states.begin(0, 59)
