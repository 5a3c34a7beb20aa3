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
    """Implements ``onnx_graph.Exporter``. ``max_context``: positions of the RoPE table.

    Where the RoPE depends on a sequence's length (``RopeSpec.switch``), its table has the rows of short sequences
    before those of long ones, and the input ``rope_row`` gives for each sequence of the batch the row of position 0.
    """

    def __init__(self, writer: GraphWriter, weights: Weights, precision: Precision, max_context: int) -> None:
        self._writer = writer
        self._weights = weights
        self._precision = precision
        self._max_context = max_context
        self._spec = weights.spec
        self.rope_switch = self._spec.rope_switch_within(max_context)
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
        if spec.vision is not None:
            # (sequence, token) of each token of an image, and what the encoder gives for it; most steps have none
            writer.input("image_rows", TensorProto.INT64, ["image_tokens", 2])
            writer.input("image_features", TensorProto.FLOAT, ["image_tokens", spec.vision.feature_size])
        if self.rope_switch:
            writer.input("rope_row", TensorProto.INT64, ["batch"])
            self._add_rope_rows()
        for i in spec.kv_layers:
            for kind in ("key", "value"):
                shape: list[int | str] = ["batch", spec.num_kv_heads, "max_context", self._heads[0].size]
                writer.input(f"past_{kind}.{i}", TensorProto.FLOAT, shape)
                writer.output(f"present_{kind}.{i}", TensorProto.FLOAT, shape)
        for state in spec.states:
            shape = ["batch", *state.shape]
            writer.input(f"past_{state.name}.{state.layer}", TensorProto.FLOAT, shape)
            writer.output(f"present_{state.name}.{state.layer}", TensorProto.FLOAT, shape)
        for name, table in self._rope_tables().items():
            if spec.mrope:  # a sequence's own: its positions depend on its images
                writer.input(name, TensorProto.FLOAT, ["max_context", table.shape[1]])
            else:
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
        if spec.embedding_scale != 1.0:
            scale = writer.constant("embedding_scale", np.float32(spec.embedding_scale))
            embedded = writer.node("Mul", [embedded, scale], "embed_scaled/output")
        if spec.vision is not None:
            features = ["image_features"]
            if spec.vision.deepstack:
                features = [f"image_features.{i}" for i in range(1 + len(spec.vision.deepstack))]
                sizes = writer.constant("image_feature_sizes", np.full(len(features), spec.hidden_size, np.int64))
                writer.node("Split", ["image_features", sizes], features, axis=1)
            embedded = writer.node("ScatterND", [embedded, "image_rows", features[0]], "embed_images/output")
        return embedded

    def add_features(self, index: int, value: str) -> str:
        if self._spec.vision is None or index >= len(self._spec.vision.deepstack):
            return value
        inputs = [value, "image_rows", f"image_features.{index + 1}"]
        return self._writer.node("ScatterND", inputs, f"layer{index}/deepstack/output", reduction="add")

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

    def add(self, name: str, residual: str, value: str) -> str:
        return self._writer.node("Add", [residual, value], f"{name}/sum")

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
        inputs += ["rope_rows"] if self.rope_switch else []
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

    def short_convolution(self, index: int, value: str, layer: LayerSpec) -> str:
        """Each of the few taps is multiplied with the tokens it sees: ``Conv`` needs tokens to be the last axis."""
        spec, writer, prefix = self._spec, self._writer, f"layer{index}/convolution"
        size, kernel = spec.hidden_size, layer.conv_kernel
        names = [f"{prefix}/gate_in", f"{prefix}/gate_out", f"{prefix}/input"]
        sizes = writer.constant("convolution_sizes", self._ints(size, size, size))
        writer.node("Split", [value, sizes], names, axis=-1)
        seen = writer.node("Mul", [names[0], names[2]], f"{prefix}/gated_in")
        if kernel > 1:  # the tokens before those of this call come from the state
            seen = writer.node("Concat", [f"past_conv.{index}", seen], f"{prefix}/seen", axis=1)
            self._shifted(f"present_conv.{index}", seen, 1 - kernel, 0)
        taps = self._weights.matrix(layer.conv_weight)[:, 0].T  # [kernel, hidden]
        total = ""
        for tap in range(kernel):
            name = f"{prefix}/tap{tap}"
            part = seen if kernel == 1 else self._shifted(f"{name}/tokens", seen, tap, tap + 1 - kernel)
            part = writer.node("Mul", [part, writer.constant(f"{name}.weight", taps[tap])], f"{name}/output")
            total = writer.node("Add", [total, part], f"{name}/sum") if total else part
        if layer.conv_bias_name:
            bias = writer.constant(layer.conv_bias_name, self._weights.matrix(layer.conv_bias_name))
            total = writer.node("Add", [total, bias], f"{prefix}/biased")
        return writer.node("Mul", [names[1], total], f"{prefix}/output")

    def _shifted(self, name: str, value: str, start: int, stop: int) -> str:
        """Add the tokens of ``value`` [batch, tokens, n] from ``start`` to ``stop``, which is counted from the end."""
        writer, ends = self._writer, stop or np.iinfo(np.int64).max
        bounds = [writer.constant(f"tokens_at_{each}", self._ints(each)) for each in (start, ends)]
        return writer.node("Slice", [value, *bounds, writer.constant("axis_1", self._ints(1))], name)

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

    def experts(self, name: str, value: str, layer: LayerSpec) -> str:
        """Each expert that is picked gets the rows of its tokens alone, and adds what it makes to them."""
        spec, writer = self._spec, self._writer
        tokens = writer.node(
            "Reshape", [value, writer.constant("rows_of_hidden", self._ints(-1, spec.hidden_size))], f"{name}/tokens"
        )
        shares = self._shares(name, tokens, layer)
        column, none = writer.constant("axis_1", self._ints(1)), writer.constant("zero", np.float32(0))
        largest = writer.node("ReduceMax", [shares], f"{name}/largest", axes=[0], keepdims=0)
        is_picked = writer.node("Greater", [largest, none], f"{name}/is_picked")
        total = writer.node("Mul", [tokens, none], f"{name}/none")

        def made_by(prefix: str, expert: str, index: int, before: str) -> str:
            gate_up, down = layer.expert(index)
            share = writer.node("Gather", [shares, expert], f"{prefix}/share", axis=1)
            places = writer.node("Transpose", [writer.node("NonZero", [share], f"{prefix}/found")], f"{prefix}/places")
            rows = writer.node("GatherND", [tokens, places], f"{prefix}/rows")
            hidden = self.gated(f"{prefix}/gated", self.linear(f"{prefix}/gate_up", rows, gate_up))
            made = self.linear(f"{prefix}/down", hidden, down)
            own = writer.node("GatherND", [share, places], f"{prefix}/own_share")
            factor = writer.node("Unsqueeze", [own, column], f"{prefix}/factor")
            weighted = writer.node("Mul", [made, factor], f"{prefix}/weighted")
            return writer.node("ScatterND", [before, places, weighted], f"{prefix}/added", reduction="add")

        for index in range(layer.num_experts):
            prefix = f"{name}/{index}"
            expert = writer.constant(f"expert_{index}", np.array(index, dtype=np.int64))
            condition = writer.node("Gather", [is_picked, expert], f"{prefix}/is_picked", axis=0)
            total = writer.where(condition, partial(made_by, prefix, expert, index, total), total, f"{prefix}/total")
        return writer.node("Reshape", [total, writer.node("Shape", [value], f"{name}/shape")], f"{name}/output")

    def _shares(self, name: str, tokens: str, layer: LayerSpec) -> str:
        """Add the router: what each expert counts for each token, [tokens, experts], 0 for those not picked."""
        spec, writer = self._spec, self._writer
        router = writer.constant(layer.router, self._weights.matrix(layer.router))
        scores = writer.node("FusedMatMul", [tokens, router], f"{name}/scores", domain=_MS, transB=1)
        parts = writer.node("Softmax", [scores], f"{name}/softmax", axis=-1)
        count = writer.constant("experts_per_token", self._ints(spec.experts_per_token))
        best, places = f"{name}/best", f"{name}/picked"
        writer.node("TopK", [parts, count], [best, places], axis=-1)
        if spec.norm_expert_weights:
            total = writer.node(
                "ReduceSum", [best, writer.constant("axis_last", self._ints(-1))], f"{name}/sum", keepdims=1
            )
            best = writer.node("Div", [best, total], f"{name}/normed")
        none = writer.node("Mul", [parts, writer.constant("zero", np.float32(0))], f"{name}/zeros")
        return writer.node("ScatterElements", [none, places, best], f"{name}/shares", axis=1)

    @staticmethod
    def _ints(*values: int) -> np.ndarray:
        return np.array(values, dtype=np.int64)

    def wanted_tokens(self, name: str, value: str) -> str:
        return self._writer.node("GatherND", [value, "rows"], f"{name}/output")

    def head(self, value: str) -> None:
        logits = self._head_logits(value)
        if self._spec.logits_scale != 1:
            scale = self._writer.constant("logits_scale", np.float32(self._spec.logits_scale))
            logits = self._writer.node("Mul", [logits, scale], "logits_scaled")
        if self._spec.logits_softcap:
            cap = self._writer.constant("logits_softcap", np.float32(self._spec.logits_softcap))
            scaled = self._writer.node("Div", [logits, cap], "softcap/scaled")
            bounded = self._writer.node("Tanh", [scaled], "softcap/tanh")
            logits = self._writer.node("Mul", [bounded, cap], "softcap/output")
        self._writer.node("Identity", [logits], "logits")
        self._writer.output("logits", TensorProto.FLOAT, ["rows", self._weights.head_rows])

    def _head_logits(self, value: str) -> str:
        """Return the output of the LM head, before soft capping."""
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
        self._save_graph(with_fp16_cache(self._writer, {} if self._spec.mrope else self._rope_tables()), "fp16")

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
        """Name in the graph → float32 [positions, half of the elements that are turned, see ``head_axes``]."""
        tables = {}
        for i, rope in enumerate(self._spec.ropes):
            width = turned_size(rope.dim) // 2
            for name, table in zip(("cos", "sin"), rope.rows(self.rope_switch, self._max_context)):
                tables[f"rope_{name}.{i}"] = np.pad(table, ((0, 0), (0, width - table.shape[1])))
        return tables

    def _add_rope_rows(self) -> None:
        """Add ``rope_rows``, int64 [batch, tokens]: the row of the RoPE tables that each token's position has."""
        writer, one = self._writer, self._writer.constant("one", np.array(1, dtype=np.int64))
        shape = writer.node("Shape", ["input_ids"], "rope_rows/shape")
        tokens = writer.node("Gather", [shape, one], "rope_rows/tokens")
        first = writer.node("Sub", [one, tokens], "rope_rows/first")
        before = writer.node("Range", [first, one, one], "rope_rows/before_last")  # 1 - tokens … 0
        last = writer.node("Cast", ["last_position"], "rope_rows/last_position", to=TensorProto.INT64)
        row = writer.node("Add", [last, "rope_row"], "rope_rows/last")
        column = writer.node("Unsqueeze", [row, writer.constant("axis_1", self._ints(1))], "rope_rows/column")
        writer.node("Add", [column, before], "rope_rows")

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
        """Splits Q, K and V and normalizes every head of Q and K, or all of Q and all of K."""
        spec, writer, prefix = self._spec, self._writer, f"layer{index}"
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        sizes = writer.constant("qkv_sizes", np.array([q_size, kv_size, kv_size], dtype=np.int64))
        names = [f"{prefix}/query", f"{prefix}/key", f"{prefix}/value"]
        writer.node("Split", [qkv, sizes], names, axis=-1)
        normed = []
        for name, weight, size in ((names[0], layer.q_norm, q_size), (names[1], layer.k_norm, kv_size)):
            if layer.wide_qk_norm:
                normed.append(self.norm(f"{name}/norm", name, weight))
                continue
            shape = np.array([0, 0, size // spec.head_dim, spec.head_dim], np.int64)
            heads = writer.constant(f"heads_of_{size}", shape)
            flat = writer.constant(f"flat_{size}", np.array([0, 0, size], dtype=np.int64))
            split = writer.node("Reshape", [name, heads], f"{name}/heads")
            normed.append(writer.node("Reshape", [self.norm(f"{name}/norm", split, weight), flat], f"{name}/normed"))
        return normed[0], normed[1], names[2]
