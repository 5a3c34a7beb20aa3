"""int4 checkpoints for the CUDA backend: values and scales as they are where the kernels' layout has them."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import checkpoints
from engine_core import cli
from engine_core.backends.cuda.build import build_cuda
from engine_core.cuda.kernels import int4_layout
from engine_core.cuda.kernels.reference import dequantize
from engine_core.errors import BuildError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.manifest import read_manifest
from engine_core.formats.safetensors_file import SafetensorsFile
from engine_core.formats.weight_formats import weight_format
from engine_core.models.reader import read_spec
from engine_core.quantize import quantize_checkpoint

SIZES = dict(vocab_size=320, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def original(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return checkpoints.write(directory, "llama3", dtype=request.param, **SIZES)


def stored(engine_dir, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(values, scales as float32) of a fused tensor."""
    file = SafetensorsFile(engine_dir / "weights.safetensors")
    values, scales = int4_layout.unpack(file.raw(name))
    is_bf16 = file.dtype("embed") == "BF16"
    return values, (scales.astype(np.uint32) << 16).view(np.float32) if is_bf16 else scales.view(np.float16)


def test_symmetric_groups_of_128_keep_levels_and_scales(original, tmp_path):
    quantize_checkpoint(original, tmp_path / "out", method="int4")
    assert cli.main(["build", str(tmp_path / "out"), str(tmp_path / "engine"), "--backend", "cuda"]) == 0
    assert read_manifest(tmp_path / "engine").quantization == "int4"  # what the checkpoint is, not fp16
    checkpoint = Checkpoint(tmp_path / "out")
    for i, layer in enumerate(read_spec(checkpoint).layers):
        for name, linear in (("qkv", layer.qkv), ("o", layer.output), ("gate_up", layer.gate_up), ("down", layer.down)):
            parts = [checkpoint.quantized(part) for part in linear.parts]
            values = np.concatenate([part.values for part in parts])
            scales = np.concatenate([part.scales for part in parts])
            if name == "gate_up":  # rows of the two in turn
                values = np.stack(np.split(values, 2), axis=1).reshape(values.shape)
                scales = np.stack(np.split(scales, 2), axis=1).reshape(scales.shape)
            assert not read_manifest(tmp_path / "engine").options["requantized"]
            found = stored(tmp_path / "engine", f"layers.{i}.{name}")
            np.testing.assert_array_equal(found[0], values)
            np.testing.assert_array_equal(found[1], scales)


@pytest.mark.parametrize("options", [{"group_size": 32}, {"symmetric": False}])
def test_other_groups_and_zero_points_are_dequantized_first_and_told(original, tmp_path, options, caplog):
    quantize_checkpoint(original, tmp_path / "out", method="int4", **options)
    build_cuda(tmp_path / "out", tmp_path / "engine", quantization="int4_awq")
    manifest = read_manifest(tmp_path / "engine")
    assert manifest.quantization == "int4_awq"
    assert manifest.options["requantized"] == 4 * manifest.model.num_layers
    assert "rounded anew" in caplog.text and "onnxruntime" in caplog.text
    assert any("rounded anew" in note for note in manifest.notes)
    expected = Checkpoint(tmp_path / "out").read("model.layers.1.mlp.down_proj.weight")
    values, scales = stored(tmp_path / "engine", "layers.1.down")
    restored = dequantize(values, scales.astype(np.float64), int4_layout.GROUP, weight_format("int4").zero)
    error = np.linalg.norm(restored - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.12
    assert manifest.options["rounding_errors"]["layers.1.down"] == pytest.approx(error, rel=1e-3)


def test_int4_awq_needs_a_checkpoint_in_int4(original, tmp_path):
    with pytest.raises(BuildError, match="int4_awq takes the quantized values"):
        build_cuda(original, tmp_path / "engine", quantization="int4_awq")
