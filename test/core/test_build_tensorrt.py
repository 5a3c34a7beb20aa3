"""Building for TensorRT without one: what the builder asks of each version, and what it refuses."""

from __future__ import annotations

import builtins
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import checkpoints
import fake_tensorrt
from device_steps import generate
from engine_core import cli
from engine_core.backends.tensorrt.api import TensorRT, TensorRTError
from engine_core.backends.tensorrt.build import build_tensorrt, workspace_limit
from engine_core.errors import (
    BackendUnavailableError,
    BuildError,
    CheckpointError,
    InsufficientMemoryError,
    UnsupportedModelError,
)
from engine_core.formats.manifest import read_manifest
from engine_core.formats.safetensors_file import write_safetensors
from test_backend_tensorrt import PROMPT, load

GIB = 1 << 30
DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"


@pytest.fixture
def driver(driver):
    driver.memory = 4 * GIB
    return driver


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama3"), "llama3")


def build(checkpoint, out, driver, version="8.6.0", **options):
    """(manifest, the stand-in module)."""
    module = fake_tensorrt.make(version, driver)
    options = {"max_context": 128, "exporter": "plain", **options}
    return build_tensorrt(checkpoint, out, api=TensorRT(module), **options), module


def test_the_manifest_says_where_the_plan_runs(checkpoint, driver, tmp_path):
    manifest, _ = build(checkpoint, tmp_path / "engine", driver)
    assert manifest == read_manifest(tmp_path / "engine")
    assert (manifest.backend, manifest.quantization, manifest.kv_cache_type) == ("tensorrt", "fp16", "fp16")
    assert (manifest.gpu_arch, manifest.builder["tensorrt"]) == ("sm_90", "8.6.0")
    assert manifest.options["scratch_bytes"] == fake_tensorrt.SCRATCH
    assert manifest.options["max_prefill"] == 128  # no more than the context
    assert sorted(manifest.files) == ["generation_config.json", "model.plan"]
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".timing_cache"] == ["engine"]  # no ONNX left


def test_two_profiles_prefill_and_decode(checkpoint, driver, tmp_path):
    _, module = build(checkpoint, tmp_path / "engine", driver, max_prefill=32)
    prefill, decode = (profile.shapes for profile in module.configs[0].profiles)
    assert prefill["token_ids"] == prefill["positions"] == ((1,), (32,), (32,))
    assert decode["token_ids"] == ((1,), (1,), (1,))
    assert prefill["past_index"] == ((64,), (64,), (128,))
    assert decode["past_key.2"] == ((2, 64, 32), (2, 128, 32), (2, 128, 32))
    assert set(prefill) == set(decode) and len(prefill) == 3 + 2 * 3
    assert "last_token" not in prefill  # its shape is fixed


def test_8_6_is_told_which_layers_are_float32(checkpoint, driver, tmp_path):
    _, module = build(checkpoint, tmp_path / "engine", driver)
    config, network = module.configs[0], module.networks[0]
    assert {flag.name for flag in config.flags} == {"FP16", "OBEY_PRECISION_CONSTRAINTS"}
    assert config.previews == {module.PreviewFeature.FASTER_DYNAMIC_SHAPES_0805: False}
    pinned = {layer.name for layer in network.layers if layer.precision == module.float32}
    for name in (
        "layer0/input_norm/fp32/square",
        "layer2/fp32/scores",
        "layer1/fp32/rope_left",
        "final_norm/fp32/sum",
    ):
        assert name in pinned
    kinds = {layer.type.name for layer in network.layers if layer.precision}
    assert kinds.isdisjoint({"MATRIX_MULTIPLY", "CAST", "GATHER", "SHUFFLE"})
    assert kinds >= {"ELEMENTWISE", "REDUCE", "SLICE"}
    assert all(set(layer.output_types.values()) == {module.float32} for layer in network.layers if layer.precision)


def test_fp32_stays_fp32_where_tensorrt_chooses(checkpoint, driver, tmp_path):
    _, module = build(checkpoint, tmp_path / "engine", driver, quantization="fp32")
    assert not module.configs[0].flags


