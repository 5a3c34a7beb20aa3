"""Quantized checkpoints of other tools: read as what they stand for, and built with their own values."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine_core.errors import CheckpointError, UnsupportedModelError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.number_formats import E2M1, E4M3, to_16_bit
from engine_core.formats.safetensors_file import SafetensorsWriter

ROWS, COLUMNS, GROUP = 24, 64, 32
NAME = "model.layers.0.self_attn.q_proj"
TYPES = {"float16": "F16", "float32": "F32", "int32": "I32", "int64": "I64", "int8": "I8", "uint8": "U8"}


def write(directory, quantization: dict, tensors: dict, types: dict | None = None) -> Checkpoint:
    """``types``: of tensors whose numpy type does not tell it (fp8)."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    tensors = {f"{NAME}.{name}": np.ascontiguousarray(values) for name, values in tensors.items()}
    header = {}
    for name, values in tensors.items():
        header[name] = ((types or {}).get(name.rpartition(".")[2]) or TYPES[str(values.dtype)], values.shape)
    with SafetensorsWriter(directory / "model.safetensors", header) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
    return Checkpoint(directory)


def words(nibbles, bits: int = 4) -> np.ndarray:
    """int32 of the values of a word, the first in the lowest bits; ``nibbles``: [..., values of a word]."""
    value = np.zeros(nibbles.shape[:-1], dtype=np.uint32)
    for place in range(nibbles.shape[-1]):
        value |= nibbles[..., place].astype(np.uint32) << np.uint32(place * bits)
    return value.view(np.int32)


