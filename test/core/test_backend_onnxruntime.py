"""The CPU backend over small random checkpoints: the protocol, the cache, faults, prefixes, the vocab map, the plan."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import checkpoints
from engine_core.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.config import EngineConfig
from engine_core.errors import BackendUnavailableError, ConfigurationError, EngineFaultError, InvalidSamplingError
from engine_core.formats.safetensors_file import write_safetensors
from engine_core.formats.vocab_map import TENSOR_NAME
from engine_core.measure.steps import begin, decode, extend, prefill
from engine_core.request import SamplingParams

GREEDY = SamplingParams(seed=0)
PROMPT = np.random.default_rng(5).integers(3, 331, size=40).astype(np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama3"), "llama3")


@pytest.fixture(scope="module")
def variant(checkpoint):
    """(directory, manifest) of the fp32 engine."""
    return checkpoint / "engine", build_engine(checkpoint, checkpoint / "engine")


@pytest.fixture(scope="module")
def expected(checkpoint):
    """The 30 greedy tokens of transformers after PROMPT."""
    return checkpoints.reference_greedy(checkpoints.reference(checkpoint), PROMPT, 30)


@pytest.fixture
def load(variant):
    loaded = []

    def make(**config):
        loaded.append(OnnxRuntimeBackend.load(*variant, EngineConfig(variant[0], **config)))
        return loaded[-1]

    yield make
    for backend in loaded:
        backend.close()


def run(backend, sampling=GREEDY, count=30, prompt=PROMPT, position=0):
    """The tokens of one request, each step queued before the token before it is read; up to the first None."""
    begin(backend, sampling, prompt)
    pending = prefill(backend, prompt[position:], position)
    tokens = []
    for _ in range(count):
        ahead = decode(backend)
        tokens.append(pending.result())
        pending = ahead
    backend.interrupt(0)
    pending.result()
    return tokens


@pytest.mark.parametrize("chunk", [0, 1, 7, 40])
def test_tokens_are_those_of_transformers_whatever_the_chunk(load, expected, chunk):
    assert run(load(prefill_chunk=chunk)) == expected


def test_two_threads_give_the_same_tokens(load, expected):
    assert run(load(num_threads=2)) == expected


def test_steps_behind_a_stop_id_do_nothing(load, expected):
    stop = expected[4]
    first = expected.index(stop)
    tokens = run(load(), dataclasses.replace(GREEDY, stop_token_ids=frozenset({stop})), count=10)
    assert tokens == expected[: first + 1] + [None] * (9 - first)


def test_interrupt_ends_a_prefill_and_holds_until_begin(load, expected):
    backend = load(prefill_chunk=1)
    entered = threading.Event()
    step = backend._session.prefill

    def slow(*arguments):
        entered.set()
        time.sleep(0.01)
        step(*arguments)

    backend._session.prefill = slow
    begin(backend, GREEDY, PROMPT)
    pending = prefill(backend, PROMPT, 0)
    ahead = decode(backend)
    assert entered.wait(5)
    backend.interrupt(0)
    start = time.monotonic()
    assert pending.result() is None and ahead.result() is None
    assert time.monotonic() - start < 0.2  # 40 chunks would take 0.4 s
    assert decode(backend).result() is None
    backend._session.prefill = step
    assert run(backend) == expected


def test_a_mask_is_read_before_the_call_returns(load):
    backend = load()
    begin(backend, GREEDY, PROMPT)
    mask = np.zeros(-(-331 // 32), dtype=np.uint32)
    mask[5] = 1 << 7
    pending = prefill(backend, PROMPT, 0, mask)
    mask[:] = 0xFFFFFFFF
    assert pending.result() == 5 * 32 + 7


def test_no_token_left_ends_the_sequence_only(load, expected):
    backend = load()
    begin(backend, GREEDY, PROMPT)
    pending = prefill(backend, PROMPT, 0, np.zeros(-(-331 // 32), dtype=np.uint32))
    ahead = decode(backend)
    with pytest.raises(InvalidSamplingError):
        pending.result()
    assert ahead.result() is None
    assert run(backend) == expected


def test_a_failing_step_is_an_engine_fault(load):
    backend = load()

    def fail(token_ids, positions, slot):
        raise RuntimeError("the kernel gave up")

    backend._session.decode_batch = fail
    begin(backend, GREEDY, PROMPT)
    first, second, third = prefill(backend, PROMPT, 0), decode(backend), decode(backend)
    assert isinstance(first.result(), int)
    with pytest.raises(EngineFaultError, match="the kernel gave up"):
        second.result()
    assert third.result() is None


def test_more_tokens_than_the_cache_holds_are_a_fault(load):
    backend = load(max_context=PROMPT.size)
    begin(backend, GREEDY, PROMPT)
    assert isinstance(prefill(backend, PROMPT, 0).result(), int)
    with pytest.raises(EngineFaultError, match="41 positions"):
        decode(backend).result()


def test_a_saved_prefix_replaces_its_prefill(load, expected):
    backend = load(prompt_cache_entries=2, prompt_cache_tokens=24)
    extend(backend, PROMPT[:24], 0)
    backend.save_kv(0, 0, 32, 24)
    run(backend, prompt=PROMPT[::-1].copy())  # overwrites the live cache
    backend.load_kv(0, 0, 32, 24)
    assert run(backend, position=24) == expected


def test_decode_writes_its_own_position_of_the_cache_and_no_other(load):
    """The past is neither copied nor moved: past and present are one buffer, and a step touches one row of it."""
    backend = load(max_context=256)
    cache = backend._session.kv_cache
    begin(backend, GREEDY, PROMPT)
    prefill(backend, PROMPT, 0).result()
    address, before = cache.ctypes.data, cache.copy()
    decode(backend).result()
    changed = np.unique(np.argwhere(cache != before)[:, 4])
    assert changed.tolist() == [len(PROMPT)] and cache.ctypes.data == address


def test_a_request_leaves_no_memory_behind(load):
    psutil = pytest.importorskip("psutil")
    backend = load()
    run(backend)
    before = psutil.Process().memory_info().rss
    for length in (1, 3, 9, 17, 33, 40) * 10:
        run(backend, prompt=PROMPT[:length].copy(), count=10)
    assert psutil.Process().memory_info().rss - before < 1 << 20


def test_a_reduced_head_gives_only_kept_tokens(checkpoint, variant, expected, tmp_path):
    """Built in or given at load, the map makes the same tokens: those of the full head among the kept ids."""
    kept = np.array(sorted({2, *range(0, 331, 3), *expected[::2]}), dtype=np.int32)
    write_safetensors(tmp_path / "map.safetensors", {TENSOR_NAME: kept})
    manifest = build_engine(checkpoint, tmp_path / "reduced", vocab_map=tmp_path / "map.safetensors")
    assert manifest.reduced_vocab_size == len(kept)
    tokens = []
    for directory, built, config in (
        (tmp_path / "reduced", manifest, {}),
        (*variant, {"vocab_map": str(tmp_path / "map.safetensors")}),
    ):
        backend = OnnxRuntimeBackend.load(directory, built, EngineConfig(directory, **config))
        assert backend.reduced_vocab_size == len(kept)
        tokens.append(run(backend))
        backend.close()
    assert tokens[0] == tokens[1] and set(tokens[0]) <= set(kept.tolist())
    with pytest.raises(ConfigurationError, match="build a variant without one"):
        OnnxRuntimeBackend.plan(tmp_path / "reduced", manifest, EngineConfig(tmp_path, vocab_map="none"))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"kv_cache_type": "int8"}, "built for fp32, fp16"),
        ({"max_batch": 5}, "up to 4 sequences"),
        ({"max_context": 4096}, "built for 256"),
    ],
)
def test_what_it_cannot_do_is_refused(variant, config, message):
    with pytest.raises(ConfigurationError, match=message):
        OnnxRuntimeBackend.plan(*variant, EngineConfig(variant[0], **config))


def test_a_damaged_model_is_refused_and_leaves_no_thread(variant, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    (tmp_path / "model.onnx.data").touch()
    before = threading.active_count()
    with pytest.raises(BackendUnavailableError, match="cannot load"):
        OnnxRuntimeBackend.load(tmp_path, variant[1], EngineConfig(tmp_path))
    assert threading.active_count() == before


def test_close_twice_ends_the_thread(load):
    before = threading.active_count()
    backend = load()
    backend.close()
    backend.close()
    assert threading.active_count() == before


def test_the_plan_names_every_purpose(variant):
    plan = OnnxRuntimeBackend.plan(*variant, EngineConfig(variant[0], max_context=100, prompt_cache_entries=3))
    assert plan.item("kv_cache") == 3 * 2 * 2 * 100 * 32 * 4
    assert plan.item("prefix_cache") == 3 * 112 * plan.item("kv_cache") // 100  # the context, in blocks of 16 tokens
    assert plan.item("weights") > 4 * variant[1].model.num_parameters * 0.95
    assert all(plan.item(name) > 0 for name in ("scratch", "rope", "io", "runtime")) and plan.available > 0
