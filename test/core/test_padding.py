"""Models whose sizes the CUDA kernels do not read: the weights that are built compute what the checkpoint's compute."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine_core.backends.cuda.build import build_cuda
from engine_core.backends.cuda.layout import CudaSpec, bytes_by_purpose, packed_shapes, weight_arrays, work_arrays
from engine_core.backends.cuda.weights import CudaWeights, resolve
from engine_core.config import EngineConfig
from engine_core.cuda.driver import aligned
from engine_core.cuda.kernels import reference
from engine_core.cuda.kernels.int4_layout import GROUP
from engine_core.formats.number_formats import from_16_bit
from engine_core.formats.safetensors_file import SafetensorsFile, write_safetensors
from engine_core.formats.weight_formats import weight_format
from engine_core.formats.weight_formats.base import Rounding
from engine_core.models.padding import Axis
from engine_core.models.shapes import read_shapes

CONTEXT = 32
IDS = np.random.default_rng(2).integers(0, 251, 12)
SIZES = dict(num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, vocab_size=251, eos_token_id=2)
# What real models have: SmolLM2-135M (576 = 4.5 groups of 128) and smaller; heads of 8 (stories260K), 100 and 120.
ODD = [
    dict(hidden_size=72, intermediate_size=192, head_dim=64),
    dict(hidden_size=90, intermediate_size=150, head_dim=32),
    dict(hidden_size=64, intermediate_size=172, head_dim=8),
    dict(hidden_size=136, intermediate_size=264, head_dim=20),
]


def write(directory: Path, architecture: str, **sizes) -> dict[str, np.ndarray]:
    """Writes a checkpoint whose attention is not flat; returns its tensors."""
    directory.mkdir(parents=True)
    config = SIZES | dict(architectures=[architecture], dtype="float16", max_position_embeddings=64) | sizes
    (directory / "config.json").write_text(json.dumps(config))
    rng, tensors = np.random.default_rng(7), {}
    for name, shape in read_shapes(directory)[1].shapes().items():
        is_norm = name.endswith("norm.weight")
        values = rng.normal(1 if is_norm else 0, 0.3 if len(shape) == 1 else 2 * shape[-1] ** -0.5, shape)
        tensors[name] = values.astype(np.float16)
    write_safetensors(directory / "model.safetensors", tensors)
    return tensors


def logits(arrays: dict[str, np.ndarray], rope: np.ndarray, spec, hidden_size: int, head_size: int) -> np.ndarray:
    """[tokens, rows] of IDS by the kernels' references; ``arrays``: as ``weight_arrays`` names them, in floats."""
    heads, kv_heads, eps = spec.num_heads, spec.num_kv_heads, spec.norm_eps
    head_dim, n = 2 * rope.shape[1], len(IDS)
    hidden = arrays["embed"][IDS]
    for i in range(len(spec.layers)):
        layer = {name.split(".")[-1]: w for name, w in arrays.items() if name.startswith(f"layers.{i}.")}
        qkv = reference.rms_norm(hidden, layer["input_norm"], eps, hidden_size) @ layer["qkv"].T
        qkv = (qkv + layer.get("qkv_bias", 0)).reshape(n, -1, head_dim)
        q, k, v = np.split(qkv, [heads, heads + kv_heads], axis=1)
        if "q_norm" in layer:
            q, k = (reference.rms_norm(x, layer[f"{name}_norm"], eps, head_size) for x, name in ((q, "q"), (k, "k")))
        q, k = (reference.rotate(x, rope[:n]) for x in (q, k))
        attended = reference.attention(q, k.swapaxes(0, 1), v.swapaxes(0, 1), 0, (head_size or head_dim) ** -0.5)
        hidden = hidden + attended.reshape(n, -1) @ layer["o"].T
        normed = reference.rms_norm(hidden, layer["post_norm"], eps, hidden_size)
        hidden = hidden + reference.silu_multiply(normed @ layer["gate_up"].T) @ layer["down"].T
    return reference.rms_norm(hidden, arrays["norm"], eps, hidden_size) @ arrays.get("head", arrays["embed"]).T


