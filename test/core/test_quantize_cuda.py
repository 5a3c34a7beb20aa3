"""int4 checkpoints for the CUDA backend: values and scales as they are where the kernels' layout has them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import checkpoints
import quantized_checkpoints
from engine_core import cli
from engine_core.backends.cuda.build import build_cuda
from engine_core.backends.cuda.layout import CudaSpec, packed_shapes, weight_arrays
from engine_core.config import EngineConfig
from engine_core.cuda.driver import aligned
from engine_core.cuda.kernels import int4_layout
from engine_core.cuda.kernels.integer_layout import IntegerLayout
from engine_core.cuda.kernels.linear_packed import layout_of
from engine_core.cuda.kernels.reference import dequantize, packed_weight
from engine_core.errors import BuildError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.manifest import read_manifest
from engine_core.formats.safetensors_file import SafetensorsFile, SafetensorsWriter
from engine_core.formats.weight_formats import weight_format
from engine_core.formats.weight_formats.base import Rounding
from engine_core.models.reader import read_spec
from engine_core.quantize import quantize_checkpoint
from quantized_checkpoints import Scheme

SIZES = dict(vocab_size=320, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def original(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return checkpoints.write(directory, "llama3", dtype=request.param, **SIZES)


def stored(engine_dir, name: str, layout: IntegerLayout = int4_layout.LAYOUT) -> tuple[np.ndarray, ...]:
    """(values, scales as float32) of a fused tensor, and its zero points if there are any."""
    file = SafetensorsFile(engine_dir / "weights.safetensors")
    values, scales, *zeros = layout.unpack(file.raw(name))
    is_bf16 = file.dtype("embed") == "BF16"
    return values, (scales.astype(np.uint32) << 16).view(np.float32) if is_bf16 else scales.view(np.float16), *zeros


CASES = [
    ("int4", {}, IntegerLayout(4)),
    ("int4", {"group_size": 32}, IntegerLayout(4, 32)),
    ("int4", {"group_size": 64}, IntegerLayout(4, 64)),
    ("int4", {"symmetric": False}, IntegerLayout(4, 128, True)),
    ("int4", {"symmetric": False, "group_size": 32}, IntegerLayout(4, 32, True)),
    ("int8", {}, IntegerLayout(8)),  # by the row
    ("int8", {"group_size": 32}, IntegerLayout(8, 32)),
]


@pytest.mark.parametrize("method, options, layout", CASES)
def test_an_engine_has_the_checkpoints_levels_scales_and_zero_points(original, tmp_path, method, options, layout):
    quantize_checkpoint(original, tmp_path / "out", method=method, **options)
    assert cli.main(["build", str(tmp_path / "out"), str(tmp_path / "engine"), "--backend", "cuda"]) == 0
    manifest = read_manifest(tmp_path / "engine")
    assert manifest.quantization == method  # what the checkpoint is, not fp16
    assert manifest.group_size == layout.group_size and manifest.options["zero_points"] == layout.has_zeros
    checkpoint = Checkpoint(tmp_path / "out")
    for i, layer in enumerate(read_spec(checkpoint).layers):
        for name, linear in (("qkv", layer.qkv), ("o", layer.output), ("gate_up", layer.gate_up), ("down", layer.down)):
            parts = [checkpoint.quantized(part).regrouped(layout.group_size) for part in linear.parts]
            names = ("values", "scales", "zeros") if layout.has_zeros else ("values", "scales")
            expected = [np.concatenate([getattr(part, each) for part in parts]) for each in names]
            if name == "gate_up":  # rows of the two in turn
                expected = [np.stack(np.split(each, 2), axis=1).reshape(each.shape) for each in expected]
            assert not manifest.options["requantized"]
            for own, kept in zip(stored(tmp_path / "engine", f"layers.{i}.{name}", layout), expected, strict=True):
                np.testing.assert_array_equal(own, kept)
    spec = CudaSpec.create(manifest, EngineConfig(tmp_path / "engine"))
    arrays = weight_arrays(spec)
    file = SafetensorsFile(tmp_path / "engine" / "weights.safetensors")
    assert {name: file.shape(name) for name in arrays} == {name: array.shape for name, array in arrays.items()}
    assert arrays["layers.0.down"].nbytes == aligned(8 * 2 * layout.TILE_BYTES)  # 128 rows, 256 columns


def test_all_matrices_of_an_engine_have_the_smallest_groups(original, tmp_path):
    """A checkpoint with other groups in its second layer, where the first one has zero points."""
    quantize_checkpoint(original, tmp_path / "coarse", method="int4", symmetric=False)
    quantize_checkpoint(original, tmp_path / "fine", method="int4", group_size=32)
    shutil.copytree(tmp_path / "coarse", tmp_path / "mixed")
    coarse, fine = (SafetensorsFile(tmp_path / name / "model.safetensors") for name in ("coarse", "fine"))
    tensors = {name: coarse.raw(name) for name in coarse.names() if ".layers.1." not in name}
    tensors |= {name: fine.raw(name) for name in fine.names() if ".layers.1." in name}
    types = {name: coarse.dtype(name) for name in tensors if name in coarse.names()}
    types |= {name: fine.dtype(name) for name in fine.names()}
    with SafetensorsWriter(
        tmp_path / "mixed" / "model.safetensors", {name: (types[name], each.shape) for name, each in tensors.items()}
    ) as writer:
        for name, each in tensors.items():
            writer.write(name, each)
    manifest = build_cuda(tmp_path / "mixed", tmp_path / "engine", quantization="int4")
    assert (manifest.group_size, manifest.options["zero_points"], manifest.options["requantized"]) == (32, True, 0)
    checkpoint, layout = Checkpoint(tmp_path / "mixed"), IntegerLayout(4, 32, True)
    for i in range(manifest.model.num_layers):
        values, scales, zeros = stored(tmp_path / "engine", f"layers.{i}.down", layout)
        found = dequantize(values, scales.astype(np.float64), 32, zeros)
        np.testing.assert_array_equal(found, checkpoint.read(f"model.layers.{i}.mlp.down_proj.weight"))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("quantization", ["int4", "int8"])
def test_weights_are_rounded_in_the_groups_that_are_asked_for(original, tmp_path, quantization, group_size):
    arguments = ["--backend", "cuda", "--quantization", quantization, "--group-size", str(group_size)]
    assert cli.main(["build", str(original), str(tmp_path / "engine"), *arguments]) == 0
    manifest = read_manifest(tmp_path / "engine")
    assert manifest.group_size == group_size and not manifest.options["requantized"]
    stored_as = weight_format(quantization).in_groups(group_size)
    whole = Checkpoint(original).read("model.layers.1.mlp.down_proj.weight")
    rounded = stored_as.quantize(whole, Rounding(group_size, manifest.options["dtype"]))
    found = stored(tmp_path / "engine", "layers.1.down", layout_of(stored_as))
    np.testing.assert_array_equal(found[0], rounded.values)
    np.testing.assert_array_equal(found[1], rounded.scales)


def test_groups_that_are_asked_for_are_refused_where_there_are_own_ones_or_none(original, tmp_path):
    quantize_checkpoint(original, tmp_path / "out", method="int4")
    with pytest.raises(BuildError, match="groups of its own"):
        build_cuda(tmp_path / "out", tmp_path / "engine", quantization="int4", group_size=64)
    with pytest.raises(BuildError, match="fp16 weights have no groups"):
        build_cuda(original, tmp_path / "engine", quantization="fp16", group_size=64)
    with pytest.raises(BuildError, match="one of 32, 64 and 128"):
        build_cuda(original, tmp_path / "engine", quantization="int4", group_size=16)


@pytest.mark.parametrize("scheme", [Scheme("gptq"), Scheme("awq", group_size=32, asymmetric=True)])
def test_fp16_scales_are_kept_beside_weights_in_bf16(original, tmp_path, scheme):
    """GPTQ and AutoAWQ store them so, whatever the type of the model."""
    checkpoint = Checkpoint(quantized_checkpoints.quantize(original, tmp_path / "out", scheme))
    manifest = build_cuda(tmp_path / "out", tmp_path / "engine", quantization="int4", dtype="bf16")
    assert manifest.options["half_scales"] and not manifest.options["requantized"]
    spec = CudaSpec.create(manifest, EngineConfig(tmp_path / "engine"))
    for name, part in (("o", "self_attn.o_proj"), ("down", "mlp.down_proj")):
        tiles = SafetensorsFile(tmp_path / "engine" / "weights.safetensors").raw(f"layers.1.{name}")
        shape = packed_shapes(spec)[name]
        found = packed_weight(tiles, spec.weight_format, shape, "bf16")
        np.testing.assert_array_equal(found, checkpoint.read(f"model.layers.1.{part}.weight"))
    assert not build_cuda(tmp_path / "out", tmp_path / "fp16", quantization="int4", dtype="fp16").options["half_scales"]


def test_groups_of_other_sizes_are_rounded_anew_and_told(original, tmp_path, caplog):
    quantized_checkpoints.quantize(original, tmp_path / "out", Scheme("gptq", group_size=16))
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
