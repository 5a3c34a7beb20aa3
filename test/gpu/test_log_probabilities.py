"""Log probabilities on the GPU: the kernel against its reference, whole models against transformers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from gpu_bench import error

from device_steps import GREEDY, generate
from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.build import build_cuda
from engine_core.config import EngineConfig
from engine_core.cuda.kernels import reference
from engine_core.cuda.kernels.log_probability import LogProbability
from engine_core.formats.manifest import read_manifest
from engine_core.measure.steps import begin, prefill

pytestmark = pytest.mark.gpu

IDS = np.random.default_rng(3).integers(0, 1003, 150).astype(np.int32)
# How far from transformers in float32 they may be, as a multiple of what transformers itself loses in the same type.
TOLERANCE = 1.2


@pytest.mark.parametrize("rows", [1, 3, 31, 1003, 4098, 151936])
@pytest.mark.parametrize("scale", [1e-3, 4.0, 300.0])
def test_the_logarithm_of_a_softmax(bench, rows, scale):
    logits, values = bench.normal((rows,), "fp32", scale)
    output = bench.poisoned((6,), "fp32")
    log_probability = LogProbability(bench.kernels("fp16"), logits, output)
    targets = [0, rows - 1, rows // 2, int(values.argmax()), -1]
    for place, target in enumerate(targets):
        log_probability(bench.stream, target, place)
    found = bench.get(output)
    expected = np.array([reference.log_probability(values, target) for target in targets])
    np.testing.assert_allclose(found[:5], expected, rtol=1e-6, atol=2e-6 * max(1.0, scale))
    assert np.isnan(found[5])  # nobody wrote it


@pytest.mark.parametrize("place", [0, 700, 1002])
def test_a_logit_that_is_no_number_is_seen(bench, place):
    values = np.zeros(1003, dtype=np.float32)
    values[place] = np.nan
    output = bench.poisoned((1,), "fp32")
    LogProbability(bench.kernels("fp16"), bench.put(values, "fp32"), output)(bench.stream, 5, 0)
    assert np.isnan(bench.get(output)).all()
    values[place] = -np.inf  # while this is only a token that cannot come
    LogProbability(bench.kernels("fp16"), bench.put(values, "fp32"), output)(bench.stream, 5, 0)
    assert bench.get(output)[0] == pytest.approx(-np.log(1002), abs=1e-5)


@pytest.fixture(scope="module", params=["Llama", "Gemma2"])
def checkpoint(request, tmp_path_factory):
    """(directory, log probabilities of IDS[1:] by transformers in float32, and in fp16)."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(7)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, head_dim=32)
    sizes |= dict(vocab_size=1003, num_key_value_heads=2, initializer_range=0.1, eos_token_id=2)
    config = getattr(transformers, f"{request.param}Config")(**sizes)
    config._attn_implementation = "eager"  # others leave soft capping out
    model = getattr(transformers, f"{request.param}ForCausalLM")(config)
    rotary = copy.deepcopy(model.model.rotary_emb)  # its frequencies stay in float32, as in a checkpoint that is loaded
    model = model.half().eval()
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    tokens, found = torch.tensor(IDS[None].astype(np.int64)), []
    for kind in (torch.float32, torch.float16):
        model.to(kind).model.rotary_emb = copy.deepcopy(rotary)
        with torch.no_grad():
            logs = model(tokens).logits[0].double().log_softmax(dim=-1).numpy()
        found.append(logs[np.arange(len(IDS) - 1), IDS[1:]])
    return directory, *found


@pytest.mark.parametrize("config", [{}, {"prefill_chunk": 64}, {"max_batch": 3}, {"speculation": "on"}], ids=str)
def test_models_give_the_log_probabilities_of_transformers(checkpoint, tmp_path, config):
    directory, exact, rounded = checkpoint
    build_cuda(directory, tmp_path / "engine", max_context=256, dtype="fp16")
    backend = CudaBackend.load(
        tmp_path / "engine", read_manifest(tmp_path / "engine"), EngineConfig(tmp_path / "engine", **config)
    )
    try:
        tokens = generate(backend, IDS[:40], 8)
        allocations = backend._device.allocations
        for first in (1, 64, 65, 149):
            found = backend.log_probabilities(IDS, first)
            assert error(found, exact[first - 1 :]) < TOLERANCE * max(error(rounded, exact), 1e-4)
        assert backend._device.allocations == allocations
        assert generate(backend, IDS[:40], 8) == tokens
    finally:
        backend.close()


@pytest.mark.parametrize("quantization", ["fp16", "int8", "int4", "fp8", "nvfp4"])
@pytest.mark.parametrize("kv_cache_type", ["fp16", "int8"])
def test_every_format_is_scored_as_it_decodes(checkpoint, tmp_path, quantization, kv_cache_type):
    """A decode step multiplies what a chunk's matrices are in 16 bits by other kernels: only rounding may differ."""
    directory, exact, _ = checkpoint
    build_cuda(directory, tmp_path / "engine", max_context=256, dtype="fp16", quantization=quantization)
    config = EngineConfig(tmp_path / "engine", kv_cache_type=kv_cache_type)
    backend = CudaBackend.load(tmp_path / "engine", read_manifest(tmp_path / "engine"), config)
    try:
        tokens = generate(backend, IDS[:100], 12)
        fed = np.concatenate([IDS[:100], tokens]).astype(np.int32)
        found = backend.log_probabilities(fed, 100)
        begin(backend, GREEDY, fed[:-1])
        prefill(backend, fed[:-1], 0).result()
        logits = backend._device.download(backend._work["logits"]).astype(np.float64)
        assert found[-1] == pytest.approx(reference.log_probability(logits, int(fed[-1])), abs=0.05)
        assert found.mean() > exact.mean() + 1  # what it chose itself is likelier than chance
    finally:
        backend.close()
