"""fp8 and nvfp4 on the CUDA backend: the kernels multiply by what other tools stored. On a driver in host memory."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import float_checkpoints
from engine_core import cli
from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.build import build_cuda
from engine_core.backends.cuda.capabilities import CAPABILITIES
from engine_core.backends.cuda.layout import CudaSpec, packed_shapes
from engine_core.config import EngineConfig
from engine_core.cuda.kernels import reference
from engine_core.errors import BuildError, EngineDirectoryError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.manifest import read_manifest
from engine_core.formats.safetensors_file import SafetensorsFile, SafetensorsWriter, write_safetensors
from engine_core.models.reader import read_spec

PROMPT = np.random.default_rng(3).integers(3, 320, size=40).astype(np.int32)
FOLLOWING = np.array([5, 77, 200], dtype=np.int32)


def stored(engine_dir, name: str) -> np.ndarray:
    """float64 of a packed matrix of an engine."""
    manifest = read_manifest(engine_dir)
    spec = CudaSpec.create(manifest, EngineConfig(engine_dir))
    tiles = SafetensorsFile(engine_dir / "weights.safetensors").raw(name)
    return reference.packed_weight(tiles, spec.weight_format.kind, packed_shapes(spec)[name.split(".")[-1]], spec.dtype)


def check_weights(checkpoint_dir, engine_dir) -> None:
    """Every linear of the engine is the checkpoint's."""
    checkpoint = Checkpoint(checkpoint_dir)
    for i, layer in enumerate(read_spec(checkpoint).layers):
        linears = {"qkv": layer.qkv, "o": layer.output, "gate_up": layer.gate_up, "down": layer.down}
        for name, linear in linears.items():
            expected = np.concatenate([checkpoint.read(part) for part in linear.parts])
            if name == "gate_up":  # rows of the two in turn
                expected = np.stack(np.split(expected, 2), axis=1).reshape(expected.shape)
            found = stored(engine_dir, f"layers.{i}.{name}")
            np.testing.assert_allclose(found, expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", float_checkpoints.KINDS)
def test_the_values_and_scales_of_other_tools_are_kept(tmp_path, kind, dtype):
    directory = float_checkpoints.write(tmp_path / "checkpoint", kind)
    quantization = float_checkpoints.KINDS[kind][2]
    build_cuda(directory, tmp_path / "engine", quantization=quantization, dtype=dtype)
    manifest = read_manifest(tmp_path / "engine")
    groups = {"deepseek": 128, "compressed-tensors-blocks": 128}.get(kind, 16 if quantization == "nvfp4" else 0)
    assert (manifest.quantization, manifest.group_size) == (quantization, groups)
    assert manifest.options["requantized"] == 0
    check_weights(directory, tmp_path / "engine")


def test_modelopts_own_file_of_its_quantization_is_read(tmp_path):
    directory = float_checkpoints.write(tmp_path / "checkpoint", "modelopt", side_file=True)
    assert cli.main(["build", str(directory), str(tmp_path / "engine"), "--backend", "cuda"]) == 0
    assert read_manifest(tmp_path / "engine").quantization == "fp8"
    check_weights(directory, tmp_path / "engine")


def write_what_the_engine_has(directory, checkpoint_dir, engine_dir) -> None:
    """A plain checkpoint of the values that ``engine_dir`` multiplies by."""
    checkpoint = Checkpoint(checkpoint_dir)
    spec = read_spec(checkpoint)
    tensors = {name: checkpoint.read(name) for name in spec.shapes()}
    tensors["lm_head.weight"] = stored(engine_dir, "head").astype(np.float32)
    directory.mkdir()
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(float_checkpoints.CONFIG | {"dtype": "float32"}))


