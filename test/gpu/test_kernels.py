"""Each kernel against its reference in float64, over tables of shapes with odd sizes. Outputs are poisoned first."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_bench import epilogue_cases, error, from_bits, to_bits

from engine_core.cuda.driver import DeviceArray
from engine_core.cuda.kernels import (
    KernelArgumentError,
    attention,
    experts,
    linear,
    linear_batch,
    linear_packed,
    reference,
    sampling,
)
from engine_core.cuda.kernels.launch_configs import (
    GemvConfig,
    Gpu,
    LaunchConfigs,
    PackedGemmProblem,
    PrefillAttentionConfig,
)
from packed_weights import format_of, random_tiles

pytestmark = pytest.mark.gpu

TOLERANCE = {"fp16": 1e-3, "bf16": 6e-3, "fp32": 2e-5}  # of outputs rounded to the type
EPS = 1e-5
# Columns: below one load of a warp, no multiple of one, one, several, more than a row of warps.
SHAPES = [(8, 8), (6, 96), (130, 264), (384, 256), (1000, 1536), (2048, 2048), (3072, 4096), (512, 14336), (34, 28672)]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("rows, cols", SHAPES)
@pytest.mark.parametrize("normed", [False, True])
def test_gemv_with_every_epilogue(bench, rows, cols, normed, dtype):
    kernels = bench.kernels(dtype)
    weight, w = bench.normal((rows, cols), dtype, cols**-0.5)
    vector, x = bench.normal((cols,), "fp32" if normed else dtype, 3.0)
    norm_weight, g = bench.normal((cols,), dtype)
    norm = {"norm_weight": norm_weight, "norm_eps": EPS} if normed else {}
    sums = w @ (reference.rms_norm(x, g, EPS) if normed else x)
    for epilogue, (output, more, expected) in epilogue_cases(bench, sums, dtype).items():
        linear.gemv(kernels, weight, vector, output, epilogue, **norm, **more)(bench.stream)
        assert error(bench.get(output), expected) < TOLERANCE[output.dtype], epilogue


@pytest.mark.parametrize("config", [GemvConfig(4, 4, 4, 2), GemvConfig(2, 1, 1, 8, 2), GemvConfig(3, 2, 2, 3)], ids=str)
def test_gemv_in_other_configurations(bench, config):
    weight, w = bench.normal((1031, 2056), "fp16", 0.02)
    vector, x = bench.normal((2056,), "fp16")
    output = bench.poisoned((1031,), "fp32")
    linear.gemv(bench.kernels("fp16"), weight, vector, output, linear.LOGITS, config=config)(bench.stream)
    assert error(bench.get(output), w @ x) < TOLERANCE["fp32"]


def test_gemv_refuses_what_it_cannot_read(bench):
    weight, _ = bench.normal((16, 64), "fp16")
    vector, _ = bench.normal((64,), "fp16")
    output = bench.poisoned((16,), "fp32")
    kernels = bench.kernels("fp16")
    with pytest.raises(KernelArgumentError, match="vector"):
        linear.gemv(kernels, weight, vector, output, linear.LOGITS, norm_weight=vector)
    shifted = DeviceArray(vector.address + 2, (64,), "fp16")
    with pytest.raises(KernelArgumentError, match="16 bytes"):
        linear.gemv(kernels, weight, shifted, output, linear.LOGITS)


# One tile, one row of warps and more, groups that do not divide among warps, more tiles than CTAs; then tiles that are
# not full: to the right (the 576 and 960 columns of SmolLM2), below, both.
PACKED_SHAPES = [
    (16, 128),
    (48, 384),
    (1280, 256),
    (256, 640),
    (160, 896),
    (1008, 2048),
    (6144, 4096),
    (528, 4864),
    (256, 14336),
    (960, 576),
    (2560, 960),
    (576, 1536),
    (1002, 128),
    (50258, 72),
    (26, 2568),
]


class _Packed:
    """A matrix of the format ``kind`` in packed tiles, and what it is in float64."""

    def __init__(self, bench, kind: str, rows: int, cols: int, dtype: str) -> None:
        tiles = random_tiles(bench.random, kind, rows, cols, dtype)
        self.matrix = linear_packed.PackedWeight(bench.put(tiles, "uint8"), format_of(kind), rows, cols)
        self.weight = reference.packed_weight(tiles, kind, (rows, cols), dtype)


def _packed_scratch(bench, rows: int, cols: int, num_sms: int):
    """(partial sums, counters) of a PackedGemm of 70 tokens."""
    num_sums, num_counters = linear_packed.packed_scratch([(rows, cols)], 70, num_sms)
    return bench.poisoned((num_sums,), "fp32"), bench.put(np.zeros(num_counters, dtype=np.uint32), "uint32")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("rows, cols", [*PACKED_SHAPES, (28672, 256), (70000, 128)])
@pytest.mark.parametrize("kind", linear_packed.LAYOUTS)
def test_packed_gemm_of_some_tokens(bench, rows, cols, kind, dtype):
    kernels, packed = bench.kernels(dtype), _Packed(bench, kind, rows, cols, dtype)
    vectors, x = bench.normal((70, cols), dtype, 3.0)
    partial, counters = _packed_scratch(bench, rows, cols, bench.device.num_sms)
    inputs = (kernels, packed.matrix, vectors)
    rounding = TOLERANCE[dtype]  # of scaled weights, and of what is stored in 16 bits
    for count in (1, 8, 33, 70):
        scratch = (bench.chunk(5, count), partial, counters)
        output = bench.poisoned((70, rows), dtype)
        linear_packed.PackedGemm(*inputs, output, linear.STORE, *scratch)(bench.stream, count)
        found, sums = bench.get(output), x[:count] @ packed.weight.T
        assert error(found[:count], sums) < rounding
        assert np.isnan(found[count:]).all()
        residual, before = bench.normal((70, rows), "fp32")
        linear_packed.PackedGemm(*inputs, residual, linear.RESIDUAL, *scratch)(bench.stream, count)
        found = bench.get(residual)
        assert error(found[:count] - before[:count], sums) < rounding
        assert (found[count:] == before[count:]).all()
        activated = bench.poisoned((70, rows // 2), dtype)
        linear_packed.PackedGemm(*inputs, activated, linear.SILU, *scratch)(bench.stream, count)
        found = bench.get(activated)
        assert error(found[:count], reference.silu_multiply(sums)) < rounding
        assert np.isnan(found[count:]).all()
    assert (bench.get(counters) == 0).all()


@pytest.mark.parametrize("num_sms, max_shared", [(16, 166912), (8, 166912), (20, 101376)])
@pytest.mark.parametrize("rows, cols", [(6144, 4096), (528, 4864), (1008, 2048)])
@pytest.mark.parametrize("kind", linear_packed.LAYOUTS)
def test_packed_gemm_as_smaller_gpus_divide_it(bench, rows, cols, kind, num_sms, max_shared):
    """The SMs of an AGX Orin, an Orin Nano and a small RTX: more rows a CTA, and CTAs that come in rounds."""
    packed, count = _Packed(bench, kind, rows, cols, "fp16"), 70
    gpu = Gpu("smaller", 87, num_sms, max_shared)
    config = LaunchConfigs(gpu).lookup(PackedGemmProblem(*packed.matrix.sizes, packed.matrix.format.bits))
    partial, counters = _packed_scratch(bench, rows, cols, num_sms)
    vectors, x = bench.normal((count, cols), "fp16", 3.0)
    output = bench.poisoned((count, rows), "fp16")
    arrays = (packed.matrix, vectors, output, linear.STORE, bench.chunk(5, count), partial, counters)
    linear_packed.PackedGemm(bench.kernels("fp16"), *arrays, config=config)(bench.stream, count)
    assert error(bench.get(output), x @ packed.weight.T) < TOLERANCE["fp16"]
    assert (bench.get(counters) == 0).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("rows, cols", PACKED_SHAPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("kind", linear_packed.LAYOUTS)
def test_gemv_packed_with_every_epilogue_and_dequantize(bench, rows, cols, normed, kind, dtype):
    kernels = bench.kernels(dtype)
    packed = _Packed(bench, kind, rows, cols, dtype)
    matrix, w = packed.matrix, packed.weight
    vector, x = bench.normal((cols,), "fp32" if normed else dtype, 3.0)
    norm_weight, g = bench.normal((cols,), dtype)
    norm = {"norm_weight": norm_weight, "norm_eps": EPS} if normed else {}
    if normed:  # x is rounded to the type, as transformers does
        x = from_bits(to_bits(reference.rms_norm(x, g, EPS), dtype), dtype)
    sums = w @ x
    for epilogue, (output, more, expected) in epilogue_cases(bench, sums, dtype).items():
        linear_packed.gemv_packed(kernels, matrix, vector, output, epilogue, **norm, **more)(bench.stream)
        # A normalised value near the middle of two of the type may be rounded the other way.
        # What OFFSETS add in fp16 and is taken off again costs some of float32's last digits.
        allowed = TOLERANCE[dtype] if normed else max(TOLERANCE[output.dtype], 5e-5)
        assert error(bench.get(output), expected) < allowed, epilogue
    weight = bench.poisoned((rows, cols), dtype)
    linear_packed.dequantize_packed(kernels, matrix, weight)(bench.stream)
    assert (bench.get(weight) == from_bits(to_bits(w.astype(np.float32), dtype), dtype)).all()


@pytest.mark.parametrize("kind", ["fp16", *linear_packed.LAYOUTS])
@pytest.mark.parametrize("rows, cols", [(50257, 576), (1003, 96), (1, 8)])
def test_logits_of_an_odd_vocabulary(bench, rows, cols, kind):
    kernels, (vector, x) = bench.kernels("fp16"), bench.normal((cols,), "fp16")
    output = bench.poisoned((rows + 3,), "fp32")
    logits = DeviceArray(output.address, (rows,), "fp32")
    if kind == "fp16":
        weight, w = bench.normal((rows, cols), "fp16", cols**-0.5)
        linear.gemv(kernels, weight, vector, logits, linear.LOGITS)(bench.stream)
    else:
        packed = _Packed(bench, kind, rows, cols, "fp16")
        w = packed.weight
        linear_packed.gemv_packed(kernels, packed.matrix, vector, logits, linear.LOGITS)(bench.stream)
    found = bench.get(output)
    assert error(found[:rows], w @ x) < 5e-5
    assert np.isnan(found[rows:]).all()  # nothing is written for rows that only fill a tile up


@pytest.mark.parametrize("kind", ["fp16", *linear_packed.LAYOUTS])
@pytest.mark.parametrize("cols, size", [(96, 90), (576, 570), (2048, 2041)])
def test_a_norm_of_fewer_values_than_there_are_columns(bench, cols, size, kind):
    """The others are zeros, as in a model whose hidden size the kernels do not read."""
    kernels, rows = bench.kernels("fp16"), 64
    hidden = bench.random.standard_normal((3, cols)).astype(np.float32) * 3
    hidden[:, size:] = 0
    array, vector = bench.put(hidden, "fp32"), bench.put(hidden[0], "fp32")
    weight, g = bench.normal((cols,), "fp16")
    expected = reference.rms_norm(hidden.astype(np.float64), g, EPS, size)
    output = bench.poisoned((3, cols), "fp16")
    linear.rms_norm(kernels, array, weight, output, EPS, norm_size=size)(bench.stream)
    assert error(bench.get(output), expected) < TOLERANCE["fp16"]
    norm = {"norm_weight": weight, "norm_eps": EPS, "norm_size": size}
    output = bench.poisoned((rows,), "fp32")
    if kind == "fp16":
        matrix, w = bench.normal((rows, cols), "fp16", cols**-0.5)
        linear.gemv(kernels, matrix, vector, output, linear.LOGITS, **norm)(bench.stream)
    else:
        packed = _Packed(bench, kind, rows, cols, "fp16")
        w = packed.weight
        linear_packed.gemv_packed(kernels, packed.matrix, vector, output, linear.LOGITS, **norm)(bench.stream)
    assert error(bench.get(output), w @ expected[0]) < TOLERANCE["fp16"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("rows, cols", [(1024, 640), (40, 72), (2000, 4096)])
@pytest.mark.parametrize("epilogue", [linear.STORE, linear.RESIDUAL, linear.SILU, linear.LOGITS, linear.GELU])
@pytest.mark.parametrize("kind", ["fp16", "int8", "int4"])
def test_a_bias_in_every_epilogue(bench, kind, epilogue, rows, cols, dtype):
    """With a norm that has an offset and, of logits, a soft cap: GEMV, GEMM of a batch and of a short prompt."""
    kernels, count = bench.kernels(dtype), 5
    if kind == "fp16":
        matrix, w = bench.normal((rows, cols), dtype, cols**-0.5)
    else:
        packed = _Packed(bench, kind, rows, cols, dtype)
        matrix, w = packed.matrix, packed.weight
    weight, g = bench.normal((cols,), dtype, 0.3)
    bias, b = bench.normal((rows,), dtype)
    hidden, h = bench.normal((cols,), "fp32", 3.0)
    vectors, v = bench.normal((count, cols), dtype)
    is_gated, is_float = epilogue in linear.GATED, epilogue in (linear.RESIDUAL, linear.LOGITS)
    width, output_dtype = rows // 2 if is_gated else rows, "fp32" if is_float else dtype

    def expected(sums: np.ndarray, before: np.ndarray) -> np.ndarray:
        sums = sums + b
        if is_gated:
            return (reference.silu_multiply if epilogue == linear.SILU else reference.gelu_multiply)(sums)
        return {linear.RESIDUAL: before + sums, linear.LOGITS: 2 * np.tanh(sums / 2)}.get(epilogue, sums)

    cap = {"softcap": 2.0} if epilogue == linear.LOGITS else {}
    output, before = bench.normal((width,), output_dtype)
    norm = {"norm_weight": weight, "norm_eps": EPS, "norm_offset": 1.0}
    gemv = linear.gemv if kind == "fp16" else linear_packed.gemv_packed
    gemv(kernels, matrix, hidden, output, epilogue, bias=bias, **norm, **cap)(bench.stream)
    normed = reference.rms_norm(h, g + 1, EPS)
    assert error(bench.get(output), expected(w @ normed, before)) < TOLERANCE[dtype]

    counters = bench.put(np.zeros(1 << 12, dtype=np.uint32), "uint32")
    scratch = (bench.chunk(0, count), bench.poisoned((1 << 22,), "fp32"), counters)
    output, before = bench.normal((count, width), output_dtype)
    arrays = (kernels, matrix, vectors, output, epilogue, *scratch)
    linear_batch.gemm_batch(*arrays, bias=bias, **cap)(bench.stream)
    assert error(bench.get(output), expected(v @ w.T, before)) < TOLERANCE[dtype]
    if kind == "fp16" or epilogue == linear.LOGITS:
        return
    output, before = bench.normal((count, width), output_dtype)
    arrays = (kernels, matrix, vectors, output, epilogue, *scratch)
    linear_packed.PackedGemm(*arrays, bias=bias)(bench.stream, count)
    assert error(bench.get(output), expected(v @ w.T, before)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("norm_shares", [False, True])
@pytest.mark.parametrize("tokens, count, number, cols", [(1, 8, 128, 2048), (70, 3, 5, 72), (2, 32, 512, 264)])
def test_experts_that_are_picked(bench, tokens, count, number, cols, norm_shares, dtype):
    vectors, x = bench.normal((tokens, cols), dtype)
    router, r = bench.normal((number, cols), dtype, cols**-0.5)
    picked, shares = bench.poisoned((tokens, count), "int32"), bench.poisoned((tokens, count), "fp32")
    experts.route(bench.kernels(dtype), vectors, router, picked, shares, norm_shares=norm_shares)(bench.stream)
    expected, parts = reference.route(x @ r.T, count, norm_shares)
    assert (bench.device.download(picked) == expected).all()
    assert error(bench.get(shares), parts) < 1e-4


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("tokens, hidden, inner", [(1, 2048, 768), (37, 144, 48)])
@pytest.mark.parametrize("kind", ["fp16", *linear_packed.LAYOUTS])
def test_the_matrices_of_experts(bench, kind, tokens, hidden, inner, dtype):
    kernels, number, count = bench.kernels(dtype), 6, 3
    weights = []
    for rows, cols in ((2 * inner, hidden), (hidden, inner)):
        if kind == "fp16":
            matrix, w = bench.normal((number * rows, cols), dtype, cols**-0.5)
        else:
            packed = _Packed(bench, kind, number * rows, cols, dtype)
            matrix, w = packed.matrix, packed.weight
        weights.append((matrix, w.reshape(number, rows, cols)))
    ids = np.stack([bench.random.permutation(number)[:count] for _ in range(tokens)]).astype(np.int32)
    picked, (vectors, x) = bench.put(ids, "int32"), bench.normal((tokens, hidden), dtype)
    (gate_up, g), (down, d) = weights
    output = bench.poisoned((tokens, count, inner), dtype)
    experts.gemv_experts(kernels, gate_up, number, picked, vectors, output, linear.SILU)(bench.stream)
    assert error(bench.get(output), reference.silu_multiply(np.einsum("tkrc,tc->tkr", g[ids], x))) < TOLERANCE[dtype]

    vectors, x = bench.normal((tokens, count, inner), dtype)
    made = bench.poisoned((tokens, count, hidden), "fp32")
    experts.gemv_experts(kernels, down, number, picked, vectors, made, linear.LOGITS)(bench.stream)
    expected = np.einsum("tkrc,tkc->tkr", d[ids], x)
    assert error(bench.get(made), expected) < 5e-5
    (shares, s), (sums, before) = bench.normal((tokens, count), "fp32"), bench.normal((tokens, hidden), "fp32")
    experts.combine(kernels, made, shares, sums)(bench.stream)
    assert error(bench.get(sums), before + np.einsum("tk,tkr->tr", s, expected)) < 5e-5


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("rows, q, k", [(1, 16, 8), (3, 264, 264), (65, 5120, 1024)])
def test_norms_of_q_and_k_over_all_heads(bench, rows, q, k, dtype):
    """In place, and V stays. The last values of Q are zeros that its mean does not count."""
    added = 8
    norms = [bench.normal((size,), dtype) for size in (q, k)]
    values = bench.normal((rows, q + 2 * k), dtype, 3.0)[1]
    values[:, q - added : q] = 0
    qkv = bench.put(to_bits(values, dtype), dtype)
    arrays = (qkv, *(norm for norm, _ in norms))
    linear.qk_norm(bench.kernels(dtype), *arrays, EPS, (q - added, k))(bench.stream)
    found = bench.get(qkv)
    assert error(found[:, :q], reference.rms_norm(values[:, :q], norms[0][1], EPS, q - added)) < TOLERANCE[dtype]
    assert error(found[:, q : q + k], reference.rms_norm(values[:, q : q + k], norms[1][1], EPS)) < TOLERANCE[dtype]
    assert (found[:, q + k :] == values[:, q + k :]).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("rows, cols", [(1, 8), (3, 264), (65, 4096)])
def test_rms_norm_embed_silu_bias(bench, rows, cols, dtype):
    kernels, stream = bench.kernels(dtype), bench.stream
    hidden, h = bench.normal((rows, cols), "fp32", 3.0)
    weight, g = bench.normal((cols,), dtype)
    output = bench.poisoned((rows, cols), dtype)
    linear.rms_norm(kernels, hidden, weight, output, EPS)(stream)
    assert error(bench.get(output), reference.rms_norm(h, g, EPS)) < TOLERANCE[dtype]
    delta, d = bench.normal((rows, cols), dtype)
    output = bench.poisoned((rows, cols), dtype)
    linear.rms_norm(kernels, hidden, weight, output, EPS, delta)(stream)
    assert error(bench.get(output), reference.rms_norm(h + d, g, EPS)) < TOLERANCE[dtype]
    assert error(bench.get(hidden), h + d) < 1e-6

    total, before = bench.normal((rows, cols), "fp32")
    rounded = bench.poisoned((rows, cols), dtype)
    linear.rms_norm(kernels, hidden, weight, total, EPS, rounded=rounded)(stream)
    assert error(bench.get(total), before + reference.rms_norm(h + d, g, EPS)) < 1e-5
    assert (bench.get(rounded) == from_bits(to_bits(bench.get(total), dtype), dtype)).all()

    table, t = bench.normal((50, cols), dtype)
    tokens = bench.random.integers(0, 50, rows).astype(np.int32)
    embedded = bench.poisoned((rows, cols), "fp32")
    linear.embed(kernels, table, bench.put(tokens, "int32"), embedded)(stream)
    assert (bench.get(embedded) == t[tokens]).all()

    pairs, p = bench.normal((rows, 2 * cols), dtype)
    output = bench.poisoned((rows, cols), dtype)
    linear.gate_multiply(kernels, pairs, output)(stream)
    assert error(bench.get(output), reference.silu_multiply(p)) < TOLERANCE[dtype]

    linear.gate_multiply(kernels, pairs, output, linear.GELU)(stream)
    assert error(bench.get(output), reference.gelu_multiply(p)) < TOLERANCE[dtype]
    linear.embed(kernels, table, bench.put(tokens, "int32"), embedded, scale=25.25)(stream)
    assert (bench.get(embedded) == 25.25 * t[tokens]).all()
    total, before = bench.normal((rows, cols), "fp32")
    linear.rms_norm(kernels, hidden, weight, total, EPS, norm_offset=1.0)(stream)
    assert error(bench.get(total), before + reference.rms_norm(bench.get(hidden), g + 1, EPS)) < 1e-5
    before = bench.get(total)
    linear.add_bias(kernels, total, weight)(stream)
    assert error(bench.get(total), before + g) < 1e-6

    values, v = bench.normal((rows, cols), dtype)
    linear.add_bias(kernels, values, weight)(stream)
    assert error(bench.get(values), v + g) < TOLERANCE[dtype]
    for array in (values, hidden):
        before = bench.get(array)
        linear.keep_last_row(kernels, array, bench.chunk(7, max(1, rows - 1)))(stream)
        before[0] = before[max(0, rows - 2)]
        assert (bench.get(array) == before).all()


# heads, KV heads, head_dim, query and key norms
ATTENTION = [
    (32, 8, 128, False),
    (32, 8, 64, False),
    (14, 2, 64, False),
    (16, 8, 128, True),
    (8, 8, 32, False),
    (6, 2, 96, False),
    (8, 1, 48, True),
    (4, 2, 256, False),
    (3, 3, 16, False),
]


def _table(shape: attention.AttentionShape) -> np.ndarray:
    frequencies = 10000.0 ** (-np.arange(shape.rope_width) / max(1, shape.rope_width))
    angles = np.arange(shape.max_context)[:, None] * frequencies
    if shape.rope_switch:  # those of short sequences first
        angles = np.concatenate([0.7 * angles[: shape.rope_switch] + 0.1, angles])
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


class _Attention:
    """One layer's arrays and, in float64, what the kernels should make of them."""

    def __init__(
        self,
        bench,
        heads: int,
        kv_heads: int,
        head_dim: int,
        qk_norm: bool,
        dtype: str,
        count: int,
        context: int,
        kv_int8: bool = False,
        **traits: float,
    ):
        self.bench, self.count = bench, count
        self.kernels = bench.kernels(dtype)
        self.shape = attention.AttentionShape(heads, kv_heads, head_dim, context, EPS, qk_norm, kv_int8, **traits)
        self.table = _table(self.shape)
        self.rope = bench.put(self.table, "fp32")
        self.row = self.shape.rope_switch  # of position 0
        self.rope_rows = bench.put(np.array([self.row], dtype=np.int32), "int32") if self.row else None
        self.cache, self.cached = bench.normal((2, kv_heads, context, head_dim), dtype)
        self.scales = None
        self.kv_type = "fp8" if self.shape.kv_fp8 else "int8"
        if self.shape.kv_scaled:  # scales of very different sizes, as a model's tokens have; past the row's end NaN
            self.cached *= np.exp2(bench.random.integers(-6, 2, (2, kv_heads, context, 1)))
            quantized, scales = reference.quantize_vectors(self.cached, self.kv_type)
            padded = np.full((2, kv_heads, self.shape.scale_pitch), np.nan, dtype=np.float16)
            padded[..., :context] = scales
            self.cache = bench.put(to_bits(quantized, self.kv_type), self.kv_type)
            self.scales = bench.put(padded, "fp16")
            self.cached = quantized * scales[..., None]
        self.qkv, values = bench.normal((count, self.shape.qkv_width), dtype)
        self.heads = values.reshape(count, heads + 2 * kv_heads, head_dim)
        self.output = bench.poisoned((count, heads * head_dim), dtype)
        norms = [bench.normal((head_dim,), dtype) for _ in range(2)]
        self.norms = (norms[0][0], norms[1][0]) if qk_norm else None
        self.norm_values = (norms[0][1], norms[1][1])

    def expected(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(output [n, heads × head_dim], cache afterwards)."""
        shape, n = self.shape, self.count
        q, k, v = np.split(self.heads, [shape.num_heads, shape.num_heads + shape.num_kv_heads], axis=1)
        if shape.qk_norm:
            weights = [g + shape.norm_offset for g in self.norm_values]
            q, k = (reference.rms_norm(x, g, EPS) for x, g in zip((q, k), weights, strict=True))
        angles = self.table[self.row + start : self.row + start + n].astype(np.float64)
        q, k = reference.rotate(q, angles), reference.rotate(k, angles)
        cache = self.cached.copy()
        for part, new in enumerate((k.swapaxes(0, 1), v.swapaxes(0, 1))):
            if shape.kv_scaled:
                quantized, scales = reference.quantize_vectors(new, self.kv_type)
                new = quantized * scales[..., None]
            cache[part, :, start : start + n] = new
        options = (shape.scale, shape.window, shape.softcap)
        output = reference.attention(q, cache[0, :, : start + n], cache[1, :, : start + n], start, *options)
        return output.reshape(n, -1), cache

    def check(self, start: int, tolerance: float) -> None:
        """Compare cache and output with the reference after a chunk at ``start``."""
        output, cache = self.expected(start)
        found = self.bench.get(self.cache)
        if self.scales is not None:
            found = found * self.bench.get(self.scales)[..., : self.shape.max_context, None]
            new = slice(start, start + self.count)
            # A value near the middle between two may be rounded the other way, no more than that.
            steps = np.abs(cache[:, :, new]).max(axis=-1, keepdims=True) / 127
            if self.kv_type == "fp8":  # eight to a power of two, and multiples of 2^-9 of the scale
                steps = np.maximum(np.abs(cache[:, :, new]) / 8, steps * 127 / 28 / 512)
            assert (np.abs(found - cache)[:, :, new] <= 1.01 * steps).all()
            assert (np.abs(found - cache)[:, :, new] > 0.1 * steps).mean() < 0.02
        assert error(found, cache) < tolerance
        assert error(self.bench.get(self.output), output) < tolerance


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("heads, kv_heads, head_dim, qk_norm", ATTENTION)
@pytest.mark.parametrize("position", [0, 1, 63, 64, 200, 1498, 1499])
@pytest.mark.parametrize("kv_int8", [False, True], ids=["16-bit", "int8"])
def test_attention_decode(bench, heads, kv_heads, head_dim, qk_norm, position, kv_int8, dtype):
    _check_decode(_Attention(bench, heads, kv_heads, head_dim, qk_norm, dtype, 1, 1500, kv_int8), position)


# What a family has beside the sizes: heads, KV heads, head_dim and the rest of AttentionShape.
TRAITS = {
    "window": (8, 2, 64, dict(window=100)),
    "window of one": (4, 2, 32, dict(window=1)),
    "long window": (8, 1, 128, dict(window=1027)),
    "capped": (4, 2, 256, dict(window=90, softcap=2.5, scale=0.2)),
    "partly rotated": (6, 2, 96, dict(rotated=64)),
    "not rotated": (4, 4, 64, dict(rotated=0)),
    "16 query heads": (16, 1, 64, dict(window=300)),
    "12 query heads": (24, 2, 32, {}),
    "15 query heads": (15, 1, 128, dict(softcap=3.0)),
    "long RoPE": (6, 2, 96, dict(rope_switch=64, rotated=64)),
}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("heads, kv_heads, head_dim, traits", TRAITS.values(), ids=TRAITS)
@pytest.mark.parametrize("position", [0, 99, 100, 613, 1499])
@pytest.mark.parametrize("kv_int8", [False, True], ids=["16-bit", "int8"])
def test_attention_decode_of_other_families(bench, heads, kv_heads, head_dim, traits, position, kv_int8, dtype):
    case = _Attention(bench, heads, kv_heads, head_dim, True, dtype, 1, 1500, kv_int8, norm_offset=1.0, **traits)
    _check_decode(case, position)


def _check_decode(case: _Attention, position: int) -> None:
    bench, heads, head_dim = case.bench, case.shape.num_heads, case.shape.head_dim
    state = np.zeros((), dtype=sampling.STATE)
    state["position"] = position
    num_sms = bench.device.num_sms
    launch = attention.attention_decode(
        case.kernels,
        case.shape,
        case.qkv.reshape(case.shape.qkv_width),
        case.cache,
        case.rope,
        bench.put(np.frombuffer(state.tobytes(), dtype=np.uint8), "uint8"),
        bench.poisoned((case.shape.partial_floats(num_sms),), "fp32"),
        bench.put(np.zeros(case.shape.bundles, dtype=np.uint32), "uint32"),
        case.output.reshape(heads * head_dim),
        norms=case.norms,
        scales=case.scales,
        rope_rows=case.rope_rows,
    )
    launch(bench.stream)
    launch(bench.stream)  # the counters are as before: a second launch gives the same
    case.check(position, TOLERANCE[case.kernels.dtype] * (3 if case.shape.kv_scaled else 1))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("heads, kv_heads, head_dim, qk_norm", ATTENTION)
@pytest.mark.parametrize("start, count", [(0, 1), (0, 7), (5, 64), (0, 130), (200, 33)])
@pytest.mark.parametrize("kv_int8", [False, True], ids=["16-bit", "int8"])
def test_attention_prefill(bench, heads, kv_heads, head_dim, qk_norm, start, count, kv_int8, dtype):
    case = _Attention(bench, heads, kv_heads, head_dim, qk_norm, dtype, count, 301, kv_int8)
    chunk = bench.chunk(start, count)
    inputs = (case.kernels, case.shape, case.qkv, case.cache)
    attention.rope_append(*inputs, case.rope, chunk, norms=case.norms, scales=case.scales)(bench.stream)
    attention.attention_prefill(*inputs, case.output, chunk, [count], case.scales)(bench.stream, count)
    # The weights of the keys are rounded to the type here, too.
    case.check(start, TOLERANCE[dtype] * (4 if kv_int8 else 2))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("heads, kv_heads, head_dim, traits", TRAITS.values(), ids=TRAITS)
@pytest.mark.parametrize("start, count", [(0, 7), (0, 130), (200, 33), (700, 300)])
@pytest.mark.parametrize("kv_int8", [False, True], ids=["16-bit", "int8"])
def test_attention_prefill_of_other_families(bench, heads, kv_heads, head_dim, traits, start, count, kv_int8, dtype):
    sizes = (heads, kv_heads, head_dim, True, dtype, count, 1003, kv_int8)
    case = _Attention(bench, *sizes, norm_offset=1.0, **traits)
    chunk = bench.chunk(start, count)
    inputs, more = (case.kernels, case.shape, case.qkv, case.cache), dict(norms=case.norms, rope_rows=case.rope_rows)
    attention.rope_append(*inputs, case.rope, chunk, scales=case.scales, **more)(bench.stream)
    attention.attention_prefill(*inputs, case.output, chunk, [count], case.scales)(bench.stream, count)
    case.check(start, TOLERANCE[dtype] * (4 if kv_int8 else 2))


@pytest.mark.parametrize("config", [(4, 2, 2, 64), (8, 1, 1, 64), (1, 1, 4, 16)], ids=str)
@pytest.mark.parametrize("window", [1, 15, 16, 64, 129])
@pytest.mark.parametrize("kv_int8", [False, True], ids=["16-bit", "int8"])
def test_windows_in_every_configuration(bench, config, window, kv_int8):
    case = _Attention(bench, 4, 2, 64, False, "fp16", 300, 603, kv_int8, window=window, softcap=4.0)
    chunk = bench.chunk(301, 300)
    inputs = (case.kernels, case.shape, case.qkv, case.cache)
    attention.rope_append(*inputs, case.rope, chunk, scales=case.scales)(bench.stream)
    config = PrefillAttentionConfig(*config)
    launch = attention.attention_prefill(*inputs, case.output, chunk, [300], case.scales, config)
    launch(bench.stream, 300)
    case.check(301, TOLERANCE["fp16"] * (4 if kv_int8 else 2))


_PREFILL_CONFIGS = [
    *((4, 1, 1, 64), (4, 1, 2, 64), (4, 2, 2, 64), (4, 2, 1, 64), (4, 2, 1, 32), (8, 1, 1, 64)),
    *((1, 1, 4, 32), (1, 1, 8, 16), (1, 1, 4, 16)),
]


@pytest.mark.parametrize("config", _PREFILL_CONFIGS, ids=str)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 1, 128), (4, 2, 80)])
@pytest.mark.parametrize("start, count", [(0, 65), (63, 130), (301, 300)])
@pytest.mark.parametrize("kv_int8", [False, True], ids=["16-bit", "int8"])
def test_attention_prefill_in_every_configuration(bench, config, heads, kv_heads, head_dim, start, count, kv_int8):
    dtype = "bf16" if head_dim == 80 else "fp16"
    case = _Attention(bench, heads, kv_heads, head_dim, False, dtype, count, 603, kv_int8)
    chunk = bench.chunk(start, count)
    inputs = (case.kernels, case.shape, case.qkv, case.cache)
    attention.rope_append(*inputs, case.rope, chunk, scales=case.scales)(bench.stream)
    config = PrefillAttentionConfig(*config)
    launch = attention.attention_prefill(*inputs, case.output, chunk, [count], case.scales, config)
    launch(bench.stream, count)
    case.check(start, TOLERANCE[dtype] * (4 if kv_int8 else 2))


@pytest.mark.parametrize("config", [(4, 1, 1, 64), (4, 2, 2, 64), (1, 1, 4, 32)], ids=str)
def test_attention_prefill_follows_scores_that_grow(bench, config):
    """Peaks move late and far: keys grow with their position, so that every tile's scores are above the last one's."""
    case = _Attention(bench, 4, 1, 64, False, "fp16", 200, 603)
    case.cached[0] *= np.linspace(0.01, 6, 603)[None, :, None]
    case.heads[:, 4] *= 6
    bench.device.upload(case.cache, case.cached.astype(np.float16))
    bench.device.upload(case.qkv, case.heads.reshape(200, -1).astype(np.float16))
    case.cached, case.heads = case.cached.astype(np.float16).astype(float), case.heads.astype(np.float16).astype(float)
    chunk = bench.chunk(400, 200)
    inputs = (case.kernels, case.shape, case.qkv, case.cache)
    attention.rope_append(*inputs, case.rope, chunk)(bench.stream)
    config = PrefillAttentionConfig(*config)
    launch = attention.attention_prefill(*inputs, case.output, chunk, [200], config=config)
    launch(bench.stream, 200)
    case.check(400, TOLERANCE["fp16"] * 4)


def test_a_nan_in_an_int8_cache_is_seen_and_zeros_stay_zeros(bench):
    case = _Attention(bench, 4, 2, 64, False, "fp16", 3, 64, True)
    values = bench.device.download(case.qkv).reshape(3, 8, 64)
    values[1, 5, 7] = np.nan  # a key
    values[0, 6] = 0  # a value
    bench.device.upload(case.qkv, values)
    inputs = (case.kernels, case.shape, case.qkv, case.cache)
    attention.rope_append(*inputs, case.rope, bench.chunk(4, 3), scales=case.scales)(bench.stream)
    scales, quantized = bench.get(case.scales), bench.get(case.cache)
    assert np.isnan(scales[0, 1, 5]) and np.isfinite(scales[:, 0, :7]).all()
    assert scales[1, 0, 4] == 0 and (quantized[1, 0, 4] == 0).all()


def test_attention_refuses_a_cache_of_another_type(bench):
    case = _Attention(bench, 4, 2, 64, False, "fp16", 3, 64, True)
    args = (case.kernels, case.shape, case.qkv, case.cache, case.output, bench.chunk(0, 3), [])
    with pytest.raises(KernelArgumentError, match="scales"):
        attention.attention_prefill(*args)
    with pytest.raises(KernelArgumentError, match="cache is fp16"):
        attention.attention_prefill(*args[:3], case.output.reshape(3, 256), *args[4:], case.scales)


@pytest.mark.parametrize("sizes", [(8, 8, 72), (8, 8, 272), (34, 2, 64), (5, 2, 64)])
def test_attention_refuses_sizes_it_does_not_cover(sizes):
    with pytest.raises(KernelArgumentError):
        attention.AttentionShape(*sizes, max_context=64).validate()
