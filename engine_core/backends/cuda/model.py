"""The transformer on our own kernels alone.

Decode takes five kernels a layer, each of which may start while the one before it ends: norm + QKV GEMV, attention
(with RoPE and the append to the KV cache), output GEMV + residual, norm + gate-up GEMV + SiLU, down GEMV + residual.
Prefill calls cuBLAS, for which 4- and 8-bit weights are dequantized; a GEMM of a few tokens reads them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from engine_core.backends.cuda.layout import CudaSpec, matrix_shapes, packed_rows_problem, work_arrays
from engine_core.backends.gpu_model import DeviceModel, Matrix, Work
from engine_core.cuda.driver import Arena, Device, DeviceArray, Launch, Stream
from engine_core.cuda.kernels import Kernels, linear, linear_packed
from engine_core.cuda.kernels.attention import AttentionPrefill
from engine_core.cuda.kernels.blas import Blas
from engine_core.cuda.kernels.launch_configs import (
    GEMM_TOKENS,
    PACKED_ROWS,
    PackedGemmProblem,
    PackedRowsProblem,
    Problem,
)


@dataclass
class _Gemm:
    """A 16-bit matrix for cuBLAS and, where it is kept in 4 or 8 bits, what makes it and what does without."""

    weight: DeviceArray
    dequantize: Launch | None = None
    packed: linear_packed.PackedGemm | None = None


@dataclass
class _Layer:
    """The launches and the matrices of one layer's prefill."""

    input_norm: Launch
    bias: Launch | None
    rope_append: Launch
    attend: AttentionPrefill
    post_norm: Launch
    gemms: dict[str, _Gemm]


