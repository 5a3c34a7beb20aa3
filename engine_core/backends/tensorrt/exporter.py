"""The common part of the exporters of whole decoders: all but the attention, in plain ONNX operators.

Activations are [tokens, features]. GEMMs are 16-bit; the residual stream, norms, RoPE, softmax and logits are
float32, because their sums overflow or lose too much in 16 bits (Gemma's residual exceeds 65504). Casts stand next to
element-wise nodes, which TensorRT can fuse, so that but for the residual no float32 value has to reach memory. Strongly
typed networks take the types from here; where TensorRT chooses types itself (8.6), the builder pins every node whose
name contains ``FP32``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from engine_core.errors import BuildError
from engine_core.formats.onnx_writer import GraphWriter
from engine_core.formats.weight_formats import float_format
from engine_core.formats.weights import Weights
from engine_core.models.spec import LayerSpec, LinearSpec

FP32 = "/fp32/"
_ONNX_TYPES = {"fp16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT}
_REDUCE_AXES_ARE_INPUTS = 18  # the opset since which they are no attribute


class TrtExporter:
    """Implements ``onnx_graph.Exporter`` but for ``attention``. ``dtype``: of weights, KV cache and GEMMs.

    The inputs: ``token_ids`` and ``positions``, int32 [tokens]; ``last_token``, int32 [1], the index of the token whose
    logits are wanted, so that a call may be padded. int32, as TensorRT 8.6 has no int64 inputs. ``positions`` ascend by
    one.
    """

    opset: int
    ir_version: int

    def __init__(self, writer: GraphWriter, weights: Weights, max_context: int, dtype: str = "fp16") -> None:
        self._writer = writer
        self._weights = weights
        self._spec = weights.spec
        self._max_context = max_context
        self._dtype = dtype
        self._weight_format = float_format(dtype)
        self._io_type = _ONNX_TYPES[dtype]
        self._type_of: dict[str, str] = {}  # value → fp16 or fp32; other types are not in it
        self._cached: dict[tuple, str] = {}  # what several nodes read and is computed once
        self._tied_head = ""

    # --- onnx_graph.Exporter ---------------------------------------------------------------------------

    def begin(self) -> None:
        for name in ("token_ids", "positions"):
            self._writer.input(name, TensorProto.INT32, ["tokens"])
        self._writer.input("last_token", TensorProto.INT32, [1])
        self._begin_cache()

    def embed(self) -> str:
        spec, weights = self._spec, self._weights
        table = self._stream("embedding", (spec.vocab_size, spec.hidden_size), weights.embedding())
        self._tied_head = table if spec.tied and weights.vocab_map is None else ""
        embedded = self._node("Gather", [table, "token_ids"], "embed/output", self._dtype, axis=0)
        if spec.embedding_scale == 1.0:
            return embedded
        scale = self._constant32("embedding_scale", spec.embedding_scale)
        return self._node32("Mul", [embedded, scale], f"embed{FP32}scaled")

    def norm(self, name: str, value: str, weight: str) -> str:
        return self._norm(name, value, self._constant32(weight, self._weights.norm(weight)))

    def add_norm(self, name: str, residual: str, value: str, weight: str) -> tuple[str, str]:
        total = self._node32("Add", [residual, value], f"{name}{FP32}sum")
        return self.norm(name, total, weight), total

    def add(self, name: str, residual: str, value: str) -> str:
        return self._node32("Add", [residual, value], f"{name}{FP32}sum")

    def linear(self, name: str, value: str, linear: LinearSpec) -> str:
        weights = self._weights
        weight = self._stream(f"{name}.weight", weights.linear_shape(linear), weights.linear(linear))
        return self._matmul(name, value, weight, weights.bias(linear))

    def attention(self, index: int, qkv: str, layer: LayerSpec) -> str:
        raise NotImplementedError

    def gated(self, name: str, gate_up: str) -> str:
        size = self._spec.intermediate_size
        gate, up = self._split(gate_up, [size, size], 1, [f"{name}/gate", f"{name}/up"])
        if self._spec.activation == "silu":
            sigmoid = self._node("Sigmoid", [gate], f"{name}/sigmoid", self._dtype)
            active = self._node("Mul", [gate, sigmoid], f"{name}/active", self._dtype)
        else:
            active = self._gelu_tanh(f"{name}{FP32}gelu", gate)
        return self._node("Mul", [active, up], f"{name}/output", self._dtype)

    def add_features(self, index: int, value: str) -> str:
        return value  # no model that sees is written

    def experts(self, name: str, value: str, layer: LayerSpec) -> str:
        raise BuildError(f"{self._spec.architecture} has experts, which TensorRT engines are not built with.")

    def short_convolution(self, index: int, value: str, layer: LayerSpec) -> str:
        raise BuildError(
            f"{self._spec.architecture} has short convolutions, which TensorRT engines are not built with."
        )

    def wanted_tokens(self, name: str, value: str) -> str:
        return self._node("Gather", [value, "last_token"], f"{name}/output", self._type_of[value], axis=0)

    def head(self, value: str) -> None:
        spec, weights = self._spec, self._weights
        shape = (weights.head_rows, spec.hidden_size)
        weight = self._tied_head or self._stream("head.weight", shape, weights.head())
        logits = self._matmul("head", value, weight, None)
        if spec.logits_scale != 1:
            scale = self._constant32("logits_scale", spec.logits_scale)
            logits = self._node32("Mul", [logits, scale], f"logits{FP32}scaled")
        if spec.logits_softcap:
            logits = self._softcap("logits", logits, spec.logits_softcap)
        logits = self._as(logits, "fp32")
        self._writer.node("Identity", [logits], "logits")
        self._writer.output("logits", TensorProto.FLOAT, [1, shape[0]])

    def finish(self) -> None:
        self._writer.save({"": self.opset}, ir_version=self.ir_version)

    # --- for the attention of an exporter ---------------------------------------------------------------

    def _begin_cache(self) -> None:
        """Declares the inputs and outputs the KV cache needs."""
        raise NotImplementedError

    def _heads(self, index: int, qkv: str, layer: LayerSpec, value_name: str) -> tuple[str, str]:
        """(Q and K [tokens, heads + kv_heads, head_dim], normed where the layer has norms and Q scaled, float32;
        V [tokens, kv_heads, head_dim], named ``value_name``)."""
        spec, prefix = self._spec, f"layer{index}"
        num_rotated = spec.num_heads + spec.num_kv_heads
        if layer.wide_qk_norm:
            qkv = self._normed_wide(prefix, qkv, layer)
        split = self._reshape(qkv, [-1, num_rotated + spec.num_kv_heads, spec.head_dim], f"{prefix}/heads")
        names = [f"{prefix}/query_key", value_name]
        query_key, value = self._split(split, [num_rotated, spec.num_kv_heads], 1, names)
        has_norms = layer.q_norm and not layer.wide_qk_norm
        scale = np.ones((num_rotated, spec.head_dim if has_norms else 1), dtype=np.float32)
        scale[: spec.num_heads] = spec.attention_scale
        if not has_norms:
            factor = self._constant32("query_scale", scale)
            return self._node32("Mul", [query_key, factor], f"{prefix}{FP32}query_scaled"), value
        scale[: spec.num_heads] *= self._weights.norm(layer.q_norm)
        scale[spec.num_heads :] *= self._weights.norm(layer.k_norm)
        factor = self._constant32(f"{prefix}/head_norms", scale)
        return self._norm(f"{prefix}/head_norm", query_key, factor), value

    def _normed_wide(self, prefix: str, qkv: str, layer: LayerSpec) -> str:
        """Return ``qkv`` with Q normed over all its heads and K over all of its own."""
        sizes = [count * self._spec.head_dim for count in (self._spec.num_heads, *2 * (self._spec.num_kv_heads,))]
        query, key, value = self._split(qkv, sizes, 1, [f"{prefix}/{part}_flat" for part in ("query", "key", "value")])
        parts = [
            self.norm(f"{prefix}/query_norm", query, layer.q_norm),
            self.norm(f"{prefix}/key_norm", key, layer.k_norm),
        ]
        return self._node("Concat", [*parts, value], f"{prefix}/qkv_normed", self._dtype, axis=1)

    def _positions_column(self) -> str:
        """int32 [tokens, 1]."""
        return self._once(("column",), lambda: self._unsqueeze("positions", [1], "mask/positions"))

    # --- operators ------------------------------------------------------------------------------------

    def _norm(self, name: str, value: str, weight: str) -> str:
        """RMS norm of the last axis in float32. Zhang and Sennrich 2019 (arXiv 1910.07467)."""
        square = self._node32("Mul", [value, value], f"{name}{FP32}square")
        mean = self._mean32(square, f"{name}{FP32}mean")
        biased = self._node32("Add", [mean, self._constant32("norm_eps", self._spec.norm_eps)], f"{name}{FP32}biased")
        root = self._node32("Sqrt", [biased], f"{name}{FP32}root")
        normed = self._node32("Div", [value, root], f"{name}{FP32}normed")
        return self._node32("Mul", [normed, weight], f"{name}{FP32}weighted")

    def _matmul(self, name: str, value: str, weight: str, bias: np.ndarray | None) -> str:
        """value [tokens, in] · weight [out, in]ᵀ (+ bias), 16-bit."""
        inputs = [value, weight]
        if bias is not None:
            inputs.append(self._constant16(f"{name}.bias", bias))
        return self._node("Gemm", inputs, f"{name}/output", self._dtype, transB=1)

    def _gelu_tanh(self, name: str, value: str) -> str:
        """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))). Hendrycks and Gimpel 2016 (arXiv 1606.08415)."""
        square = self._node32("Mul", [value, value], f"{name}/square")
        scaled = self._node32("Mul", [square, self._constant32("gelu_cubic", 0.044715)], f"{name}/scaled")
        factor = self._node32("Add", [scaled, self._constant32("one", 1.0)], f"{name}/factor")
        inner = self._node32("Mul", [value, factor], f"{name}/inner")
        angle = self._node32("Mul", [inner, self._constant32("gelu_scale", np.sqrt(2 / np.pi))], f"{name}/angle")
        bounded = self._node32("Tanh", [angle], f"{name}/tanh")
        shifted = self._node32("Add", [bounded, self._constant32("one", 1.0)], f"{name}/shifted")
        half = self._node32("Mul", [value, self._constant32("half", 0.5)], f"{name}/half")
        return self._node32("Mul", [half, shifted], f"{name}/product")

    def _softcap(self, name: str, value: str, cap: float) -> str:
        limit = self._constant32(f"softcap_{cap}", cap)
        scaled = self._node32("Div", [value, limit], f"{name}{FP32}softcap_scaled")
        bounded = self._node32("Tanh", [scaled], f"{name}{FP32}softcap_tanh")
        return self._node32("Mul", [bounded, limit], f"{name}{FP32}softcap")

    def _node(self, op: str, inputs: Sequence[str], output: str, dtype: str, **attributes: Any) -> str:
        """Add a node whose floating-point inputs are cast to ``dtype``, which its output has."""
        inputs = [self._as(value, dtype) for value in inputs]
        self._type_of[output] = dtype
        return self._writer.node(op, inputs, output, **attributes)

    def _node32(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        assert FP32 in output, output
        return self._node(op, inputs, output, "fp32", **attributes)

    def _mean32(self, value: str, output: str) -> str:
        """Over the last axis, which stays as 1."""
        if self.opset >= _REDUCE_AXES_ARE_INPUTS:
            return self._node32("ReduceMean", [value, self._ints("axis_last", [-1])], output, keepdims=1)
        return self._node32("ReduceMean", [value], output, axes=[-1], keepdims=1)

    def _as(self, value: str, dtype: str) -> str:
        found = self._type_of.get(value, dtype)
        if found == dtype or self._dtype == "fp32":
            return value
        output = f"{value}{FP32}cast" if dtype == "fp32" else f"{value}/fp16_cast"

        def cast() -> str:
            self._type_of[output] = dtype
            return self._writer.node("Cast", [value], output, to=_ONNX_TYPES[dtype])

        return self._once(("cast", value, dtype), cast)

    def _split(self, value: str, sizes: Sequence[int], axis: int, outputs: Sequence[str]) -> tuple[str, ...]:
        lengths = self._ints("sizes_" + "_".join(map(str, sizes)), sizes)
        self._writer.node("Split", [value, lengths], list(outputs), axis=axis)
        self._type_of.update(dict.fromkeys(outputs, self._type_of[value]))
        return tuple(outputs)

    def _reshape(self, value: str, shape: Sequence[int], output: str) -> str:
        """``shape``: one of the sizes may be -1. Constant, as TensorRT loses track of sizes that are computed."""
        return self._moved("Reshape", [value, self._ints("shape_" + "_".join(map(str, shape)), shape)], output)

    def _transpose(self, value: str, order: Sequence[int], output: str) -> str:
        return self._moved("Transpose", [value], output, perm=list(order))

    def _unsqueeze(self, value: str, axes: Sequence[int], output: str) -> str:
        axes_name = "axes_" + "_".join(map(str, axes))
        return self._moved("Unsqueeze", [value, self._ints(axes_name, axes)], output)

    def _moved(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node that moves the values of its first input."""
        if inputs[0] in self._type_of:
            self._type_of[output] = self._type_of[inputs[0]]
        return self._writer.node(op, inputs, output, **attributes)

    def _once(self, key: tuple, make: Any) -> str:
        if key not in self._cached:
            self._cached[key] = make()
        return self._cached[key]

    # --- tensors --------------------------------------------------------------------------------------

    def _constant32(self, name: str, value: np.ndarray | float) -> str:
        self._type_of[name] = "fp32"
        return self._writer.constant(name, np.asarray(value, dtype=np.float32))

    def _constant16(self, name: str, value: np.ndarray) -> str:
        self._type_of[name] = self._dtype
        return self._writer.constant(name, self._narrow(value))

    def _ints(self, name: str, values: Sequence[int] | Sequence[Sequence[int]], dtype: type = np.int64) -> str:
        return self._writer.constant(name, np.array(values, dtype=dtype))

    def _stream(self, name: str, shape: Sequence[int], blocks: Iterator[np.ndarray]) -> str:
        self._type_of[name] = self._dtype
        narrowed: Iterable[np.ndarray] = (self._narrow(block) for block in blocks)
        return self._writer.stream(name, self._weight_format.dtype, shape, narrowed)

    def _narrow(self, values: np.ndarray) -> np.ndarray:
        result = self._weight_format.pack(values)
        if not np.isfinite(result).all():
            raise BuildError(
                "A weight is not finite in fp16 (its magnitude is above 65504, or it is damaged); build fp32, or use "
                "the backend cuda, which keeps bf16."
            )
        return result
