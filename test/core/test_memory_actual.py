"""The plan against what a fresh process really takes when it loads: within 1 %.

Two loads of one engine differ by up to 2 MiB, in code pages and what malloc keeps: 3 MiB are let pass, which is more
than 1 % only in models as small as this one. EDGELLM_LARGE=1 takes 650 M parameters and lets nothing but the 1 % pass;
that needs 10 GB of memory and 20 minutes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from engine_core.backends.onnxruntime.build import build_engine
from engine_core.formats.manifest import read_manifest
from engine_core.formats.safetensors_file import write_safetensors
from engine_core.formats.vocab_map import write_vocab_map

LARGE = os.environ.get("EDGELLM_LARGE") == "1"
NOISE = 0 if LARGE else 3 << 20  # bytes
ROOT = Path(__file__).resolve().parents[2]
KV_HEADS, HEAD_DIM = (8, 64) if LARGE else (4, 64)
HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCAB = (1536, 4096, 20, 24, 48000) if LARGE else (1024, 2816, 6, 16, 16000)
PROGRAM = """
import dataclasses, json, sys
from pathlib import Path
from engine_core.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine_core.config import EngineConfig
from engine_core.formats.manifest import read_manifest
from engine_core.measure.steps import extend


def resident():
    fields = [line.split() for line in open("/proc/self/smaps_rollup")]
    return sum(int(field[1]) * 1024 for field in fields if field[0] == "Rss:")


directory = Path(sys.argv[1])
manifest = read_manifest(directory, verify_hashes=False)
config = EngineConfig(directory, max_context=int(sys.argv[2]), num_threads=2, kv_cache_type=sys.argv[3])
config = dataclasses.replace(config, vocab_map=sys.argv[4], session_memory=int(sys.argv[5]), lora_adapters=sys.argv[6:])
plan = OnnxRuntimeBackend.plan(directory, manifest, config)
before = resident()
backend = OnnxRuntimeBackend.load(directory, manifest, config)
grown = resident() - before
import numpy as np
for adapter in ("", *(entry.partition(":")[0] for entry in config.lora_adapters)):
    for length in (1, 17, 64, 65, 127):  # what comes after takes nothing more
        extend(backend, np.arange(length), 0, adapter)
    extend(backend, np.arange(300), config.max_context - 300, adapter)
later = resident() - before
session = backend._session
actual = {"kv_cache": session.kv_cache.nbytes, "prefix_cache": backend._pool.nbytes}
print(json.dumps([{item.name: item.bytes for item in plan.items}, actual, grown, later]))
backend.close()
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama of random parameters."""
    directory = tmp_path_factory.mktemp("large")
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", eos_token_id=2)
    config |= dict(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, vocab_size=VOCAB)
    config |= dict(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, rms_norm_eps=1e-5)
    config |= dict(max_position_embeddings=2048, rope_theta=10000.0, tie_word_embeddings=False)
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{layer}.self_attn.{name}_proj"] = (rows * HEAD_DIM, HIDDEN)
        shapes[f"{layer}.self_attn.o_proj"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[f"{layer}.mlp.gate_proj"] = shapes[f"{layer}.mlp.up_proj"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{layer}.mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
        shapes[f"{layer}.input_layernorm"] = shapes[f"{layer}.post_attention_layernorm"] = (HIDDEN,)
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.random(shape, dtype=np.float32) * 0.1 - 0.05 for name, shape in shapes.items()}
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def engine(request, checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param) / "engine"
    build_engine(checkpoint, directory, quantization=request.param)
    return directory


def measure(engine: Path, *arguments: object) -> tuple[dict, dict, int, int]:
    """Return the planned bytes and the actual bytes by name, and the growth after loading and after work."""
    command = [sys.executable, "-c", PROGRAM, str(engine), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    plan, actual, grown, later = json.loads(result.stdout.splitlines()[-1])
    assert plan["kv_cache"] == actual["kv_cache"] and plan["prefix_cache"] == actual["prefix_cache"]
    return plan, actual, grown, later


@pytest.mark.parametrize("max_context, kind, session_memory", [(512, "fp32", 100), (2048, "fp16", 0)])
def test_planned_and_actual_bytes_agree_within_one_percent(engine, max_context, kind, session_memory):
    check(engine, max_context, kind, "auto", session_memory)


def test_they_agree_where_the_head_is_cut_at_load(engine, tmp_path):
    kept = np.arange(0, VOCAB, 4, dtype=np.int32)  # the first is no end of sequence
    kept[0] = 2
    write_vocab_map(tmp_path / "map", kept, {})
    check(engine, 512, "fp32", tmp_path / "map", 0, tolerance=0.02)


@pytest.mark.parametrize("engine", ["int4"], indirect=True)
def test_they_agree_with_adapters(engine, tmp_path):
    spec, tensors = read_manifest(engine, verify_hashes=False).model, {}
    for name, shape in spec.shapes().items():
        if len(shape) == 2 and "layers" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = np.zeros((16, shape[1]), np.float32)
            tensors[f"{stem}.lora_B.weight"] = np.zeros((shape[0], 16), np.float32)
    write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": "all-linear"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    plan = check(engine, 512, "fp32", "auto", 0, f"one:{tmp_path}", f"two:{tmp_path}")
    assert plan["adapters"] > 2 * sum(tensor.nbytes for tensor in tensors.values())


def check(engine: Path, *arguments: object, tolerance: float = 0.01) -> dict:
    """Compare the plan, which is returned, with one load or, where that differs by more, with the median of three.

    Now and then a load has 2 MiB more or less of the libraries' code in memory.
    """
    runs = [measure(engine, *arguments)]
    plan = runs[0][0]
    total = sum(plan.values())

    def largest_error() -> float:
        return max(abs(statistics.median(run[i] for run in runs) - total) for i in (2, 3))

    if largest_error() > (allowed := max(tolerance * total, NOISE)):
        runs += [measure(engine, *arguments) for _ in range(2)]
    found = [tuple(f"{run[i] / 2**20:.1f}" for i in (2, 3)) for run in runs]
    message = f"{found} MiB after loading and after work, {total / 2**20:.1f} MiB planned: {plan}"
    assert largest_error() < allowed, message
    return plan
