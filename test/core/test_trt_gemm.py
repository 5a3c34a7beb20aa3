"""The exporter ``gemm`` without a GPU: what is bound where, in which order, on the kernels' references in numpy."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import checkpoints
import fake_tensorrt
from device_steps import GREEDY, check_tokens_after_a_prefix, compare_logits, generate
from engine_core.backends.tensorrt.api import TensorRT, TensorRTError
from engine_core.backends.tensorrt.backend import TensorRTBackend
from engine_core.backends.tensorrt.build import build_tensorrt
from engine_core.config import EngineConfig
from engine_core.cuda.driver import DeviceMemoryError
from engine_core.errors import BuildError, ConfigurationError, EngineDirectoryError, UnsupportedModelError
from engine_core.formats.manifest import read_manifest
from engine_core.formats.safetensors_file import write_safetensors
from engine_core.measure.steps import begin, decode, prefill
from fake_gpu import FakeDriver, install
from test_backend_tensorrt import PROMPT, load

CONTEXT, CHUNK = 128, 64
LONG = np.resize(PROMPT, 100)  # two chunks, the second not full


@pytest.fixture(scope="module", params=["llama-odd", "qwen2", "qwen3"])
def built(request, tmp_path_factory):
    """(engine directory, checkpoint directory)."""
    directory = checkpoints.write(tmp_path_factory.mktemp(request.param), request.param)
    with pytest.MonkeyPatch.context() as patch:
        driver = FakeDriver(memory=4 << 30)
        install(patch, driver)
        api = TensorRT(fake_tensorrt.make("8.6.0", driver))
        build_tensorrt(directory, directory / "engine", max_context=CONTEXT, max_prefill=CHUNK, api=api)
    return directory / "engine", directory


@pytest.fixture
def llama(tmp_path, driver):
    """(a function that builds an engine, its checkpoint)."""
    directory = checkpoints.write(tmp_path / "llama3", "llama3")
    driver.memory = 4 << 30

    def build(**options):
        api = TensorRT(fake_tensorrt.make("8.6.0", driver))
        build_tensorrt(directory, tmp_path / "engine", max_context=CONTEXT, api=api, **options)
        return tmp_path / "engine"

    return build, directory


def test_logits_are_those_of_transformers(built, driver):
    compare_logits(load(built[0], driver), checkpoints.reference(built[1]), LONG, PROMPT[:6])


@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_tokens_do_not_depend_on_graphs_chunks_or_prefixes(built, driver, use_cuda_graph):
    backend = load(built[0], driver, use_cuda_graph=use_cuda_graph, prompt_cache_tokens=64)
    check_tokens_after_a_prefix(backend, LONG)
    assert ("cuGraphLaunch" in driver.log) == use_cuda_graph


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_prefixes_of_a_cache_of_8_bits_come_back(built, driver, kind):
    backend = load(built[0], driver, kv_cache_type=kind, prompt_cache_tokens=64)
    assert backend._work["kv_cache"].dtype == backend._work["pool"].dtype == kind
    check_tokens_after_a_prefix(backend, LONG)


def test_a_chunk_is_no_graph(built, driver):
    """A context's shapes change between chunks, which a graph of it would not survive."""
    backend = load(built[0], driver)
    driver.log.clear()
    begin(backend, GREEDY, LONG)
    prefill(backend, LONG, 0)
    assert "cuGraphLaunch" not in driver.log
    decode(backend).result()
    assert driver.log.count("cuGraphLaunch") == 1
    backend.close()


