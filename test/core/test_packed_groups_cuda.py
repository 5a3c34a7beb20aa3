"""Integers in groups of 32, 64 and 128, symmetric and with zero points, on the CUDA backend.

What the kernels read of a tile is computed here as packed.cuh does it, value by value; test/gpu/test_packed_groups.py
runs them.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

import quantized_checkpoints
import small_llama
import test_padding
from batch_steps import Requests
from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.build import build_cuda
from engine_core.backends.cuda.capabilities import CAPABILITIES
from engine_core.backends.cuda.layout import CudaSpec, pair_rows, stacked_rows, weight_arrays
from engine_core.backends.cuda.orders import linears_of
from engine_core.backends.cuda.weights import kept_rows
from engine_core.config import EngineConfig
from engine_core.cuda.driver import DeviceArray
from engine_core.cuda.kernels import linear_batch, reference
from engine_core.cuda.kernels.integer_layout import GROUP, TILE, IntegerLayout
from engine_core.cuda.kernels.launch_configs import FALLBACK
from engine_core.cuda.kernels.linear_packed import PackedWeight, layout_of
from engine_core.errors import BuildError, EngineDirectoryError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.detect import default_quantization
from engine_core.formats.safetensors_file import SafetensorsFile, write_safetensors
from engine_core.formats.weight_formats import weight_format
from engine_core.measure.random_checkpoint import write_random_adapter, write_random_checkpoint
from engine_core.models.reader import read_spec
from engine_core.models.spec import LayerSpec
from engine_core.request import SamplingParams
from packed_weights import integer_formats, random_integers
from quantized_checkpoints import Scheme
from test_launch_configs import GPUS, MATRICES, STATIC_SHARED
from test_padding import built

ROWS_STATIC_SHARED = 20 * 1024  # bytes that gemv_packed.cu declares itself with several vectors, at most
FORMATS = integer_formats()
LAYOUTS = {name: layout_of(found) for name, found in FORMATS.items()}
LAYOUTS |= {"int4": IntegerLayout(4), "int8": IntegerLayout(8)}


def lanes_weight(tile: np.ndarray, layout: IntegerLayout, lane: int, half: int, eight: int) -> list[int]:
    """Return the eight values that ``widen`` makes for a lane of row g (``half`` 0) or g + 8."""
    size = 16 * layout.bits // 4  # bytes that a lane has of a row: PIECES units of 16, 512 bytes apart
    pieces = [tile[512 * (size // 16 * half + p) + 16 * lane :][:16] for p in range(size // 16)]
    if layout.bits == 8:
        return pieces[eight // 2][8 * (eight % 2) :][:8].tolist()
    (word,) = pieces[0][4 * eight :][:4].view("<u4")
    return [int(word) >> 4 * (pair + 4 * parity) & 15 for pair in range(4) for parity in range(2)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_lane_finds_the_columns_that_its_part_of_x_has(layout):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << layout.bits, (TILE, GROUP)).astype(np.uint8)
    scales = rng.integers(0, 1 << 16, (TILE, layout.parts)).astype(np.uint16)
    zeros = rng.integers(0, 1 << layout.bits, scales.shape).astype(np.uint8)
    tile = layout.pack(values, scales, zeros if layout.has_zeros else None)[0, 0]
    assert len(tile) == layout.TILE_BYTES and len(tile) % 16 == 0
    scales_from = TILE * GROUP * layout.bits // 8
    for lane in range(32):
        g, t = divmod(lane, 4)
        for half in range(2):
            for eight in range(4):
                column = 32 * eight + 8 * t if layout.parts > 1 else 32 * t + 8 * eight
                part = eight // (4 // layout.parts)
                assert column // layout.group_size == part, "a multiplication has the columns of one group"
                found = lanes_weight(tile, layout, lane, half, eight)
                assert found == values[g + 8 * half, column : column + 8].tolist()
                place = scales_from + 2 * (2 * (g * layout.parts + part) + half)
                assert tile[place : place + 2].view("<u2") == scales[g + 8 * half, part]
                if layout.has_zeros:
                    place = scales_from + 32 * layout.parts + 2 * (g * layout.parts + part) + half
                    assert tile[place] == zeros[g + 8 * half, part]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows, cols", [(64, 512), (16, 576), (331, 1000), (1, 8)])
def test_packing_is_its_own_inverse(name, rows, cols):
    stored_as, layout = FORMATS[name], LAYOUTS[name]
    rng = np.random.default_rng(1)
    parts = random_integers(rng, stored_as, rows, cols, "fp16")
    tiles = layout.pack(*parts)
    assert tiles.shape == layout.tiles_shape(rows, cols) and tiles.dtype == np.uint8
    for before, after in zip(parts, layout.unpack(tiles, (rows, cols)), strict=True):
        assert np.array_equal(before, after.view(before.dtype))
    kept = np.sort(rng.choice(rows, -(-rows // 3), replace=False)).astype(np.int32)
    assert (kept_rows(tiles, kept, stored_as) == layout.pack(*(part[kept] for part in parts))).all()
    values, scales = parts[0].astype(np.float64), parts[1].astype(np.float64)
    zeros = parts[2].astype(np.float64) if stored_as.asymmetric else np.full(scales.shape, float(stored_as.zero))
    column = np.arange(cols) // stored_as.group_size
    expected = (values - zeros[:, column]) * scales[:, column]
    assert np.array_equal(reference.packed_weight(tiles, stored_as, (rows, cols), "fp16"), expected)


def test_no_zeros_are_those_of_symmetric_values():
    layout = IntegerLayout(4, 32, True)
    values, scales = random_integers(np.random.default_rng(2), weight_format("int4").in_groups(32), 16, 128, "fp16")
    tiles = layout.pack(values, scales)
    assert (layout.unpack(tiles)[2] == 8).all()


@pytest.mark.parametrize("group_size", [16, 48, 256])
def test_other_groups_have_no_layout(group_size):
    with pytest.raises(AssertionError):
        IntegerLayout(4, group_size)


# --- engines of checkpoints that others quantized ---------------------------------------------------------

CONFIG = small_llama.CONFIG | dict(intermediate_size=192, dtype="float16")
SCHEMES = {
    "awq": Scheme("awq", group_size=64, asymmetric=True),
    "gptq in groups of 32": Scheme("gptq", group_size=32),
    "gptq asymmetric by the row": Scheme("gptq", group_size=0, asymmetric=True),
    "gptq int8": Scheme("gptq", bits=8, group_size=32, asymmetric=True),
    "gptq act-order": Scheme("gptq", group_size=32, act_order=True),
    "gptq act-order asymmetric": Scheme("gptq", group_size=32, asymmetric=True, act_order=True),
    "gptq act-order of down alone": Scheme("gptq", group_size=64, act_order=True),  # the others have one group
    "gptq int8 act-order": Scheme("gptq", bits=8, group_size=32, act_order=True),
}
PROMPTS = [np.random.default_rng(i).integers(3, small_llama.VOCAB, 5 + 30 * i).astype(np.int32) for i in range(4)]
requests = Requests(PROMPTS, [(SamplingParams(seed=i), None) for i in range(4)], 6, ["", "one", "", "one"])


@pytest.fixture(scope="module", params=SCHEMES.values(), ids=SCHEMES)
def made(request, tmp_path_factory):
    """(the checkpoint, its engine, the manifest, an adapter of all matrices)."""
    directory, scheme = tmp_path_factory.mktemp("quantized"), request.param
    plain = write_random_checkpoint(directory / "plain", CONFIG, scale=0.15)
    checkpoint = quantized_checkpoints.quantize(plain, directory / "checkpoint", scheme)
    kind = "int8" if scheme.bits == 8 else "int4_awq"
    manifest = build_cuda(checkpoint, directory / "engine", quantization=kind, max_context=128)
    modules = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    adapter = write_random_adapter(directory / "one", read_spec(Checkpoint(plain)), *modules)
    return Checkpoint(checkpoint), directory / "engine", manifest, f"one:{adapter}"


def natural(checkpoint: Checkpoint, layer: LayerSpec) -> dict[str, np.ndarray]:
    """Return the matrices of a layer as the checkpoint has them, fused, float64."""
    found = {name: np.concatenate([checkpoint.read(p) for p in each.parts]) for name, each in linears_of(layer).items()}
    return {name: (pair_rows(w) if name == "gate_up" else w).astype(np.float64) for name, w in found.items()}


def test_an_engine_has_the_weights_that_the_checkpoint_stands_for(made):
    checkpoint, engine, manifest, _ = made
    assert manifest.options["requantized"] == 0 and manifest.options["zero_points"] in (True, False)
    spec, arrays, _ = built(engine, manifest, EngineConfig(engine))
    for i, layer in enumerate(spec.model.layers):
        for name, expected in natural(checkpoint, layer).items():
            has_order = checkpoint.stored(linears_of(layer)[name].parts[0]).order is not None
            assert (name in spec.ordered) == has_order, "only matrices whose groups are not consecutive"
            if has_order:
                expected = expected[:, np.argsort(arrays[f"layers.{i}.{name}_places"])]
            if name == "gate_up" and "down" in spec.ordered:
                order = np.argsort(arrays[f"layers.{i}.down_places"])
                expected = expected.reshape(len(order), 2, -1)[order].reshape(expected.shape)
            assert np.array_equal(arrays[f"layers.{i}.{name}"], expected), name


def added(spec: CudaSpec, layer: int, name: str) -> np.ndarray:
    """Return what the first adapter adds to a matrix, as ``natural`` has that."""
    total = np.zeros(spec.model.layer_matrices[name])
    for part in stacked_rows(spec.model)[name]:
        low = spec.adapters[0].dense(layer, name, part)
        total[part.start : part.stop] = low.b @ low.a
    return pair_rows(total) if name == "gate_up" else total


@pytest.mark.parametrize("adapted", [False, True])
def test_an_engine_computes_what_the_checkpoint_does(made, driver, monkeypatch, adapted):
    """Tokens by prefill and by decode, of the checkpoint's own matrices and order in float64."""
    checkpoint, engine, manifest, adapter = made
    config = EngineConfig(engine, tune_kernels=False, lora_adapters=(adapter,) if adapted else ())
    spec, arrays, rope = built(engine, manifest, config)
    for i, layer in enumerate(spec.model.layers):
        for name, matrix in natural(checkpoint, layer).items():
            arrays[f"layers.{i}.{name}"] = matrix + added(spec, i, name) if adapted else matrix
    backend = CudaBackend.load(engine, manifest, config)
    of_all = dataclasses.replace(requests, adapters=["one"] * 4 if adapted else None)
    for index, prompt in enumerate(PROMPTS):
        ids = prompt.tolist()
        for token in of_all.alone(backend, index):
            monkeypatch.setattr(test_padding, "IDS", np.array(ids))
            logits = test_padding.logits(arrays, rope, spec.model, 0, 0)[-1]
            assert logits[token] > logits.max() - 0.01 * np.ptp(logits)
            ids.append(token)
    backend.close()