@pytest.fixture
def weight():
    """(values [rows, columns], scales and zeros [rows, groups], what they stand for); every row and column differs."""
    random = np.random.default_rng(5)
    values = random.integers(0, 16, (ROWS, COLUMNS)).astype(np.uint8)
    scales = random.uniform(0.01, 0.1, (ROWS, COLUMNS // GROUP)).astype(np.float16).astype(np.float32)
    zeros = random.integers(1, 16, (ROWS, COLUMNS // GROUP)).astype(np.uint8)
    return values, scales, zeros


def meaning(values, scales, zeros, group_of=None) -> np.ndarray:
    """Element by element: what integer weights stand for."""
    result = np.empty(values.shape, dtype=np.float32)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            group = column // GROUP if group_of is None else group_of[column]
            zero = 8 if zeros is None else int(zeros[row, group])
            result[row, column] = np.float32(int(values[row, column]) - zero) * scales[row, group]
    return result


def check(checkpoint: Checkpoint, values, scales, zeros, expected) -> None:
    """Compare the weight, whole, sliced and by rows, and its quantized values with what was stored."""
    name = f"{NAME}.weight"
    assert name in checkpoint and checkpoint.shape(name) == (ROWS, COLUMNS)
    np.testing.assert_array_equal(checkpoint.read(name), expected)
    np.testing.assert_array_equal(checkpoint.read(name, slice(5, 19)), expected[5:19])
    np.testing.assert_array_equal(checkpoint.read(name, np.array([2, 23, 9])), expected[[2, 23, 9]])
    own = checkpoint.quantized(name, slice(3, 22))
    np.testing.assert_array_equal(own.values, values[3:22])
    np.testing.assert_array_equal(own.scales, scales[3:22])
    assert (own.bits, own.group_size) == (4, GROUP)
    if zeros is None:
        assert own.zeros is None
    else:
        np.testing.assert_array_equal(own.zeros, zeros[3:22])


def test_autoawq(tmp_path, weight):
    """Its GEMM version packs eight output channels into a word, in the order 0 2 4 6 1 3 5 7."""
    values, scales, zeros = weight
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        "qweight": words(values.T.reshape(COLUMNS, -1, 8)[:, :, order]),
        "qzeros": words(zeros.T.reshape(COLUMNS // GROUP, -1, 8)[:, :, order]),
        "scales": scales.T.astype(np.float16),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    check(write(tmp_path / "a", config, tensors), values, scales, zeros, meaning(values, scales, zeros))
    with pytest.raises(UnsupportedModelError, match="'gemv'"):
        write(tmp_path / "b", {**config, "version": "gemv"}, tensors)


def gptq(values, scales, zeros, group_of=None, offset=1) -> dict:
    return {
        "qweight": words(np.moveaxis(values.T.reshape(-1, 8, ROWS), 1, 2)),
        "qzeros": words(((zeros.T - offset) & 15).reshape(COLUMNS // GROUP, -1, 8)),
        "scales": scales.T.astype(np.float16),
        "g_idx": (np.arange(COLUMNS) // GROUP if group_of is None else group_of).astype(np.int32),
    }


@pytest.mark.parametrize("layout, offset", [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_of_both_versions(tmp_path, weight, layout, offset):
    """The first version stores zeros less one."""
    values, scales, zeros = weight
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": layout}
    checkpoint = write(tmp_path / "a", config, gptq(values, scales, zeros, offset=offset))
    check(checkpoint, values, scales, zeros, meaning(values, scales, zeros))
    eights = np.full_like(zeros, 8)
    checkpoint = write(tmp_path / "b", config, gptq(values, scales, eights, offset=offset))
    check(checkpoint, values, scales, None, meaning(values, scales, None))


def test_gptq_with_groups_in_another_order_is_dequantized_but_not_taken_as_it_is(tmp_path, weight):
    values, scales, zeros = weight
    group_of = np.random.default_rng(1).permutation(np.arange(COLUMNS) // GROUP)
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}
    checkpoint = write(tmp_path / "a", config, gptq(values, scales, zeros, group_of))
    expected = meaning(values, scales, zeros, group_of)
    np.testing.assert_array_equal(checkpoint.read(f"{NAME}.weight"), expected)
    np.testing.assert_array_equal(checkpoint.read(f"{NAME}.weight", slice(7, 9)), expected[7:9])
    assert checkpoint.quantized(f"{NAME}.weight") is None
    uneven = np.zeros(COLUMNS, dtype=np.int64)
    with pytest.raises(CheckpointError, match="g_idx"):
        write(tmp_path / "b", config, gptq(values, scales, zeros, uneven))


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_pack_quantized(tmp_path, weight, symmetric):
    values, scales, zeros = weight
    tensors = {
        "weight_packed": words(values.reshape(ROWS, -1, 8)),
        "weight_scale": scales.astype(np.float16),
        "weight_shape": np.array([ROWS, COLUMNS]),
    }
    if symmetric:
        zeros = None
    else:
        tensors["weight_zero_point"] = words(np.moveaxis(zeros.reshape(-1, 8, zeros.shape[1]), 1, 2))
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    check(write(tmp_path / "a", config, tensors), values, scales, zeros, meaning(values, scales, zeros))


def test_compressed_tensors_int_quantized(tmp_path):
    random = np.random.default_rng(2)
    values = random.integers(-128, 128, (ROWS, COLUMNS)).astype(np.int8)
    scales = random.uniform(0.01, 0.1, (ROWS, 1)).astype(np.float16)
    config = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    checkpoint = write(tmp_path / "a", config, {"weight": values, "weight_scale": scales})
    np.testing.assert_array_equal(checkpoint.read(f"{NAME}.weight"), values * scales.astype(np.float32))
    own = checkpoint.quantized(f"{NAME}.weight")
    np.testing.assert_array_equal(own.values.astype(int) - 128, values)
    assert own.group_size == COLUMNS and own.bits == 8


@pytest.mark.parametrize("grid", [(), (1,), (ROWS, 1), (3, 4)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_fp8_with_a_scale_for_all_a_row_or_a_block(tmp_path, grid, name):
    """Blocks of 8 × 16 here; both names are factors."""
    random = np.random.default_rng(3)
    codes = random.integers(0, 0x7F, (ROWS, COLUMNS)).astype(np.uint8)
    scales = np.asarray(random.uniform(0.5, 2, grid), dtype=np.float32)
    config = {"quant_method": "fp8", "weight_block_size": [8, 16]}
    checkpoint = write(tmp_path / "a", config, {"weight": codes, name: scales}, {"weight": "F8_E4M3"})
    per_weight = np.kron(scales, np.ones((8, 16), np.float32)) if grid == (3, 4) else scales
    expected = E4M3[codes] * per_weight
    np.testing.assert_array_equal(checkpoint.read(f"{NAME}.weight"), expected)
    np.testing.assert_array_equal(checkpoint.read(f"{NAME}.weight", slice(7, 18)), expected[7:18])
    assert checkpoint.quantized(f"{NAME}.weight") is None
    np.testing.assert_array_equal(checkpoint.stored(f"{NAME}.weight").read(slice(None)).codes, codes)


def test_compressed_tensors_nvfp4(tmp_path):
    """What is stored is the factor by which weights were multiplied: scales are divided by it."""
    random = np.random.default_rng(4)
    codes = random.integers(0, 16, (ROWS, COLUMNS)).astype(np.uint8)
    block_scales = random.integers(0, 0x7F, (ROWS, COLUMNS // 16)).astype(np.uint8)
    tensors = {
        "weight_packed": codes[:, 0::2] | codes[:, 1::2] << 4,
        "weight_scale": block_scales,
        "weight_global_scale": np.array([500], dtype=np.float32),
    }
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    checkpoint = write(tmp_path / "a", config, tensors, {"weight_scale": "F8_E4M3"})
    expected = E2M1[codes] * np.repeat(E4M3[block_scales], 16, axis=1) / np.float32(500)
    np.testing.assert_allclose(checkpoint.read(f"{NAME}.weight"), expected, rtol=1e-6)


def test_modelopt_nvfp4(tmp_path):
    """Here the tensor's scale is a factor of the weights."""
    random = np.random.default_rng(4)
    codes = random.integers(0, 16, (ROWS, COLUMNS)).astype(np.uint8)
    block_scales = random.integers(0, 0x7F, (ROWS, COLUMNS // 16)).astype(np.uint8)
    tensors = {
        "weight": codes[:, 0::2] | codes[:, 1::2] << 4,
        "weight_scale": block_scales,
        "weight_scale_2": np.array(0.002, dtype=np.float32),
    }
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    checkpoint = write(tmp_path / "a", config, tensors, {"weight_scale": "F8_E4M3"})
    expected = E2M1[codes] * np.repeat(E4M3[block_scales], 16, axis=1) * np.float32(0.002)
    np.testing.assert_allclose(checkpoint.read(f"{NAME}.weight"), expected, rtol=1e-6)
    tensors["pre_quant_scale"] = np.ones(COLUMNS, dtype=np.float32)
    with pytest.raises(UnsupportedModelError, match="FP8 and NVFP4 are read"):
        write(tmp_path / "b", config, tensors, {"weight_scale": "F8_E4M3"})


@pytest.mark.parametrize(
    "config, error, message",
    [
        ({"quant_method": "bitsandbytes"}, UnsupportedModelError, "'bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 3}, UnsupportedModelError, "3 bits"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
            UnsupportedModelError,
            "transform_config",
        ),
    ],
)
def test_what_is_not_read_is_refused(tmp_path, weight, config, error, message):
    values, scales, zeros = weight
    with pytest.raises(error, match=message):
        write(tmp_path / "a", config, gptq(values, scales, zeros))


def test_a_quantized_weight_without_its_scales_is_refused(tmp_path):
    config = {"quant_method": "compressed-tensors"}
    with pytest.raises(CheckpointError, match="weight_scale"):
        write(tmp_path / "a", config, {"weight": np.zeros((ROWS, COLUMNS), dtype=np.int8)})


SCHEMES = {
    "W4A16": ("pack-quantized", "int4"),
    "W4A16_ASYM": ("pack-quantized", "int4"),
    "W8A16": ("pack-quantized", "int8"),
    "W8A8": ("int-quantized", "int8"),
    "FP8_DYNAMIC": ("float-quantized", "fp8"),
    "FP8_BLOCK": ("float-quantized", "fp8"),
    "NVFP4A16": ("nvfp4-pack-quantized", "nvfp4"),
}


@pytest.mark.parametrize("preset", SCHEMES)
def test_what_the_compressed_tensors_library_packs_is_read_as_the_library_unpacks_it(tmp_path, preset):
    """Held against the code that defines the layout, where it is installed."""
    torch = pytest.importorskip("torch")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")

    layout, kind = SCHEMES[preset]
    scheme = quantization.preset_name_to_scheme(preset, ["Linear"])
    random = np.random.default_rng(6)
    weights = torch.from_numpy(random.normal(size=(48, 256)).astype(np.float32))
    state = {"weight": weights, **_parameters(torch, weights, preset)}
    compressor = compressors.BaseCompressor.get_value_from_registry(layout)
    packed = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(packed), scheme)["weight"].float().numpy()
    fp8 = {name for name, tensor in packed.items() if tensor.dtype == torch.float8_e4m3fn}
    tensors = {name: (tensor.view(torch.uint8) if name in fp8 else tensor).numpy() for name, tensor in packed.items()}
    config = {"quant_method": "compressed-tensors", "format": layout}
    if preset == "FP8_BLOCK":
        config["config_groups"] = {"group_0": {"weights": {"block_structure": [128, 128]}}}
    checkpoint = write(tmp_path / "a", config, tensors, dict.fromkeys(fp8, "F8_E4M3"))
    assert checkpoint.stored(f"{NAME}.weight").format.name == kind
    np.testing.assert_allclose(checkpoint.read(f"{NAME}.weight"), expected, rtol=1e-2, atol=1e-3)
    assert np.abs(expected - weights.numpy()).mean() < 0.15  # that the library packed the weights at all


def _parameters(torch, weights, preset: str) -> dict:
    """Scales and zero points for the library's ``compress``, by the formulas of each preset."""
    peak = weights.abs()
    if preset == "NVFP4A16":
        global_scale = torch.tensor([448 * 6 / float(peak.max())])
        scale = (peak.reshape(48, 16, 16).amax(2) / 6 * global_scale).to(torch.float8_e4m3fn).float()
        return {"weight_scale": scale, "weight_global_scale": global_scale}
    if preset == "FP8_BLOCK":
        return {"weight_scale": torch.stack([peak[:, :128].max(), peak[:, 128:].max()])[None] / 448}
    if preset == "FP8_DYNAMIC":
        return {"weight_scale": peak.amax(1, keepdim=True) / 448}
    if preset == "W8A8":
        return {"weight_scale": peak.amax(1, keepdim=True) / 127}
    grouped = weights.reshape(48, 2, 128)
    if preset == "W4A16_ASYM":
        low, high = grouped.amin(2), grouped.amax(2)
        scale = (high - low) / 15
        return {"weight_scale": scale, "weight_zero_point": (-8 - low / scale).round().clamp(-8, 7).to(torch.int8)}
    return {"weight_scale": grouped.abs().amax(2) / (127 if preset == "W8A16" else 7.5)}


def test_bf16_scales_are_read(tmp_path):
    scales = to_16_bit(np.array([[0.5], [3.0]], dtype=np.float32), "bf16")
    tensors = {"weight": np.array([[1, -2], [3, 4]], dtype=np.int8), "weight_scale": scales}
    checkpoint = write(tmp_path / "a", {"quant_method": "compressed-tensors"}, tensors, {"weight_scale": "BF16"})
    np.testing.assert_array_equal(checkpoint.read(f"{NAME}.weight"), [[0.5, -1], [9, 12]])


def test_compressed_tensors_with_zero_points_that_are_not_packed(tmp_path, weight):
    """Stored as int8, one for each scale, where the weights are packed."""
    values, scales, zeros = weight
    tensors = {
        "weight_packed": words(values.reshape(ROWS, -1, 8)),
        "weight_scale": scales.astype(np.float16),
        "weight_shape": np.array([ROWS, COLUMNS]),
        "weight_zero_point": (zeros.astype(np.int16) - 8).astype(np.int8),
    }
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    check(write(tmp_path / "a", config, tensors), values, scales, zeros, meaning(values, scales, zeros))
    tensors["weight_zero_point"] = tensors["weight_zero_point"][:, :1]
    with pytest.raises(CheckpointError, match="zero points"):
        write(tmp_path / "b", config, tensors)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_without_a_dimension_is_one_scale(tmp_path, shape):
    codes = np.arange(ROWS * COLUMNS, dtype=np.uint8).reshape(ROWS, COLUMNS) % 100
    tensors = {"weight": codes, "weight_scale": np.full(shape, 0.5, dtype=np.float32)}
    header = {f"{NAME}.weight": ("F8_E4M3", codes.shape), f"{NAME}.weight_scale": ("F32", shape)}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "modelopt"}}))
    with SafetensorsWriter(tmp_path / "model.safetensors", header) as writer:
        for name, values in tensors.items():
            writer.write(f"{NAME}.{name}", values)
    np.testing.assert_array_equal(Checkpoint(tmp_path).read(f"{NAME}.weight"), E4M3[codes] * np.float32(0.5))


def test_what_is_no_checkpoint_is_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="GGUF"):
        Checkpoint(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="hf download"):
        Checkpoint("nobody-has-this/model-7b")
    with pytest.raises(CheckpointError, match="does not exist.$"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoint(tmp_path / "config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="LoRA"):
        Checkpoint(tmp_path)
