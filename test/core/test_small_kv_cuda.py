"""KV caches of 8 bits on the CUDA backend, on a driver in host memory: what is kept, copied and planned.

The numerics of fp8 are held against those of int8 on vectors as models have them.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import checkpoints
from device_steps import GREEDY, TOLERANCE, check_tokens_after_a_prefix, generate
from draft_steps import answer, with_drafts
from engine_core.backends import SequenceStep
from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.build import build_cuda
from engine_core.config import EngineConfig
from engine_core.cuda.kernels import reference
from engine_core.cuda.kernels.attention import AttentionShape
from engine_core.formats.manifest import read_manifest
from engine_core.formats.number_formats import E4M3, to_minifloat
from engine_core.measure.steps import begin, decode, prefill

PROMPT = np.random.default_rng(3).integers(3, 331, size=100).astype(np.int32)
KINDS = ("int8", "fp8")


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    directory = checkpoints.write(tmp_path_factory.mktemp("small_kv"), "qwen3")
    build_cuda(directory, directory / "engine", max_context=131)  # a row of scales is longer than its tokens
    return directory / "engine"


def load(engine_dir, **config) -> CudaBackend:
    return CudaBackend.load(engine_dir, read_manifest(engine_dir), EngineConfig(engine_dir, **config))


def logits_of(backend, prompt: np.ndarray) -> list[np.ndarray]:
    """Of a prompt's last token, and of two steps that feed what a 16-bit cache samples."""
    begin(backend, GREEDY, prompt)
    found, pending = [], prefill(backend, prompt, 0)
    for _ in range(3):
        pending.result()
        found.append(backend._device.download(backend._work["logits"]))
        pending = decode(backend)
    pending.result()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_near_those_of_a_16_bit_cache(engine_dir, driver, kind):
    exact, rounded = load(engine_dir), load(engine_dir, kv_cache_type=kind)
    assert rounded._work["kv_cache"].dtype == kind
    wanted, found = logits_of(exact, PROMPT), logits_of(rounded, PROMPT)
    difference = np.abs(found[0] - wanted[0]).max() / wanted[0].std()
    assert TOLERANCE / 100 < difference < (0.1 if kind == "int8" else 0.3)
    for backend in (exact, rounded):
        backend.close()


