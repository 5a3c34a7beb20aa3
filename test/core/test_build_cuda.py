"""Engine directories for the CUDA backend, built without a GPU from a tiny checkpoint written with numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fakes
from engine_core import cli
from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.build import build_cuda, to_tiles
from engine_core.backends.cuda.layout import CudaSpec, bytes_by_purpose, weight_arrays, work_arrays
from engine_core.backends.cuda.weights import CudaWeights, kept_rows, resolve
from engine_core.config import EngineConfig
from engine_core.cuda.driver import aligned
from engine_core.cuda.kernels import int4_layout, int8_layout, reference
from engine_core.cuda.kernels.linear_packed import LAYOUTS
from engine_core.cuda.kernels.reference import dequantize
from engine_core.errors import BuildError, ConfigurationError, UnsupportedModelError
from engine_core.formats.manifest import read_manifest
from engine_core.formats.safetensors_file import SafetensorsFile, write_safetensors
from engine_core.formats.vocab_map import write_vocab_map
from engine_core.formats.weight_formats import weight_format
from fake_gpu import FakeDriver, install
from packed_weights import format_of, random_parts

CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=320,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    eos_token_id=[5, 2],
    dtype="bfloat16",
)


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint; ``changes`` go into its config.json."""

    def write(**changes):
        config = {**CONFIG, **changes}
        hidden, width = config["hidden_size"], config["head_dim"]
        shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
        if not config["tie_word_embeddings"]:
            shapes["lm_head.weight"] = (config["vocab_size"], hidden)
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            shapes |= {
                layer + "input_layernorm.weight": (hidden,),
                layer + "post_attention_layernorm.weight": (hidden,),
            }
            for name, rows, cols in (
                ("self_attn.q_proj", 4 * width, hidden),
                ("self_attn.k_proj", 2 * width, hidden),
                ("self_attn.v_proj", 2 * width, hidden),
                ("self_attn.o_proj", hidden, 4 * width),
                ("mlp.gate_proj", config["intermediate_size"], hidden),
                ("mlp.up_proj", config["intermediate_size"], hidden),
                ("mlp.down_proj", hidden, config["intermediate_size"]),
            ):
                shapes[f"{layer}{name}.weight"] = (rows, cols)
        random = np.random.default_rng(0)
        directory = tmp_path / "checkpoint"
        directory.mkdir()
        tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        write_safetensors(directory / "model.safetensors", tensors)
        (directory / "config.json").write_text(json.dumps(config))
        fakes.write_small_tokenizer(directory)
        return directory, tensors

    return write


def test_weights_are_fused_as_the_kernels_read_them(checkpoint, tmp_path):
    directory, tensors = checkpoint()
    build_cuda(directory, tmp_path / "engine", dtype="fp16")
    manifest = read_manifest(tmp_path / "engine")
    assert (manifest.backend, manifest.quantization, manifest.eos_token_ids) == ("cuda", "fp16", (2, 5))
    assert manifest.options["dtype"] == "fp16" and manifest.model.tied
    assert set(manifest.files) == {"tokenizer.json", "weights.safetensors"}
    file = SafetensorsFile(tmp_path / "engine" / "weights.safetensors")
    assert "head" not in file.names()  # tied
    layer = "model.layers.1."
    gate, up = (tensors[f"{layer}mlp.{name}_proj.weight"].astype(np.float16) for name in ("gate", "up"))
    assert (file.raw("layers.1.gate_up")[0::2] == gate).all() and (file.raw("layers.1.gate_up")[1::2] == up).all()
    parts = [tensors[f"{layer}self_attn.{name}_proj.weight"].astype(np.float16) for name in "qkv"]
    assert (file.raw("layers.1.qkv") == np.concatenate(parts)).all()
    rope = file.raw("rope")
    assert rope.shape == (512, 16, 2)
    np.testing.assert_allclose(rope[3, 0], [np.cos(3), np.sin(3)], rtol=1e-6)


def test_bf16_is_the_checkpoints_own_and_rounded_to_even(checkpoint, tmp_path):
    directory, tensors = checkpoint()
    build_cuda(directory, tmp_path / "engine", max_context=64)
    file = SafetensorsFile(tmp_path / "engine" / "weights.safetensors")
    assert file.dtype("embed") == "BF16" and file.shape("rope")[0] == 64
    exact, stored = tensors["model.embed_tokens.weight"], file.read("embed")
    assert (np.abs(stored - exact) <= np.abs(exact) * 2**-8).all()


