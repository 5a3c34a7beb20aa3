"""Kernels of a decode step of several sequences, each row against the reference of one. Outputs are poisoned first."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_bench import epilogue_cases, error, to_bits
from test_device_sampler import CASES, options

from engine_core.cuda.driver import DeviceArray
from engine_core.cuda.kernels import (
    KernelArgumentError,
    attention,
    linear,
    linear_batch,
    linear_packed,
    reference,
    sampling,
)
from engine_core.request import SAMPLING_OPTIONS
from engine_core.sampling import Sampler
from packed_weights import KINDS, format_of, random_tiles

pytestmark = pytest.mark.gpu

TOLERANCE = {"fp16": 1e-3, "bf16": 6e-3, "fp32": 2e-5}
EPS = 1e-5
# One tile, groups that do not divide among warps, an odd number of tiles, shapes of models, tiles that are not full.
SHAPES = [(16, 128), (48, 384), (1280, 256), (160, 896), (1008, 2048), (6144, 4096), (528, 4864), (4096, 14336)]
SHAPES += [(960, 576), (50258, 72), (26, 2568)]


def make_weight(bench, rows: int, cols: int, kind: str, dtype: str):
    """(on the device, float64 [rows, cols])."""
    if kind == "fp16":
        return bench.normal((rows, cols), dtype, cols**-0.5)
    tiles = random_tiles(bench.random, kind, rows, cols, dtype)
    packed = linear_packed.PackedWeight(bench.put(tiles, "uint8"), format_of(kind), rows, cols)
    return packed, reference.packed_weight(tiles, kind, (rows, cols), dtype)


def check_every_epilogue(bench, weight, w: np.ndarray, sequences: int, dtype: str, least: float = 0.0) -> None:
    """Compare ``gemm_batch`` of ``weight`` with its values ``w``, float64 [rows, cols], in every epilogue.

    An error of ``least`` is let pass in any case.
    """
    rows, cols = w.shape
    vectors, x = bench.normal((sequences, cols), dtype, 3.0)
    num_sums, num_counters = linear_batch.batch_scratch([(rows, cols)], sequences, bench.device.num_sms)
    counters = bench.put(np.zeros(num_counters, dtype=np.uint32), "uint32")
    scratch = (bench.chunk(0, sequences), bench.poisoned((num_sums,), "fp32"), counters)
    sums = x @ w.T
    for epilogue, (output, more, expected) in epilogue_cases(bench, sums, dtype).items():
        guard = bench.poisoned((64,), "fp32")
        linear_batch.gemm_batch(bench.kernels(dtype), weight, vectors, output, epilogue, *scratch, **more)(bench.stream)
        assert error(bench.get(output), expected) < max(TOLERANCE[output.dtype], least), epilogue
        assert np.isnan(bench.get(guard)).all()
    assert (bench.get(counters) == 0).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("rows, cols", SHAPES)
@pytest.mark.parametrize("kind", ["fp16", *KINDS])
@pytest.mark.parametrize("sequences", [1, 2, 7, 8, 9, 16])
def test_gemm_batch_with_every_epilogue(bench, sequences, kind, rows, cols, dtype):
    """The OFFSETS that fp16 adds and takes off again cost some of float32's last digits, as tensor cores round towards
    zero: up to 1e-4 where one token has few rows."""
    weight, w = make_weight(bench, rows, cols, kind, dtype)
    check_every_epilogue(bench, weight, w, sequences, dtype, least=0.0 if kind == "fp16" else 2e-4)


@pytest.mark.parametrize("kind", ["fp16", *KINDS])
def test_every_gemm_candidate_and_rows_that_are_not_computed(bench, kind):
    rows, cols, sequences, count = 1008, 2048, 12, 9
    kernels = bench.kernels("fp16")
    weight, w = make_weight(bench, rows, cols, kind, "fp16")
    vectors, x = bench.normal((sequences, cols), "fp16")
    num_sums, num_counters = linear_batch.batch_scratch([(rows, cols)], sequences, bench.device.num_sms)
    counters = bench.put(np.zeros(num_counters, dtype=np.uint32), "uint32")
    scratch = (bench.chunk(0, count), bench.poisoned((num_sums,), "fp32"), counters)
    problem = linear_batch.gemm_problem(weight, linear.LOGITS)
    assert problem.tokens == 16
    for config in problem.candidates(kernels.gpu):
        output = bench.poisoned((sequences, rows), "fp32")
        launch = linear_batch.gemm_batch(kernels, weight, vectors, output, linear.LOGITS, *scratch, config=config)
        for _ in range(2):
            launch(bench.stream)
        found = bench.get(output)
        assert error(found[:count], x[:count] @ w.T) < 5e-5, config
        assert np.isnan(found[count:]).all()
        assert (bench.get(counters) == 0).all()


@pytest.mark.parametrize("kind", ["fp16", *KINDS])
@pytest.mark.parametrize("rows, cols", [(1008, 2048), (4096, 14336), (6144, 4096)])
def test_a_row_has_the_same_bits_in_every_batch(bench, kind, rows, cols):
    kernels = bench.kernels("fp16")
    weight, _ = make_weight(bench, rows, cols, kind, "fp16")
    vectors, _ = bench.normal((16, cols), "fp16")
    num_sums, num_counters = linear_batch.batch_scratch([(rows, cols)], 16, bench.device.num_sms)
    counters = bench.put(np.zeros(num_counters, dtype=np.uint32), "uint32")
    scratch = (bench.poisoned((num_sums,), "fp32"), counters)
    found = {}
    for n in (1, 2, 4, 8, 16):
        some = DeviceArray(vectors.address, (n, cols), "fp16")
        output = bench.poisoned((n, rows), "fp32")
        linear_batch.gemm_batch(kernels, weight, some, output, linear.LOGITS, bench.chunk(0, n), *scratch)(bench.stream)
        found[n] = bench.get(output)
    for n, rows_of_n in found.items():
        assert (rows_of_n == found[16][:n]).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("rows, cols", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gemv_of_several_vectors_has_the_bits_of_each_one(bench, kind, rows, cols, dtype):
    kernels = bench.kernels(dtype)
    weight, w = make_weight(bench, rows, cols, kind, dtype)
    vectors, x = bench.normal((8, cols), dtype, 3.0)
    for count in (1, 2, 3, 5, 8):
        if not linear_packed.vectors_fit(kernels, weight, count):
            assert count * cols * 2 > 90 << 10
            continue
        some = DeviceArray(vectors.address, (count, cols), vectors.dtype)
        for epilogue, (output, more, expected) in epilogue_cases(bench, x[:count] @ w.T, dtype).items():
            before, guard = bench.get(output), bench.poisoned((64,), "fp32")
            linear_packed.gemv_packed(kernels, weight, some, output, epilogue, **more)(bench.stream)
            found = bench.get(output)
            assert error(found, expected) < max(TOLERANCE[output.dtype], 2e-4), (epilogue, count)
            assert np.isnan(bench.get(guard)).all()
            row = count - 1  # by itself
            own = bench.put(to_bits(before[row].astype(np.float32), output.dtype), output.dtype)
            linear_packed.gemv_packed(kernels, weight, vectors.at(row), own, epilogue, **more)(bench.stream)
            assert (bench.get(own) == found[row]).all(), (epilogue, count)


def test_gemv_of_several_vectors_refuses_what_it_cannot_take(bench):
    weight, _ = make_weight(bench, 48, 384, "int4", "fp16")
    vectors, _ = bench.normal((9, 384), "fp16")
    with pytest.raises(KernelArgumentError, match="up to 8"):
        linear_packed.gemv_packed(
            bench.kernels("fp16"), weight, vectors, bench.poisoned((9, 48), "fp32"), linear.LOGITS
        )


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("rows, cols", [(1000, 1000), (20, 200), (2, 8), (30, 4104)])
@pytest.mark.parametrize("sequences", [2, 16])
def test_16_bit_weights_that_do_not_fill_their_tiles(bench, sequences, rows, cols, dtype):
    weight, w = bench.normal((rows, cols), dtype, cols**-0.5)
    bench.poisoned((1 << 14,), "fp32")  # lies behind the weight: must not be read
    check_every_epilogue(bench, weight, w, sequences, dtype)


def test_gemm_batch_refuses_what_it_cannot_read(bench):
    kernels, chunk = bench.kernels("fp16"), bench.chunk(0, 2)
    partial, counters = bench.poisoned((1 << 16,), "fp32"), bench.put(np.zeros(64, np.uint32), "uint32")
    for rows, cols, sequences in ((16, 68, 2), (16, 128, 17)):
        weight, _ = bench.normal((rows, cols), "fp16")
        vectors, _ = bench.normal((sequences, cols), "fp16")
        output = bench.poisoned((sequences, rows), "fp32")
        with pytest.raises(KernelArgumentError):
            linear_batch.gemm_batch(kernels, weight, vectors, output, linear.LOGITS, chunk, partial, counters)


# --- attention ------------------------------------------------------------------------------------------

CONTEXT, LAYERS, SLOTS = 700, 2, 6


class Slots:
    """A KV cache of several slots, and one layer's view of it."""

    def __init__(self, bench, heads: int, kv_heads: int, head_dim: int, kv: str, dtype: str, layer: int) -> None:
        """``kv``: the type of the cache, int8 or fp8; else it has 16 bits."""
        self.bench, self.kernels, self.layer, self.kv = bench, bench.kernels(dtype), layer, kv
        kinds = dict(kv_int8=kv == "int8", kv_fp8=kv == "fp8")
        self.shape = attention.AttentionShape(heads, kv_heads, head_dim, CONTEXT, EPS, slot_layers=LAYERS, **kinds)
        self.cache, self.values = bench.normal((SLOTS, LAYERS, 2, kv_heads, CONTEXT, head_dim), dtype)
        self.scales = None
        if self.shape.kv_scaled:
            quantized, scales = reference.quantize_vectors(self.values, kv)
            padded = np.full((*scales.shape[:-1], self.shape.scale_pitch), np.nan, dtype=np.float16)
            padded[..., :CONTEXT] = scales
            self.cache, self.scales = bench.put(to_bits(quantized, kv), kv), bench.put(padded, "fp16")
            self.values = quantized * scales[..., None]
        frequencies = 100.0 ** (-np.arange(head_dim // 2) / (head_dim // 2))
        angles = np.arange(CONTEXT)[:, None] * frequencies
        self.table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
        self.rope = bench.put(self.table, "fp32")

    @property
    def layer_arrays(self) -> tuple[DeviceArray, DeviceArray | None]:
        return self.cache.at(0, self.layer), None if self.scales is None else self.scales.at(0, self.layer)

    def expected(self, heads: np.ndarray, slot: int, start: int) -> np.ndarray:
        """Output [n, heads, head_dim] of raw q, k and v at positions ``start`` …; k and v are put into the slot."""
        shape = self.shape
        q, k, v = np.split(heads, [shape.num_heads, shape.num_heads + shape.num_kv_heads], axis=1)
        angles = self.table[start : start + len(heads)].astype(np.float64)
        q, k = reference.rotate(q, angles), reference.rotate(k, angles)
        layer = self.values[slot, self.layer]
        for part, new in enumerate((k.swapaxes(0, 1), v.swapaxes(0, 1))):
            if shape.kv_scaled:
                quantized, scales = reference.quantize_vectors(new, self.kv)
                new = quantized * scales[..., None]
            layer[part, :, start : start + len(heads)] = new
        end = start + len(heads)
        return reference.attention(q, layer[0, :, :end], layer[1, :, :end], start)

    def found(self) -> np.ndarray:
        cache = self.bench.get(self.cache)
        return cache if self.scales is None else cache * self.bench.get(self.scales)[..., :CONTEXT, None]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(32, 8, 128), (14, 2, 64), (6, 2, 96), (4, 2, 256)])