def test_nothing_is_allocated_after_load_and_everything_comes_back(built, driver):
    config = EngineConfig(built[0])
    plan = TensorRTBackend.plan(built[0], read_manifest(built[0]), config)
    assert driver.used == 0
    backend = load(built[0], driver)
    assert driver.log.count("cuMemAlloc") == 1
    allocations, used = backend._device.allocations, driver.used
    (arena,) = (buffer.nbytes - 512 for buffer in driver._buffers.values() if buffer.nbytes > used // 2)
    assert arena == plan.total - plan.item("runtime")
    for length in (3, 100, 20):
        generate(backend, LONG[:length], 5)
    assert (backend._device.allocations, driver.used) == (allocations, used)
    backend.close()
    assert driver.used == 0


def test_three_small_plans_serve_all_layers(built, driver):
    manifest = read_manifest(built[0])
    plans = {name for name in manifest.files if name.endswith(".plan")}
    assert plans == {"qkv.plan", "o.plan", "mlp.plan"} and "weights.safetensors" in manifest.files
    assert sum((built[0] / name).stat().st_size for name in plans) < 10_000
    assert (manifest.backend, manifest.options["exporter"]) == ("tensorrt", "gemm")
    api = TensorRT(fake_tensorrt.make("8.6.0", driver))
    backend = TensorRTBackend.load(built[0], manifest, EngineConfig(built[0], tune_kernels=False), api)
    assert len(api.trt.contexts) == 6  # prefill and decode of each
    assert {context.device_memory for context in api.trt.contexts} == {backend._work["engine"].address}
    backend.close()


def test_a_vocab_map_at_configure_cuts_the_head(llama, driver, tmp_path):
    engine_dir = llama[0]()
    kept = np.arange(2, 331, 7).astype(np.int32)
    path = tmp_path / "map.safetensors"
    write_safetensors(path, {"vocab_map": kept})
    backend = load(engine_dir, driver, vocab_map=str(path))
    assert (backend.vocab_size, backend.reduced_vocab_size) == (331, len(kept))
    logits = checkpoints.reference_logits(checkpoints.reference(llama[1]), PROMPT)[-1]
    assert generate(backend, PROMPT, 5)[0] == kept[logits[kept].argmax()]
    backend.close()


def test_which_exporter_a_model_gets(llama, driver, tmp_path):
    assert read_manifest(llama[0](exporter="plain")).options["exporter"] == "plain"
    assert read_manifest(llama[0](quantization="fp32")).options["exporter"] == "plain"
    assert read_manifest(llama[0]()).options["exporter"] == "gemm"
    with pytest.raises(BuildError, match="fp16 weights, not fp32"):
        llama[0](exporter="gemm", quantization="fp32")
    with pytest.raises(BuildError, match="no exporter 'latin'"):
        llama[0](exporter="latin")
    gemma = checkpoints.write(tmp_path / "gemma2", "gemma2")
    api = TensorRT(fake_tensorrt.make("8.6.0", driver))
    build = dict(max_context=CONTEXT, api=api)
    assert build_tensorrt(gemma, tmp_path / "gemma", **build).options["exporter"] == "plain"
    with pytest.raises(UnsupportedModelError, match="norms with an offset"):
        build_tensorrt(gemma, tmp_path / "gemma", exporter="gemm", **build)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (dict(max_batch=2), "the tensorrt backend runs one sequence"),
        (dict(kv_cache_type="fp32"), "no 'fp32' KV cache with fp16 weights; it has fp16, int8 and fp8"),
        (dict(prefill_chunk=65), "at most 64 tokens a step"),
        (dict(max_context=192), "covers 128 positions"),
    ],
)
def test_a_configuration_the_engine_cannot_honour_is_refused(built, driver, config, reason):
    with pytest.raises((ConfigurationError, EngineDirectoryError), match=reason):
        load(built[0], driver, **config)
    assert driver.used == 0


def test_what_fails_leaves_nothing_behind(built, driver, monkeypatch):
    with pytest.raises(EngineDirectoryError, match="built by TensorRT 8.6.0, but this machine has 10.3.0"):
        load(built[0], driver, "10.3.0")
    memory, driver.memory = driver.memory, 100_000
    with pytest.raises(DeviceMemoryError):
        load(built[0], driver)
    driver.memory = memory
    monkeypatch.setattr(fake_tensorrt.FakeContext, "execute_async_v3", lambda self, stream: False)
    with pytest.raises(TensorRTError, match="execute_async_v3 failed"):
        load(built[0], driver)
    assert driver.used == 0


@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_a_plan_tensorrt_does_not_take_is_refused(built, driver, tmp_path, damage):
    for path in built[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    plan = (built[0] / "mlp.plan").read_bytes()
    damaged = plan[: len(plan) // 2] if damage == "truncated" else (built[0] / "o.plan").read_bytes()
    (tmp_path / "mlp.plan").write_bytes(damaged)
    with pytest.raises(EngineDirectoryError, match="build the engine again"):
        load(tmp_path, driver)
    assert driver.used == 0
