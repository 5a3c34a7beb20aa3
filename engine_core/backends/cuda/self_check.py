"""Compare the CUDA kernels with their references on the GPU that is here, in a few seconds.

test/gpu does the same over many more shapes. This needs no test tools, so that ``edgellm report`` can say of any GPU
whether the kernels compute there what they should.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np

from engine_core.backends.cuda.build import to_tiles
from engine_core.backends.toolkit import KernelCheck
from engine_core.cuda.driver import Arena, Device, DeviceArray, PinnedArray, Stream
from engine_core.cuda.kernels import Kernels, attention, linear, linear_packed, reference, sampling
from engine_core.errors import EdgeLLMError
from engine_core.formats.number_formats import E4M3, from_16_bit, to_16_bit, to_minifloat
from engine_core.formats.weight_formats import fp8, weight_format
from engine_core.formats.weight_formats.base import WeightFormat

_TOLERANCE = {"fp16": 1e-3, "bf16": 6e-3, "fp32": 5e-5}  # of outputs in the type, relative
_ARENA = 256 << 20  # bytes
_POISON = 0xFF  # bytes that are NaN in every floating-point type: an output nobody wrote shows
_EPS = 1e-5
_GEMVS = ((3072, 2048), (34, 28672), (1000, 1536))  # rows, columns
_PACKED = ((3072, 2048), (1002, 640))
_TOKENS = 33
_CONTEXT = 1003


def check_kernels(
    report: Callable[[str], None] = lambda line: None,
    dtypes: Sequence[str] = ("fp16", "bf16"),
    wanted: Callable[[str], bool] = lambda name: True,
) -> list[KernelCheck]:
    """Return what each kernel's output is off its reference, of those whose name is ``wanted``.

    Raises DeviceError or DeviceUnavailableError.
    """
    with ExitStack() as undo:
        device = Device()
        undo.callback(device.close)
        found = []
        for dtype in dtypes:
            with ExitStack() as used:
                bench = _Bench(device, dtype, used)
                for name, check in _checks(bench):
                    if not wanted(name):
                        continue
                    report(f"{dtype}: {name}")
                    found.append(_run(f"{name}, {dtype}", check))
                    bench.start_anew()
        return found


def _run(name: str, check: Callable[[], tuple[float, float]]) -> KernelCheck:
    """A kernel that cannot be launched is a finding, not the end."""
    try:
        error, tolerance = check()
    except EdgeLLMError as problem:
        return KernelCheck(name, None, 0.0, str(problem))
    return KernelCheck(name, error, tolerance)


class _Bench:
    """Arrays in, arrays out."""

    def __init__(self, device: Device, dtype: str, undo: ExitStack) -> None:
        self.device, self.dtype = device, dtype
        self.stream, self._arena = Stream(device), Arena(device, _ARENA)
        self.kernels = Kernels(device, dtype)
        for each in (self.stream, self._arena, self.kernels):
            undo.callback(each.close)
        self.random = np.random.default_rng(0)

    def start_anew(self) -> None:
        self._arena.used = 0

    def put(self, values: np.ndarray, dtype: str) -> DeviceArray:
        array = self._arena.take(values.shape, dtype)
        self.device.upload(array, values)
        return array

    def poisoned(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        array = self._arena.take(shape, dtype)
        self.device.upload(array, np.full(array.nbytes, _POISON, np.uint8))
        return array

    def zeros(self, count: int, dtype: str) -> DeviceArray:
        array = self._arena.take((count,), dtype)
        self.device.upload(array, np.zeros(array.nbytes, np.uint8))
        return array

    def normal(self, shape: tuple[int, ...], dtype: str = "", scale: float = 1.0) -> tuple[DeviceArray, np.ndarray]:
        """(on the device, the same values as float64). ``dtype``: the kernels' own unless given."""
        values = scale * self.random.standard_normal(shape, dtype=np.float32)
        if (dtype or self.dtype) == "fp32":
            return self.put(values, "fp32"), values.astype(np.float64)
        bits = to_16_bit(values, self.dtype)
        return self.put(bits, self.dtype), from_16_bit(bits).astype(np.float64)

    def get(self, array: DeviceArray) -> np.ndarray:
        values = self.device.download(array)
        return (from_16_bit(values) if array.dtype in ("fp16", "bf16") else values).astype(np.float64)

    def error(self, array: DeviceArray, expected: np.ndarray) -> float:
        """‖found − expected‖ / ‖expected‖; NaN where an output was not written."""
        return float(np.linalg.norm(self.get(array).reshape(expected.shape) - expected) / np.linalg.norm(expected))