@pytest.mark.parametrize("adapted", [False, True])
def test_sequences_of_a_batch_have_the_tokens_that_they_have_alone(made, driver, adapted):
    """By GEMVs, and by GEMMs where there are adapters; a prompt of 95 tokens is dequantized for, others are not."""
    _, engine, manifest, adapter = made
    own = requests if adapted else dataclasses.replace(requests, adapters=None)

    def load(**options) -> CudaBackend:
        config = EngineConfig(engine, lora_adapters=(adapter,) if adapted else (), tune_kernels=False, **options)
        return CudaBackend.load(engine, manifest, config)

    one = load()
    alone = {index: own.alone(one, index) for index in range(4)}
    one.close()
    several = load(max_batch=4)
    assert own.together(several, {index: index for index in range(4)}) == alone
    several.close()
    assert len({tuple(tokens) for tokens in alone.values()}) == 4


def test_an_engine_takes_what_its_plan_says(made, driver):
    _, engine, manifest, _ = made
    config = EngineConfig(engine, tune_kernels=False)
    planned = CudaBackend.plan(engine, manifest, config).item("weights")
    spec = CudaSpec.create(manifest, config)
    assert planned == sum(array.nbytes for array in weight_arrays(spec).values())
    held = sum(file.stat().st_size for file in engine.glob("weights.safetensors"))
    rope = 4 * math.prod(spec.rope_shape)
    assert abs(held - rope - planned) < 256 * len(weight_arrays(spec))  # what fills arrays up, and the file's header