def test_int4_has_a_head_of_its_own_and_a_vocabulary_map_its_rows(checkpoint, tmp_path):
    directory, tensors = checkpoint()
    kept = np.array([2, 5, *range(6, 322 - 2, 2)], dtype=np.int32)[:144]  # 5: the end of sequence
    write_safetensors(tmp_path / "map.safetensors", {"vocab_map": kept})
    build_cuda(
        directory, tmp_path / "engine", quantization="int4", dtype="fp16", vocab_map=tmp_path / "map.safetensors"
    )
    manifest = read_manifest(tmp_path / "engine")
    assert (manifest.quantization, manifest.group_size, manifest.reduced_vocab_size) == ("int4", 128, 144)
    file = SafetensorsFile(tmp_path / "engine" / "weights.safetensors")
    expected = tensors["model.embed_tokens.weight"][kept]
    values, scales = int4_layout.unpack(file.raw("head"))
    restored = dequantize(
        values, scales.view(np.float16).astype(np.float64), int4_layout.GROUP, weight_format("int4").zero
    )
    steps = np.abs(scales.view(np.float16).astype(np.float64))
    # Half a step where the 16 levels reach; the value opposite to the largest may lose up to a whole one.
    assert (np.abs(restored - expected) <= 1.01 * steps).all()
    assert np.linalg.norm(restored - expected) / np.linalg.norm(expected) < 0.12


