"""Integers in groups of 32, 64 and 128, symmetric and with zero points: the kernels and the cuda backend."""

from __future__ import annotations

import numpy as np
import pytest
import test_kernels
from gpu_bench import epilogue_cases, error, from_bits, to_bits

from engine_core.cuda.driver import DeviceArray
from engine_core.cuda.kernels import attention, linear, linear_batch, linear_packed, reference, sampling
from engine_core.cuda.kernels.linear_packed import layout_of
from engine_core.formats.weight_formats import weight_format
from packed_weights import integer_formats, random_integers

pytestmark = pytest.mark.gpu

TOLERANCE = {"fp16": 1e-3, "bf16": 6e-3, "fp32": 2e-4}  # of outputs rounded to the type; see test_kernels
EPS = 1e-5
FORMATS = integer_formats()
# fp16 scales beside bf16: tiles with a scale for each row, and with all that there is.
for bits, group_size, has_zeros in ((4, 128, False), (8, 32, True)):
    made = weight_format(f"int{bits}").in_groups(group_size, has_zeros, True)
    FORMATS[f"int{bits}-g{group_size}-halves"] = made
# The last groups are not full; several stages and splits, tiles that warps do not divide.
SHAPES = [(272, 1000), (1008, 2048)]


class _Matrix:
    def __init__(self, bench, name: str, rows: int, cols: int, dtype: str) -> None:
        stored_as = FORMATS[name]
        tiles = layout_of(stored_as).pack(*random_integers(bench.random, stored_as, rows, cols, dtype))
        self.matrix = linear_packed.PackedWeight(bench.put(tiles, "uint8"), stored_as, rows, cols)
        self.weight = reference.packed_weight(tiles, stored_as, (rows, cols), dtype)