def test_groups_that_the_kernels_do_not_read_are_refused(made):
    _, engine, manifest, _ = made
    for size in (16, 48, 256):
        with pytest.raises(EngineDirectoryError, match=f"groups of {size}"):
            CudaSpec.create(dataclasses.replace(manifest, group_size=size), EngineConfig(engine))


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("name", FORMATS)
def test_launches_fit_the_gpu(name, gpu):
    """The sums of each group are in dynamic shared memory, of one vector and of eight, and in every stage of X."""
    stored_as, layout = FORMATS[name], LAYOUTS[name]
    for rows, cols in MATRICES:
        weight = PackedWeight(DeviceArray(1 << 20, layout.tiles_shape(rows, cols), "uint8"), stored_as, rows, cols)
        assert weight.sums == weight.vector_sums == layout.parts * (1 + layout.has_zeros)
        problem = weight.gemv_problem(rows)
        for config in problem.candidates(gpu):
            assert problem.shared(config) + STATIC_SHARED <= gpu.max_shared
            assert problem.shared(config) - config.shared(problem.groups, problem.tile_bytes) >= 4 * (
                problem.groups * weight.sums
            )
        for count in (2, 8):
            config, shared = problem.for_vectors(problem.rule(gpu, FALLBACK), count, gpu)
            if config.depth > 1:
                assert shared + ROWS_STATIC_SHARED <= gpu.max_shared
        for tokens in (8, 16, 32):
            gemm = dataclasses.replace(linear_batch.gemm_problem(weight, 0), tokens=tokens)
            assert gemm.sums == weight.sums
            for gemm_config in gemm.candidates(gpu):
                shared = gemm_config.shared(gemm.tile_bytes, tokens, gemm.sums)
                assert shared + 1024 <= gpu.max_shared
                stages = gemm_config.buffers * gemm_config.stage * tokens * (256 + 4 * weight.sums)
                warps = gemm_config.row_warps * gemm_config.k_warps
                assert shared >= stages + warps * gemm_config.depth * 2 * gemm.tile_bytes


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Olmo2ForCausalLM"])
def test_act_order_is_kept_where_norms_come_first_and_else_told(tmp_path, caplog, architecture):
    """As the format to build unless told otherwise, and in the manifest."""
    config = CONFIG | dict(architectures=[architecture], model_type="olmo2" if "Olmo2" in architecture else "llama")
    plain = write_random_checkpoint(tmp_path / "plain", config, scale=0.15)
    scheme = Scheme("gptq", group_size=32, act_order=True)
    checkpoint = quantized_checkpoints.quantize(plain, tmp_path / "checkpoint", scheme)
    keeps = architecture == "LlamaForCausalLM"
    assert default_quantization(checkpoint, CAPABILITIES.keeps_order) == ("int4_awq" if keeps else "")
    assert default_quantization(checkpoint) == "", "onnxruntime keeps none"
    manifest = build_cuda(checkpoint, tmp_path / "engine", quantization="int4", max_context=64)
    assert manifest.options["requantized"] == (0 if keeps else 8)
    assert ("rounded anew" in caplog.text) == (not keeps) and bool(manifest.options["ordered"]) == keeps
    if not keeps:
        with pytest.raises(BuildError, match="not in consecutive groups"):
            build_cuda(checkpoint, tmp_path / "engine", quantization="int4_awq", max_context=64)


