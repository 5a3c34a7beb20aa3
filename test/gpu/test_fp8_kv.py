"""The fp8 KV cache on the GPU: its attention against the reference, its sequences against each other."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_bench import error, from_bits, to_bits
from sanitizer_model import VOCAB, make_backend
from test_kernels import TOLERANCE, TRAITS, _Attention, _check_decode

from device_steps import check_tokens_after_a_prefix, generate
from draft_steps import answer, with_drafts
from engine_core.backends import SequenceStep
from engine_core.cuda.kernels import KernelArgumentError, attention, reference
from engine_core.formats.number_formats import E4M3
from engine_core.request import SamplingParams

pytestmark = pytest.mark.gpu

SHAPES = [
    (32, 8, 128, False),
    (14, 2, 64, False),
    (16, 8, 128, True),
    (6, 2, 96, True),
    (4, 1, 256, False),
    (4, 4, 16, False),
]
PROMPT = np.random.default_rng(2).integers(0, VOCAB, 100).astype(np.int32)


def make_case(bench, heads, kv_heads, head_dim, qk_norm, dtype, count, context, **traits) -> _Attention:
    return _Attention(bench, heads, kv_heads, head_dim, qk_norm, dtype, count, context, kv_fp8=True, **traits)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("heads, kv_heads, head_dim, qk_norm", SHAPES)
@pytest.mark.parametrize("position", [0, 1, 63, 200, 1499])
def test_decode(bench, heads, kv_heads, head_dim, qk_norm, position, dtype):
    _check_decode(make_case(bench, heads, kv_heads, head_dim, qk_norm, dtype, 1, 1500), position)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("heads, kv_heads, head_dim, traits", TRAITS.values(), ids=TRAITS)
def test_decode_of_other_families(bench, heads, kv_heads, head_dim, traits, dtype):
    case = make_case(bench, heads, kv_heads, head_dim, True, dtype, 1, 1500, norm_offset=1.0, **traits)
    _check_decode(case, 613)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("heads, kv_heads, head_dim, qk_norm", SHAPES)
@pytest.mark.parametrize("start, count", [(0, 7), (5, 64), (0, 130), (200, 33)])
def test_prefill(bench, heads, kv_heads, head_dim, qk_norm, start, count, dtype):
    case = make_case(bench, heads, kv_heads, head_dim, qk_norm, dtype, count, 301)
    chunk, inputs = bench.chunk(start, count), (case.kernels, case.shape, case.qkv, case.cache)
    attention.rope_append(*inputs, case.rope, chunk, norms=case.norms, scales=case.scales)(bench.stream)
    attention.attention_prefill(*inputs, case.output, chunk, [count], case.scales)(bench.stream, count)
    case.check(start, TOLERANCE[dtype] * 4)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_values_of_every_size_are_rounded_to_the_nearest(bench, dtype):
    """Elements down to less than the smallest E4M3 beside the largest; V, which is not rotated, bit for bit."""
    case = make_case(bench, 4, 2, 128, False, dtype, 9, 64)
    sizes = np.exp2(-bench.random.integers(0, 16, case.heads.shape)).astype(np.float64)
    values = case.heads * sizes
    stored = to_bits(values.reshape(9, -1), dtype)
    bench.device.upload(case.qkv, stored)
    exact = from_bits(stored, dtype).reshape(case.heads.shape)[:, 6:].swapaxes(0, 1)
    attention.rope_append(
        case.kernels, case.shape, case.qkv, case.cache, case.rope, bench.chunk(3, 9), scales=case.scales
    )(bench.stream)
    codes = bench.device.download(case.cache)[1, :, 3:12]
    scales = bench.get(case.scales)[1, :, 3:12]
    wanted, steps = reference.quantize_vectors(exact, "fp8")
    assert (scales == steps).all()
    found = E4M3[codes].astype(np.float64)
    assert (found != wanted).mean() < 2e-3  # a quotient next to the middle of two
    assert error(found, wanted) < 1e-3


def test_a_nan_is_seen_and_zeros_stay_zeros(bench):
    case = make_case(bench, 4, 2, 64, False, "fp16", 3, 64)
    values = bench.device.download(case.qkv).reshape(3, 8, 64)
    values[1, 5, 7] = np.nan  # a key
    values[0, 6] = 0  # a value
    bench.device.upload(case.qkv, values)
    inputs = (case.kernels, case.shape, case.qkv, case.cache)
    attention.rope_append(*inputs, case.rope, bench.chunk(4, 3), scales=case.scales)(bench.stream)
    scales, codes = bench.get(case.scales), bench.device.download(case.cache)
    assert np.isnan(scales[0, 1, 5]) and np.isfinite(scales[:, 0, :7]).all()
    assert scales[1, 0, 4] == 0 and (codes[1, 0, 4] & 0x7F == 0).all()


def test_a_cache_of_the_other_type_is_refused(bench):
    case = make_case(bench, 4, 2, 64, False, "fp16", 3, 64)
    cache = bench.poisoned(case.cache.shape, "int8")
    with pytest.raises(KernelArgumentError, match="cache is int8"):
        attention.attention_prefill(
            case.kernels, case.shape, case.qkv, cache, case.output, bench.chunk(0, 3), [], case.scales
        )


@pytest.mark.parametrize("use_cuda_graph", [True, False])
@pytest.mark.parametrize("weights", ["fp16", "int4"])
def test_prefixes_come_back_bit_for_bit(weights, use_cuda_graph):
    check_tokens_after_a_prefix(make_backend(weights, "fp8", use_cuda_graph), PROMPT)


@pytest.mark.parametrize("weights", ["fp16", "int8"])
def test_slots_and_drafts_give_the_same_tokens(weights):
    backend = make_backend(weights, "fp8", True, max_batch=3, drafts=True)
    allocations = backend._device.allocations
    sampling, expected = SamplingParams(seed=1), {}
    for slot in (0, 2):
        expected[slot] = answer(backend, PROMPT[: 60 + slot], 12, slot, sampling)
        assert with_drafts(backend, PROMPT[: 60 + slot], expected[slot], slot, sampling) == expected[slot]
    tokens: dict[int, list] = {}
    for slot in expected:
        prompt = PROMPT[: 60 + slot]
        backend.begin(slot, sampling, prompt)
        tokens[slot] = [backend.step([SequenceStep(slot, prompt)])[0].result()]
    for _ in range(11):
        for slot, pending in zip(tokens, backend.step([SequenceStep(slot) for slot in tokens]), strict=True):
            tokens[slot].append(pending.result())
    assert tokens == expected and backend._device.allocations == allocations
    backend.close()


def test_graphs_change_nothing():
    found = []
    for use_cuda_graph in (True, False):
        backend = make_backend("fp16", "fp8", use_cuda_graph)
        found.append(generate(backend, PROMPT, 12))
        backend.close()
    assert found[0] == found[1] and None not in found[0]