def _dtype(name: str, rows: int) -> str:
    """Return the type of a case: all kinds meet both, but for those with fp16 scales."""
    if FORMATS[name].half_scales:
        return "bf16"
    return ("fp16", "bf16")[(list(FORMATS).index(name) + rows // 16) % 2]


@pytest.mark.parametrize("rows, cols", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_gemv_of_one_to_eight_vectors_and_dequantize(bench, name, rows, cols):
    dtype = _dtype(name, rows)
    kernels, packed = bench.kernels(dtype), _Matrix(bench, name, rows, cols, dtype)
    matrix, w = packed.matrix, packed.weight
    vectors, x = bench.normal((8, cols), dtype, 3.0)
    for count, epilogue in ((1, linear.LOGITS), (3, linear.LOGITS), (8, linear.SILU)):
        assert linear_packed.vectors_fit(kernels, matrix, count)
        some = DeviceArray(vectors.address, (count, cols), dtype)
        output, more, expected = epilogue_cases(bench, x[:count] @ w.T, dtype)[epilogue]
        guard = bench.poisoned((64,), "fp32")
        linear_packed.gemv_packed(kernels, matrix, some, output, epilogue, **more)(bench.stream)
        found = bench.get(output)
        assert error(found, expected) < TOLERANCE[output.dtype], (epilogue, count)
        assert np.isnan(bench.get(guard)).all()
        if epilogue == linear.LOGITS:
            own = bench.poisoned((rows,), "fp32")
            linear_packed.gemv_packed(kernels, matrix, vectors.at(count - 1), own, epilogue)(bench.stream)
            assert (bench.get(own) == found[count - 1]).all(), "a row has the bits that it has alone"
    weight = bench.poisoned((rows, cols), dtype)
    linear_packed.dequantize_packed(kernels, matrix, weight)(bench.stream)
    assert (bench.get(weight) == from_bits(to_bits(w.astype(np.float32), dtype), dtype)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_gemv_with_a_norm(bench, name):
    rows, cols, dtype = 528, 2568, _dtype(name, 0)
    packed = _Matrix(bench, name, rows, cols, dtype)
    vector, x = bench.normal((cols,), "fp32", 3.0)
    norm_weight, g = bench.normal((cols,), dtype)
    output = bench.poisoned((rows,), "fp32")
    norm = {"norm_weight": norm_weight, "norm_eps": EPS}
    arrays = (packed.matrix, vector, output, linear.LOGITS)
    linear_packed.gemv_packed(bench.kernels(dtype), *arrays, **norm)(bench.stream)
    rounded = from_bits(to_bits(reference.rms_norm(x, g, EPS), dtype), dtype)
    assert error(bench.get(output), packed.weight @ rounded) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows, cols", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_gemm_of_a_batch_and_of_a_prompt(bench, name, rows, cols):
    dtype = _dtype(name, rows)
    kernels, packed = bench.kernels(dtype), _Matrix(bench, name, rows, cols, dtype)
    vectors, x = bench.normal((70, cols), dtype, 3.0)
    shape, num_sms = [(rows, cols)], bench.device.num_sms
    for count, epilogue in ((2, linear.LOGITS), (7, linear.LOGITS), (16, linear.RESIDUAL)):
        some = DeviceArray(vectors.address, (count, cols), dtype)
        output, more, expected = epilogue_cases(bench, x[:count] @ packed.weight.T, dtype)[epilogue]
        num_sums, num_counters = linear_batch.batch_scratch(shape, count, num_sms)
        counters = bench.put(np.zeros(num_counters, dtype=np.uint32), "uint32")
        scratch = (bench.chunk(0, count), bench.poisoned((num_sums,), "fp32"), counters)
        linear_batch.gemm_batch(kernels, packed.matrix, some, output, epilogue, *scratch, **more)(bench.stream)
        assert error(bench.get(output), expected) < TOLERANCE[output.dtype], (epilogue, count)
    num_sums, num_counters = linear_packed.packed_scratch(shape, 70, num_sms)
    partial, counters = bench.poisoned((num_sums,), "fp32"), bench.put(np.zeros(num_counters, np.uint32), "uint32")
    for count in (1, 70):
        output, chunk = bench.poisoned((70, rows), dtype), bench.chunk(5, count)
        arrays = (packed.matrix, vectors, output, linear.STORE, chunk, partial, counters)
        linear_packed.PackedGemm(kernels, *arrays)(bench.stream, count)
        found = bench.get(output)
        assert error(found[:count], x[:count] @ packed.weight.T) < TOLERANCE[dtype]
        assert np.isnan(found[count:]).all()
    assert (bench.get(counters) == 0).all()


@pytest.mark.parametrize("name", ["int4-g32", "int4-g128-zeros", "int8-g32-zeros"])
def test_every_candidate(bench, name):
    """Launch configurations of GPUs that are measured; a long matrix, of which the sums take the most room."""
    rows, cols = 528, 4864
    kernels, packed = bench.kernels("fp16"), _Matrix(bench, name, rows, cols, "fp16")
    vectors, x = bench.normal((12, cols), "fp16")
    vector, sums = DeviceArray(vectors.address, (cols,), "fp16"), x @ packed.weight.T
    for config in packed.matrix.gemv_problem(rows, linear.LOGITS).candidates(kernels.gpu):
        output = bench.poisoned((rows,), "fp32")
        linear_packed.gemv_packed(kernels, packed.matrix, vector, output, linear.LOGITS, config=config)(bench.stream)
        assert error(bench.get(output), sums[0]) < TOLERANCE["fp32"], config
    num_sums, num_counters = linear_batch.batch_scratch([(rows, cols)], 12, bench.device.num_sms)
    counters = bench.put(np.zeros(num_counters, dtype=np.uint32), "uint32")
    scratch = (bench.chunk(0, 12), bench.poisoned((num_sums,), "fp32"), counters)
    for config in linear_batch.gemm_problem(packed.matrix, linear.LOGITS).candidates(kernels.gpu):
        output = bench.poisoned((12, rows), "fp32")
        arrays = (packed.matrix, vectors, output, linear.LOGITS)
        linear_batch.gemm_batch(kernels, *arrays, *scratch, config=config)(bench.stream)
        assert error(bench.get(output), sums) < TOLERANCE["fp32"], config


# --- columns in the order of a matrix's groups ----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("cols", [96, 2568, 4096])
def test_norms_put_columns_in_order(bench, cols, dtype):
    """The norm of several rows, and that of a GEMV, whose sums of groups are those of the order."""
    kernels, places = bench.kernels(dtype), bench.random.permutation(cols).astype(np.int32)
    on_device = bench.put(places, "int32")
    hidden, x = bench.normal((3, cols), "fp32", 3.0)
    weight, g = bench.normal((cols,), dtype)
    plain, ordered = bench.poisoned((3, cols), dtype), bench.poisoned((3, cols), dtype)
    linear.rms_norm(kernels, hidden, weight, plain, EPS)(bench.stream)
    linear.rms_norm(kernels, hidden, weight, ordered, EPS, places=on_device)(bench.stream)
    assert (bench.get(ordered)[:, places] == bench.get(plain)).all()
    for name in ("int4-g32-zeros", "int8-g64"):
        packed = _Matrix(bench, name, 528, cols, dtype)
        output = bench.poisoned((528,), "fp32")
        more = {"norm_weight": weight, "norm_eps": EPS, "places": on_device}
        arrays = (packed.matrix, hidden.at(0), output, linear.LOGITS)
        linear_packed.gemv_packed(kernels, *arrays, **more)(bench.stream)
        normed = from_bits(to_bits(reference.rms_norm(x[0], g, EPS), dtype), dtype)
        assert error(bench.get(output), packed.weight[:, places] @ normed) < TOLERANCE[dtype], name


@pytest.mark.parametrize("kv_int8", [False, True], ids=["16-bit", "int8"])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(32, 8, 128), (14, 2, 64), (24, 2, 48)])
def test_attention_puts_columns_in_order(bench, heads, kv_heads, head_dim, kv_int8):
    """Of one token, merged by one CTA and by several, and of a prompt."""
    places = bench.random.permutation(heads * head_dim).astype(np.int32)
    on_device = bench.put(places, "int32")
    for position, count in ((5, 1), (1400, 1), (20, 70)):
        case = test_kernels._Attention(bench, heads, kv_heads, head_dim, False, "fp16", count, 1500, kv_int8)
        found = []
        for given in (None, on_device):
            output = bench.poisoned((count, heads * head_dim), "fp16")
            if count > 1:
                chunk = bench.chunk(position, count)
                attention.rope_append(
                    *(case.kernels, case.shape, case.qkv, case.cache, case.rope, chunk),
                    scales=case.scales,
                    kv_only=True,
                )(bench.stream)
                arrays = (case.kernels, case.shape, case.qkv, case.cache, output, chunk, [count])
                attention.attention_prefill(*arrays, case.scales, places=given)(bench.stream, count)
            else:
                state = np.zeros((), dtype=sampling.STATE)
                state["position"] = position
                scratch = (
                    bench.put(np.frombuffer(state.tobytes(), dtype=np.uint8), "uint8"),
                    bench.poisoned((case.shape.partial_floats(bench.device.num_sms),), "fp32"),
                    bench.put(np.zeros(case.shape.bundles, dtype=np.uint32), "uint32"),
                )
                attention.attention_decode(
                    *(case.kernels, case.shape, case.qkv.reshape(case.shape.qkv_width), case.cache, case.rope),
                    *(*scratch, output.reshape(heads * head_dim)),
                    scales=case.scales,
                    places=given,
                )(bench.stream)
            found.append(bench.get(output))
        assert np.isfinite(found[0]).all() and (found[1][:, places] == found[0]).all(), (position, count)
