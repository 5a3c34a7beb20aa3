"""The vision encoder and its projector as a graph of ONNX Runtime's fused CPU operators: pixels to tokens.

A run of the graph works through one layer, which ``layer`` names, so that other sequences get their tokens between two
of them. The first layer also embeds the pixels, and those with a merger, or the projector behind them, give features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from onnx import TensorProto

from engine_core.backends.onnxruntime.files import ENCODER_NAME
from engine_core.formats.onnx_writer import GraphWriter
from engine_core.formats.weights import Tensors
from engine_core.models.vision import SIGLIP, EncoderLayerNames, MergerNames, VisionSpec
from engine_core.vision.encoder_inputs import tile_positions

_MS = "com.microsoft"
_OPSETS = {"": 17, _MS: 1}
_INT8_MAX = 127
_TINY = 1e-12  # the largest value of a row of zeros
_MERGER_EPS = 1e-6


def write_encoder(writer: GraphWriter, tensors: Tensors, spec: VisionSpec, *, int8: bool) -> None:
    """Write the graph.

    Inputs are those of ``vision.encoder_inputs``, ``layer`` int64 [], and ``hidden`` float32 [1, patches, hidden], what
    the layer before gave as ``next_hidden``. ``features`` is float32 [tokens, n * out_size]: the n parts that the layer
    gives, by ``VisionSpec.features_after``, and [0, out_size] where these are none.

    ``int8``: the products are those of int8, with a scale for each row of the weights and, measured as it comes, for
    each row of the activations. Of a thousand rows at once, CPUs with VNNI multiply them more than twice as fast as
    float32, while MatMulNBits, made for few rows, is slower than that. False: float32.
    """
    _EncoderExporter(writer, tensors, spec, int8).write()


class _EncoderExporter:
    """Activations are float32 [1, patches, hidden]."""

    def __init__(self, writer: GraphWriter, tensors: Tensors, spec: VisionSpec, is_int8: bool) -> None:
        self._writer, self._tensors, self._spec, self._is_int8 = writer, tensors, spec, is_int8

    def write(self) -> None:
        spec, writer = self._spec, self._writer
        self._declare_inputs()
        patches: list[int | str] = [1, "patches", spec.hidden_size]
        hidden = writer.input("hidden", TensorProto.FLOAT, patches)
        selector = writer.input("layer", TensorProto.INT64, [])
        self._none = writer.constant("no_features", np.empty((0, spec.out_size), np.float32))
        layers = [partial(self._layer, index, hidden) for index in range(spec.num_layers)]
        outputs = writer.output("next_hidden", TensorProto.FLOAT, patches), "features"
        writer.output("features", TensorProto.FLOAT, ["tokens", "values"])
        writer.cases(selector, layers, outputs)
        writer.save(_OPSETS, ENCODER_NAME)

    def _layer(self, index: int, hidden: str) -> tuple[str, str]:
        """Return the hidden states behind a layer, and its features."""
        spec, writer = self._spec, self._writer
        if index == 0:
            hidden = self._embed_tile() if spec.kind == SIGLIP else self._embed_patches()
        names, prefix = spec.layer(index), f"layer{index}"
        normed, residual = self._norm_in(f"{prefix}/norm", hidden, "", names.norm)
        attended = self._product(f"{prefix}/output", self._attention(prefix, normed, names), (names.output,))
        added = self._bias(f"{prefix}/output", (names.output,))
        normed, residual = self._norm_in(f"{prefix}/mlp_norm", residual, attended, names.mlp_norm, added)
        active = self._activated(prefix, normed, names.up, spec.activation)
        down = self._linear(f"{prefix}/down", active, (names.down,))
        following = writer.node("Add", [residual, down], f"{prefix}/following")
        places = spec.features_after(index)
        if not places:
            return following, writer.node("Identity", [self._none], f"{prefix}/features")
        if spec.mergers:
            parts = [self._merged(f"merger{place}", following, spec.mergers[place]) for place in places]
            return following, writer.node("Concat", parts, f"{prefix}/features", axis=1)
        normed, _ = self._norm_in("final_norm", following, "", spec.final_norm)
        return following, self._project(normed)

    # --- parts ----------------------------------------------------------------------------------------

    def _declare_inputs(self) -> None:
        """Declare what ``encoder_inputs`` gives."""
        spec, writer = self._spec, self._writer
        if spec.kind == SIGLIP:
            writer.input("pixels", TensorProto.FLOAT, [1, spec.channels, spec.tile_size, spec.tile_size])
            return
        writer.input("pixels", TensorProto.FLOAT, ["patches", spec.patch_values])
        writer.input("position_taps", TensorProto.INT64, ["patches", 4])
        writer.input("position_weights", TensorProto.FLOAT, ["patches", 4])
        writer.input("places", TensorProto.INT64, [1, "patches"])
        for name in ("cos", "sin"):
            writer.input(name, TensorProto.FLOAT, ["patches", spec.head_dim // 2])

    def _embed_tile(self) -> str:
        """Return the patches of a tile with their positions."""
        spec, writer = self._spec, self._writer
        weight = self._constant(f"{spec.patch_embedding}.weight")
        bias = self._constant(f"{spec.patch_embedding}.bias")
        side = [spec.patch_size] * 2
        patches = writer.node("Conv", ["pixels", weight, bias], "patches", kernel_shape=side, strides=side)
        flat_shape = writer.constant("flat_patches", np.array([1, spec.hidden_size, spec.side**2], np.int64))
        flat = writer.node("Reshape", [patches, flat_shape], "patches/flat")
        rows = writer.node("Transpose", [flat], "patches/rows", perm=[0, 2, 1])
        table = self._tensors.read(spec.position_embedding)[tile_positions(spec.side, spec.positions)]
        return writer.node("Add", [rows, writer.constant("positions", table)], "embed/output")

    def _embed_patches(self) -> str:
        """Return the patches of an image with their interpolated positions."""
        spec, writer = self._spec, self._writer
        weight = self._tensors.read(f"{spec.patch_embedding}.weight").reshape(spec.hidden_size, spec.patch_values)
        inputs = ["pixels", writer.constant(f"{spec.patch_embedding}.weight", weight)]
        product = writer.node("FusedMatMul", inputs, "patches/product", domain=_MS, transB=1)
        bias = self._constant(f"{spec.patch_embedding}.bias")
        patches = writer.node("Add", [product, bias], "patches/output")
        table = self._constant(spec.position_embedding)
        taken = writer.node("Gather", [table, "position_taps"], "positions/taken", axis=0)  # [patches, 4, hidden]
        last = writer.constant("last_axis", np.array([2], np.int64))
        weights = writer.node("Unsqueeze", ["position_weights", last], "positions/weights")
        mixed = writer.node("Mul", [taken, weights], "positions/mixed")
        middle = writer.constant("middle_axis", np.array([1], np.int64))
        positions = writer.node("ReduceSum", [mixed, middle], "positions/output", keepdims=0)
        placed = writer.node("Add", [patches, positions], "patches/placed")
        first = writer.constant("first_axis", np.array([0], np.int64))
        return writer.node("Unsqueeze", [placed, first], "embed/output")

    def _attention(self, prefix: str, normed: str, names: EncoderLayerNames) -> str:
        writer, hidden, heads = self._writer, self._spec.hidden_size, self._spec.num_heads
        turns = bool(self._spec.rope_theta)
        qkv = (self._linear if turns else self._product)(f"{prefix}/qkv", normed, names.qkv)
        sizes = writer.constant("qkv_sizes", np.array([hidden] * 3, dtype=np.int64))
        parts = [f"{prefix}/{part}" for part in ("query", "key", "value")]
        writer.node("Split", [qkv, sizes], parts, axis=-1)
        if turns:
            for i, part in enumerate(parts[:2]):
                inputs = [part, "places", "cos", "sin"]
                parts[i] = writer.node("RotaryEmbedding", inputs, f"{part}/turned", domain=_MS, num_heads=heads)
        else:
            parts.append(self._bias(f"{prefix}/qkv", names.qkv))
        return writer.node("MultiHeadAttention", parts, f"{prefix}/attention/output", domain=_MS, num_heads=heads)

    def _merged(self, name: str, value: str, merger: MergerNames) -> str:
        """Return the features of merged patches, which lie one after another: [tokens, out_size]."""
        spec, writer = self._spec, self._writer
        joined = writer.constant("merge/joined", np.array([-1, spec.hidden_size * spec.merge**2], np.int64))
        weights = [self._constant(f"{merger.norm}.weight"), self._constant(f"{merger.norm}.bias")]
        if merger.joins_first:
            value = writer.node("Reshape", [value, joined], f"{name}/joined")
        normed = [value, *weights]
        value = writer.node("LayerNormalization", normed, f"{name}/norm", axis=-1, epsilon=_MERGER_EPS)
        if not merger.joins_first:
            value = writer.node("Reshape", [value, joined], f"{name}/joined")
        active = self._activated(name, value, merger.up, "gelu")
        return self._linear(f"{name}/down", active, (merger.down,))

    def _project(self, value: str) -> str:
        """Join ``merge`` x ``merge`` neighbouring patches of a tile, row by row; return them times the projector."""
        spec, writer = self._spec, self._writer
        side, merge, hidden = spec.side // spec.merge, spec.merge, spec.hidden_size
        apart = writer.constant("merge/apart", np.array([side, merge, side, merge * hidden], np.int64))
        joined = writer.constant("merge/joined", np.array([side * side, merge * merge * hidden], np.int64))
        split = writer.node("Reshape", [value, apart], "merge/split")
        turned = writer.node("Transpose", [split], "merge/turned", perm=[0, 2, 1, 3])
        merged = writer.node("Reshape", [turned, joined], "merge/output")
        return self._product("projector", merged, (spec.projector,))

    # --- operators --------------------------------------------------------------------------------------

    def _norm_in(self, name: str, residual: str, pending: str, weight: str, bias: str = "") -> tuple[str, str]:
        """Return (norm, residual): of the sum of ``residual`` and, where there is one, ``pending`` with its bias."""
        weights = [self._constant(f"{weight}.weight"), self._constant(f"{weight}.bias")]
        epsilon = self._spec.norm_eps
        if not pending:
            inputs = [residual, *weights]
            return self._writer.node("LayerNormalization", inputs, f"{name}/output", axis=-1, epsilon=epsilon), residual
        outputs = [f"{name}/output", "", "", f"{name}/sum"]
        inputs = [residual, pending, *weights, bias]
        normed = self._writer.node("SkipLayerNormalization", inputs, outputs, domain=_MS, epsilon=epsilon)
        return normed, outputs[3]

    def _activated(self, prefix: str, value: str, up: str, kind: str) -> str:
        """Return the activation of value Wᵀ + b."""
        inputs = [self._product(f"{prefix}/up", value, (up,)), self._bias(f"{prefix}/up", (up,))]
        op = "FastGelu" if kind == "gelu_tanh" else "BiasGelu"
        return self._writer.node(op, inputs, f"{prefix}/active", domain=_MS)

    def _linear(self, name: str, value: str, parts: tuple[str, ...]) -> str:
        """Return value Wᵀ + b of the tensors ``parts``, stacked along their rows."""
        product = self._product(name, value, parts)
        return self._writer.node("Add", [product, self._bias(name, parts)], f"{name}/output")

    def _bias(self, name: str, parts: tuple[str, ...]) -> str:
        values = np.concatenate([self._tensors.read(f"{part}.bias") for part in parts])
        return self._writer.constant(f"{name}.bias", values)

    def _product(self, name: str, value: str, parts: tuple[str, ...]) -> str:
        """Return value Wᵀ of the tensors ``parts``, stacked along their rows."""
        writer = self._writer
        shapes = [self._tensors.shape(f"{part}.weight") for part in parts]
        shape = (sum(shape[0] for shape in shapes), shapes[0][1])
        if not self._is_int8:
            weight = writer.stream(f"{name}.weight", np.dtype(np.float32), shape, self._rows(parts))
            return writer.node("FusedMatMul", [value, weight], f"{name}/product", domain=_MS, transB=1)
        weight = writer.stream(f"{name}.weight", np.dtype(np.int8), shape[::-1], self._int8_columns(parts))
        scale = writer.stream(f"{name}.scales", np.dtype(np.float32), shape[:1], map(_scales, self._rows(parts)))
        step, zero = writer.constant("step", np.float32(1 / _INT8_MAX)), writer.constant("zero", np.uint8(128))
        peak = self._peak(name, value)
        scaled = writer.node("Div", [value, peak], f"{name}/scaled")
        rounded = writer.node("QuantizeLinear", [scaled, step, zero], f"{name}/rounded")
        inputs = [rounded, weight, step, scale, zero]
        product = writer.node("MatMulIntegerToFloat", inputs, f"{name}/of_scaled", domain=_MS)
        return writer.node("Mul", [product, peak], f"{name}/product")

    def _peak(self, name: str, value: str) -> str:
        """Return the largest absolute value of each row."""
        writer = self._writer
        absolute = writer.node("Abs", [value], f"{name}/absolute")
        largest = writer.node("ReduceMax", [absolute], f"{name}/largest", axes=[-1], keepdims=1)
        return writer.node("Max", [largest, writer.constant("tiny", np.float32(_TINY))], f"{name}/peak")

    def _rows(self, parts: tuple[str, ...]) -> Iterator[np.ndarray]:
        for part in parts:
            yield self._tensors.read(f"{part}.weight")

    def _int8_columns(self, parts: tuple[str, ...]) -> Iterator[np.ndarray]:
        """Yield the rounded matrix, transposed; nothing is read before it is asked for."""
        yield np.concatenate([np.rint(rows / _scales(rows)[:, None]).astype(np.int8) for rows in self._rows(parts)]).T

    def _constant(self, name: str) -> str:
        return self._writer.constant(name, self._tensors.read(name))


def _scales(rows: np.ndarray) -> np.ndarray:
    """Return the int8 scale of each row, float32."""
    return (np.maximum(np.abs(rows).max(axis=1), _TINY) / _INT8_MAX).astype(np.float32)
