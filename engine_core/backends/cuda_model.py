"""The transformer on the device: its arrays, one decode step as a list of launches, one prefill chunk as a method.

Decode takes five kernels a layer, each of which may start while the one before it ends: norm + QKV product, attention
(with RoPE and the append to the KV cache), output product + residual, norm + gate-up product + SiLU, down product +
residual. The residual stream is float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine_core.backends.cuda_layout import ROW_GRAIN, CudaSpec, product_shapes, weight_arrays, work_arrays
from engine_core.device import Arena, Device, DeviceArray, Launch, Stream
from engine_core.kernels import Kernels, attention, linear, linear_packed, sampling
from engine_core.kernels.blas import Blas

# name, array → fills the array. From a file, or random for a benchmark.
WeightSource = Callable[[str, DeviceArray], None]


@dataclass
class _Product:
    """A 16-bit matrix for cuBLAS and, where it is kept in 4 or 8 bits, what makes it."""

    weight: DeviceArray
    dequantize: Launch | None


@dataclass
class _Layer:
    """The launches and the matrices of one layer's prefill."""

    input_norm: Launch
    bias: Launch | None
    rope_append: Launch
    attend: Launch
    post_norm: Launch
    products: dict[str, _Product]


class CudaModel:
    """Weights, KV cache and scratch of one model in one arena, and what runs on them."""

    def __init__(self, device: Device, stream: Stream, arena: Arena, kernels: Kernels, spec: CudaSpec) -> None:
        self.spec = spec
        self._device = device
        self._stream = stream
        self._kernels = kernels
        self.weights = {name: arena.take(a.shape, a.dtype) for name, a in weight_arrays(spec).items()}
        self.work = {name: arena.take(a.shape, a.dtype) for name, a in work_arrays(spec, device.num_sms).items()}
        self.blas = Blas(stream, self.work["blas"])
        # Scalars the prepared launches of prefill read: set before each chunk.
        self._position, self._count = ctypes.c_int(0), ctypes.c_int(0)
        self._pairs, self._values = ctypes.c_uint32(0), ctypes.c_uint32(0)

    def fill(self, source: WeightSource, rope: np.ndarray) -> None:
        """Loads every weight and the RoPE table: float32 [max_context, head_dim / 2, 2], cos and sin."""
        for name, array in self.weights.items():
            source(name, array)
        assert rope.dtype == np.float32 and rope.shape == self.work["rope"].shape
        self._device.upload(self.work["rope"], rope)
        for name in ("counters", "seen", "bias", "state"):
            self._stream.zero(self.work[name])
        self._device.synchronize()

    # --- decode ---------------------------------------------------------------------------------------

    def sampling_launches(self, host_tokens: int) -> list[Launch]:
        """The head on the first row of ``hidden``, then the sampler; the token also goes to ``host_tokens``."""
        w, weights = self.work, self.weights
        head = weights["head" if self.spec.has_head else "embed"]
        launches = [
            self._gemv(
                *(head, w["hidden"].at(0), w["logits"], linear.LOGITS),
                norm_weight=weights["norm"],
                norm_eps=self.spec.norm_eps,
            )
        ]
        arrays = [w[name] for name in ("logits", "scores", "params", "state", "seen", "bias", "mask")]
        launches += sampling.sample(self._kernels, *arrays, w.get("vocab_map"), host_tokens)
        return launches

    def decode_launches(self, host_tokens: int) -> list[Launch]:
        """One whole step: reads the token and position of ``state``, writes both."""
        w = self.work
        token = DeviceArray(w["state"].address + sampling.STATE.fields["token"][1], (1,), "int32")
        hidden = DeviceArray(w["hidden"].address, (1, self.spec.hidden), "fp32")
        launches = [linear.embed(self._kernels, self.weights["embed"], token, hidden)]
        for i in range(self.spec.num_layers):
            launches += self._decode_layer(i)
        return launches + self.sampling_launches(host_tokens)

    def _gemv(self, weight: DeviceArray, *args: Any, **kwargs: Any) -> Launch:
        gemv = linear_packed.gemv_packed if weight.dtype == "uint8" else linear.gemv
        return gemv(self._kernels, weight, *args, **kwargs)

    def _decode_layer(self, i: int) -> list[Launch]:
        kernels, spec, w = self._kernels, self.spec, self.work
        weights = {name: self.weights.get(f"layers.{i}.{name}") for name in _LAYER_WEIGHTS}
        hidden, qkv, attended, activated = (w[name].at(0) for name in ("hidden", "qkv", "attended", "activated"))
        eps = spec.norm_eps
        return [
            self._gemv(
                *(weights["qkv"], hidden, qkv, linear.STORE),
                norm_weight=weights["input_norm"],
                bias=weights["qkv_bias"],
                norm_eps=eps,
            ),
            attention.attention_decode(
                kernels,
                *(
                    spec.attention,
                    qkv,
                    w["kv_cache"].at(i),
                    w["rope"],
                    w["state"],
                    w["partial"],
                    w["counters"],
                    attended,
                ),
                norms=self._head_norms(i),
                scales=self._scales(i),
            ),
            self._gemv(weights["o"], attended, hidden, linear.RESIDUAL),
            self._gemv(
                *(weights["gate_up"], hidden, activated, linear.SILU),
                norm_weight=weights["post_norm"],
                norm_eps=eps,
            ),
            self._gemv(weights["down"], activated, hidden, linear.RESIDUAL),
        ]

    def _head_norms(self, i: int) -> tuple[DeviceArray, DeviceArray] | None:
        if not self.spec.attention.qk_norm:
            return None
        return self.weights[f"layers.{i}.q_norm"], self.weights[f"layers.{i}.k_norm"]

    def _scales(self, i: int) -> DeviceArray | None:
        return self.work["kv_scales"].at(i) if self.spec.attention.kv_int8 else None

    # --- prefill --------------------------------------------------------------------------------------

    def prepare_prefill(self) -> None:
        """Makes the launches of a prefill chunk. Raises KernelCompileError or DeviceError."""
        kernels, spec, w = self._kernels, self.spec, self.work
        self._embed = linear.embed(kernels, self.weights["embed"], w["tokens"], w["hidden"])
        self._silu = linear.silu_multiply(kernels, w["gate_up"], w["activated"], self._pairs)
        self._layers = [self._prefill_layer(i) for i in range(spec.num_layers)]

    def _prefill_layer(self, i: int) -> _Layer:
        kernels, spec, w = self._kernels, self.spec, self.work
        weights = {name: self.weights.get(f"layers.{i}.{name}") for name in _LAYER_WEIGHTS}
        cache, position, count = w["kv_cache"].at(i), self._position, self._count

        def norm(weight: DeviceArray) -> Launch:
            return linear.rms_norm(kernels, w["hidden"], weight, w["normed"], spec.norm_eps)

        bias = weights["qkv_bias"]
        return _Layer(
            input_norm=norm(weights["input_norm"]),
            bias=None if bias is None else linear.add_bias(kernels, w["qkv"], bias, self._values),
            rope_append=attention.rope_append(
                kernels,
                *(spec.attention, w["qkv"], cache, w["rope"], position, count),
                norms=self._head_norms(i),
                scales=self._scales(i),
            ),
            attend=attention.attention_prefill(
                kernels, spec.attention, w["qkv"], cache, w["attended"], position, count, self._scales(i)
            ),
            post_norm=norm(weights["post_norm"]),
            products={name: self._product(weights[name], shape) for name, shape in product_shapes(spec).items()},
        )

    def _product(self, weight: DeviceArray, shape: tuple[int, int]) -> _Product:
        if self.spec.weight_bits == 16:
            return _Product(weight, None)
        target = DeviceArray(self.work["dequantized"].address, shape, self.spec.dtype)
        return _Product(target, linear_packed.dequantize_packed(self._kernels, weight, target))

    def prefill_chunk(self, count: int, position: int) -> None:
        """Queues the forward pass of ``count`` tokens, whose ids are in ``tokens``, from ``position`` on.

        Leaves the last token's hidden state in the first row of ``hidden``, where the head reads it.
        """
        spec, w, stream = self.spec, self.work, self._stream
        assert 1 <= count <= spec.chunk and position + count <= spec.max_context
        self._position.value, self._count.value = position, count
        self._pairs.value, self._values.value = count * spec.intermediate, count * spec.attention.qkv_width
        rows = min(spec.chunk, -(-count // ROW_GRAIN) * ROW_GRAIN)
        self._embed.set_grid(count)
        self._embed(stream)
        for layer in self._layers:
            self._run_layer(layer, count, rows)
        if count > 1:
            stream.copy(w["hidden"].address, w["hidden"].at(count - 1).address, spec.hidden * 4)

    def _run_layer(self, layer: _Layer, count: int, rows: int) -> None:
        w, stream = self.work, self._stream

        def multiply(name: str, source: str, target: str, accumulate: bool = False) -> None:
            product = layer.products[name]
            if product.dequantize is not None:
                product.dequantize(stream)
            self.blas.matmul(w[source], product.weight, w[target], rows, accumulate)

        layer.input_norm.set_grid(count)
        layer.input_norm(stream)
        multiply("qkv", "normed", "qkv")
        if layer.bias is not None:
            layer.bias(stream)
        layer.rope_append.set_grid(attention.rope_append_blocks(self.spec.attention, count))
        layer.rope_append(stream)
        layer.attend.set_grid(attention.attention_prefill_tiles(count), self.spec.attention.num_heads)
        layer.attend(stream)
        multiply("o", "attended", "hidden", accumulate=True)
        layer.post_norm.set_grid(count)
        layer.post_norm(stream)
        multiply("gate_up", "normed", "gate_up")
        self._silu(stream)
        multiply("down", "activated", "hidden", accumulate=True)

    def close(self) -> None:
        self.blas.close()


_LAYER_WEIGHTS = ("input_norm", "qkv", "qkv_bias", "o", "post_norm", "gate_up", "down")
