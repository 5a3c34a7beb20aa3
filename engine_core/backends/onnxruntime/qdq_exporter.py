"""The decoder with fp8 or nvfp4 weights as ONNX has them: stored in 8 or 4 bits, made floats by DequantizeLinear.

nvfp4 is dequantized in two levels: the block scales (fp8) times the tensor's scale (float32), then the weights (e2m1)
times those. The rest is as in ``exporter``, with the embedding and the head in float16.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from engine_core.backends.onnxruntime.exporter import OrtDialect
from engine_core.errors import BuildError
from engine_core.formats.number_formats import NVFP4_BLOCK, ScaledFloat, pack_nibbles
from engine_core.formats.onnx_writer import GraphWriter
from engine_core.formats.weights import Weights
from engine_core.models.spec import LinearSpec

# The first that have the type: operators' version, file format's version.
_VERSIONS = {"fp8": (21, 10), "nvfp4": (23, 11)}
_FLOAT, _HALF, _BYTES = np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.uint8)


def dequantized(writer: GraphWriter, name: str, weights: Weights, linear: LinearSpec, kind: str) -> str:
    """Adds the weight and the nodes that make it float32 [out, in]; the name of that. ``kind``: fp8 or nvfp4.

    Raises BuildError for columns that nvfp4's blocks do not divide.
    """
    rows, columns = weights.linear_shape(linear)
    scales: list[np.ndarray] = []
    globals_: list[np.ndarray] = []
    block = weights.float_block(linear, kind)

    def codes() -> Iterator[np.ndarray]:
        for part in weights.scaled_floats(linear, kind):
            scales.append(_block_scales(part, block))
            globals_.append(np.full(len(part.codes), part.global_scale, np.float32))
            yield part.codes if kind == "fp8" else pack_nibbles(part.codes)

    if kind == "fp8":
        values = writer.stream(f"{name}.weight", _BYTES, (rows, columns), codes(), TensorProto.FLOAT8E4M3FN)
        per_row = block >= columns
        shape = (rows,) if per_row else (rows, -(-columns // block))
        scale = writer.stream(f"{name}.scales", _FLOAT, shape, [s[:, 0] if per_row else s for s in scales])
        attributes = {"axis": 0} if per_row else {"axis": 1, "block_size": block}
        return writer.node("DequantizeLinear", [values, scale], f"{name}/weight", **attributes)
    values = writer.stream(f"{name}.weight", _BYTES, (rows, columns), codes(), TensorProto.FLOAT4E2M1)
    shape = (rows, columns // NVFP4_BLOCK)
    stored = writer.stream(f"{name}.scales", _BYTES, shape, scales, TensorProto.FLOAT8E4M3FN)
    per_row = np.concatenate(globals_)
    is_one = (per_row == per_row[0]).all()
    global_scale = writer.constant(f"{name}.global_scale", per_row[0] if is_one else per_row)
    scale = writer.node(
        "DequantizeLinear", [stored, global_scale], f"{name}/scales", **({} if is_one else {"axis": 0})
    )
    return writer.node("DequantizeLinear", [values, scale], f"{name}/weight", axis=1, block_size=NVFP4_BLOCK)


def _block_scales(part: ScaledFloat, block: int) -> np.ndarray:
    if part.kind == "nvfp4":
        return part.block_scales
    columns = part.codes.shape[1]
    return part.scales[:, np.arange(0, columns, block) // part.block_size].astype(np.float32)


class QdqDialect(OrtDialect):
    """Implements ``onnx_graph.Dialect``."""

    def begin(self) -> None:
        if not hasattr(TensorProto, "FLOAT4E2M1") or _VERSIONS[self._precision.kind][0] > _newest_operators():
            raise BuildError(
                f"The installed onnx is too old for {self._precision.kind} weights; they need 1.18 or newer: "
                "pip install --upgrade onnx."
            )
        super().begin()

    def embed(self) -> str:
        spec, writer = self._spec, self._writer
        blocks = (block.astype(np.float16) for block in self._weights.embedding())
        table = writer.stream("embedding", _HALF, (spec.vocab_size, spec.hidden_size), blocks)
        if spec.tied and self._weights.vocab_map is None:
            self._tied_head = table
        found = writer.node("Gather", [table, "input_ids"], "embed/half", axis=0)
        embedded = writer.node("Cast", [found], "embed/output", to=TensorProto.FLOAT)
        if spec.embedding_scale == 1.0:
            return embedded
        scale = writer.constant("embedding_scale", np.float32(spec.embedding_scale))
        return writer.node("Mul", [embedded, scale], "embed_scaled/output")

    def linear(self, name: str, value: str, linear: LinearSpec) -> str:
        weight = dequantized(self._writer, name, self._weights, linear, self._precision.kind)
        return self._product(name, value, weight, self._weights.bias(linear))

    def head_logits(self, value: str) -> str:
        shape = (self._weights.head_rows, self._spec.hidden_size)
        table = self._tied_head
        if not table:
            blocks = (block.astype(np.float16) for block in self._weights.head())
            table = self._writer.stream("head.weight", _HALF, shape, blocks)
        weight = self._writer.node("Cast", [table], "head/weight", to=TensorProto.FLOAT)
        return self._product("head", value, weight, self._weights.head_bias())

    def finish(self) -> None:
        self.save_graph(self._writer, "fp32", *_VERSIONS[self._precision.kind])

    def _product(self, name: str, value: str, weight: str, bias: np.ndarray | None) -> str:
        turned = self._writer.node("Transpose", [weight], f"{name}/turned", perm=[1, 0])
        result = self._writer.node("MatMul", [value, turned], f"{name}/product")
        if bias is None:
            return result
        return self._writer.node("Add", [result, self._writer.constant(f"{name}.bias", bias)], f"{name}/output")


def _newest_operators() -> int:
    from onnx.defs import onnx_opset_version

    return onnx_opset_version()
