"""fp8 × fp8 GEMMs for prefill against float64, the kernels around them, and whole chunks; long chunks, too."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from gpu_bench import error

from benchmarks.gpu_decode import SHAPES, make_spec, open_backend
from engine_core.backends.cuda.backend import MAX_GRAPH_ROWS
from engine_core.cuda.graphs import GraphRunner
from engine_core.cuda.kernels import fp8_layout, fp8_rows, linear, linear_packed, reference
from engine_core.cuda.kernels.blas_lt import BlasLt, Fp8Gemm
from engine_core.formats.number_formats import E4M3
from engine_core.measure.steps import begin, decode, prefill
from engine_core.request import SamplingParams
from packed_weights import format_of, random_tiles

pytestmark = pytest.mark.gpu

ROUNDED = {"fp16": 1e-3, "bf16": 6e-3, "fp32": 1e-5}  # of outputs stored in the type
# Sums of one GEMM: the tensor cores cut what they add to 13 bits after each 32 products, 448 times with 14,336 columns.
SUMS = 2e-2
# Activations in fp8 instead of 16 bits: 2^-4 / sqrt(3) of each value, at most, and 0.7 of that on average.
ACTIVATIONS = 0.035


@pytest.fixture
def lt(bench):
    found = BlasLt.open(bench.stream, bench.poisoned((32 << 20,), "uint8"))
    if found is None:
        pytest.skip("needs compute capability 9.0 and cuBLASLt 12.9")
    yield found
    bench.stream.wait()
    found.close()


def _values(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return E4M3[codes].astype(np.float64) * scales.astype(np.float64)[:, None]


def _check_codes(bench, codes, scales, rows: np.ndarray, dtype: str) -> None:
    """``rows``: float64, what was rounded."""
    found, factors = bench.device.download(codes), bench.device.download(scales)
    assert np.allclose(factors, np.abs(rows).max(axis=1) / 448, rtol=2 * ROUNDED[dtype], atol=1e-12)
    assert error(_values(found, factors), rows) < ACTIVATIONS
    expected = reference.quantize_rows(rows)[0]
    # A value beside the middle of two codes may become either.
    assert (found != expected).mean() < 0.03 and np.abs(E4M3[found] - E4M3[expected]).max() <= 32


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("count, cols", [(3, 72), (40, 4096), (5, 14336), (2, 28672)])
def test_quantize_rows(bench, count, cols, dtype):
    kernels = bench.kernels(dtype)
    rows, x = bench.normal((count, cols), dtype, 3.0)
    for epilogue, source, values in (
        (linear.STORE, rows, x),
        (linear.SILU, None, None),
        (linear.GELU, None, None),
    ):
        if source is None:
            source, pairs = bench.normal((count, 2 * cols), dtype, 2.0)
            values = (reference.silu_multiply if epilogue == linear.SILU else reference.gelu_multiply)(pairs)
        codes, scales = bench.poisoned((count, cols), "uint8"), bench.poisoned((count,), "fp32")
        fp8_rows.quantize_rows(kernels, source, codes, scales, epilogue)(bench.stream)
        _check_codes(bench, codes, scales, values, "fp32" if epilogue == linear.STORE else dtype)


def test_a_row_of_zeros_and_one_that_is_no_number(bench):
    values = np.ones((3, 64), dtype=np.float16)
    values[0], values[1, 7] = 0, np.nan
    codes, scales = bench.poisoned((3, 64), "uint8"), bench.poisoned((3,), "fp32")
    fp8_rows.quantize_rows(bench.kernels("fp16"), bench.put(values, "fp16"), codes, scales)(bench.stream)
    found = _values(bench.device.download(codes), bench.device.download(scales))
    assert (found[0] == 0).all() and np.isnan(found[1, 7]) and np.allclose(found[2], 1)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("count, cols", [(3, 72), (40, 4096), (7, 2568)])
def test_rms_norm_to_fp8(bench, count, cols, dtype):
    rows, x = bench.normal((count, cols), "fp32", 5.0)
    weight, g = bench.normal((cols,), dtype)
    codes, scales = bench.poisoned((count, cols), "uint8"), bench.poisoned((count,), "fp32")
    linear.rms_norm(bench.kernels(dtype), rows, weight, codes, 1e-5, scales=scales)(bench.stream)
    _check_codes(bench, codes, scales, reference.rms_norm(x, g, 1e-5), "fp32")


@pytest.mark.parametrize("rows, cols", [(16, 128), (48, 384), (26, 592), (1002, 144), (6144, 4096)])
def test_unpack_fp8(bench, rows, cols):
    tiles = random_tiles(bench.random, "fp8", rows, cols, "fp16")
    weight = linear_packed.PackedWeight(bench.put(tiles, "uint8"), format_of("fp8"), rows, cols)
    codes, scales = bench.poisoned((rows, cols), "uint8"), bench.poisoned((rows,), "fp32")
    fp8_rows.unpack_fp8(bench.kernels("fp16"), weight, codes, scales)(bench.stream)
    expected = fp8_layout.ROWS.unpack(tiles, (rows, cols))
    assert (bench.device.download(codes) == expected[0]).all()
    assert (bench.device.download(scales) == expected[1][:, 0]).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("rows, cols", [(48, 128), (1024, 576), (6144, 4096), (512, 14336)])
def test_gemm_in_fp8(bench, lt, rows, cols, dtype):
    """Against float64 of the same codes, launched and as a graph; rows after those asked for stay as they are."""
    total, count, random = 192, 160, bench.random
    codes = [random.integers(0, 256, shape).astype(np.uint8) for shape in ((total, cols), (rows, cols))]
    for each in codes:
        each[each & 0x7F == 0x7F] = 0
    scales = [(random.uniform(0.5, 2, len(each)) * 4e-3).astype(np.float32) for each in codes]
    operands = [bench.put(each, kind) for pair in zip(codes, scales) for each, kind in zip(pair, ("uint8", "fp32"))]
    output, before = bench.normal((total, rows), dtype)
    gemm = Fp8Gemm(lt, *operands, output, accumulate=dtype == "fp32")
    assert gemm.plan(count) and not gemm.plan(count - 1)
    expected = _values(codes[0], scales[0])[:count] @ _values(codes[1], scales[1]).T
    graphs = GraphRunner(bench.stream, enabled=True)
    allocations = bench.device.allocations
    gemm(count)
    if dtype != "fp32":  # which is added to
        graphs.add("gemm", [lambda _: gemm(count)])
        graphs.run("gemm")
    found = bench.get(output)
    distance = error(found[:count] - (before[:count] if dtype == "fp32" else 0), expected)
    print(f"{rows} x {cols} {dtype}: {distance:.2e}")
    assert distance < SUMS
    assert (found[count:] == before[count:]).all() and bench.device.allocations == allocations
    graphs.close()


def _spec(weights: str, **changes):
    shape = dataclasses.replace(SHAPES["llama-3.2-1b"], layers=4, vocab=4096)
    return dataclasses.replace(make_spec(shape, 2304, 0, weights), **changes)


def _logits(spec, prompt: np.ndarray) -> tuple[np.ndarray, list[int]]:
    backend = open_backend(spec)
    try:
        begin(backend, SamplingParams(seed=1), prompt)
        first = prefill(backend, prompt).result()
        logits = backend._device.download(backend._work["logits"]).astype(np.float64)
        if spec.fp8_activations:
            assert {rows for rows in backend._model._row_counts if rows > 96} <= backend._model._fp8_rows
        assert max(backend._model._row_counts) > MAX_GRAPH_ROWS
        return logits, [first, *(decode(backend).result() for _ in range(4))]
    finally:
        backend.close()


@pytest.mark.parametrize("tokens", [200, 1500])
def test_prompts_with_activations_in_fp8(bench, lt, tokens):
    """Close to 16 bits, which is what is measured, and not the same."""
    prompt = np.random.default_rng(1).integers(0, 4096, tokens).astype(np.int32)
    plain, rounded = (_logits(_spec("fp8", fp8_activations=on), prompt)[0] for on in (False, True))
    assert np.isfinite(rounded).all() and 1e-3 < error(rounded, plain) < 0.1


@pytest.mark.parametrize("weights", ["fp16", "int4"])
def test_long_chunks_give_the_logits_of_short_ones(bench, weights):
    prompt = np.random.default_rng(2).integers(0, 4096, 2200).astype(np.int32)
    spec = _spec(weights)
    if spec.on(bench.device).chunk == spec.chunk:
        pytest.skip("this GPU has short chunks")
    short, long = (_logits(dataclasses.replace(spec, chunk=n, chooses_chunk=False), prompt) for n in (576, 2048))
    assert error(long[0], short[0]) < 0.01
