"""The builder: quantized weights against their plain dequantization, shards, refusals, and a disk that fills up."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnx")

import checkpoints
from engine_core import cli
from engine_core.backends.onnxruntime import build
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.backends.onnxruntime.exporter import Precision
from engine_core.backends.onnxruntime.session import OrtSession
from engine_core.errors import BuildError, CheckpointError, UnsupportedModelError
from engine_core.formats.safetensors_file import SafetensorsFile
from engine_core.formats.weight_formats import weight_format
from engine_core.formats.weight_formats.base import Rounding

PROMPT = np.random.default_rng(3).integers(3, 331, size=20)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("llama3"), "llama3")


def logits_of(engine_dir, manifest):
    session = OrtSession(engine_dir, manifest.model, manifest.model.vocab_size, 64, 64, 1)
    session.prefill(PROMPT, 0)
    return session.logits[0].copy()


@pytest.mark.parametrize("bits, relative", [(4, 1 / 8), (8, 1 / 127)])
@pytest.mark.parametrize("columns, group_size", [(96, 32), (100, 32), (33, 16)])
def test_quantized_rows_are_within_half_a_level(bits, relative, columns, group_size):
    weights = np.random.default_rng(0).normal(size=(13, columns)).astype(np.float32)
    weights[3] = 0
    restored = weight_format(f"int{bits}").quantize(weights, Rounding(group_size)).dequantize()
    assert restored.shape == weights.shape and not restored[3].any()
    # One whole level at the far end: int4 has no +8 for a value as large as the one that became -8.
    assert np.abs(restored - weights).max() <= np.abs(weights).max() * relative * 1.001


@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["llama3", "qwen2", "phi3", "gemma3"])
@pytest.mark.parametrize("quantization, head_bits, group_size", [("int8", 0, 0), ("int4", 0, 0), ("int4", 4, 16)])
def test_quantized_logits_are_those_of_the_dequantized_weights(
    tmp_path, monkeypatch, name, quantization, head_bits, group_size, activations
):
    """With float activations the two agree; the kernel's int8 activations add a rounding of a few per cent."""
    import torch

    if activations == "fp32":
        monkeypatch.setattr(build, "Precision", functools.partial(Precision, accuracy_level=1))

    directory = checkpoints.write(tmp_path / "checkpoint", name)
    manifest = build_engine(
        directory, tmp_path / "engine", quantization=quantization, head_bits=head_bits, group_size=group_size
    )
    model = checkpoints.reference(directory)
    bits = 8 if quantization == "int8" else 4
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                is_head = "embed_tokens" in parameter_name or "lm_head" in parameter_name
                rounded_to = weight_format(f"int{(head_bits or 8) if is_head else bits}")
                rounded = rounded_to.quantize(parameter.numpy(), Rounding(group_size or 32))
                parameter.copy_(torch.from_numpy(rounded.dequantize()))
    expected = checkpoints.reference_logits(model, PROMPT)[-1]
    error = np.abs(logits_of(tmp_path / "engine", manifest) - expected).mean() / expected.std()
    assert error < (1e-4 if activations == "fp32" else 0.04)


def test_shards_and_bf16_make_the_same_engine(tmp_path):
    whole = checkpoints.write(tmp_path / "whole", "qwen3", dtype="bfloat16")
    shards = checkpoints.write(tmp_path / "shards", "qwen3", dtype="bfloat16", shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    first = build_engine(whole, tmp_path / "a").files["model.onnx.data"]
    assert build_engine(shards, tmp_path / "b").files["model.onnx.data"] == first


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedModelError, "GPT2LMHeadModel is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0}}, UnsupportedModelError, "'dynamic'"),
        ({"hidden_act": "relu"}, UnsupportedModelError, "'relu'"),
        ({"quantization_config": {"bits": 4}}, UnsupportedModelError, "quantization_config"),
        ({"head_dim": 48}, CheckpointError, "has the shape"),
        ({"num_hidden_layers": 4}, CheckpointError, "no tensor 'model.layers.3"),
        ({"vocab_size": None}, CheckpointError, "vocab_size"),
    ],
)
def test_a_checkpoint_that_cannot_be_built_is_refused(checkpoint, tmp_path, change, error, message):
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    with pytest.raises(error, match=message):
        build_engine(tmp_path, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_damaged_weights_are_refused(checkpoint, tmp_path, damage):
    data = (checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-9] if damage == "cut" else b"\xff" * 16 + data[16:])
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        build_engine(tmp_path, tmp_path / "engine")


@pytest.mark.parametrize(
    "options", [{"quantization": "fp16"}, {"max_context": 257}, {"max_context": 1}, {"group_size": 32}]
)
def test_options_that_make_no_engine_are_refused(checkpoint, tmp_path, options):
    with pytest.raises(BuildError):
        build_engine(checkpoint, tmp_path / "engine", **options)


def test_a_missing_tokenizer_is_told(checkpoint, tmp_path, caplog):
    (tmp_path / "llama3").symlink_to(checkpoint)
    build_engine(tmp_path / "llama3", tmp_path / "engine", quantization="int4")
    assert "no tokenizer.json" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_named_pipe_in_the_place_of_a_file_is_refused_at_once(checkpoint, tmp_path, name):
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    os.mkfifo(tmp_path / "copy" / name)
    with pytest.raises(CheckpointError):
        build_engine(tmp_path / "copy", tmp_path / "engine")
    with pytest.raises(CheckpointError, match="no file"):
        SafetensorsFile(tmp_path / "copy" / name)


def test_a_full_disk_leaves_nothing_and_the_old_engine_as_it_was(checkpoint, tmp_path):
    old = build_engine(checkpoint, tmp_path / "engine", quantization="int8")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails with EFBIG instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(BuildError, match="nothing was left behind"):
            build_engine(checkpoint, tmp_path / "engine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    assert json.loads((tmp_path / "engine" / "engine.json").read_text())["quantization"] == old.quantization


def test_the_command_line_builds_inspects_and_plans(checkpoint, tmp_path, capsys):
    engine = str(tmp_path / "engine")
    assert cli.main(["build", str(checkpoint), engine, "--quantization", "fp32,int4"]) == 0
    assert cli.main(["inspect", engine, "--quantization", "fp32"]) == 0
    assert cli.main(["plan", engine, "--max-context", "64"]) == 0
    assert "kv_cache" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 1
    assert "does not exist" in capsys.readouterr().err