@pytest.mark.parametrize("kv", ["16-bit", "int8", "fp8"])
@pytest.mark.parametrize("layer", [0, 1])
def test_each_sequence_attends_to_its_own_slot_and_length(bench, heads, kv_heads, head_dim, kv, layer, dtype):
    case = Slots(bench, heads, kv_heads, head_dim, kv, dtype, layer)
    slots = np.array([3, 0, -1, 5, 1, 4], dtype=np.int32)  # one row does nothing, one slot is not used
    positions = np.array([0, 699, 5, 256, 300, 700])  # the last one is past the end: it writes nothing
    n, shape = len(slots), case.shape
    qkv, values = bench.normal((n, shape.qkv_width), dtype)
    states = np.zeros(n, dtype=sampling.STATE)
    states["position"] = positions
    states["token"] = 7
    states_array = bench.put(np.frombuffer(states.tobytes(), dtype=np.uint8).reshape(n, -1), "uint8")
    partial = bench.poisoned((shape.partial_floats(bench.device.num_sms, n),), "fp32")
    counters = bench.put(np.zeros((n, kv_heads), dtype=np.uint32), "uint32")
    output = bench.poisoned((n, heads * head_dim), dtype)
    cache, scales = case.layer_arrays
    arrays = (qkv, cache, case.rope, states_array, partial, counters, output)
    problem = attention.attention_decode(
        case.kernels, shape, *arrays, scales=scales, slots=bench.put(slots, "int32")
    ).problem
    assert problem == shape.batch_problem
    tolerance = TOLERANCE[dtype] * (3 if case.shape.kv_scaled else 1)
    works = [i for i in range(n) if slots[i] >= 0 and positions[i] < CONTEXT]
    expected = {i: case.expected(values[i].reshape(1, -1, head_dim), slots[i], positions[i]).reshape(-1) for i in works}
    for config in problem.candidates(case.kernels.gpu):
        bench.device.upload(output, np.full(output.nbytes, 0xFF, dtype=np.uint8))
        launch = attention.attention_decode(
            case.kernels, shape, *arrays, scales=scales, config=config, slots=bench.put(slots, "int32")
        )
        for _ in range(2):
            launch(bench.stream)
        found = bench.get(output)
        for i in range(n):
            if i in works:
                assert error(found[i], expected[i]) < tolerance, (i, config)
            else:
                assert np.isnan(found[i]).all()
        assert error(case.found(), case.values) < tolerance
        assert (bench.get(counters) == 0).all()