def _checks(bench: _Bench) -> Iterator[tuple[str, Callable[[], tuple[float, float]]]]:
    for rows, cols in _GEMVS:
        yield f"gemv {rows}×{cols}", partial(_gemv, bench, rows, cols)
    for kind in linear_packed.LAYOUTS:
        for rows, cols in _PACKED:
            yield f"gemv_packed {kind} {rows}×{cols}", partial(_gemv_packed, bench, kind, rows, cols)
            yield f"gemm_packed {kind} {rows}×{cols}", partial(_gemm_packed, bench, kind, rows, cols)
    for kind in ("16-bit", "int8", "fp8"):
        yield f"attention_decode, {kind} KV", partial(_attention, bench, kind, 700, 1)
        yield f"attention_prefill, {kind} KV", partial(_attention, bench, kind, 200, _TOKENS)
    yield "sample", partial(_sample, bench)


def _gemv(bench: _Bench, rows: int, cols: int) -> tuple[float, float]:
    weight, w = bench.normal((rows, cols), scale=cols**-0.5)
    vector, x = bench.normal((cols,), "fp32", 3.0)
    norm, g = bench.normal((cols,))
    output = bench.poisoned((rows,), "fp32")
    linear.gemv(bench.kernels, weight, vector, output, linear.LOGITS, norm_weight=norm, norm_eps=_EPS)(bench.stream)
    return bench.error(output, w @ reference.rms_norm(x, g, _EPS)), _TOLERANCE["fp32"]


def _format_of(kind: str) -> WeightFormat:
    return fp8.BLOCKS if kind == fp8.BLOCKS.kind else weight_format(kind)


def _packed(bench: _Bench, kind: str, rows: int, cols: int) -> tuple[linear_packed.PackedWeight, np.ndarray]:
    values = (cols**-0.5 * bench.random.standard_normal((rows, cols))).astype(np.float32)
    tiles = to_tiles(values, _format_of(kind), bench.dtype)
    weight = linear_packed.PackedWeight(bench.put(tiles, "uint8"), _format_of(kind), rows, cols)
    return weight, reference.packed_weight(tiles, kind, (rows, cols), bench.dtype)


def _gemv_packed(bench: _Bench, kind: str, rows: int, cols: int) -> tuple[float, float]:
    weight, w = _packed(bench, kind, rows, cols)
    vector, x = bench.normal((cols,), scale=3.0)
    output = bench.poisoned((rows,), "fp32")
    linear_packed.gemv_packed(bench.kernels, weight, vector, output, linear.LOGITS)(bench.stream)
    return bench.error(output, w @ x), _TOLERANCE["fp32"]


def _gemm_packed(bench: _Bench, kind: str, rows: int, cols: int) -> tuple[float, float]:
    weight, w = _packed(bench, kind, rows, cols)
    vectors, x = bench.normal((_TOKENS, cols), scale=3.0)
    output = bench.poisoned((_TOKENS, rows), bench.dtype)
    sums, counters = linear_packed.packed_scratch([(rows, cols)], _TOKENS, bench.device.num_sms)
    scratch = bench.poisoned((sums,), "fp32"), bench.zeros(counters, "uint32")
    chunk = bench.put(np.array([0, _TOKENS], np.int32), "int32")
    gemm = linear_packed.PackedGemm(bench.kernels, weight, vectors, output, linear.STORE, chunk, *scratch)
    gemm(bench.stream, _TOKENS)
    return bench.error(output, x @ w.T), _TOLERANCE[bench.dtype]


