"""The TensorRT backend and its builder, without a GPU: on a driver in host memory and a TensorRT that runs ONNX there.

What is held here is our own logic: what is bound where, which shapes, positions, chunks, refusals. That the real
TensorRT takes the network, and how fast it is, only test/gpu can show.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import checkpoints
import fake_tensorrt
from device_steps import generate
from engine_core.backends.tensorrt.api import TensorRT
from engine_core.backends.tensorrt.backend import TensorRTBackend
from engine_core.backends.tensorrt.build import build_tensorrt
from engine_core.config import EngineConfig
from engine_core.cuda.driver import DeviceMemoryError
from engine_core.errors import (
    ConfigurationError,
    EngineDirectoryError,
    EngineFaultError,
    InvalidSamplingError,
)
from engine_core.formats.manifest import read_manifest
from engine_core.measure.steps import begin, decode, extend, prefill
from engine_core.request import SamplingParams
from fake_gpu import FakeDriver, install

PROMPT = np.random.default_rng(3).integers(3, 331, size=45).astype(np.int32)
MAX_CONTEXT = 128
VERSION = "8.6.0"


def options(**changes) -> SamplingParams:
    return SamplingParams(**{"seed": 1, **changes})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(engine directory, checkpoint directory), fp32 and chunks of 16 tokens."""
    directory = checkpoints.write(tmp_path_factory.mktemp("llama3"), "llama3")
    with pytest.MonkeyPatch.context() as patch:
        driver = FakeDriver()
        install(patch, driver)
        api = TensorRT(fake_tensorrt.make(VERSION, driver))
        build_tensorrt(
            directory, directory / "engine", quantization="fp32", max_context=MAX_CONTEXT, max_prefill=16, api=api
        )
    return directory / "engine", directory


@pytest.fixture(scope="module")
def model(built):
    return checkpoints.reference(built[1])


def load(engine_dir, driver, version=VERSION, **config) -> TensorRTBackend:
    api = TensorRT(fake_tensorrt.make(version, driver))
    return TensorRTBackend.load(
        engine_dir, read_manifest(engine_dir), EngineConfig(engine_dir, **{"tune_kernels": False, **config}), api
    )


@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_tokens_are_those_of_transformers(built, model, driver, use_cuda_graph):
    backend = load(built[0], driver, use_cuda_graph=use_cuda_graph)
    for length in (1, 16, 17, 45):  # one chunk, exactly one, and several
        found = generate(backend, PROMPT[:length], 12)
        assert found == checkpoints.reference_greedy(model, PROMPT[:length], 12), length
    assert ("cuGraphLaunch" in driver.log) == use_cuda_graph
    backend.close()
    backend.close()


def test_a_prompt_in_one_chunk_is_handed_the_shortest_past(built, driver):
    backend = load(built[0], driver)
    seen = []
    backend._prefill_engine.set_shapes = lambda shapes: seen.append((shapes["token_ids"], shapes["past_index"]))
    begin(backend, options(), PROMPT)
    prefill(backend, PROMPT[:40], 0)
    assert seen == [((16,), (64,)), ((16,), (MAX_CONTEXT,)), ((8,), (MAX_CONTEXT,))]
    backend.close()


def test_the_whole_context_can_be_used_and_no_more(built, model, driver):
    backend = load(built[0], driver)
    prompt = np.resize(PROMPT, MAX_CONTEXT - 2)
    tokens = generate(backend, prompt, 6)
    assert tokens == checkpoints.reference_greedy(model, prompt, 3) + [None] * 3
    backend.close()


def test_a_smaller_context_than_built_for(built, model, driver):
    backend = load(built[0], driver, max_context=64)
    assert generate(backend, PROMPT, 5) == checkpoints.reference_greedy(model, PROMPT, 5)
    backend.close()


def test_prefixes_and_extending_bring_the_same_tokens(built, model, driver):
    backend = load(built[0], driver, prompt_cache_tokens=40)
    expected = checkpoints.reference_greedy(model, PROMPT, 8)
    extend(backend, PROMPT[:40], 0)
    backend.save_kv(0, 0, 48, 40)
    generate(backend, PROMPT[::-1].copy(), 8)
    backend.load_kv(0, 0, 48, 40)
    assert generate(backend, PROMPT, 8, start=40) == expected
    backend.close()


