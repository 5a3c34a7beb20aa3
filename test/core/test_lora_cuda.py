"""LoRA adapters on the CUDA backend, on a driver in host memory with the kernels' references."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import checkpoints
import small_llama
from batch_steps import Requests
from device_steps import GREEDY, TOLERANCE
from engine_core.backends import SequenceStep
from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.build import build_cuda
from engine_core.backends.cuda.layout import lora_arrays
from engine_core.backends.cuda.weights import resolve
from engine_core.config import EngineConfig
from engine_core.cuda.driver import Device, DeviceArray
from engine_core.cuda.kernels import KernelArgumentError, Kernels, lora
from engine_core.errors import AdapterError, ConfigurationError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.manifest import read_manifest
from engine_core.measure.random_checkpoint import write_random_adapter, write_random_checkpoint
from engine_core.models.reader import read_spec
from engine_core.request import SamplingParams

VOCAB, COUNT = 96, 10
CONFIG = small_llama.CONFIG | dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", intermediate_size=96, vocab_size=VOCAB
)
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = [np.random.default_rng(i).integers(3, VOCAB, 4 + 13 * i).astype(np.int32) for i in range(4)]
REQUESTS = [(SamplingParams(seed=i), None) for i in range(4)]
ADAPTERS = ["", "first", "second", ""]
requests, plain = Requests(PROMPTS, REQUESTS, COUNT, ADAPTERS), Requests(PROMPTS, REQUESTS, COUNT)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("random") / "checkpoint", CONFIG, scale=0.15)


@pytest.fixture(scope="module")
def entries(checkpoint, tmp_path_factory):
    """Two adapters of other ranks and targets."""
    spec, directory = read_spec(Checkpoint(checkpoint)), tmp_path_factory.mktemp("adapters")
    first = write_random_adapter(directory / "first", spec, "q_proj", "v_proj", "down_proj", rank=2)
    others = ("k_proj", "o_proj", "gate_proj", "up_proj")
    second = write_random_adapter(directory / "second", spec, *others, rank=9, seed=1)
    return f"first:{first}", f"second:{second}"


@pytest.fixture(scope="module", params=["fp16", "int4"])
def engine(request, checkpoint):
    directory = checkpoint.parent / request.param
    build_cuda(checkpoint, directory, quantization=request.param, max_context=96)
    return directory


@pytest.fixture
def open_backend(driver):
    loaded = []

    def make(directory, *adapters: str, **options) -> CudaBackend:
        options = {"prefill_chunk": 32, "prompt_cache_entries": 2, "prompt_cache_tokens": 40, **options}
        config = EngineConfig(directory, lora_adapters=adapters, tune_kernels=False, **options)
        loaded.append(CudaBackend.load(directory, read_manifest(directory), config))
        return loaded[-1]

    yield make
    for backend in loaded:
        backend.close()


@pytest.fixture
def load(open_backend, engine):
    return partial(open_backend, engine)


@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_each_row_has_its_own_adapter_and_the_tokens_it_has_alone(load, entries, use_cuda_graph):
    bare, one = load(), load(*entries)
    without = [plain.alone(bare, index) for index in range(4)]
    alone = [requests.alone(one, index) for index in range(4)]
    assert [alone[index] == without[index] for index in range(4)] == [True, False, False, True]
    backend = load(*entries, max_batch=5, use_cuda_graph=use_cuda_graph)
    found = requests.together(backend, {0: 0, 1: 1, 2: 2, 3: 3})
    assert [found[index] for index in range(4)] == alone
    found = requests.together(backend, {3: 1, 2: 0, 1: 4}, {2: 3}, {3: 5})  # slots that had other adapters before
    assert [found[1], found[2], found[3]] == [alone[1], alone[2], alone[3][:5]]


@pytest.mark.parametrize("max_batch", [1, 4])
def test_sequences_without_an_adapter_take_the_launches_of_an_engine_without_any(load, entries, max_batch, monkeypatch):
    kernels = []
    for adapters in ((), entries):
        backend = load(*adapters, max_batch=max_batch, use_cuda_graph=False)
        launched: list[tuple] = []
        monkeypatch.setattr(backend._device, "call", _noting(backend._device.call, launched))
        plain.together(backend, {index: index for index in range(max_batch)})
        kernels.append(list(launched))
    assert not any("LORA_RANK" in dict(defines) for each in kernels for _, defines in each)
    if max_batch > 1 and backend._spec.is_packed:  # all rows take the GEMMs that those with an adapter take
        kernels = [[name.replace("gemv", "gemm") for name, _ in each] for each in kernels]
    assert kernels[0] == kernels[1]
    launched.clear()
    backend.begin(0, GREEDY, PROMPTS[0], "first")
    backend.step([SequenceStep(0, PROMPTS[0], 0)])[0].result()
    backend.step([SequenceStep(0)])[0].result()
    names = [name for name, _ in launched]
    # qkv and down of first; o and gate_up of second: every matrix of both layers.
    assert names.count("lora_shrink_chunk") == names.count("lora_expand_chunk") == 8
    adapted = [name for name, defines in launched if "LORA_RANK" in dict(defines) and name.startswith("gem")]
    assert len(adapted) == 8 and names.count("lora_shrink") == (8 if max_batch > 1 else 0)


def _noting(call, launched):
    """``call`` of a device that adds each launch's (kernel, macros) to ``launched``."""

    def noted(name, *args):
        if name == "cuLaunchKernelEx":
            entry, defines = args[1]
            launched.append((entry, tuple(sorted(defines.items()))))
        return call(name, *args)

    return noted