@pytest.mark.parametrize("kv", ["16-bit", "int8", "fp8"])
def test_a_chunk_is_prefilled_into_its_slot(bench, kv):
    case = Slots(bench, 8, 2, 64, kv, "fp16", 1)
    count, start, slot, shape = 70, 200, 4, case.shape
    qkv, values = bench.normal((count, shape.qkv_width), "fp16")
    output = bench.poisoned((count, 8 * 64), "fp16")
    chunk = bench.put(np.array([start, count, slot], dtype=np.int32), "int32")
    cache, scales = case.layer_arrays
    expected = case.expected(values.reshape(count, -1, 64), slot, start)
    attention.rope_append(case.kernels, shape, qkv, cache, case.rope, chunk, scales=scales)(bench.stream)
    launch = attention.attention_prefill(case.kernels, shape, qkv, cache, output, chunk, [count], scales)
    launch(bench.stream, count)
    assert error(bench.get(output), expected.reshape(count, -1)) < TOLERANCE["fp16"] * (
        4 if case.shape.kv_scaled else 2
    )
    assert error(case.found(), case.values) < TOLERANCE["fp16"] * 3
    with pytest.raises(KernelArgumentError, match="chunk"):
        attention.rope_append(case.kernels, shape, qkv, cache, case.rope, bench.chunk(0, 1), scales=scales)