def test_bias_mask_penalty_stop_and_interrupt(built, model, driver):
    backend = load(built[0], driver)
    tokens = generate(backend, PROMPT, 8)
    stop = tokens[3]
    ended = generate(backend, PROMPT, 8, options(stop_token_ids=frozenset({stop})))
    first = tokens.index(stop)
    assert ended == tokens[: first + 1] + [None] * (7 - first)
    assert generate(backend, PROMPT, 3, options(logit_bias=((77, 100.0),))) == [77] * 3
    mask = np.zeros(-(-331 // 32), dtype=np.uint32)
    mask[200 // 32] |= 1 << 200 % 32
    begin(backend, options(), PROMPT)
    assert [prefill(backend, PROMPT, 0, mask).result(), decode(backend, mask).result()] == [200, 200]
    with pytest.raises(InvalidSamplingError):
        decode(backend, np.zeros_like(mask)).result()
    begin(backend, options(), PROMPT)
    pending = prefill(backend, PROMPT, 0)
    backend.interrupt(0)
    assert pending.result() is None and decode(backend).result() is None
    assert generate(backend, PROMPT, 8) == tokens
    backend.close()


def test_a_nan_does_not_outlive_its_request(built, driver):
    backend = load(built[0], driver)
    expected = generate(backend, PROMPT, 4)
    begin(backend, options(), PROMPT)
    prefill(backend, PROMPT, 0).result()
    backend._stream.upload(backend._work["kv_cache"].at(1, 1, 0, 3), _nan_row(backend))
    with pytest.raises(EngineFaultError, match="NaN"):
        decode(backend).result()
    assert generate(backend, PROMPT[:2], 1) and generate(backend, PROMPT, 4) == expected
    backend.close()


def _nan_row(backend):
    from engine_core.cuda.driver import PinnedArray

    row = PinnedArray(backend._device, (32,), "float32")
    row.host[:] = np.nan
    return row


def test_nothing_is_allocated_after_load_and_everything_comes_back(built, driver):
    backend = load(built[0], driver)
    allocations, used = backend._device.allocations, driver.used
    for length in (3, 45, 20):
        generate(backend, PROMPT[:length], 5)
    assert (backend._device.allocations, driver.used) == (allocations, used)
    backend.close()
    assert driver.used == 0


def test_the_memory_plan_is_what_load_takes(built, driver):
    config = EngineConfig(built[0])
    plan = TensorRTBackend.plan(built[0], read_manifest(built[0]), config)
    assert driver.used == 0
    backend = load(built[0], driver)
    arrays = sum(plan.item(name) for name in ("kv_cache", "scratch", "io", "prefix_cache"))
    assert backend._work["kv_cache"].nbytes <= plan.item("kv_cache")
    assert driver.log.count("cuMemAlloc") == 1 and arrays <= driver.used
    assert plan.item("weights") == (built[0] / "model.plan").stat().st_size
    backend.close()


def test_too_little_memory_leaves_nothing_behind(built, driver):
    driver.memory = 100_000
    with pytest.raises(DeviceMemoryError):
        load(built[0], driver)
    assert driver.used == 0


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1", "11.0.0"])
def test_the_versions_differ_in_names_only(built, model, driver, version, tmp_path):
    module = fake_tensorrt.make(version, driver)
    engine_dir = tmp_path / "engine"
    build_tensorrt(built[1], engine_dir, quantization="fp32", max_context=128, max_prefill=16, api=TensorRT(module))
    backend = load(engine_dir, driver, version)
    assert generate(backend, PROMPT, 5) == checkpoints.reference_greedy(model, PROMPT, 5)
    backend.close()
    strongly_typed = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert module.networks[0].flags & strongly_typed
    assert module.configs[0].progress_monitor is not None and not module.configs[0].flags


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_plan_of_another_version_or_gpu_is_refused(built, driver):
    with pytest.raises(EngineDirectoryError, match="built by TensorRT 8.6.0, but this machine has 10.3.0"):
        load(built[0], driver, "10.3.0")
    driver.capability = 87
    with pytest.raises(EngineDirectoryError, match="built for sm_90, but Fake GPU is sm_87"):
        load(built[0], driver)
    assert driver.used == 0


@pytest.mark.parametrize("damage", ["truncated", "empty", "other"])
def test_a_plan_tensorrt_does_not_take_is_refused(built, driver, tmp_path, damage):
    manifest = read_manifest(built[0])
    plan = (built[0] / "model.plan").read_bytes()
    damaged = {"truncated": plan[: len(plan) // 2], "empty": b"", "other": b"x" * 99}[damage]
    (tmp_path / "model.plan").write_bytes(damaged)
    api = TensorRT(fake_tensorrt.make(VERSION, driver))
    with pytest.raises(EngineDirectoryError, match="build the engine again"):
        TensorRTBackend.load(tmp_path, manifest, EngineConfig(tmp_path), api)
    assert driver.used == 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (dict(max_batch=2), "max_batch is 2"),
        (dict(kv_cache_type="int8"), "no 'int8' KV cache"),
        (dict(vocab_map="some/path"), "vocab_map is 'some/path'"),
        (dict(prefill_chunk=17), "at most 16 tokens a step"),
        (dict(max_context=192), "built for 128 tokens"),
        (dict(max_context=100), "multiples of 64"),
    ],
)
def test_a_configuration_the_engine_cannot_honour_is_refused(built, driver, config, reason):
    with pytest.raises(ConfigurationError, match=reason):
        load(built[0], driver, **config)


def test_a_manifest_without_its_options_is_refused(built, driver):
    manifest = read_manifest(built[0])
    for options_ in ({}, {**manifest.options, "scratch_bytes": "many"}, {**manifest.options, "exporter": "latin"}):
        damaged = dataclasses.replace(manifest, options=options_)
        with pytest.raises(EngineDirectoryError, match="build the engine again|does not know"):
            api = TensorRT(fake_tensorrt.make(VERSION, driver))
            TensorRTBackend.load(built[0], damaged, EngineConfig(built[0]), api)
