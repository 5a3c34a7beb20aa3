"""The decoder with opset 24's Attention, TensorScatter and RotaryEmbedding, for TensorRT 10.15 and later.

The cache is an input, ``past_key.i`` and ``past_value.i`` [1, kv_heads, max_context, head_dim], and an output of the
same shape, ``present_key.i`` and ``present_value.i``, to be bound to the same address: TensorScatter writes the new
rows in place. ``write_index``, int64 [1], is where: ``positions[0]``, once more, in the type the operator wants.

The mask is explicit and covers causality, the window and positions not written yet, so that nothing hangs on how a
runtime aligns a causal mask with a longer cache (the ONNX reference changed that in 1.23).
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from engine_core.backends.tensorrt.exporter import FP32, TrtExporter
from engine_core.models.spec import LayerSpec

_SEQUENCE_AXIS = 2  # of [batch, heads, sequence, head_dim]


class TrtNativeExporter(TrtExporter):
    """See the module."""

    opset = 24
    ir_version = 12  # the first that has it

    def _begin_cache(self) -> None:
        spec, writer = self._spec, self._writer
        writer.input("write_index", TensorProto.INT64, [1])
        shape = [1, spec.num_kv_heads, self._max_context, spec.head_dim]
        for i in range(len(spec.layers)):
            for kind in ("key", "value"):
                writer.input(f"past_{kind}.{i}", self._io_type, shape)
                self._type_of[f"past_{kind}.{i}"] = self._dtype
                writer.output(f"present_{kind}.{i}", self._io_type, shape)

    def attention(self, index: int, qkv: str, layer: LayerSpec) -> str:
        spec, prefix = self._spec, f"layer{index}"
        query_key, value = self._heads(index, qkv, layer, f"{prefix}/value")
        rotated = self._as(self._rotate(prefix, query_key, layer.rope), self._dtype)
        query, key = self._split(rotated, [spec.num_heads, spec.num_kv_heads], 1, [f"{prefix}/query", f"{prefix}/key"])
        present = []
        for kind, update in (("key", key), ("value", self._by_head(value))):
            inputs = [f"past_{kind}.{index}", update, "write_index"]
            output = f"present_{kind}.{index}"
            present.append(self._node("TensorScatter", inputs, output, self._dtype, axis=_SEQUENCE_AXIS, mode="linear"))
        attributes = {"softcap": spec.attention_softcap} if spec.attention_softcap else {}
        window = layer.window if 0 < layer.window < self._max_context else 0
        attended = self._node(
            "Attention",
            [query, *present, self._mask(window)],
            f"{prefix}/attention",
            self._dtype,
            scale=1.0,  # the queries are scaled already
            softmax_precision=TensorProto.FLOAT,
            **attributes,
        )
        by_token = self._transpose(attended, [0, 2, 1, 3], f"{prefix}/attended_by_token")
        return self._reshape(by_token, [-1, spec.num_heads * spec.head_dim], f"{prefix}/attended")

    def _by_head(self, value: str) -> str:
        """[tokens, n, head_dim] → [1, n, tokens, head_dim]."""
        moved = self._transpose(value, [1, 0, 2], f"{value}_by_head")
        return self._unsqueeze(moved, [0], f"{value}_batched")

    def _rotate(self, prefix: str, value: str, rope: int) -> str:
        """value [tokens, n, head_dim] → [1, n, tokens, head_dim], float32."""
        spec = self._spec
        batched = self._by_head(self._as(value, "fp32"))
        tables = []
        for kind, table in zip(("cos", "sin"), spec.ropes[rope].table(self._max_context)):
            tables.append(self._constant32(f"rope_{kind}.{rope}", table))
        dim = spec.ropes[rope].dim
        partial = {"rotary_embedding_dim": dim} if dim != spec.head_dim else {}
        inputs = [batched, *tables, self._position_ids()]
        return self._node32("RotaryEmbedding", inputs, f"{prefix}{FP32}rotated", **partial)

    def _position_ids(self) -> str:
        """int64 [1, tokens]."""

        def make() -> str:
            wide = self._writer.node("Cast", ["positions"], "positions_int64", to=TensorProto.INT64)
            return self._unsqueeze(wide, [0], "position_ids")

        return self._once(("position_ids",), make)

    def _mask(self, window: int) -> str:
        """bool [tokens, max_context]: whether a query sees a position. Once for all layers of one window."""
        name, node = f"mask_{window}", self._writer.node

        def make() -> str:
            column = self._positions_column()
            index = self._ints("cache_index", np.arange(self._max_context), np.int32)
            visible = node("Not", [node("Less", [column, index], f"{name}/later")], f"{name}/earlier")
            if not window:
                return visible
            reach = self._ints(f"window_{window}", [window], np.int32)
            near = node("Less", [node("Sub", [column, reach], f"{name}/outside"), index], f"{name}/near")
            return node("And", [visible, near], f"{name}/visible")

        return self._once(("mask", window), make)