def built(engine_dir: Path, manifest, config: EngineConfig) -> tuple[CudaSpec, dict[str, np.ndarray], np.ndarray]:
    """(sizes, weights in float64, RoPE table) that ``load`` uploads."""
    resolved = resolve(engine_dir, manifest, config)
    weights, arrays = CudaWeights(engine_dir, resolved), {}
    packed = packed_shapes(resolved.spec)
    for name, array in weight_arrays(resolved.spec).items():
        stored = weights.read(name)
        assert stored.shape == array.shape and stored.nbytes <= array.nbytes
        if array.dtype == "int32":
            arrays[name] = stored
            continue
        if array.dtype != "uint8":
            arrays[name] = from_16_bit(stored).astype(np.float64)
            continue
        stored_as = resolved.spec.weight_format
        arrays[name] = reference.packed_weight(stored, stored_as, packed[name.split(".")[-1]], "fp16")
    return resolved.spec, arrays, weights.rope().astype(np.float64)


def of_checkpoint(tensors: dict[str, np.ndarray], spec, rounded) -> dict[str, np.ndarray]:
    """The checkpoint's weights, fused; ``rounded``: what becomes of a matrix that is multiplied."""

    def get(*names: str) -> np.ndarray:
        return np.concatenate([tensors[name] for name in names]).astype(np.float64)

    arrays = {"embed": get(spec.embedding), "norm": get(spec.final_norm), "head": rounded(get(spec.head))}
    for i, layer in enumerate(spec.layers):
        gate, up = np.split(get(*layer.gate_up.parts), 2)
        found = {
            "input_norm": get(layer.input_norm),
            "qkv": rounded(get(*layer.qkv.parts)),
            "o": rounded(get(*layer.output.parts)),
            "post_norm": get(layer.mlp_norm),
            "gate_up": rounded(np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])),
            "down": rounded(get(*layer.down.parts)),
        }
        if layer.qkv.biases:
            found["qkv_bias"] = get(*layer.qkv.biases)
        if layer.q_norm:
            found["q_norm"], found["k_norm"] = get(layer.q_norm), get(layer.k_norm)
        arrays |= {f"layers.{i}.{name}": values for name, values in found.items()}
    return arrays


@pytest.mark.parametrize("sizes", ODD, ids=lambda sizes: "-".join(map(str, sizes.values())))
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("quantization", ["fp16", "int8", "int4"])
def test_filled_up_weights_compute_what_the_checkpoints_do(tmp_path, architecture, sizes, quantization):
    tensors = write(tmp_path / "checkpoint", architecture, **sizes)
    _, spec = read_shapes(tmp_path / "checkpoint")
    manifest = build_cuda(
        tmp_path / "checkpoint", tmp_path / "engine", quantization=quantization, dtype="fp16", max_context=CONTEXT
    )
    made, arrays, rope = built(tmp_path / "engine", manifest, EngineConfig(tmp_path / "engine"))
    assert made.hidden % 8 == made.intermediate % 8 == made.attention.head_dim % 16 == 0
    found = logits(arrays, rope, spec, spec.hidden_size, spec.head_dim)

    def rounded(matrix: np.ndarray) -> np.ndarray:
        if quantization == "fp16":
            return matrix
        kind = weight_format(quantization)
        return kind.quantize(matrix.astype(np.float32), Rounding(GROUP, "fp16")).dequantize().astype(np.float64)

    table = np.stack(spec.ropes[0].table(CONTEXT), axis=-1).astype(np.float64)
    expected = logits(of_checkpoint(tensors, spec, rounded), table, spec, 0, 0)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    if quantization == "fp16" or spec.head_dim % 16 == 0:
        assert error < 1e-6
    else:  # the groups of the output matrix have other columns
        assert error < {"int8": 0.05, "int4": 0.8}[quantization]