class CudaModel(DeviceModel[_Layer]):
    """See the module."""

    def __init__(self, device: Device, stream: Stream, arena: Arena, kernels: Kernels, spec: CudaSpec) -> None:
        super().__init__(device, stream, arena, kernels, spec, work_arrays(spec, device.num_sms))
        self.blas = Blas(stream, self.work["blas"])

    def _decode_layer(self, i: int) -> list[Work]:
        spec, w = self.spec, self.work
        matrices = {name: self.matrix(f"layers.{i}.{name}") for name in MATRICES}
        hidden, qkv, attended, activated = (w[name].at(0) for name in ("hidden", "qkv", "attended", "activated"))
        eps = spec.norm_eps
        return [
            self._gemv(
                *(matrices["qkv"], hidden, qkv, linear.STORE),
                norm_weight=self.weights[f"layers.{i}.input_norm"],
                bias=self.weights.get(f"layers.{i}.qkv_bias"),
                norm_eps=eps,
                norm_size=spec.model.hidden_size,
            ),
            self._attend_one(i),
            self._gemv(matrices["o"], attended, hidden, linear.RESIDUAL),
            self._gemv(
                *(matrices["gate_up"], hidden, activated, linear.SILU),
                norm_weight=self.weights[f"layers.{i}.post_norm"],
                norm_eps=eps,
                norm_size=spec.model.hidden_size,
            ),
            self._gemv(matrices["down"], activated, hidden, linear.RESIDUAL),
        ]

    def prepare_prefill(self) -> None:
        self._silu = self._silu_multiply()
        self._max_packed = 0
        if self.spec.is_packed:
            self._max_packed = self._kernels.config(packed_rows_problem(self.spec)).rows
        super().prepare_prefill()

    def _silu_multiply(self) -> Launch:
        return linear.silu_multiply(self._kernels, self.work["gate_up"], self.work["activated"])

    def _work_of(self, problem: Problem[Any], host_tokens: int) -> list[Work]:
        if isinstance(problem, PackedRowsProblem):
            self._place_chunk(PACKED_ROWS[-1])
            self._silu = self._silu_multiply()
            gemms, limit = self._prefill_layer(0).gemms, self._kernels.config(problem).rows
            sizes = [rows for rows in PACKED_ROWS if rows <= self.spec.chunk]
            return [partial(self._multiply, gemms, name, rows, limit) for rows in sizes for name in MATRICES]
        if isinstance(problem, PackedGemmProblem):
            self._place_chunk(GEMM_TOKENS)
            rows = min(GEMM_TOKENS, self.spec.chunk)
            layers = [self._prefill_layer(i).gemms.values() for i in self._tuned_layers()]
            packed = [gemm.packed for gemms in layers for gemm in gemms]
            return [partial(each, rows=rows) for each in packed if each is not None and each.problem == problem]
        return super()._work_of(problem, host_tokens)

    def _prefill_layer(self, i: int) -> _Layer:
        kernels, spec, w = self._kernels, self.spec, self.work

        def norm(name: str) -> Launch:
            arrays = (w["hidden"], self.weights[f"layers.{i}.{name}"], w["normed"])
            return linear.rms_norm(kernels, *arrays, spec.norm_eps, norm_size=spec.model.hidden_size)

        bias = self.weights.get(f"layers.{i}.qkv_bias")
        return _Layer(
            input_norm=norm("input_norm"),
            bias=None if bias is None else linear.add_bias(kernels, w["qkv"], bias),
            rope_append=self._rope_append(i),
            attend=self._attend(i),
            post_norm=norm("post_norm"),
            gemms={name: self._prefill_gemm(name, self.matrix(f"layers.{i}.{name}")) for name in MATRICES},
        )

    def _prefill_gemm(self, name: str, weight: Matrix) -> _Gemm:
        if not isinstance(weight, linear_packed.PackedWeight):
            return _Gemm(weight)
        kernels, w = self._kernels, self.work
        source, target, epilogue = MATRICES[name]
        either = w["dequantized"]  # the dequantized matrix or, with few tokens, the partial sums
        whole = DeviceArray(either.address, matrix_shapes(self.spec)[name], self.spec.dtype)
        sums = DeviceArray(either.address, (either.nbytes // 4,), "fp32")
        return _Gemm(
            whole,
            linear_packed.dequantize_packed(kernels, weight, whole),
            linear_packed.PackedGemm(
                *(kernels, weight, w[source], w["activated" if epilogue == linear.SILU else target], epilogue),
                *(self._chunk, sums, w["packed_counters"]),
            ),
        )

    def _multiply(self, gemms: dict[str, _Gemm], name: str, rows: int, max_packed: int, stream: Stream) -> None:
        """Queues the GEMM ``name`` of ``rows`` rows; up to ``max_packed`` a packed matrix is multiplied as it is."""
        w, gemm = self.work, gemms[name]
        if gemm.packed is not None and rows <= max_packed:
            gemm.packed(stream, rows)
            return
        if gemm.dequantize is not None:
            gemm.dequantize(stream)
        source, target, epilogue = MATRICES[name]
        self.blas.matmul(w[source], gemm.weight, w[target], rows, epilogue == linear.RESIDUAL)
        if epilogue == linear.SILU:
            self._silu.set_grid(rows)
            self._silu(stream)

    def _run_layer(self, layer: _Layer, rows: int) -> None:
        stream = self._stream

        def multiply(name: str) -> None:
            self._multiply(layer.gemms, name, rows, self._max_packed, stream)

        layer.input_norm.set_grid(rows)
        layer.input_norm(stream)
        multiply("qkv")
        if layer.bias is not None:
            layer.bias.set_grid(rows)
            layer.bias(stream)
        self._run_attention(layer.rope_append, layer.attend, rows)
        multiply("o")
        layer.post_norm.set_grid(rows)
        layer.post_norm(stream)
        multiply("gate_up")
        multiply("down")

    def close(self) -> None:
        self.blas.close()


# GEMM → what it reads and writes, and its epilogue. SiLU's result goes from "gate_up" to "activated".
MATRICES = {
    "qkv": ("normed", "qkv", linear.STORE),
    "o": ("attended", "hidden", linear.RESIDUAL),
    "gate_up": ("normed", "gate_up", linear.SILU),
    "down": ("activated", "hidden", linear.RESIDUAL),
}
