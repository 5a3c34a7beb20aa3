"""Kernels as GPUs with few SMs launch them, every candidate against the reference, and the measurement itself.

The grids are those of a GPU with 8, 14 or 16 SMs and the shared memory of an Orin; the GPU that is there runs them.
"""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from gpu_bench import error
from sanitizer_model import CONTEXT, make_backend

from device_steps import generate
from engine_core.cuda.driver import Device
from engine_core.cuda.kernels import (
    Kernels,
    attention,
    linear,
    linear_packed,
    reference,
    sampling,
)
from engine_core.cuda.kernels.launch_configs import Gpu
from engine_core.cuda.kernels.tuning import TIME_LIMIT, EventTimer
from packed_weights import format_of, random_tiles

pytestmark = pytest.mark.gpu

TOLERANCE = {"fp16": 1e-3, "fp32": 2e-5}
EPS = 1e-5
ORIN_SHARED = 166912


@pytest.fixture(params=[8, 14, 16], ids=lambda num_sms: f"{num_sms} SMs")
def small(bench, request):
    """Kernels for a GPU of so many SMs."""
    gpu = Gpu(f"{request.param} SMs", 87, request.param, min(ORIN_SHARED, bench.device.max_shared))
    kernels = Kernels(bench.device, "fp16", gpu)
    yield kernels
    kernels.close()


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_gemv_of_several_vectors(bench, small, kind):
    rows, cols, count = 3072, 4096, 8
    weight = linear_packed.PackedWeight(
        bench.put(random_tiles(bench.random, kind, rows, cols, "fp16"), "uint8"), format_of(kind), rows, cols
    )
    vectors, _ = bench.normal((count, cols), "fp16")
    output = bench.poisoned((count, rows), "fp32")
    assert linear_packed.vectors_fit(small, weight, count)
    linear_packed.gemv_packed(small, weight, vectors, output, linear.LOGITS)(bench.stream)
    for row in range(count):
        own = bench.poisoned((rows,), "fp32")
        linear_packed.gemv_packed(small, weight, vectors.at(row), own, linear.LOGITS)(bench.stream)
        assert (bench.get(own) == bench.get(output)[row]).all()


@pytest.mark.parametrize("rows, cols", [(1031, 2056), (384, 256), (3072, 4096), (512, 14336)])
def test_every_gemv_candidate(bench, small, rows, cols):
    weight, w = bench.normal((rows, cols), "fp16", cols**-0.5)
    vector, x = bench.normal((cols,), "fp32", 3.0)
    norm_weight, g = bench.normal((cols,), "fp16")
    expected = w @ reference.rms_norm(x, g, EPS)
    arguments = {"norm_weight": norm_weight, "norm_eps": EPS}
    first = linear.gemv(small, weight, vector, bench.poisoned((rows,), "fp32"), linear.LOGITS, **arguments)
    for config in first.problem.candidates(small.gpu):
        output = bench.poisoned((rows,), "fp32")
        launch = linear.gemv(small, weight, vector, output, linear.LOGITS, **arguments, config=config)
        assert launch._config.gridDimX == small.gpu.num_sms * config.ctas_per_sm
        launch(bench.stream)
        assert error(bench.get(output), expected) < TOLERANCE["fp32"], config


def packed_matrix(bench, kind: str, rows: int, cols: int):
    """(PackedWeight, float64 [rows, cols])."""
    tiles = random_tiles(bench.random, kind, rows, cols, "fp16")
    packed = linear_packed.PackedWeight(bench.put(tiles, "uint8"), format_of(kind), rows, cols)
    return packed, reference.packed_weight(tiles, kind, (rows, cols), "fp16")


