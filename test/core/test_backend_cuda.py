"""The CUDA backend without a GPU: its own logic on a driver in host memory, with the kernels' slow twins.

Chunks, positions, graphs, prefixes, memory. That the kernels are right, and how fast, only test/gpu can show.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import checkpoints
from device_steps import check_tokens_after_a_prefix, compare_logits, generate
from engine_core.backends.cuda import CudaBackend
from engine_core.build.cuda import build_cuda
from engine_core.config import EngineConfig
from engine_core.device import DeviceMemoryError
from engine_core.manifest import read_manifest
from fake_gpu import FakeDriver, install
from fake_kernels import FakeBlas
from peak_memory import growth, large_checkpoint

PROMPT = np.random.default_rng(3).integers(3, 331, size=100).astype(np.int32)
FOLLOWING = np.array([5, 77, 200], dtype=np.int32)


@pytest.fixture
def driver(monkeypatch):
    driver = FakeDriver()
    install(monkeypatch, driver)
    monkeypatch.setattr("engine_core.backends.cuda_model.Blas", FakeBlas)
    return driver


@pytest.fixture(scope="module", params=["llama3", "qwen2", "qwen3"])
def built(request, tmp_path_factory):
    """(engine directory, checkpoint directory)."""
    directory = checkpoints.write(tmp_path_factory.mktemp(request.param), request.param)
    build_cuda(directory, directory / "engine", max_context=128)
    return directory / "engine", directory


def load(engine_dir, **config) -> CudaBackend:
    return CudaBackend.load(engine_dir, read_manifest(engine_dir), EngineConfig(engine_dir, **config))


@pytest.mark.parametrize("chunk", [0, 64])
def test_logits_are_those_of_transformers(built, driver, chunk):
    compare_logits(load(built[0], prefill_chunk=chunk), checkpoints.reference(built[1]), PROMPT, FOLLOWING)


@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_tokens_do_not_depend_on_graphs_chunks_or_prefixes(built, driver, use_cuda_graph):
    backend = load(built[0], use_cuda_graph=use_cuda_graph, prompt_cache_tokens=64, prefill_chunk=64)
    check_tokens_after_a_prefix(backend, PROMPT)
    assert ("cuGraphLaunch" in driver.log) == use_cuda_graph


def test_the_plan_is_one_allocation_and_everything_comes_back(built, driver):
    plan = CudaBackend.plan(built[0], read_manifest(built[0]), EngineConfig(built[0]))
    assert driver.used == 0
    backend = load(built[0])
    assert driver.log.count("cuMemAlloc") == 1
    arena = max(buffer.nbytes for buffer in driver._buffers.values()) - 512  # what the stand-in aligns by
    assert arena == plan.total - plan.item("runtime")
    allocations, used = backend._device.allocations, driver.used
    for length in (3, 100, 20):
        generate(backend, PROMPT[:length], 5)
    assert (backend._device.allocations, driver.used) == (allocations, used)
    backend.close()
    driver.memory = 100_000
    with pytest.raises(DeviceMemoryError):
        load(built[0])
    assert driver.used == 0


def test_a_build_takes_less_memory_than_one_and_a_half_checkpoints(tmp_path):
    directory, size = large_checkpoint(tmp_path / "checkpoint")
    imports = "from engine_core.build.cuda import build_cuda"
    code = "build_cuda(Path(sys.argv[1]), Path(sys.argv[2]), dtype='fp16', max_context=256)"
    found = growth(imports, code, directory, tmp_path / "engine")
    # The checkpoint is mapped, so its own pages count once they are read; a copy in float32 would be 2 more of it.
    assert found < 1.5 * size, f"{found / size:.2f} checkpoints"