def test_a_prefix_keeps_to_the_adapter_of_its_sequence(load, entries):
    backend = load(*entries, max_batch=2)
    expected = requests.alone(backend, 2, 1)
    backend.save_kv(1, 0, 0, 20)
    requests.together(backend, {0: 1, 3: 0})
    backend.load_kv(0, 0, 0, 20)
    backend.begin(0, REQUESTS[2][0], PROMPTS[2], "second")
    tokens = [backend.step([SequenceStep(0, PROMPTS[2][20:], 20)])[0].result()]
    while len(tokens) < COUNT:
        tokens.append(backend.step([SequenceStep(0)])[0].result())
    assert tokens == expected


@pytest.mark.parametrize("max_batch", [1, 3])
def test_adapters_are_planned_and_nothing_is_allocated_later(load, engine, entries, driver, max_batch):
    config = EngineConfig(engine, lora_adapters=entries, max_batch=max_batch, prefill_chunk=32, prompt_cache_entries=2,
                          prompt_cache_tokens=40)  # fmt: skip
    manifest = read_manifest(engine)
    plan = CudaBackend.plan(engine, manifest, config)
    without = CudaBackend.plan(engine, manifest, dataclasses.replace(config, lora_adapters=()))
    spec = resolve(engine, manifest, config).spec
    assert spec.lora_rank == 16
    assert plan.total - without.total == plan.item("adapters") == sum(a.nbytes for a in lora_arrays(spec).values())
    assert without.item("adapters") == 0
    driver.log.clear()
    backend = load(*entries, max_batch=max_batch)
    assert driver.log.count("cuMemAlloc") == 1
    arena = max(buffer.nbytes for buffer in driver._buffers.values()) - 512
    assert arena == plan.total - plan.item("runtime")
    allocations = backend._device.allocations
    requests.together(backend, {index + 1: index for index in range(max_batch)})
    assert backend._device.allocations == allocations


def test_a_bad_adapter_ends_configure_with_nothing_left(load, checkpoint, engine, driver, tmp_path):
    spec, manifest = read_spec(Checkpoint(checkpoint)), read_manifest(engine)
    cases = [
        (write_random_adapter(tmp_path / "rank", spec, "q_proj", rank=9), {"lora_max_rank": 8}, "raise it"),
        (write_random_adapter(tmp_path / "high", spec, "q_proj", rank=300), {"lora_max_rank": 512}, "runs up to 256"),
    ]
    for path, options, words in cases:
        config = EngineConfig(engine, lora_adapters=[f"a:{path}"], **options)
        for call in (CudaBackend.plan, CudaBackend.load):
            with pytest.raises((AdapterError, ConfigurationError), match=words):
                call(engine, manifest, config)
    large = write_random_adapter(tmp_path / "large", spec, "down_proj", lora_alpha=1e7)
    with pytest.raises(AdapterError, match="down of layer 0 that are too large for fp16"):
        CudaBackend.load(engine, manifest, EngineConfig(engine, lora_adapters=[f"a:{large}"]))
    assert driver.used == 0


# --- held against peft and transformers -------------------------------------------------------------------

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.mark.parametrize(
    "name, config",
    [
        *(("qwen2", {"target_modules": [target], "r": 3}) for target in MODULES),
        *(("phi3", {"target_modules": [target], "r": 3, "scale": 0.06}) for target in FUSED),
        ("qwen3", {"use_rslora": True, "r": 8, "rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 5}}),
        ("llama3", {"alpha_pattern": {"down_proj": 31}, "exclude_modules": ["o_proj"]}),
        ("llama-odd", {"r": 20}),
    ],
)
def test_logits_are_those_of_peft_and_transformers(name, config, open_backend, tmp_path):
    pytest.importorskip("peft")
    import adapters

    no_window = {"sliding_window": None} if name == "phi3" else {}
    source = checkpoints.write(tmp_path / "checkpoint", name, **no_window)
    build_cuda(source, tmp_path / "engine", max_context=96)
    directory = adapters.write(tmp_path / "adapter", source, **config)
    tokens = np.random.default_rng(0).integers(3, 300, 44).astype(np.int32)
    expected = checkpoints.reference_logits(adapters.reference(source, directory), tokens)
    base = checkpoints.reference_logits(adapters.reference(source, None), tokens)
    for max_batch in (1, 2):
        backend = open_backend(tmp_path / "engine", f"a:{directory}", max_batch=max_batch)
        slot = max_batch - 1
        for count in (40, 1, 33):
            backend.begin(slot, GREEDY, tokens[:count], "a")
            backend.step([SequenceStep(slot, tokens[:count], 0)])[0].result()
            _compare(backend, slot, expected[count - 1])
        for position in range(33, 44):
            state = backend._of("state", slot)
            backend._device.upload(DeviceArray(state.address, (1,), "int32"), tokens[position : position + 1])
            backend.step([SequenceStep(slot)])[0].result()
            _compare(backend, slot, expected[position])
    assert np.abs(expected - base).max() > 5 * TOLERANCE * expected.std()


def _compare(backend, slot, expected) -> None:
    found = backend._device.download(backend._of("logits", slot))
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()


@pytest.mark.parametrize("rank, cols", [(12, 64), (264, 64), (16, 60)])
def test_kernels_refuse_what_they_cannot_read(driver, rank, cols):
    kernels = Kernels(Device(), "fp16")
    matrix = lora.LoraMatrix(DeviceArray(512, (2, rank, cols), "fp16"), DeviceArray(512, (2, 32, rank), "fp16"))
    term = lora.LoraTerm(matrix, DeviceArray(512, (1, rank), "fp32"), DeviceArray(512, (1,), "int32"))
    with pytest.raises(KernelArgumentError):
        lora.lora_shrink(kernels, term, DeviceArray(512, (1, cols), "fp16"))
