"""Registers of a decode step's kernels, compiled for sm_90: each fits beside the next one on every scheduler.

A multiprocessor has four schedulers with 16,384 registers each. A CTA whose warps take more than half of those does not
start beside the CTA of the kernel before it, and when it can, two may start on one multiprocessor and none on another
(benchmarks/results/kernels.md).

Each way of storing weights is compiled with the sizes of one model and with adapters of one rank, by turns; with those
of all models and ranks where EDGELLM_ALL_ARCHITECTURES=1.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")

from cubin import read_resources
from engine_core.cuda.driver import Device, DeviceArray, DeviceUnavailableError
from engine_core.cuda.kernels import Kernels, attention, kernel_source, linear, linear_packed, lora
from engine_core.cuda.kernels.attention import AttentionShape
from engine_core.cuda.kernels.nvrtc import compile_kernel
from engine_core.cuda.kernels.sampling import STATE
from fake_gpu import FakeDriver, install
from packed_weights import KINDS, format_of

SCHEDULERS, REGISTERS = 4, 16384
MODELS = {  # hidden, intermediate, heads, KV heads, head_dim, vocabulary
    "llama-3.1-8b": (4096, 14336, 32, 8, 128, 128256),
    "llama-3.2-1b": (2048, 8192, 32, 8, 64, 128256),
    "qwen3-0.6b": (1024, 3072, 16, 8, 128, 151936),
}


class Noted:
    """Kernels that only note what is asked for."""

    def __init__(self, monkeypatch) -> None:
        install(monkeypatch, FakeDriver())
        device = Device()
        device.num_sms, device.max_shared = 132, 232448  # an H200's
        self.kernels = Kernels(device, "fp16")
        self.jobs: list[tuple[str, str, dict]] = []
        monkeypatch.setattr(self.kernels, "function", self._function)

    def _function(self, source: str, entry: str, defines: dict, shared: int = 0) -> None:
        self.jobs.append((source, entry, {"BF16": 0, **defines}))


def _array(shape: tuple[int, ...], dtype: str) -> DeviceArray:
    return DeviceArray(1 << 20, shape, dtype)


def _term(matrix: str, rows: int, cols: int, rank: int) -> lora.LoraTerm:
    parts = {"qkv": 3, "gate_up": 2}.get(matrix, 1)
    a, b = _array((1, parts * rank, cols), "fp16"), _array((1, rows, rank), "fp16")
    pair = lora.LoraMatrix(a, b, (rows // 2, rows // 4 * 3) if parts == 3 else (), pairs=parts == 2)
    return lora.LoraTerm(pair, _array((1, pair.num_sums), "fp32"), _array((1,), "int32"))


def _gemms(kernels: Kernels, model: str, kind: str, rank: int = 0) -> list:
    """Return the launches of a layer's matrices, with adapters of ``rank`` unless it is 0, and of the head."""
    hidden, intermediate, heads, kv_heads, head_dim, vocab = MODELS[model]
    launches = []
    for name, rows, cols, epilogue, normed in (
        ("qkv", (heads + 2 * kv_heads) * head_dim, hidden, linear.STORE, True),
        ("o", hidden, heads * head_dim, linear.RESIDUAL, False),
        ("gate_up", 2 * intermediate, hidden, linear.SILU, True),
        ("down", hidden, intermediate, linear.RESIDUAL, False),
        ("head", vocab, hidden, linear.LOGITS, True),
    ):
        output = _array(
            (rows // 2 if epilogue == linear.SILU else rows,),
            "fp32" if epilogue in (linear.RESIDUAL, linear.LOGITS) else "fp16",
        )
        vector = _array((cols,), "fp32" if normed else "fp16")
        options = {"norm_weight": _array((cols,), "fp16"), "norm_eps": 1e-5} if normed else {}
        if rank and name != "head":
            options["lora"] = _term(name, rows, cols, rank)
        if kind == "fp16":
            launches.append(linear.gemv(kernels, _array((rows, cols), "fp16"), vector, output, epilogue, **options))
        else:
            tiles = _array(linear_packed.LAYOUTS[kind].tiles_shape(rows, cols), "uint8")
            weight = linear_packed.PackedWeight(tiles, format_of(kind), rows, cols)
            launches.append(linear_packed.gemv_packed(kernels, weight, vector, output, epilogue, **options))
    return launches


def _attention(kernels: Kernels, model: str, kv_int8: bool):
    _, _, heads, kv_heads, head_dim, _ = MODELS[model]
    shape = AttentionShape(heads, kv_heads, head_dim, 4096, 1e-5, False, kv_int8)
    cache = _array((2, kv_heads, 4096, head_dim), "int8" if kv_int8 else "fp16")
    scales = _array((2, kv_heads, shape.scale_pitch), "fp16") if kv_int8 else None
    state = _array((STATE.itemsize,), "uint8")
    partial = _array((shape.partial_floats(kernels.gpu.num_sms),), "fp32")
    return attention.attention_decode(
        kernels, shape, _array((shape.qkv_width,), "fp16"), cache, _array((4096, head_dim // 2, 2), "fp32"), state,
        partial, _array((kv_heads,), "uint32"), _array((heads * head_dim,), "fp16"), scales=scales,
    )  # fmt: skip


def _check(noted: Noted, launches: list) -> None:
    def compiled(job: tuple[str, str, dict]) -> int:
        source, entry, defines = job
        text, headers = kernel_source(source)
        binary = compile_kernel(text, name=source, arch="sm_90", headers=headers, defines=defines)
        return read_resources(binary, entry).registers

    try:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            taken = list(threads.map(compiled, noted.jobs))
    except DeviceUnavailableError as error:
        pytest.skip(f"needs NVRTC: {error}")
    assert len(taken) == len(launches)
    for (source, _, defines), launch, count in zip(noted.jobs, launches, taken, strict=True):
        warps = -(-launch._config.blockDimX // (32 * SCHEDULERS))
        allocated = -(-count // 8) * 8 * 32
        assert 0 < warps * allocated <= REGISTERS // 2, f"{source} {defines} takes {count} registers"


@pytest.fixture
def noted(monkeypatch, tmp_path):
    from cuda.bindings import nvrtc

    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(tmp_path))
    noted = Noted(monkeypatch)
    monkeypatch.setattr("engine_core.cuda.kernels.nvrtc.bindings", lambda: (None, nvrtc))
    return noted


def _by_turns(values) -> list[tuple]:
    """Return (kind, value) of each kind with one value, or of each with all."""
    kinds, values = ("fp16", *KINDS), list(values)
    if os.environ.get("EDGELLM_ALL_ARCHITECTURES"):
        return list(itertools.product(kinds, values))
    return list(zip(kinds, itertools.cycle(values)))


@pytest.mark.parametrize("kind, model", _by_turns(MODELS))
def test_gemms(noted, kind, model):
    _check(noted, _gemms(noted.kernels, model, kind))


@pytest.mark.parametrize("kind, rank", _by_turns([16, 64]))
def test_gemms_with_adapters(noted, kind, rank):
    _check(noted, _gemms(noted.kernels, "llama-3.2-1b", kind, rank))


def test_attention(noted):
    _check(noted, [_attention(noted.kernels, model, kv_int8) for model in MODELS for kv_int8 in (False, True)])