@pytest.mark.parametrize("rows, cols", [(6144, 4096), (528, 4864), (1008, 2048), (256, 14336)])
@pytest.mark.parametrize("kind", linear_packed.LAYOUTS)
def test_every_candidate_of_packed_gemv_and_gemm(bench, small, kind, rows, cols):
    tiles, w = packed_matrix(bench, kind, rows, cols)
    vectors, x = bench.normal((70, cols), "fp16", 3.0)
    problem = linear_packed.gemv_packed(
        small, tiles, vectors.at(0), bench.poisoned((rows,), "fp32"), linear.LOGITS
    ).problem
    for config in problem.candidates(small.gpu):
        output = bench.poisoned((rows,), "fp32")
        linear_packed.gemv_packed(small, tiles, vectors.at(0), output, linear.LOGITS, config=config)(bench.stream)
        assert error(bench.get(output), w @ x[0]) < 5e-5, config
    sums, num_counters = linear_packed.packed_scratch([(rows, cols)], 70, small.gpu.num_sms)
    partial, counters = bench.poisoned((sums,), "fp32"), bench.put(np.zeros(num_counters, np.uint32), "uint32")
    arrays = (bench.chunk(5, 70), partial, counters)
    output = bench.poisoned((70, rows), "fp16")
    problem = linear_packed.PackedGemm(small, tiles, vectors, output, linear.STORE, *arrays).problem
    for config in problem.candidates(small.gpu):
        bench.device.upload(output, np.full((70, rows), np.nan, np.float16))
        gemm = linear_packed.PackedGemm(small, tiles, vectors, output, linear.STORE, *arrays, config)
        gemm(bench.stream, 70)
        assert error(bench.get(output), x @ w.T) < TOLERANCE["fp16"], config
        assert (bench.get(counters) == 0).all()


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(32, 8, 128), (14, 2, 64), (4, 4, 256)])
@pytest.mark.parametrize("position", [0, 300, 1499])
def test_every_decode_attention_candidate(bench, small, heads, kv_heads, head_dim, position):
    context = 1500
    shape = attention.AttentionShape(heads, kv_heads, head_dim, context)
    qkv, values = bench.normal((shape.qkv_width,), "fp16")
    angles = np.arange(context)[:, None] * 100.0 ** (-np.arange(head_dim // 2) / (head_dim // 2))
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    rope, counters = bench.put(table, "fp32"), bench.put(np.zeros(kv_heads, np.uint32), "uint32")
    cache, cached = bench.normal((2, kv_heads, context, head_dim), "fp16")
    state = np.zeros((), dtype=sampling.STATE)
    state["position"] = position
    state = bench.put(np.frombuffer(state.tobytes(), dtype=np.uint8), "uint8")
    partial = bench.poisoned((shape.partial_floats(small.gpu.num_sms),), "fp32")
    q, k, v = np.split(values.reshape(1, -1, head_dim), [heads, heads + kv_heads], axis=1)
    q, k = (reference.rotate(each, table[position : position + 1].astype(np.float64)) for each in (q, k))
    cached[0, :, position], cached[1, :, position] = k[0], v[0]
    keys, vals = cached[:, :, : position + 1]
    expected = reference.attention(q, keys, vals, position).reshape(-1)
    for config in shape.decode_problem.candidates(small.gpu):
        output = bench.poisoned((heads * head_dim,), "fp16")
        arrays = (qkv, cache, rope, state, partial, counters, output)
        launch = attention.attention_decode(small, shape, *arrays, config=config)
        for _ in range(2):  # the counters are as before: a second launch gives the same
            launch(bench.stream)
        assert error(bench.get(output), expected) < TOLERANCE["fp16"], config
        assert (bench.get(counters) == 0).all()


# --- measuring ------------------------------------------------------------------------------------------


def test_the_timer_tells_long_work_from_short(bench):
    weight, _ = bench.normal((8192, 4096), "fp16")
    vector, _ = bench.normal((4096,), "fp16")
    launch = linear.gemv(bench.kernels("fp16"), weight, vector, bench.poisoned((8192,), "fp32"), linear.LOGITS)
    timer = EventTimer(bench.stream)
    one, many = timer([launch]), timer([launch] * 20)
    assert 0 < one < 1e-3 and 5 * one < many < 40 * one


@pytest.fixture
def as_small(monkeypatch, tmp_path):
    """The GPU that is there counts as one of 8 SMs that the table does not list. Returns the kernel cache."""
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(tmp_path))
    opened = Device.__init__

    def open_as_small(device: Device, ordinal: int = 0) -> None:
        opened(device, ordinal)  # the kernels are compiled for what it is
        device.name, device.capability, device.num_sms = "small", 87, 8

    monkeypatch.setattr(Device, "__init__", open_as_small)
    return tmp_path


def run(weights: str, kv_cache_type: str, **options) -> list[int]:
    prompt = np.random.default_rng(1).integers(0, 1008, 290).astype(np.int32)
    backend = make_backend(weights, kv_cache_type, use_cuda_graph=True, **options)
    try:
        return [*generate(backend, prompt, 4), *generate(backend, prompt[:20], 4)]
    finally:
        backend.close()


@pytest.mark.parametrize(
    ("weights", "kv_cache_type"),
    [("int4", "int8"), ("fp16", "fp16"), ("int8", "int8"), ("fp8", "fp16"), ("nvfp4", "int8")],
)
def test_a_model_measures_once_and_answers_the_same_afterwards(as_small, weights, kv_cache_type):
    start = time.monotonic()
    first = run(weights, kv_cache_type, tune_kernels=True)
    taken = time.monotonic() - start
    (path,) = as_small.glob("launch-configs-*.json")
    stored = path.read_bytes()
    configs = json.loads(stored)["configs"]
    names = {key.split("(")[0] for key in configs}
    assert {"DecodeAttentionProblem", "PrefillAttentionProblem"} < names and len(configs) >= 8
    assert taken < TIME_LIMIT + 20, "compiling what the model takes comes on top"
    start = time.monotonic()
    assert run(weights, kv_cache_type, tune_kernels=True) == first
    assert path.read_bytes() == stored and time.monotonic() - start < max(3.0, taken)
    assert CONTEXT > 290


def test_a_gpu_of_the_table_measures_nothing(monkeypatch, tmp_path, bench):
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(tmp_path))
    if not bench.kernels("fp16").configs.in_table:
        pytest.skip("the table does not list this GPU")
    run("int4", "fp16", tune_kernels=True)
    assert not list(tmp_path.glob("launch-configs-*"))