@pytest.mark.parametrize("kind", ["modelopt", "deepseek", "compressed-tensors-nvfp4"])
@pytest.mark.parametrize("max_batch", [1, 3])
def test_logits_are_those_of_transformers(tmp_path, driver, kind, max_batch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import checkpoints
    from device_steps import GREEDY, compare_logits, generate

    directory, engine = float_checkpoints.write(tmp_path / "checkpoint", kind), tmp_path / "engine"
    build_cuda(directory, engine, quantization=float_checkpoints.KINDS[kind][2], max_context=128)
    write_what_the_engine_has(tmp_path / "plain", directory, engine)
    model = checkpoints.reference(tmp_path / "plain")
    config = EngineConfig(engine, tune_kernels=False, max_batch=max_batch, prefill_chunk=64)
    backend = CudaBackend.load(engine, read_manifest(engine), config)
    if max_batch == 1:
        compare_logits(backend, model, np.tile(PROMPT, 3)[:100], FOLLOWING)
        return
    tokens = generate(backend, PROMPT, 6, GREEDY)
    backend.close()
    fed = np.concatenate([PROMPT, np.array(tokens[:-1], dtype=np.int32)])
    rows = checkpoints.reference_logits(model, fed)[len(PROMPT) - 1 :]
    chosen = rows[np.arange(len(tokens)), tokens]
    assert (chosen > rows.max(axis=1) - 0.02 * rows.std()).all()  # the best, or as good in 16 bits


@pytest.mark.parametrize("quantization, allowed", [("fp8", 0.03), ("nvfp4", 0.11)])
def test_plain_checkpoints_are_rounded_with_every_head_and_any_columns(tmp_path, quantization, allowed):
    """Sizes that no group, no block and no tile divides."""
    sizes = dict(hidden_size=72, intermediate_size=200, head_dim=20, vocab_size=331)
    directory = float_checkpoints.write(tmp_path / "checkpoint", "modelopt", **sizes)
    plain = tmp_path / "plain"
    plain.mkdir()
    checkpoint = Checkpoint(directory)
    tensors = {name: checkpoint.read(name) for name in read_spec(checkpoint).shapes()}
    write_safetensors(plain / "model.safetensors", tensors)
    (plain / "config.json").write_text(json.dumps(float_checkpoints.CONFIG | sizes))
    build_cuda(plain, tmp_path / "engine", quantization=quantization)
    found, expected = stored(tmp_path / "engine", "head"), tensors["lm_head.weight"]
    assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < allowed
    found, expected = stored(tmp_path / "engine", "layers.1.down"), tensors["model.layers.1.mlp.down_proj.weight"]
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < allowed


def test_what_the_kernels_have_no_scales_for_is_rounded_anew_and_told(tmp_path, caplog):
    """Heads that are filled up move the columns of the output matrix from block to block; other blocks than of 128."""
    directory = float_checkpoints.write(tmp_path / "heads", "modelopt-nvfp4", head_dim=20, num_attention_heads=4)
    build_cuda(directory, tmp_path / "filled", quantization="nvfp4")
    assert read_manifest(tmp_path / "filled").options["requantized"] == 2  # the output matrix of each layer
    assert "rounded anew" in caplog.text
    directory = float_checkpoints.write(tmp_path / "blocks", "deepseek")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    file = SafetensorsFile(directory / "model.safetensors")
    tensors = {name: (file.dtype(name), file.raw(name).copy()) for name in file.names()}
    for name, (dtype, values) in tensors.items():
        if name.endswith("weight_scale_inv"):
            shape = file.shape(name.removesuffix("_scale_inv"))
            down, right = (-(-size // 64) for size in shape)
            tensors[name] = (dtype, np.repeat(np.repeat(values, 2, axis=0), 2, axis=1)[:down, :right].copy())
    (directory / "config.json").write_text(json.dumps(config))
    with SafetensorsWriter(directory / "model.safetensors", {n: (t, v.shape) for n, (t, v) in tensors.items()}) as new:
        for name, (_, values) in tensors.items():
            new.write(name, values)
    manifest = build_cuda(directory, tmp_path / "rounded", quantization="fp8")
    assert manifest.options["requantized"] == 8 and manifest.group_size == 0
    found = manifest.options["rounding_errors"]
    assert set(found) == {f"layers.{i}.{name}" for i in range(2) for name in ("qkv", "o", "gate_up", "down")}
    expected = Checkpoint(directory).read("model.layers.1.mlp.down_proj.weight")
    error = np.linalg.norm(stored(tmp_path / "rounded", "layers.1.down") - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.04 and found["layers.1.down"] == pytest.approx(error, rel=1e-3)


def test_values_that_are_no_numbers_are_refused(tmp_path):
    directory = float_checkpoints.write(tmp_path / "checkpoint", "modelopt")
    file = SafetensorsFile(directory / "model.safetensors")
    tensors = {name: (file.dtype(name), file.raw(name).copy()) for name in file.names()}
    tensors["model.layers.1.mlp.up_proj.weight"][1][3, 5] = 0xFF
    with SafetensorsWriter(directory / "model.safetensors", {n: (t, v.shape) for n, (t, v) in tensors.items()}) as new:
        for name, (_, values) in tensors.items():
            new.write(name, values)
    with pytest.raises(BuildError, match=r"layers.1.mlp.up_proj.weight .* no numbers"):
        build_cuda(directory, tmp_path / "engine", quantization="fp8")
    assert not (tmp_path / "engine").exists()


def test_capabilities_and_plans_know_them(tmp_path):
    assert {"fp8", "nvfp4"} <= set(CAPABILITIES.weight_formats)
    for quantization in ("fp8", "nvfp4"):
        assert CAPABILITIES.refusal(None, quantization, capability=80) is None  # converted in registers
    directory = float_checkpoints.write(tmp_path / "checkpoint", "deepseek")
    manifest = build_cuda(directory, tmp_path / "engine", quantization="fp8")
    manifest = dataclasses.replace(manifest, group_size=64)
    with pytest.raises(EngineDirectoryError, match="groups of 64"):
        CudaSpec.create(manifest, EngineConfig(tmp_path / "engine"))