@pytest.mark.parametrize("version", ["10.3.0", "11.0.0"])
def test_strongly_typed_networks_are_told_nothing(checkpoint, driver, tmp_path, version):
    _, module = build(checkpoint, tmp_path / "engine", driver, version)
    assert not module.configs[0].flags
    assert not any(layer.precision for layer in module.networks[0].layers)


def test_the_cache_is_read_as_it_lies(checkpoint, driver, tmp_path):
    _, module = build(checkpoint, tmp_path / "engine", driver)
    layers = {layer.name: layer for layer in module.networks[0].layers}
    for i in range(3):
        product = layers[f"layer{i}/past_scores"]
        assert product.inputs[1].name == f"past_key.{i}" and product.op1 is module.MatrixOperation.TRANSPOSE
        assert getattr(layers[f"layer{i}/new_scores"], "op1", None) is None


def test_the_timing_cache_is_kept_beside_the_engine(checkpoint, driver, tmp_path):
    _, first = build(checkpoint, tmp_path / "engine", driver)
    _, second = build(checkpoint, tmp_path / "engine", driver)
    assert (first.configs[0].caches, second.configs[0].caches) == ([b""], [b"timed "])
    (path,) = tmp_path.glob(".*.timing_cache")
    assert path.name == ".tensorrt_8.6.0_sm_90.timing_cache"
    path.write_bytes(b"of another GPU")
    _, third = build(checkpoint, tmp_path / "engine", driver)
    assert third.configs[0].caches == [b"of another GPU", b""]


def test_progress_is_reported_where_tensorrt_tells(checkpoint, driver, tmp_path):
    lines = []
    _, module = build(checkpoint, tmp_path / "engine", driver, "10.3.0", report=lines.append)
    monitor = module.configs[0].progress_monitor
    lines.clear()
    monitor.phase_start("Building Engine", None, 40)
    monitor.phase_start("Tactics", "Building Engine", 1000)
    assert all(monitor.step_complete("Building Engine", step) for step in range(40))
    monitor.step_complete("Tactics", 500)
    monitor.phase_finish("Building Engine")
    assert lines[:2] == ["TensorRT: Building Engine", "TensorRT: Building Engine: 10 %"]
    assert len(lines) == 11 and lines[-1] == "TensorRT: Building Engine: 100 %"


def test_a_smaller_head_gives_ids_of_the_full_vocabulary(checkpoint, driver, tmp_path):
    kept = np.arange(2, 331, 7).astype(np.int32)
    write_safetensors(tmp_path / "map.safetensors", {"vocab_map": kept})
    build(checkpoint, tmp_path / "engine", driver, quantization="fp32", vocab_map=tmp_path / "map.safetensors")
    backend = load(tmp_path / "engine", driver)
    assert (backend.vocab_size, backend.reduced_vocab_size) == (331, len(kept))
    model = checkpoints.reference(checkpoint)
    for token in generate(backend, PROMPT, 5)[:1]:
        assert token == kept[checkpoints.reference_logits(model, PROMPT)[-1][kept].argmax()]
    assert set(generate(backend, PROMPT, 8)) <= set(kept.tolist())
    backend.close()
    write_safetensors(tmp_path / "map.safetensors", {"vocab_map": kept[1:]})
    with pytest.raises(CheckpointError, match="end-of-sequence token 2"):
        build(checkpoint, tmp_path / "engine", driver, vocab_map=tmp_path / "map.safetensors")


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < 24, reason="this onnx has no opset 24")
def test_the_native_exporter_writes_its_cache_itself(checkpoint, driver, tmp_path):
    options = dict(quantization="fp32", exporter="native", max_prefill=16)
    build(checkpoint, tmp_path / "engine", driver, "10.16.1", **options)
    backend = load(tmp_path / "engine", driver, "10.16.1")
    expected = checkpoints.reference_greedy(checkpoints.reference(checkpoint), PROMPT[:20], 5)
    assert generate(backend, PROMPT[:20], 5) == expected
    backend.close()
    with pytest.raises(BuildError, match="10.15 has them"):
        build(checkpoint, tmp_path / "other", driver, "10.13.0", **options)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(quantization="int4"), "no 'int4' weights; it has fp32 and fp16"),
        (dict(quantization="nvfp4"), "no 'nvfp4' weights"),
        (dict(max_context=100), "multiples of 64"),
        (dict(max_context=320), "made for 1 to 256 tokens"),
    ],
)
def test_what_no_engine_can_be_is_refused(checkpoint, driver, tmp_path, options, reason):
    with pytest.raises(BuildError, match=reason):
        build(checkpoint, tmp_path / "engine", driver, **options)
    assert not (tmp_path / "engine").exists()