def test_the_checkpoints_own_vocabulary_map_is_used_by_itself(checkpoint, tmp_path):
    directory, tensors = checkpoint()
    kept = np.array([1, 2, 5, 300], dtype=np.int32)
    write_safetensors(directory / "vocab_map.safetensors", {"vocab_map": kept})
    manifest = build_cuda(directory, tmp_path / "engine", dtype="fp16", max_context=64)
    assert manifest.reduced_vocab_size == 4 and (tmp_path / "engine" / "vocab_map.safetensors").is_file()
    head = SafetensorsFile(tmp_path / "engine" / "weights.safetensors").read("head")
    np.testing.assert_allclose(head, tensors["model.embed_tokens.weight"][kept], rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_int8_is_within_half_a_step(checkpoint, tmp_path, dtype):
    directory, tensors = checkpoint()
    build_cuda(directory, tmp_path / "engine", quantization="int8", dtype=dtype)
    manifest = read_manifest(tmp_path / "engine")
    assert (manifest.quantization, manifest.group_size) == ("int8", 128)
    spec = CudaSpec.create(manifest, EngineConfig(tmp_path / "engine"))
    assert spec.weight_format.name == "int8" and spec.has_head
    file = SafetensorsFile(tmp_path / "engine" / "weights.safetensors")
    values, scales = int8_layout.unpack(file.raw("layers.1.down"))
    scales = (scales.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else scales.view(np.float16)
    expected = tensors["model.layers.1.mlp.down_proj.weight"]
    restored = dequantize(values, scales.astype(np.float64), int8_layout.GROUP, weight_format("int8").zero)
    # The largest may be clipped where the scale, rounded to the type, came out small.
    half = np.repeat(scales.astype(np.float64), 128, axis=1) * (0.51 if dtype == "fp16" else 0.8)
    assert (np.abs(restored - expected) <= half).all()
    assert 0 < np.linalg.norm(restored - expected) / np.linalg.norm(expected) < 0.01


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS.items())
@pytest.mark.parametrize("rows, cols", [(64, 512), (16, 576), (50, 128), (1, 8), (331, 1000)])
def test_packing_is_its_own_inverse(kind, layout, rows, cols):
    parts = random_parts(np.random.default_rng(1), kind, rows, cols, "fp16")
    if kind == "nvfp4":  # the signs of block scales go to the values
        parts = (parts[0], parts[1] & 0x7F, parts[2])
    tiles = layout.pack(*parts)
    assert tiles.shape == layout.tiles_shape(rows, cols) and tiles.dtype == np.uint8
    for before, after in zip(parts, layout.unpack(tiles, (rows, cols)), strict=True):
        assert np.array_equal(before, after.view(before.dtype))
    whole = layout.unpack(tiles)  # with zeros around it
    assert whole[0].shape == (-(-rows // 16) * 16, -(-cols // 128) * 128)
    for before, after in zip(parts, whole, strict=True):
        padded = np.pad(before, [(0, b - a) for a, b in zip(before.shape, after.shape)])
        assert np.array_equal(padded, after.view(before.dtype))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("kind", "layout"), LAYOUTS.items())
def test_a_group_of_zeros_stays_zero(kind, layout, dtype):
    tiles = to_tiles(np.zeros((16, 128), dtype=np.float32), format_of(kind), dtype)
    assert (
        not reference.packed_weight(tiles, kind, (16, 128), dtype).any() and layout.tiles_shape(16, 128) == tiles.shape
    )


@pytest.mark.parametrize(
    "changes, quantization, error, text",
    [
        (
            dict(num_attention_heads=34, num_key_value_heads=2),
            "fp16",
            UnsupportedModelError,
            "16 query heads",
        ),
        (
            dict(head_dim=272),
            "fp16",
            UnsupportedModelError,
            "head size",
        ),
        ({}, "fp32", BuildError, "fp32"),
    ],
)
def test_what_the_kernels_cannot_run_is_refused_and_nothing_is_left(
    checkpoint, tmp_path, changes, quantization, error, text
):
    directory, _ = checkpoint(**changes)
    with pytest.raises(error, match=text):
        build_cuda(directory, tmp_path / "engines" / "new", quantization=quantization)
    assert not (tmp_path / "engines").exists() or not list((tmp_path / "engines").iterdir())


def test_the_plan_adds_up_what_is_taken(checkpoint, tmp_path):
    directory, _ = checkpoint()
    manifest = build_cuda(directory, tmp_path / "engine", dtype="fp16")
    config = EngineConfig(tmp_path / "engine", max_context=100, prompt_cache_entries=3, prompt_cache_tokens=50)
    spec = CudaSpec.create(manifest, config)
    totals = bytes_by_purpose(weight_arrays(spec), work_arrays(spec, num_sms=10))
    assert totals["kv_cache"] == 2 * 2 * 2 * 100 * 32 * 2  # layers, K and V, heads, tokens, head_dim, bytes
    assert totals["prefix_cache"] == 3 * 2 * 2 * 2 * 64 * 32 * 2
    stored = sum(tensor.nbytes for tensor in _tensors(tmp_path / "engine").values())
    assert 0 <= totals["weights"] - stored < 256 * len(weight_arrays(spec))
    assert spec.chunk % 64 == 0 and spec.chunk >= 100


def test_an_int8_kv_cache_is_chosen_when_the_engine_is_opened(checkpoint, tmp_path):
    directory, _ = checkpoint()
    manifest = build_cuda(directory, tmp_path / "engine")
    assert manifest.kv_cache_type == "fp16"
    sizes = dict(max_context=101, prompt_cache_entries=3, prompt_cache_tokens=50)
    spec = CudaSpec.create(manifest, EngineConfig(tmp_path / "engine", kv_cache_type="int8", **sizes))
    arrays = work_arrays(spec, num_sms=10)
    # Layers, K and V, heads, tokens, head_dim, and a scale of 2 bytes for every token, in rows of 16 bytes.
    assert (arrays["kv_cache"].shape, arrays["kv_cache"].dtype) == ((2, 2, 2, 101, 32), "int8")
    assert (arrays["kv_scales"].shape, arrays["kv_scales"].dtype) == ((2, 2, 2, 104), "fp16")
    assert bytes_by_purpose(arrays)["kv_cache"] == aligned(8 * 101 * 32) + aligned(8 * 104 * 2)
    assert bytes_by_purpose(arrays)["prefix_cache"] == aligned(3 * 8 * 64 * 32) + aligned(3 * 8 * 64 * 2)
    assert "kv_scales" not in work_arrays(CudaSpec.create(manifest, EngineConfig(tmp_path / "engine")), num_sms=10)


def test_an_engine_can_be_built_to_open_with_an_int8_kv_cache(checkpoint, tmp_path):
    directory, _ = checkpoint()
    build = ["build", str(directory), str(tmp_path / "engine"), "--backend", "cuda", "--kv-cache-type"]
    assert cli.main([*build, "int8"]) == 0
    manifest = read_manifest(tmp_path / "engine")
    assert manifest.kv_cache_type == "int8"
    for asked, kv_int8 in (("auto", True), ("int8", True), ("fp16", False)):
        spec = CudaSpec.create(manifest, EngineConfig(tmp_path / "engine", kv_cache_type=asked))
        assert spec.attention.kv_int8 == kv_int8
    with pytest.raises(BuildError, match="no 'fp32' KV cache"):
        build_cuda(directory, tmp_path / "other", kv_cache_type="fp32")


def _tensors(engine_dir) -> dict[str, np.ndarray]:
    file = SafetensorsFile(engine_dir / "weights.safetensors")
    return {name: file.raw(name) for name in file.names() if name != "rope"}


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(max_batch=17), "max_batch is 17"),
        (dict(kv_cache_type="fp32"), "no 'fp32' KV cache"),
    ],
)
def test_a_configuration_the_backend_does_not_do_is_refused(checkpoint, tmp_path, changes, text):
    directory, _ = checkpoint()
    manifest = build_cuda(directory, tmp_path / "engine")
    with pytest.raises(ConfigurationError, match=text):
        CudaSpec.create(manifest, EngineConfig(tmp_path / "engine", **changes))


