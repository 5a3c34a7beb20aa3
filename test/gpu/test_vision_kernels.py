"""The kernels of encoders against their references in float64. Outputs are poisoned first."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_bench import error

from engine_core.cuda.kernels import attention, linear, reference, vision

pytestmark = pytest.mark.gpu

TOLERANCE = {"fp16": 1e-3, "bf16": 6e-3}
EPS = 1e-6


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("rows, cols", [(1, 48), (7, 768), (36, 1152), (3, 4608)])
def test_layer_norm(bench, rows, cols, dtype):
    values, x = bench.normal((rows, cols), "fp32", 3.0)
    params, p = bench.normal((3, cols), "fp32")
    output = bench.poisoned((rows, cols), dtype)
    vision.layer_norm(bench.kernels(dtype), values, params, output, EPS)(bench.stream)
    assert error(bench.get(output), reference.layer_norm(x, p, EPS)) < TOLERANCE[dtype]


@pytest.mark.parametrize("merge, side, cols", [(2, 4, 48), (4, 32, 768), (3, 27, 1152)])
def test_layer_norm_of_merged_patches(bench, merge, side, cols):
    values, x = bench.normal((side**2, cols), "fp32", 3.0)
    params, p = bench.normal((3, cols), "fp32")
    output = bench.poisoned((side**2 // merge**2, merge**2 * cols), "fp16")
    vision.layer_norm(bench.kernels("fp16"), values, params, output, EPS, (merge, side))(bench.stream)
    expected = reference.merge_patches(reference.layer_norm(x, p, EPS), merge, side)
    assert error(bench.get(output), expected) < TOLERANCE["fp16"]


@pytest.mark.parametrize("size, patch", [(60, 14), (512, 16), (64, 8)])
def test_patches_of_a_tile(bench, size, patch):
    tile, values = vision.Tile(3, size, patch), 3 * patch**2
    pixels, x = bench.normal(tile.shape, "fp32")
    output = bench.poisoned((tile.side**2, -(-values // 8) * 8), "fp16")
    vision.patches(bench.kernels("fp16"), pixels, output, values, tile)(bench.stream)
    found, expected = bench.get(output), reference.cut_patches(x, patch).astype(np.float16)
    assert (found[:, :values] == expected).all() and (found[:, values:] == 0).all()


def test_patches_that_are_cut(bench):
    pixels, x = bench.normal((24, 1536 + 12), "fp32")
    output = bench.poisoned((24, 1552), "fp16")
    vision.patches(bench.kernels("fp16"), pixels, output, 1548)(bench.stream)
    found = bench.get(output)
    assert (found[:, :1548] == x.astype(np.float16)).all() and (found[:, 1548:] == 0).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("rows, width", [(1, 8), (36, 80), (5, 4304)])
@pytest.mark.parametrize("exact", [False, True])
def test_bias_gelu(bench, rows, width, exact, dtype):
    values, x = bench.normal((rows, width), dtype, 3.0)
    bias, b = bench.normal((width,), dtype)
    linear.bias_gelu(bench.kernels(dtype), values, bias, exact=exact)(bench.stream)
    assert error(bench.get(values), reference.bias_gelu(x, b, exact=exact)) < TOLERANCE[dtype]


def test_embedding_of_tokens_and_features(bench):
    table, t = bench.normal((50, 264), "fp16")
    features, f = bench.normal((9, 264), "fp32")
    tokens = np.array([3, 50, 49, 58, 0, 54], dtype=np.int32)
    output = bench.poisoned((6, 264), "fp32")
    embed = linear.embed(bench.kernels("fp16"), table, bench.put(tokens, "int32"), output, scale=2.0, features=features)
    embed(bench.stream)
    assert (bench.get(output) == np.concatenate([2 * t, f])[tokens]).all()


# heads, head_dim in memory and of the model, patches, elements of a head that are turned
SHAPES = [(3, 16, 16, 16, 0), (12, 64, 64, 1024, 0), (16, 80, 72, 729, 0), (2, 32, 32, 100, 32), (16, 64, 64, 256, 64)]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("heads, head_dim, head_size, count, rotated", SHAPES)
def test_attention_of_an_encoder(bench, heads, head_dim, head_size, count, rotated, dtype):
    """Biases, rotation and attention in which every patch sees all, in arrays with room for more patches."""
    kernels, rows = bench.kernels(dtype), count + 5
    shape = attention.AttentionShape(heads, heads, head_dim, rows, head_size=head_size, rotated=rotated)
    qkv, values = bench.normal((rows, shape.qkv_width), dtype)
    bias, b = bench.normal((shape.qkv_width,), dtype)
    angles = bench.random.uniform(0, 6, (rows, max(rotated // 2, 1)))
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    cache = bench.poisoned((2, heads, rows, head_dim), dtype)
    output, chunk = bench.poisoned((rows, heads * head_dim), dtype), bench.chunk(0, count)
    rope = bench.put(table, "fp32")
    attention.rope_append(kernels, shape, qkv, cache, rope, chunk, bias=bias)(bench.stream)
    attend = attention.attention_prefill(kernels, shape, qkv, cache, output, chunk, [count, rows], causal=False)
    attend(bench.stream, rows)
    q, k, v = (values[:count] + b).reshape(count, 3, heads, head_dim).swapaxes(0, 1)
    if rotated:
        q, k = (reference.rotate(part, table[:count].astype(np.float64)) for part in (q, k))
    keys, own = k.swapaxes(0, 1), v.swapaxes(0, 1)
    assert error(bench.get(cache)[:, :, :count], np.stack([keys, own])) < TOLERANCE[dtype]
    expected = reference.attention(q, keys, own, 0, head_size**-0.5, causal=False)
    assert error(bench.get(output)[:count], expected.reshape(count, -1)) < 4 * TOLERANCE[dtype]