@pytest.mark.parametrize("session_memory", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_come_back_bit_for_bit(engine_dir, driver, kind, session_memory):
    check_tokens_after_a_prefix(
        load(engine_dir, kv_cache_type=kind, session_memory=session_memory, prompt_cache_tokens=64, prefill_chunk=64),
        PROMPT,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_slots_and_drafts_give_the_tokens_of_one_sequence(engine_dir, driver, kind):
    alone, together = load(engine_dir, kv_cache_type=kind), load(engine_dir, kv_cache_type=kind, max_batch=3)
    expected = {slot: generate(alone, PROMPT[: 40 + slot], 6) for slot in (0, 2)}
    tokens: dict[int, list] = {0: [], 2: []}
    for slot in tokens:
        prompt = PROMPT[: 40 + slot]
        together.begin(slot, GREEDY, prompt)
        tokens[slot].append(together.step([SequenceStep(slot, prompt)])[0].result())
    for _ in range(5):
        for slot, pending in zip(tokens, together.step([SequenceStep(slot) for slot in tokens]), strict=True):
            tokens[slot].append(pending.result())
    assert tokens == expected
    drafting = load(engine_dir, kv_cache_type=kind, speculation="on")
    steps = answer(drafting, PROMPT[:40], 6, 0, GREEDY)
    assert steps == expected[0] and with_drafts(drafting, PROMPT[:40], steps, 0, GREEDY) == steps
    for backend in (alone, together, drafting):
        backend.close()


@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_is_what_is_taken(engine_dir, driver, kind, max_batch):
    manifest, config = read_manifest(engine_dir), EngineConfig(engine_dir, kv_cache_type=kind, max_batch=max_batch)
    plan = CudaBackend.plan(engine_dir, manifest, config)
    backend = CudaBackend.load(engine_dir, manifest, config)
    arena = max(buffer.nbytes for buffer in driver._buffers.values()) - 512
    assert arena == plan.total - plan.item("runtime")
    shape, spec = backend._spec.attention, backend._spec
    vectors = max_batch * spec.num_layers * 2 * shape.num_kv_heads
    values, scales = vectors * 131 * shape.head_dim, vectors * 136 * 2
    assert 0 <= plan.item("kv_cache") - values - scales < 1024  # each array begins at a multiple of 512 bytes
    backend.close()


def test_an_engine_built_for_an_fp8_cache_opens_with_it(tmp_path, driver):
    directory = checkpoints.write(tmp_path / "checkpoint", "llama3")
    manifest = build_cuda(directory, tmp_path / "engine", max_context=128, kv_cache_type="fp8", quantization="fp8")
    assert manifest.kv_cache_type == "fp8"
    backend = load(tmp_path / "engine")
    assert backend._work["kv_cache"].dtype == "fp8" and None not in generate(backend, PROMPT[:30], 3)
    backend.close()


# --- numerics -----------------------------------------------------------------------------------------------


def errors(vectors: np.ndarray) -> dict[str, float]:
    """The relative error of all elements but the largest of each vector, by the type of the cache."""
    order = np.argsort(np.abs(vectors), axis=-1)[:, :-4]
    small = np.take_along_axis(vectors, order, axis=-1)
    found = {}
    for kind in KINDS:
        values, scales = reference.quantize_vectors(vectors, kind)
        restored = np.take_along_axis(values * scales[:, None], order, axis=-1)
        found[kind] = float(np.linalg.norm(restored - small) / np.linalg.norm(small))
    codes = to_minifloat(vectors.astype(np.float32), E4M3)
    restored = np.take_along_axis(E4M3[codes].astype(np.float64), order, axis=-1)
    found["fp8 without scales"] = float(np.linalg.norm(restored - small) / np.linalg.norm(small))
    return found


def test_fp8_keeps_small_elements_beside_large_ones():
    """Keys whose biases make a few elements hundreds of times larger lose most of the others in int8."""
    vectors = np.random.default_rng(1).standard_normal((500, 64))
    assert errors(vectors)["int8"] < 0.02 < errors(vectors)["fp8"] < 0.04
    for factor in (100, 500):
        larger = vectors.copy()
        larger[:, [3, 17, 40, 41]] *= factor
        found = errors(larger)
        assert found["fp8"] < 0.04 and found["int8"] > 4 * found["fp8"]


@pytest.mark.parametrize("size, times", [(1e-3, 10), (300.0, 1.5)])
def test_scales_keep_fp8_from_small_and_large_vectors(size, times):
    """Without them values below 2^-6 lose bits and those above 448 are cut; with them the size does not matter."""
    found = errors(np.random.default_rng(2).standard_normal((500, 64)) * size)
    assert found["fp8"] < 0.04 and found["fp8 without scales"] > times * found["fp8"]


def test_the_reference_of_fp8_is_the_nearest_value():
    vectors = np.random.default_rng(4).standard_normal((40, 16)) * 7
    values, scales = reference.quantize_vectors(vectors, "fp8")
    assert np.abs(values).max() == 28
    finite = E4M3[~np.isnan(E4M3)].astype(np.float64)
    distance = np.abs(vectors[..., None] - finite * scales[:, None, None]).min(axis=-1)
    assert np.abs(np.abs(vectors - values * scales[:, None]) - distance).max() < 1e-6 * np.abs(vectors).max()
    assert (reference.quantize_vectors(np.zeros((2, 16)), "fp8")[0] == 0).all()


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """What kv_fp8.cuh does where the GPU has no instruction for it, uint8."""
    bits = values.astype(np.float32).view(np.uint32)
    size, sign = bits & 0x7FFFFFFF, bits >> 24 & 0x80
    tiny = np.rint(np.abs(values.astype(np.float32)) * np.float32(512)).clip(0, 1 << 20).astype(np.uint32)
    normal = (size + 0x7FFFF + (size >> 20 & 1) >> 20) - (120 << 3)
    return (sign | np.minimum(np.where(size < 0x3C800000, tiny, normal), 0x7E)).astype(np.uint8)


def test_bits_are_moved_to_the_nearest_value():
    edges = E4M3[:0x7F].astype(np.float32)
    middles = (edges[1:] + edges[:-1]) / 2
    values = np.concatenate([edges, middles, np.nextafter(middles, 0), np.nextafter(middles, np.float32(1e9))])
    values = np.concatenate([values, np.random.default_rng(5).standard_normal(5000) * 50, [449, 464, 470, 1e9, 1e-12]])
    values = np.concatenate([values, -values]).astype(np.float32)
    assert to_e4m3(values).tolist() == to_minifloat(values, E4M3).tolist()


def test_moved_bits_are_the_values_in_16_bits():
    """quantized_to_half of kv_fp8.cuh without its instruction: fp16 times 2^8, bf16 times 2^120."""
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], dtype=np.uint16) << 8
    half = ((codes & 0x8000) | ((codes & 0x7F00) >> 1)).view(np.float16) * np.float16(256)
    wide = ((codes & 0x8000) | ((codes & 0x7F00) >> 4)).astype(np.uint32) << 16
    bf16 = wide.view(np.float32).astype(np.float64) * 2.0**120
    wanted = E4M3[codes >> 8].astype(np.float64)
    assert half.astype(np.float64).tolist() == bf16.tolist() == wanted.tolist()


def test_a_cache_has_one_type():
    with pytest.raises(AssertionError):
        AttentionShape(4, 2, 64, 64, kv_int8=True, kv_fp8=True).validate()
    assert {"KV_INT8": 1, "KV_FP8": 1}.items() <= AttentionShape(4, 2, 64, 64, kv_fp8=True).defines().items()
    assert "KV_FP8" not in AttentionShape(4, 2, 64, 64, kv_int8=True).defines()
