"""The decoder in opset 17's plain operators, for TensorRT 8.6 to 10.14: attention over a cache that is only read.

The cache is an input, ``past_key.i`` and ``past_value.i`` [kv_heads, past, head_dim]: views of the one allocation.
A call's new rows come out as ``new_key.i`` and ``new_value.i`` [tokens, kv_heads, head_dim], which the caller appends
for all layers at once. Past and new parts meet in the softmax: their scores are joined, never the caches, and the
weights are cut apart again for a product with each part's values.

``past_index``, int32 [past], holds 0, 1, 2 …: only past positions below ``positions[0]`` are seen, so ``past`` may be
any length that covers them, and whatever finite values lie beyond do not matter. Queries of a KV head's group are rows
of one matrix: no key or value is repeated. Node names that end in TRANSPOSED are operands the builder folds into their
product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from engine_core.backends.tensorrt.exporter import FP32, TrtExporter
from engine_core.models.spec import LayerSpec

TRANSPOSED = "/transposed"
# Added to a score that must not count: exp of it is 0 in float32 whatever the scores are, and no infinity is involved.
_HIDDEN = -1e30


class TrtPlainExporter(TrtExporter):
    """See the module."""

    opset = 17
    ir_version = 8  # the first that has it; TensorRT 8.6 was made with it

    def _begin_cache(self) -> None:
        spec, writer = self._spec, self._writer
        writer.input("past_index", TensorProto.INT32, ["past"])
        for i in range(len(spec.layers)):
            for kind in ("key", "value"):
                writer.input(f"past_{kind}.{i}", self._io_type, [spec.num_kv_heads, "past", spec.head_dim])
                self._type_of[f"past_{kind}.{i}"] = self._dtype
                writer.output(f"new_{kind}.{i}", self._io_type, ["tokens", spec.num_kv_heads, spec.head_dim])

    def attention(self, index: int, qkv: str, layer: LayerSpec) -> str:
        spec, prefix = self._spec, f"layer{index}"
        kv_heads, group, head_dim = spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, spec.head_dim
        query_key, value = self._heads(index, qkv, layer, f"new_value.{index}")
        rotated = self._as(self._rotate(prefix, query_key, layer.rope), self._dtype)
        query, key = self._split(rotated, [spec.num_heads, kv_heads], 1, [f"{prefix}/query", f"new_key.{index}"])
        query = self._reshape(query, [-1, kv_heads, group, head_dim], f"{prefix}/query_groups")
        query = self._transpose(query, [1, 0, 2, 3], f"{prefix}/query_by_head")
        query = self._reshape(query, [kv_heads, -1, head_dim], f"{prefix}/query_rows")
        key_by_head = self._transpose(key, [1, 2, 0], f"{prefix}/new_key_by_head")
        value_by_head = self._transpose(value, [1, 0, 2], f"{prefix}/new_value_by_head")
        past_key = self._transpose(f"past_key.{index}", [0, 2, 1], f"{prefix}/past_key{TRANSPOSED}")
        scores = []
        for part, keys in (("past", past_key), ("new", key_by_head)):
            product = self._node("MatMul", [query, keys], f"{prefix}/{part}_scores", self._dtype)
            scores.append(self._masked(f"{prefix}/{part}", product, part, layer))
        attended = self._weighted_sum(prefix, scores, [f"past_value.{index}", value_by_head])
        attended = self._reshape(attended, [kv_heads, -1, group, head_dim], f"{prefix}/attended_groups")
        attended = self._transpose(attended, [1, 0, 2, 3], f"{prefix}/attended_by_token")
        return self._reshape(attended, [-1, spec.num_heads * head_dim], f"{prefix}/attended")

    # --- RoPE -----------------------------------------------------------------------------------------

    def _rotate(self, prefix: str, value: str, rope: int) -> str:
        """value [tokens, n, head_dim], float32. Su et al. 2021 (arXiv 2104.09864), halves paired as in transformers."""
        spec = self._spec
        half, rest = spec.ropes[rope].dim // 2, spec.head_dim - spec.ropes[rope].dim
        cos, sin = self._rope_rows(rope, "cos"), self._rope_rows(rope, "sin")
        sizes = [half, half, rest] if rest else [half, half]
        parts = [f"{prefix}{FP32}rope_{name}" for name in ("first", "second", "rest")[: len(sizes)]]
        first, second, *unrotated = self._split(self._as(value, "fp32"), sizes, 2, parts)
        product = {}
        for name, operand, factor in (
            ("first_cos", first, cos),
            ("second_sin", second, sin),
            ("second_cos", second, cos),
            ("first_sin", first, sin),
        ):
            product[name] = self._node32("Mul", [operand, factor], f"{prefix}{FP32}rope_{name}")
        left = self._node32("Sub", [product["first_cos"], product["second_sin"]], f"{prefix}{FP32}rope_left")
        right = self._node32("Add", [product["second_cos"], product["first_sin"]], f"{prefix}{FP32}rope_right")
        return self._node32("Concat", [left, right, *unrotated], f"{prefix}{FP32}rotated", axis=2)

    def _rope_rows(self, rope: int, kind: str) -> str:
        """float32 [tokens, 1, dim / 2], looked up once for all layers."""

        def look_up() -> str:
            cos, sin = self._spec.ropes[rope].table(self._max_context)
            table = self._constant32(f"rope_{kind}.{rope}", cos if kind == "cos" else sin)
            rows = self._node32("Gather", [table, "positions"], f"rope{rope}{FP32}{kind}", axis=0)
            return self._unsqueeze(rows, [1], f"rope{rope}{FP32}{kind}_rows")

        return self._once(("rope", rope, kind), look_up)

    # --- scores ---------------------------------------------------------------------------------------

    def _masked(self, prefix: str, product: str, part: str, layer: LayerSpec) -> str:
        """Scores [kv_heads, tokens * group, n] in float32, hidden ones far below."""
        if self._spec.attention_softcap:
            product = self._softcap(f"{prefix}_scores", product, self._spec.attention_softcap)
        window = layer.window if 0 < layer.window < self._max_context else 0
        return self._node32("Add", [product, self._mask(part, window)], f"{prefix}{FP32}scores_masked")

    def _mask(self, part: str, window: int) -> str:
        """float32 [n] or [tokens * group, n]: 0 where a query sees the position, far below elsewhere."""
        name, node = f"mask_{part}_{window}", self._writer.node

        def make() -> str:
            if part == "past":
                start = node("Gather", ["positions", self._ints("first", [0])], f"{name}/start", axis=0)
                others, visible = "past_index", node("Less", ["past_index", start], f"{name}/written")
            else:
                others, later = "positions", node("Less", [self._row_positions(), "positions"], f"{name}/later")
                visible = node("Not", [later], f"{name}/earlier")
            if window:
                reach = self._ints(f"window_{window}", [window], np.int32)
                first = node("Sub", [self._row_positions(), reach], f"{name}/outside")
                visible = node("And", [visible, node("Less", [first, others], f"{name}/near")], f"{name}/visible")
            shown, hidden = self._constant32("shown", [0.0]), self._constant32("hidden", [_HIDDEN])
            return self._node32("Where", [visible, shown, hidden], f"{name}{FP32}mask")

        return self._once(("mask", part, window), make)

    def _row_positions(self) -> str:
        """int32 [tokens * group, 1]: each token's position, once for every query of its group."""

        def make() -> str:
            group = self._spec.num_heads // self._spec.num_kv_heads
            zeros = self._ints("group_zeros", [[0] * group], np.int32)
            repeated = self._writer.node("Add", [self._positions_column(), zeros], "mask/positions_by_group")
            return self._reshape(repeated, [-1, 1], "mask/row_positions")

        return self._once(("row positions",), make)

    def _weighted_sum(self, prefix: str, scores: Sequence[str], values: Sequence[str]) -> str:
        """softmax over past and new scores together, times both parts' values: [kv_heads, tokens * group, head_dim]."""
        joined = self._node32("Concat", scores, f"{prefix}{FP32}scores", axis=2)
        weights = self._node32("Softmax", [joined], f"{prefix}{FP32}weights", axis=2)
        start, end = self._ints("first", [0]), self._ints("last", [np.iinfo(np.int64).max])
        past, axis = self._past_length(), self._ints("scores_axis", [2])
        products = []
        for part, first, last, value in (("past", start, past, values[0]), ("new", past, end, values[1])):
            share = self._node32("Slice", [weights, first, last, axis], f"{prefix}{FP32}{part}_weights")
            products.append(self._node("MatMul", [share, value], f"{prefix}/{part}_attended", self._dtype))
        return self._node("Add", products, f"{prefix}/attended_rows", self._dtype)

    def _past_length(self) -> str:
        """int64 [1]."""
        return self._once(("past length",), lambda: self._writer.node("Shape", ["past_index"], "past_length"))
