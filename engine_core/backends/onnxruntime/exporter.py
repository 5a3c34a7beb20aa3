"""The decoder in ONNX Runtime's fused CPU operators (domain com.microsoft), by measurement: docs/cpu_backend.md.

GroupQueryAttention applies RoPE, appends to the cache in place (past and present are bound to one buffer) and attends.
MatMulNBits multiplies with group-wise int4 or int8 weights; GatherBlockQuantized looks tokens up in the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from onnx import TensorProto

from engine_core.backends.onnxruntime.files import graph_name
from engine_core.backends.onnxruntime.heads import head_axes, turned_size
from engine_core.backends.onnxruntime.kv_cache_graphs import KVScales, with_fp16_cache, with_int8_cache
from engine_core.backends.onnxruntime.weight_writer import PackedWeight, own_values, packed_shape, rounded
from engine_core.formats.onnx_writer import GraphWriter
from engine_core.formats.rounding_errors import RoundingErrors
from engine_core.formats.weight_formats.base import WeightFormat
from engine_core.formats.weight_formats.integers import IntegerFormat
from engine_core.formats.weights import Weights
from engine_core.models.padding import Axis
from engine_core.models.spec import LayerSpec, LinearSpec

_MS = "com.microsoft"
_OPSETS = {"": 17, _MS: 1}
_PACKED_GROUP_BYTES = 8  # MatMulNBits keeps the scale and the sum of each group beside its packed values, float32 both
_ACCURACY_INT8 = 4  # MatMulNBits: activations are rounded to int8 group by group, the GEMM is in integers


@dataclass(frozen=True)
class Precision:
    """The formats of the weights. A group is ``group_size`` weights of a row that share a scale."""

    linear: WeightFormat  # fp32 or an integer format
    head: WeightFormat  # of LM head and embedding
    group_size: int = 0
    accuracy_level: int = _ACCURACY_INT8


@dataclass
class Packing:
    """Bytes of the weights that the runtime packs anew when it loads; see docs/cpu_backend.md."""

    released: int = 0  # of the file, not kept once packed
    packed: int = 0
    head: int = 0  # of ``packed``, the LM head's
    largest_scales: int = 0  # of one tensor; the packing keeps a buffer of this size

    def add(self, groups: int, group_bytes: int, *, is_head: bool, is_shared: bool) -> None:
        """Count a matrix of so many groups. ``is_shared``: the token lookup keeps its bytes."""
        packed = groups * (group_bytes + _PACKED_GROUP_BYTES)
        self.released += 0 if is_shared else groups * group_bytes
        self.packed += packed
        self.head += packed if is_head else 0
        self.largest_scales = max(self.largest_scales, 4 * groups)


class OrtExporter:
    """Implements ``onnx_graph.Exporter``. ``max_context``: positions of the RoPE table."""

    def __init__(self, writer: GraphWriter, weights: Weights, precision: Precision, max_context: int) -> None:
        self._writer = writer
        self._weights = weights
        self._precision = precision
        self._max_context = max_context
        self._spec = weights.spec
        self.packing = Packing()
        self.rounding_errors = RoundingErrors()  # of matrices that the checkpoint has quantized otherwise
        self._heads = head_axes(self._spec)
        self._tied_head = ""  # the embedding's tensor, where the head can use the same bytes

    def begin(self) -> None:
        spec, writer = self._spec, self._writer
        writer.input("input_ids", TensorProto.INT64, ["batch", "tokens"])
        # For each sequence, positions already in the cache plus those of this call, less one; and their largest sum.
        writer.input("last_position", TensorProto.INT32, ["batch"])
        writer.input("length", TensorProto.INT32, [])
        writer.input("rows", TensorProto.INT64, ["rows", 2])  # (sequence, token) of each row of the logits
        for i in range(len(spec.layers)):
            for kind in ("key", "value"):
                shape: list[int | str] = ["batch", spec.num_kv_heads, "max_context", self._heads[0].size]
                writer.input(f"past_{kind}.{i}", TensorProto.FLOAT, shape)
                writer.output(f"present_{kind}.{i}", TensorProto.FLOAT, shape)
        for name, table in self._rope_tables().items():
            writer.constant(name, table)

    def embed(self) -> str:
        spec, writer, precision = self._spec, self._writer, self._precision
        shares = spec.tied and self._weights.vocab_map is None
        shape = (spec.vocab_size, spec.hidden_size)
        if not isinstance(precision.head, IntegerFormat):
            table = writer.stream("embedding", np.dtype(np.float32), shape, self._weights.embedding())
            self._tied_head = table if shares else ""
            embedded = writer.node("Gather", [table, "input_ids"], "embed/output", axis=0)
        else:
            head, group_size = precision.head, precision.group_size
            blocks, listener = self._weights.embedding(), self._listener("embedding", spec.embedding)
            packed = rounded(writer, "embedding", shape, blocks, head, group_size, flat=True, on_rounded=listener)
            if shares:
                self._tied_head = writer.alias("head.weight", packed.values, packed_shape(shape, head, group_size))
            embedded = writer.node(
                "GatherBlockQuantized",
                [packed.values, "input_ids", packed.scales],
                "embed/output",
                domain=_MS,
                bits=head.bits,
                block_size=group_size,
                gather_axis=0,
                quantize_axis=1,
            )
            if spec.hidden_size % group_size:  # the lookup gives whole groups
                embedded = self._taken("embed/hidden", embedded, np.arange(spec.hidden_size))
        if spec.embedding_scale == 1.0:
            return embedded
        scale = writer.constant("embedding_scale", np.float32(spec.embedding_scale))
        return writer.node("Mul", [embedded, scale], "embed_scaled/output")

    def norm(self, name: str, value: str, weight: str) -> str:
        inputs = [value, self._norm_weight(weight)]
        return self._writer.node(
            "SimplifiedLayerNormalization", inputs, f"{name}/output", axis=-1, epsilon=self._spec.norm_eps, stash_type=1
        )

    def add_norm(self, name: str, residual: str, value: str, weight: str) -> tuple[str, str]:
        outputs = [f"{name}/output", "", "", f"{name}/sum"]
        inputs = [residual, value, self._norm_weight(weight)]
        normed = self._writer.node(
            "SkipSimplifiedLayerNormalization", inputs, outputs, domain=_MS, epsilon=self._spec.norm_eps
        )
        return normed, outputs[3]

    def linear(self, name: str, value: str, linear: LinearSpec) -> str:
        shape = self._weights.linear_shape(linear)
        bias = self._weights.bias(linear)
        wanted = self._precision.linear
        if not isinstance(wanted, IntegerFormat):
            weight = self._writer.stream(f"{name}.weight", np.dtype(np.float32), shape, self._weights.linear(linear))
            return self._matmul(name, value, weight, bias)
        layout = self._weights.integer_layout(linear)
        group_size = self._precision.group_size
        if layout is not None and wanted.keeps(layout.format, layout.group_size):
            packed = own_values(self._writer, f"{name}.weight", self._weights, linear, group_size)
        else:
            blocks, listener = self._weights.linear(linear), self._listener(name, *linear.parts)
            packed = rounded(self._writer, f"{name}.weight", shape, blocks, wanted, group_size, on_rounded=listener)
        return self._matmul_nbits(name, value, packed, shape, bias)

    def attention(self, index: int, qkv: str, layer: LayerSpec) -> str:
        spec = self._spec
        heads = self._heads[layer.rope]
        if layer.q_norm:
            parts = self._head_norms(index, qkv, layer)
            counts = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
            query, key, value = (self._filled(part, heads, count) for part, count in zip(parts, counts))
        else:
            query, key, value = self._filled(qkv, heads, spec.num_heads + 2 * spec.num_kv_heads), "", ""
        inputs = [query, key, value, f"past_key.{index}", f"past_value.{index}", "last_position", "length"]
        inputs += [f"rope_cos.{layer.rope}", f"rope_sin.{layer.rope}"]
        attributes: dict[str, float | int] = {"scale": spec.attention_scale}
        if spec.attention_softcap:
            attributes["softcap"] = spec.attention_softcap
        if layer.window and layer.window < self._max_context:
            attributes["local_window_size"] = layer.window
        attended = self._writer.node(
            "GroupQueryAttention",
            inputs,
            [f"layer{index}/attention/output", f"present_key.{index}", f"present_value.{index}"],
            domain=_MS,
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            do_rotary=1,
            **attributes,
        )
        if heads.is_whole:
            return attended
        return self._taken(f"layer{index}/attention/heads", attended, heads.repeated(spec.num_heads).places)

    def gated(self, name: str, gate_up: str) -> str:
        writer = self._writer
        size = self._spec.intermediate_size
        sizes = writer.constant("gate_up_sizes", np.array([size, size], dtype=np.int64))
        gate, up = f"{name}/gate", f"{name}/up"
        writer.node("Split", [gate_up, sizes], [gate, up], axis=-1)
        if self._spec.activation == "silu":
            active = writer.node("QuickGelu", [gate], f"{name}/active", domain=_MS, alpha=1.0)  # x * sigmoid(x)
        else:
            active = writer.node("FastGelu", [gate], f"{name}/active", domain=_MS)  # the tanh approximation
        return writer.node("Mul", [active, up], f"{name}/output")

    def wanted_tokens(self, name: str, value: str) -> str:
        return self._writer.node("GatherND", [value, "rows"], f"{name}/output")

    def head(self, value: str) -> None:
        logits = self._head_logits(value)
        if self._spec.logits_softcap:
            cap = self._writer.constant("logits_softcap", np.float32(self._spec.logits_softcap))
            scaled = self._writer.node("Div", [logits, cap], "softcap/scaled")
            bounded = self._writer.node("Tanh", [scaled], "softcap/tanh")
            logits = self._writer.node("Mul", [bounded, cap], "softcap/output")
        self._writer.node("Identity", [logits], "logits")
        self._writer.output("logits", TensorProto.FLOAT, ["rows", self._weights.head_rows])

    def _head_logits(self, value: str) -> str:
        """The head's product, before soft capping."""
        precision, weights = self._precision, self._weights
        shape = (weights.head_rows, self._spec.hidden_size)
        if not isinstance(precision.head, IntegerFormat):
            weight = self._tied_head or self._writer.stream("head.weight", np.dtype(np.float32), shape, weights.head())
            return self._matmul("head", value, weight, None)
        head, group_size = precision.head, precision.group_size
        if self._tied_head:
            packed = PackedWeight(self._tied_head, "embedding.scales", "", head, group_size)
        else:
            blocks, listener = weights.head(), self._listener("head", self._spec.head)
            packed = rounded(self._writer, "head.weight", shape, blocks, head, group_size, on_rounded=listener)
        return self._matmul_nbits("head", value, packed, shape, None)

    def finish(self) -> None:
        """Writes the graphs of the KV cache types that need no calibration."""
        self._save_graph(self._writer, "fp32")
        self._save_graph(with_fp16_cache(self._writer, self._rope_tables()), "fp16")

    def add_int8_cache(self, scales: KVScales) -> None:
        """Writes the graph of an int8 KV cache too; after ``finish``."""
        self._save_graph(with_int8_cache(self._writer, scales), "int8")

    def _save_graph(self, writer: GraphWriter, kv_cache_type: str) -> None:
        writer.save(_OPSETS, graph_name(kv_cache_type))
        # Before 1.24 the runtime's local_window_size left the query's own position out: a second graph over the same
        # weights for those (1.23 is the last one for Python 3.10, and so for JetPack 6). They have no int8 cache.
        if kv_cache_type != "int8":
            before = writer.fork()
            if before.add_to_attribute("local_window_size", -1):
                before.save(_OPSETS, graph_name(kv_cache_type, window_before_1_24=True))

    # --- helpers ------------------------------------------------------------------------------------

    def _listener(self, name: str, *tensors: str) -> Callable[[np.ndarray, np.ndarray], None] | None:
        """Return what counts the loss of a matrix of which any tensor is quantized in the checkpoint, or None."""
        if not any(self._weights.is_rounded(tensor) for tensor in tensors):
            return None
        return partial(self.rounding_errors.add, name)

    def _rope_tables(self) -> dict[str, np.ndarray]:
        """Name in the graph → float32 [max_context, half of the elements that are turned, see ``head_axes``]."""
        tables = {}
        for i, rope in enumerate(self._spec.ropes):
            width = turned_size(rope.dim) // 2
            for name, table in zip(("cos", "sin"), rope.table(self._max_context)):
                tables[f"rope_{name}.{i}"] = np.pad(table, ((0, 0), (0, width - table.shape[1])))
        return tables

    def _filled(self, value: str, head: Axis, count: int) -> str:
        """Return ``value`` [batch, tokens, ``count`` heads] with zeros where ``head`` adds elements to each."""
        if head.is_whole:
            return value
        end = self._writer.constant("one_zero_after_each_row", np.array([0, 0, 0, 0, 0, 1], dtype=np.int64))
        longer = self._writer.node("Pad", [value, end], f"{value}/longer")
        return self._taken(f"{value}/filled", longer, head.repeated(count).sources())

    def _taken(self, name: str, value: str, columns: np.ndarray) -> str:
        """Return the values ``columns``, int64 [n], of ``value`` [batch, tokens, …]."""
        indices = self._writer.constant(f"{name}/columns", columns.astype(np.int64))
        return self._writer.node("Gather", [value, indices], name, axis=2)

    def _norm_weight(self, name: str) -> str:
        return self._writer.constant(name, self._weights.norm(name))

    def _matmul(self, name: str, value: str, weight: str, bias: np.ndarray | None) -> str:
        """``weight``: [out, in], as the checkpoint has it."""
        result = self._writer.node("FusedMatMul", [value, weight], f"{name}/product", domain=_MS, transB=1)
        if bias is None:
            return result
        return self._writer.node("Add", [result, self._writer.constant(f"{name}.bias", bias)], f"{name}/output")

    def _matmul_nbits(
        self, name: str, value: str, weight: PackedWeight, shape: tuple[int, int], bias: np.ndarray | None
    ) -> str:
        groups, group_bytes = packed_shape(shape, weight.format, weight.block_size)[1:]
        is_shared = weight.values == self._tied_head
        self.packing.add(shape[0] * groups, group_bytes, is_head=name == "head", is_shared=is_shared)
        inputs = [value, weight.values, weight.scales]
        if weight.zeros or bias is not None:
            inputs += [weight.zeros]
        if bias is not None:
            inputs += ["", self._writer.constant(f"{name}.bias", bias)]
        return self._writer.node(
            "MatMulNBits",
            inputs,
            f"{name}/output",
            domain=_MS,
            N=shape[0],
            K=shape[1],
            bits=weight.format.bits,
            block_size=weight.block_size,
            accuracy_level=self._precision.accuracy_level,
        )

    def _head_norms(self, index: int, qkv: str, layer: LayerSpec) -> tuple[str, str, str]:
        """Splits Q, K and V and normalizes every head of Q and K."""
        spec, writer, prefix = self._spec, self._writer, f"layer{index}"
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        sizes = writer.constant("qkv_sizes", np.array([q_size, kv_size, kv_size], dtype=np.int64))
        names = [f"{prefix}/query", f"{prefix}/key", f"{prefix}/value"]
        writer.node("Split", [qkv, sizes], names, axis=-1)
        normed = []
        for name, weight, size in ((names[0], layer.q_norm, q_size), (names[1], layer.k_norm, kv_size)):
            shape = np.array([0, 0, size // spec.head_dim, spec.head_dim], np.int64)
            heads = writer.constant(f"heads_of_{size}", shape)
            flat = writer.constant(f"flat_{size}", np.array([0, 0, size], dtype=np.int64))
            split = writer.node("Reshape", [name, heads], f"{name}/heads")
            normed.append(writer.node("Reshape", [self.norm(f"{name}/norm", split, weight), flat], f"{name}/normed"))
        return normed[0], normed[1], names[2]
