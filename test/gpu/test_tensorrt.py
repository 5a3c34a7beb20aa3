"""The TensorRT backend on a real GPU: logits, tokens, memory, refusals. Needs no torch: the reference is the exported
model on ONNX Runtime, which test/core/test_export_tensorrt.py holds against transformers."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil

import numpy as np
import pytest

from device_steps import generate
from engine_core.config import EngineConfig
from engine_core.cuda.driver import Device, DeviceMemoryError
from engine_core.errors import EngineDirectoryError, EngineFaultError
from engine_core.formats.manifest import read_manifest
from engine_core.measure.random_checkpoint import write_random_checkpoint
from engine_core.measure.steps import begin, decode, extend, prefill
from engine_core.request import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("tensorrt") is None, reason="needs the Python package tensorrt"),
]
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

CONTEXT, CHUNK = 256, 64
PROMPT = np.random.default_rng(3).integers(3, 500, size=150).astype(np.int32)
COMMON = dict(
    vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=3, max_position_embeddings=CONTEXT
)
ROPE = dict(rope_theta=10000.0)
LLAMA = dict(architectures=["LlamaForCausalLM"], num_attention_heads=8, num_key_value_heads=2, head_dim=32, **ROPE)
# Those our kernels take get the exporter gemm, gemma2 gets plain.
MODELS = {
    "llama": LLAMA,
    "llama-plain": LLAMA,
    "qwen2": dict(
        architectures=["Qwen2ForCausalLM"],
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        **ROPE,
    ),
    "qwen3": dict(
        architectures=["Qwen3ForCausalLM"], num_attention_heads=4, num_key_value_heads=4, head_dim=64, **ROPE
    ),
    # The exporter gemm's kernels and plans have sizes that are filled up.
    "qwen3-odd": dict(
        architectures=["Qwen3ForCausalLM"],
        hidden_size=90,
        intermediate_size=150,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        **ROPE,
    ),
    "gemma2": dict(
        architectures=["Gemma2ForCausalLM"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=48,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=2.0,
        tie_word_embeddings=True,
        **ROPE,
    ),
}
# Logits of fp16 engines may differ from the fp16 model on ONNX Runtime by this share of their spread: GEMMs are
# rounded to 16 bits at the same places, but sums run in another order, perhaps in 16 bits.
TOLERANCE = 0.03


def options(**changes) -> SamplingParams:
    return SamplingParams(**{"seed": 1, **changes})


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """(engine directory, checkpoint directory)."""
    from engine_core.backends.tensorrt.build import build_tensorrt

    directory = tmp_path_factory.mktemp(request.param)
    checkpoint = write_random_checkpoint(directory / "checkpoint", {**COMMON, **MODELS[request.param]}, scale=0.09)
    exporter = "plain" if request.param.endswith("plain") else "auto"
    options = dict(max_context=CONTEXT, max_prefill=CHUNK, level=1, exporter=exporter)
    manifest = build_tensorrt(checkpoint, directory / "engine", **options)
    is_plain = request.param in ("llama-plain", "gemma2")
    assert manifest.options["exporter"] == ("plain" if is_plain else "gemm")
    return directory / "engine", checkpoint


def load(engine_dir, **config):
    from engine_core.backends.tensorrt.backend import TensorRTBackend

    return TensorRTBackend.load(engine_dir, read_manifest(engine_dir), EngineConfig(engine_dir, **config))


def test_logits_are_those_of_the_exported_model(model, tmp_path):
    from engine_core.backends.tensorrt.export import export_onnx
    from engine_core.formats.checkpoint import Checkpoint
    from engine_core.formats.weights import Weights
    from engine_core.models.reader import read_spec
    from trt_runners import PlainRunner

    checkpoint = Checkpoint(model[1])
    spec = read_spec(checkpoint)
    exported = export_onnx(tmp_path, Weights(checkpoint, spec), CONTEXT, exporter="plain", dtype="fp16")
    reference = PlainRunner(exported, spec, CONTEXT, np.float16)
    reference.cache[:] = 0
    backend = load(model[0])
    try:
        begin(backend, options(), PROMPT)
        token = prefill(backend, PROMPT, 0).result()
        fed, worst = PROMPT, 0.0
        for position in range(len(PROMPT), len(PROMPT) + 8):
            found = backend._device.download(backend._work["logits"])
            expected = reference.run(fed, position - len(fed))
            worst = max(worst, np.abs(found - expected).max() / expected.std())
            assert worst < TOLERANCE, position
            fed = np.array([token], dtype=np.int32)
            token = decode(backend).result()
        print(f"logits differ by at most {100 * worst:.2f} % of their spread")
    finally:
        backend.close()


def test_tokens_are_the_same_with_and_without_graphs(model):
    answers = []
    for use_cuda_graph in (True, False):
        backend = load(model[0], use_cuda_graph=use_cuda_graph)
        sampled = options(temperature=1.5, top_p=0.9, top_k=40, repetition_penalty=1.2, seed=5)
        answers.append([generate(backend, PROMPT[:n], 40, how) for n in (1, 64, 150) for how in (options(), sampled)])
        backend.close()
    assert answers[0] == answers[1]


def test_prefixes_bring_the_same_tokens(model):
    backend = load(model[0])
    expected = generate(backend, PROMPT, 10)
    extend(backend, PROMPT[:64], 0)
    place = backend._limits.pool_tokens - 64
    backend.save_kv(0, 0, place, 64)
    generate(backend, PROMPT[::-1].copy(), 10)
    backend.load_kv(0, 0, place, 64)
    assert generate(backend, PROMPT, 10, start=64) == expected
    backend.close()


def test_nothing_is_allocated_after_load(model):
    backend = load(model[0])
    generate(backend, PROMPT, 5)
    allocations, (free, _) = backend._device.allocations, backend._device.memory_info()
    for i in range(300):
        generate(backend, PROMPT[: 1 + i % 150], 4, options(temperature=float(i % 2)))
    assert backend._device.allocations == allocations
    assert backend._device.memory_info()[0] == free
    backend.close()


def test_twenty_loads_give_all_memory_back(model):
    load(model[0]).close()  # the driver and TensorRT keep some of their own the first time
    outer = Device()  # keeps the context, so that its memory is not counted
    before = outer.memory_info()[0]
    for _ in range(20):
        backend = load(model[0])
        generate(backend, PROMPT, 10)
        backend.close()
        print(f"{(before - outer.memory_info()[0]) / 1e6:.1f} MB more than before")
    assert before - outer.memory_info()[0] <= 8 << 20
    outer.close()


def test_the_plan_covers_what_load_takes(model):
    from engine_core.backends.tensorrt.backend import TensorRTBackend

    load(model[0]).close()
    outer = Device()
    plan = TensorRTBackend.plan(model[0], read_manifest(model[0]), EngineConfig(model[0]))
    before = outer.memory_info()[0]
    backend = load(model[0])
    taken = before - outer.memory_info()[0]
    backend.close()
    outer.close()
    assert taken <= plan.total, f"{taken} bytes taken, {plan.table()}"


def test_what_does_not_fit_leaves_nothing_behind(model):
    load(model[0]).close()
    outer = Device()
    before = outer.memory_info()[0]
    with pytest.raises(DeviceMemoryError):
        load(model[0], prompt_cache_entries=1 << 28)
    assert before - outer.memory_info()[0] <= 8 << 20
    outer.close()


def test_plans_of_other_machines_and_damaged_ones_are_refused(model, tmp_path):
    from engine_core.backends.tensorrt.backend import TensorRTBackend

    manifest, config = read_manifest(model[0]), EngineConfig(model[0])
    other = dataclasses.replace(manifest, gpu_arch="sm_53")
    with pytest.raises(EngineDirectoryError, match="built for sm_53"):
        TensorRTBackend.load(model[0], other, config)
    other = dataclasses.replace(manifest, builder={**manifest.builder, "tensorrt": "7.2.3"})
    with pytest.raises(EngineDirectoryError, match="built by TensorRT 7.2.3"):
        TensorRTBackend.load(model[0], other, config)
    shutil.copytree(model[0], tmp_path, dirs_exist_ok=True)
    path = sorted(tmp_path.glob("*.plan"))[0]
    plan = path.read_bytes()
    for damaged in (plan[: len(plan) // 2], b"\0" * 100):
        path.write_bytes(damaged)
        with pytest.raises((EngineDirectoryError, EngineFaultError)):
            TensorRTBackend.load(tmp_path, manifest, EngineConfig(tmp_path))
