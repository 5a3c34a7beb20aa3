"""The CUDA backend without a GPU: its own logic on a driver in host memory, with the kernels' references.

Chunks, positions, graphs, prefixes, memory. That the kernels are right, and how fast, only test/gpu can show.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import checkpoints
from benchmarks.gpu_decode import TURN, measure_turn
from device_steps import GREEDY, TOLERANCE, check_tokens_after_a_prefix, compare_logits, generate
from engine_core.backends import SequenceStep
from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.build import build_cuda
from engine_core.config import EngineConfig
from engine_core.cuda.driver import DeviceArray, DeviceMemoryError
from engine_core.cuda.kernels import tuning
from engine_core.cuda.kernels.sampling import STATE
from engine_core.formats.manifest import read_manifest
from engine_core.measure.steps import begin, decode, extend, prefill, prompt_step
from peak_memory import growth, large_checkpoint

PROMPT = np.random.default_rng(3).integers(3, 331, size=100).astype(np.int32)
FOLLOWING = np.array([5, 77, 200], dtype=np.int32)


@pytest.fixture(scope="module", params=["llama3", "qwen2", "qwen3", "llama-odd"])
def built(request, tmp_path_factory):
    """(engine directory, checkpoint directory)."""
    directory = checkpoints.write(tmp_path_factory.mktemp(request.param), request.param)
    build_cuda(directory, directory / "engine", max_context=128)
    return directory / "engine", directory


def load(engine_dir, tune_kernels=False, **config) -> CudaBackend:
    config = EngineConfig(engine_dir, tune_kernels=tune_kernels, **config)
    return CudaBackend.load(engine_dir, read_manifest(engine_dir), config)


FAMILIES = (
    "llama-tied-bias",
    "mistral-window",
    "qwen2-window",
    "gemma2",
    "gemma3",
    "phi3",
    "phi3-longrope",
    "phi3-odd",
    "olmo2",
    "granite",
    "qwen3-moe",
    "lfm2",
    "lfm2-odd",
)


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """A checkpoint of a family that has something the others have not; windows end inside the prompt."""
    return checkpoints.write(tmp_path / request.param, request.param)


def test_logits_of_other_families_are_those_of_transformers(family, driver):
    build_cuda(family, family / "engine", max_context=128)
    compare_logits(load(family / "engine", prefill_chunk=64), checkpoints.reference(family), PROMPT[:80], FOLLOWING)


def test_rows_of_other_families_have_the_logits_of_transformers(family, driver):
    build_cuda(family, family / "engine", max_context=128)
    backend, model, fed = load(family / "engine", max_batch=2), checkpoints.reference(family), {}
    for slot, length in enumerate((70, 81)):
        backend.begin(slot, GREEDY, PROMPT[:length])
        token = backend.step([prompt_step(backend, PROMPT[:length], slot=slot)])[0].result()
        fed[slot] = np.append(PROMPT[:length], token)
    for each in backend.step([SequenceStep(0), SequenceStep(1)]):
        each.result()
    found = backend._device.download(backend._work["logits"])
    for slot, ids in fed.items():
        expected = checkpoints.reference_logits(model, ids)[-1]
        assert np.abs(found[slot] - expected).max() < TOLERANCE * expected.std()
    backend.close()


def test_packed_weights_of_other_families_give_the_same_logits_however_they_are_multiplied(family, driver):
    """Dequantized, as they are for a few tokens, and by a GEMV."""
    build_cuda(family, family / "engine", max_context=128, quantization="int8")
    backend, logits = load(family / "engine", prefill_chunk=128), []
    begin(backend, GREEDY, PROMPT)
    for parts in (np.split(PROMPT[:97], [96]), np.split(PROMPT[:97], [30, 60, 80, 96])):
        start = 0
        for part in parts[:-1]:
            extend(backend, part, start, length=97)
            start += len(part)
        prefill(backend, parts[-1], start).result()
        logits.append(backend._device.download(backend._work["logits"]))
    prefill(backend, PROMPT[:96], 0).result()
    address = backend._work["state"].address + STATE.fields["token"][1]
    backend._device.upload(DeviceArray(address, (1,), "int32"), PROMPT[96:97])
    decode(backend).result()
    logits.append(backend._device.download(backend._work["logits"]))
    for other in logits[1:]:
        assert np.abs(other - logits[0]).max() < TOLERANCE * logits[0].std()
    backend.close()


@pytest.mark.parametrize("chunk", [0, 64])
def test_logits_are_those_of_transformers(built, driver, chunk):
    compare_logits(load(built[0], prefill_chunk=chunk), checkpoints.reference(built[1]), PROMPT, FOLLOWING)


@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_tokens_do_not_depend_on_graphs_chunks_or_prefixes(built, driver, use_cuda_graph):
    backend = load(built[0], use_cuda_graph=use_cuda_graph, prompt_cache_tokens=64, prefill_chunk=64)
    check_tokens_after_a_prefix(backend, PROMPT)
    assert ("cuGraphLaunch" in driver.log) == use_cuda_graph


@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_a_chunk_is_one_graph(built, driver, use_cuda_graph):
    backend = load(built[0], use_cuda_graph=use_cuda_graph, prefill_chunk=64)
    begin(backend, GREEDY, PROMPT)
    driver.log.clear()
    prefill(backend, PROMPT, 0)  # two chunks, then the head and the sampler
    layers = backend._spec.num_layers
    assert driver.log.count("cuGraphLaunch") == (2 if use_cuda_graph else 0)
    assert (driver.log.count("cuLaunchKernelEx") < 8) == use_cuda_graph
    assert use_cuda_graph or driver.log.count("cuLaunchKernelEx") > 2 * 4 * layers
    backend.close()


@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_every_length_brings_the_tokens_it_brings_one_by_one(built, driver, use_cuda_graph):
    """Lengths around the sizes chunks are rounded to, in an order in which longer chunks leave their rows behind."""
    backend = load(built[0], use_cuda_graph=use_cuda_graph, prefill_chunk=128)
    lengths = (97, 100, 1, 33, 31, 65, 32, 64, 96)
    tokens = {length: generate(backend, PROMPT[:length], 3) for length in lengths}
    assert all(None not in found for found in tokens.values())
    begin(backend, GREEDY, PROMPT)
    for length in range(1, max(lengths) + 1):
        last = PROMPT[length - 1 : length]
        if length in lengths:
            assert prefill(backend, last, length - 1).result() == tokens[length][0]
        else:
            extend(backend, last, length - 1)
    backend.close()


def test_measured_configurations_bring_the_same_tokens(built, driver, monkeypatch, tmp_path):
    """The fake GPU has 8 SMs. Each timed run is shorter than the one before, so that the last candidates are chosen."""
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(tmp_path))
    backend = load(built[0], max_context=100)
    expected = generate(backend, PROMPT[:90], 4)
    backend.close()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tuning, "TIME_LIMIT", 600.0)  # however busy the machine is
    times = itertools.count()
    driver.milliseconds = lambda: 0.9 ** next(times)
    backend = load(built[0], max_context=100, tune_kernels=True)
    configs = backend._model._kernels.configs
    chosen = {problem: configs.lookup(problem) for problem in configs._chosen}
    assert generate(backend, PROMPT[:90], 4) == expected
    backend.close()
    assert {type(problem).__name__ for problem in chosen} == {
        *("GemvProblem", "DecodeAttentionProblem", "PrefillAttentionProblem")
    }
    assert all(config == problem.candidates(configs.gpu)[-1] for problem, config in chosen.items())
    assert any(len(problem.candidates(configs.gpu)) > 1 for problem in chosen)
    (path,) = tmp_path.glob("launch-configs-*")
    driver.milliseconds = None  # nothing is timed again
    backend = load(built[0], max_context=100, tune_kernels=True)
    assert {problem: backend._model._kernels.config(problem) for problem in chosen} == chosen
    backend.close()


def test_a_chunk_may_be_rounded_up_beyond_the_context(built, driver):
    backend = load(built[0], prefill_chunk=64)
    prompt = np.resize(PROMPT, backend.max_context - 1)
    whole = generate(backend, prompt, 1)
    begin(backend, GREEDY, prompt)
    extend(backend, prompt[:100], 0)  # then 27 tokens in 32 rows, of which 28 would fit
    assert prefill(backend, prompt[100:], 100).result() == whole[0]
    backend.close()


def test_large_chunks_are_not_captured(built, driver, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("engine_core.backends.cuda.backend.MAX_GRAPH_ROWS", 32)
        backend = load(built[0], prefill_chunk=64)
    expected = generate(backend, PROMPT, 4)
    driver.log.clear()
    begin(backend, GREEDY, PROMPT)
    prefill(backend, PROMPT, 0)  # 64 tokens and 36
    assert "cuGraphLaunch" not in driver.log
    backend.close()
    backend = load(built[0], prefill_chunk=64)
    assert generate(backend, PROMPT, 4) == expected
    backend.close()


def test_a_turn_is_timed_as_the_benchmark_says(built, driver):
    backend = load(built[0])
    driver.log.clear()
    assert measure_turn(backend, 64) > 0
    assert driver.log.count("cuGraphLaunch") == 1 and backend._slots[0].position == 64 + TURN
    backend.close()


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
    imports = "from engine_core.backends.cuda.build import build_cuda"
    code = "build_cuda(Path(sys.argv[1]), Path(sys.argv[2]), dtype='fp16', max_context=256)"
    found = growth(imports, code, directory, tmp_path / "engine")
    # The checkpoint is mapped, so its own pages count once they are read; a copy in float32 would be 2 more of it.
    assert found < 1.5 * size, f"{found / size:.2f} checkpoints"