def _attention(bench: _Bench, kind: str, start: int, count: int) -> tuple[float, float]:
    """One token by the kernel of decode steps, several by those of a prompt's chunk. ``kind``: of the KV cache."""
    heads, kv_heads, head_dim = 32, 8, 64
    kinds = {"kv_int8": kind == "int8", "kv_fp8": kind == "fp8"}
    shape = attention.AttentionShape(heads, kv_heads, head_dim, _CONTEXT, **kinds)
    angles = np.arange(_CONTEXT)[:, None] * 1e4 ** (-np.arange(shape.rope_width) / shape.rope_width)
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    rope = bench.put(table, "fp32")
    cache, cached = bench.normal((2, kv_heads, _CONTEXT, head_dim))
    scales = None
    if shape.kv_scaled:
        quantized, steps = reference.quantize_vectors(cached, kind)
        padded = np.zeros((2, kv_heads, shape.scale_pitch), np.float16)
        padded[..., :_CONTEXT] = steps
        codes = to_minifloat(quantized, E4M3) if kind == "fp8" else quantized.astype(np.int8)
        cache, scales = bench.put(codes, kind), bench.put(padded, "fp16")
        cached = quantized * steps[..., None]
    qkv, values = bench.normal((count, shape.qkv_width))
    output = bench.poisoned((count, heads * head_dim), bench.dtype)
    if count == 1:
        state = np.zeros((), sampling.STATE)
        state["position"] = start
        held = bench.put(np.frombuffer(state.tobytes(), np.uint8), "uint8")
        partial = bench.poisoned((shape.partial_floats(bench.device.num_sms),), "fp32")
        counters = bench.zeros(shape.bundles, "uint32")
        arrays = (qkv.reshape(shape.qkv_width), cache, rope, held, partial, counters, output.reshape(heads * head_dim))
        attention.attention_decode(bench.kernels, shape, *arrays, scales=scales)(bench.stream)
    else:
        chunk = bench.put(np.array([start, count], np.int32), "int32")
        inputs = (bench.kernels, shape, qkv, cache)
        attention.rope_append(*inputs, rope, chunk, scales=scales)(bench.stream)
        attention.attention_prefill(*inputs, output, chunk, [count], scales)(bench.stream, count)
    places = [heads, heads + kv_heads]
    q, k, v = np.split(values.reshape(count, heads + 2 * kv_heads, head_dim), places, axis=1)
    own = table[start : start + count].astype(np.float64)
    q, k = reference.rotate(q, own), reference.rotate(k, own)
    for part, new in enumerate((k.swapaxes(0, 1), v.swapaxes(0, 1))):
        if shape.kv_scaled:
            quantized, steps = reference.quantize_vectors(new, kind)
            new = quantized * steps[..., None]
        cached[part, :, start : start + count] = new
    keys, seen = cached[:, :, : start + count]
    expected = reference.attention(q, keys, seen, start).reshape(count, -1)
    return bench.error(output, expected), _TOLERANCE[bench.dtype] * (4 if shape.kv_scaled else 2)


def _sample(bench: _Bench) -> tuple[float, float]:
    """The greedy token: no error, or one of 1."""
    rows = 128256
    logits, values = bench.normal((rows,), "fp32")
    host = PinnedArray(bench.device, (sampling.RING,), "int32")
    try:
        host.host[:] = -9
        scratch = {
            "scores": bench.poisoned(sampling.scores_shape(rows), "fp32"),
            "params": bench.zeros(sampling.PARAMS.itemsize, "uint8"),
            "state": bench.zeros(sampling.STATE.itemsize, "uint8"),
            "seen": bench.zeros(-(-rows // 32), "uint32"),
            "bias": bench.zeros(rows, "fp32"),
            "mask": bench.zeros(-(-rows // 32), "uint32"),
        }
        params = np.zeros((), sampling.PARAMS)
        params["repetition_penalty"], params["top_p"] = 1, 1
        bench.device.upload(scratch["params"], np.frombuffer(params.tobytes(), np.uint8))
        launches = sampling.sample(bench.kernels, logits, **scratch, vocab_map=None, host_tokens=host.device_address)
        for launch in launches:
            launch(bench.stream)
        bench.device.synchronize()
        return float(host.host[0] != int(values.argmax())), 0.0
    finally:
        host.close()