def test_parts_in_different_orders_are_rounded_anew(tmp_path, caplog):
    plain = write_random_checkpoint(tmp_path / "plain", CONFIG, scale=0.15)
    scheme = Scheme("gptq", group_size=32, act_order=True)
    directory = quantized_checkpoints.quantize(plain, tmp_path / "checkpoint", scheme)
    file = SafetensorsFile(directory / "model.safetensors")
    tensors = {name: np.array(file.raw(name)) for name in file.names()}
    name = "model.layers.1.self_attn.k_proj.g_idx"
    tensors[name] = np.roll(tensors[name], 1)
    write_safetensors(directory / "model.safetensors", tensors)
    manifest = build_cuda(directory, tmp_path / "engine", quantization="int4_awq", max_context=64)
    assert list(manifest.options["rounding_errors"]) == ["layers.1.qkv"] and "rounded anew" in caplog.text
    _, arrays, _ = built(tmp_path / "engine", manifest, EngineConfig(tmp_path / "engine"))
    assert (arrays["layers.1.qkv_places"] == np.arange(64)).all()
    assert (arrays["layers.0.qkv_places"] != np.arange(64)).any()
    parts = [Checkpoint(directory).read(f"model.layers.1.self_attn.{part}_proj.weight") for part in "qkv"]
    expected = np.concatenate(parts)
    assert 0 < np.linalg.norm(arrays["layers.1.qkv"] - expected) / np.linalg.norm(expected) < 0.12