# --- embedding, sampling --------------------------------------------------------------------------------


def test_embedding_of_the_tokens_of_several_states(bench):
    table, t = bench.normal((50, 96), "fp16")
    states = np.zeros(4, dtype=sampling.STATE)
    states["token"] = tokens = [7, 49, -1, 0]
    array = bench.put(np.frombuffer(states.tobytes(), dtype=np.uint8), "uint8")
    output = bench.poisoned((4, 96), "fp32")
    stride = sampling.STATE.itemsize // 4
    first = DeviceArray(array.address + sampling.STATE.fields["token"][1], (4,), "int32")
    linear.embed(bench.kernels("fp16"), table, first, output, stride)(bench.stream)
    assert (bench.get(output) == t[np.maximum(tokens, 0)]).all()


@pytest.mark.parametrize("vocab_size", [1024, 32000])
def test_each_sequence_is_sampled_as_on_the_host(bench, vocab_size):
    """Each with its own options, mask, bias and history; the sequence without a slot stays as it is."""
    names = list(CASES)
    n, steps, idle = len(names), 4, 5
    slots = np.arange(n, dtype=np.int32)
    slots[idle] = -1
    params, states = np.zeros(n, dtype=sampling.PARAMS), np.zeros(n, dtype=sampling.STATE)
    seen, bias = np.zeros((n, vocab_size), dtype=bool), np.zeros((n, vocab_size), dtype=np.float32)
    hosts = []
    for i, name in enumerate(names):
        sampled = options(**{"seed": 100 + i, **CASES[name]})
        history = bench.random.integers(0, vocab_size, 20).astype(np.int32)
        seen[i, history] = True
        for token, value in sampled.logit_bias:
            bias[i, token] += np.float32(value)
        for field in SAMPLING_OPTIONS.keys() & set(sampling.PARAMS.names):
            params[i][field] = getattr(sampled, field)
        params[i]["has_bias"] = bool(sampled.logit_bias)
        params[i]["has_mask"] = i % 3 == 0
        hosts.append(Sampler(vocab_size))
        hosts[i].begin(sampled, history)
    words = np.stack([np.packbits(row, bitorder="little").view(np.uint32) for row in seen])
    mask = bench.random.integers(0, 2**32, (n, vocab_size // 32), dtype=np.uint64).astype(np.uint32)
    arrays = {
        "logits": bench.poisoned((n, vocab_size), "fp32"),
        "scores": bench.poisoned((n, *sampling.scores_shape(vocab_size)), "fp32"),
        "params": bench.put(np.frombuffer(params.tobytes(), dtype=np.uint8).reshape(n, -1), "uint8"),
        "state": bench.put(np.frombuffer(states.tobytes(), dtype=np.uint8).reshape(n, -1), "uint8"),
        "seen": bench.put(words, "uint32"),
        "bias": bench.put(bias, "fp32"),
        "mask": bench.put(mask, "uint32"),
    }
    tokens = bench.put(np.full((n, sampling.RING), -9, dtype=np.int32), "int32")
    launches = sampling.sample(bench.kernels("fp16"), *arrays.values(), None, tokens.address, bench.put(slots, "int32"))
    for step in range(steps):
        logits = (bench.random.standard_normal((n, vocab_size)) * 3).astype(np.float32)
        bench.device.upload(arrays["logits"], logits)
        bench.device.synchronize()
        for launch in launches:
            launch(bench.stream)
        found = bench.device.download(tokens)[:, step]
        for i in range(n):
            if i != idle:
                assert found[i] == hosts[i].sample(logits[i], mask[i] if i % 3 == 0 else None), names[i]
        assert found[idle] == -9
    raw = bench.device.download(arrays["state"])
    after = np.frombuffer(raw.tobytes(), dtype=sampling.STATE)
    assert (np.delete(after["step"], idle) == steps).all() and after["step"][idle] == 0