def test_a_head_the_append_kernel_cannot_move_is_refused(driver, tmp_path):
    odd = checkpoints.write(tmp_path / "odd", "llama3", head_dim=20)
    with pytest.raises(UnsupportedModelError, match="not a multiple of 8"):
        build(odd, tmp_path / "engine", driver)


def test_what_tensorrt_refuses_carries_its_words(checkpoint, driver, tmp_path, monkeypatch):
    monkeypatch.setattr(
        fake_tensorrt.FakeParser, "parse_from_file", lambda self, path: bool(setattr(self, "num_errors", 1))
    )
    with pytest.raises(TensorRTError, match="cannot parse model.onnx: In node 3 with name: layer0/qkv"):
        build(checkpoint, tmp_path / "engine", driver)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_refused_with_the_numbers(checkpoint, driver, tmp_path):
    assert workspace_limit(80 * GIB, 2 * GIB, GIB) == GIB
    assert workspace_limit(6 * GIB, 2 * GIB, GIB) == GIB // 2
    with pytest.raises(InsufficientMemoryError, match="4.00 GiB are free"):
        workspace_limit(4 * GIB, 2 * GIB, GIB)
    driver.memory = GIB // 4
    with pytest.raises(InsufficientMemoryError, match="lower max_context"):
        build(checkpoint, tmp_path / "engine", driver)


def test_running_out_of_memory_while_building_is_named(checkpoint, driver, tmp_path, monkeypatch):
    monkeypatch.setattr("engine_core.backends.tensorrt.build._WORKSPACE", 1)
    with pytest.raises(InsufficientMemoryError, match="build_serialized_network ran out of GPU memory"):
        build(checkpoint, tmp_path / "engine", driver)
    assert not (tmp_path / "engine").exists()


def test_without_tensorrt_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def no_tensorrt(name, *args, **kwargs):
        if name == "tensorrt":
            raise ImportError("No module named 'tensorrt'", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_tensorrt)
    with pytest.raises(BackendUnavailableError, match="pip install tensorrt"):
        TensorRT()


def test_the_command_hands_its_options_over(monkeypatch):
    calls = []

    def build(*args, **kwargs):
        calls.append((args, kwargs))
        fields = dict(model_name="demo", backend="tensorrt", quantization="fp16", max_context=512, files={})
        return SimpleNamespace(**fields)  # what the command tells of it

    monkeypatch.setattr("engine_core.backends.tensorrt.build.build_tensorrt", build)
    command = ["build", str(DEMO), "ENGINE", "--backend", "tensorrt"]

    def run(*more):
        options = cli.make_parser().parse_args([*command, *more])
        return options.run(options)

    assert run("--max-context", "512", "--max-prefill", "64") == 0
    ((args, kwargs),) = calls
    assert args == (DEMO, Path("ENGINE"))
    assert (kwargs["quantization"], kwargs["max_context"], kwargs["max_prefill"]) == ("fp16", 512, 64)
    run("--quantization", "fp16,fp32")
    assert [call[0][1] for call in calls[1:]] == [Path("ENGINE/fp16"), Path("ENGINE/fp32")]
    with pytest.raises(BuildError, match="group-size"):
        run("--group-size", "32")
    command[-1] = "cuda"
    with pytest.raises(BuildError, match="tensorrt only"):
        run("--max-prefill", "64")