def write_map(path, count: int):
    """A map of ``count`` of the 320 tokens, the ends of sequence among them."""
    others = np.random.default_rng(0).choice(np.setdiff1d(np.arange(320), [2, 5]), count - 2, replace=False)
    write_vocab_map(path, np.sort(np.append(others, [2, 5])).astype(np.int32), {})
    return path


@pytest.mark.parametrize("quantization", ["fp16", "int8", "int4", "fp8", "nvfp4"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("count", [272, 101])
def test_a_map_given_at_load_takes_the_rows_that_a_build_with_it_writes(
    checkpoint, tmp_path, monkeypatch, quantization, tied, count
):
    directory, _ = checkpoint(tie_word_embeddings=tied, hidden_size=128 if tied else 140)
    given = write_map(tmp_path / "map.safetensors", count)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    cases = {whole: build_cuda(directory, whole, quantization=quantization)}
    cases[cut] = build_cuda(directory, cut, quantization=quantization, vocab_map=given)
    at_load, built = (EngineConfig(whole, vocab_map=str(given)), EngineConfig(cut))
    found, expected = resolve(whole, cases[whole], at_load), resolve(cut, cases[cut], built)
    assert found.spec == expected.spec and found.spec.head_rows == count
    assert (found.vocab_map == expected.vocab_map).all()
    ours, theirs = CudaWeights(whole, found), CudaWeights(cut, expected)
    for name, array in weight_arrays(found.spec).items():
        assert ours.read(name).nbytes <= array.nbytes and ours.read(name).shape == array.shape
        assert (ours.read(name) == theirs.read(name)).all(), name
    install(monkeypatch, FakeDriver())
    plans = [CudaBackend.plan(whole, cases[whole], at_load), CudaBackend.plan(cut, cases[cut], built)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("rows, count, cols", [(4096, 1040, 256), (4099, 1041, 264)])
def test_rows_are_kept_across_many_records(rows, count, cols):
    rng = np.random.default_rng(1)
    kept = np.sort(rng.choice(rows, count, replace=False)).astype(np.int32)
    for kind, layout in LAYOUTS.items():
        parts = random_parts(rng, kind, rows, cols, "fp16")
        found = kept_rows(layout.pack(*parts), kept, format_of(kind))
        assert (found == layout.pack(*(part[kept] for part in parts))).all()


def test_a_map_that_cannot_be_cut_to_is_refused(checkpoint, tmp_path):
    directory, _ = checkpoint()
    manifest = build_cuda(directory, tmp_path / "engine")
    given = str(tmp_path / "none.safetensors")
    with pytest.raises(ConfigurationError, match="none.safetensors"):
        resolve(tmp_path / "engine", manifest, EngineConfig(tmp_path / "engine", vocab_map=given))