def test_the_plan_counts_what_is_added(tmp_path):
    write(tmp_path / "checkpoint", "LlamaForCausalLM", hidden_size=90, intermediate_size=150, head_dim=20)
    for quantization, weight_bytes in (("fp16", 2), ("int8", 1), ("int4", 0.5)):
        out = tmp_path / quantization
        manifest = build_cuda(
            tmp_path / "checkpoint", out, quantization=quantization, dtype="fp16", max_context=CONTEXT
        )
        spec = CudaSpec.create(manifest, EngineConfig(out))
        assert (spec.hidden, spec.intermediate, spec.attention.head_dim) == (96, 152, 32)
        arrays = weight_arrays(spec)
        file = SafetensorsFile(out / "weights.safetensors")
        assert {name: file.shape(name) for name in arrays} == {name: array.shape for name, array in arrays.items()}
        tiles = {(320, 96): 20, (96, 192): 6 * 2, (304, 96): 19, (96, 152): 6 * 2, (251, 96): 16}
        for name, shape in packed_shapes(spec).items():
            array = arrays["head" if name == "head" else f"layers.1.{name}"]
            assert array.nbytes == aligned(int(tiles[shape] * (16 * 128 * weight_bytes + 32)))
        totals = bytes_by_purpose(arrays, work_arrays(spec, num_sms=10))
        assert totals["weights"] == sum(array.nbytes for array in arrays.values())
        assert totals["kv_cache"] == 2 * 2 * 2 * CONTEXT * 32 * 2  # layers, K and V, heads, tokens, head_dim, bytes


@pytest.mark.parametrize(
    "head_dim, rotated, grain", [(64, 64, 16), (20, 20, 16), (8, 8, 16), (40, 24, 16), (80, 24, 16)]
)
def test_a_heads_halves_stay_halves(head_dim, rotated, grain):
    axis = Axis.of_head(head_dim, rotated, grain)
    turned = -(-rotated // grain) * grain
    assert axis.size % grain == 0 and len(axis.places) == head_dim == len(set(axis.places))
    half = rotated // 2
    assert (axis.places[half:rotated] - axis.places[:half] == turned // 2).all()
    assert (axis.places[rotated:] >= turned).all() and (np.diff(axis.places) > 0).all()
    values = np.arange(1, head_dim + 1)[None]
    spread = axis.spread(values, 1)
    assert spread.sum() == values.sum() and (spread[:, axis.places] == values).all()
    assert (np.append(values, 0)[axis.sources()] == spread).all()
    both = axis.repeated(2).spread(np.concatenate([values, -values], axis=1), 1)
    assert (both == np.concatenate([spread, -spread], axis=1)).all()


def test_a_checkpoints_own_levels_are_kept_where_rows_and_the_last_columns_are_added(tmp_path):
    """Int8 by the row, as most checkpoints have it, with sizes that no group of 128 divides."""
    sizes = dict(hidden_size=90, intermediate_size=150, head_dim=32)
    tensors = write(tmp_path / "plain", "LlamaForCausalLM", **sizes)
    _, spec = read_shapes(tmp_path / "plain")
    rng, stored = np.random.default_rng(3), dict(tensors)
    linears = [name for name in tensors if "proj" in name]
    for name in linears:
        rows, columns = stored.pop(name).shape
        stored[name] = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
        stored[f"{name}_scale"] = (rng.random((rows, 1)) * 0.002 + 0.001).astype(np.float16)
    directory = tmp_path / "quantized"
    directory.mkdir()
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (directory / "config.json").write_text(json.dumps(config))
    write_safetensors(directory / "model.safetensors", stored)
    manifest = build_cuda(directory, tmp_path / "engine", quantization="int8", dtype="fp16", max_context=CONTEXT)
    assert manifest.options["requantized"] == 0
    _, arrays, _ = built(tmp_path / "engine", manifest, EngineConfig(tmp_path / "engine"))
    down = "model.layers.1.mlp.down_proj.weight"
    expected = stored[down].astype(np.float64) * stored[f"{down}_scale"].astype(np.float64)
    assert (arrays["layers.1.down"][:90, :150] == expected).all() and not arrays["layers.1.down"][90:].any()
    up = "model.layers.1.mlp.up_proj.weight"
    expected = stored[up].astype(np.float64) * stored[f"{up}_scale"].astype(np.float64)
    assert (arrays["layers.1.gate_up"][1:300:2, :90] == expected).all() and not arrays["layers.1.gate_up"][300:].any()
    assert spec.intermediate_size == 150
