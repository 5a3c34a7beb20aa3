"""The graphs of the smaller KV caches: the float32 one with its attention nodes rewritten, over the same weights.

fp16: attention takes and gives fp16, between two casts of the step's own activations; the past is not converted.
int8: the operator's symmetric form with one scale for each channel, known when the engine is built.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from engine_core.backends.onnxruntime.kv_scales import KVScales
from engine_core.formats.onnx_writer import GraphWriter

_CACHES = tuple(f"{time}_{kind}." for time in ("past", "present") for kind in ("key", "value"))
_TABLES = ("rope_cos.", "rope_sin.")  # of RoPE, where they are inputs
# Places of GroupQueryAttention's inputs.
_QKV, _PAST_KEY, _ROPE, _SCALES = slice(0, 3), 3, slice(7, 9), slice(12, 14)


def with_fp16_cache(writer: GraphWriter, ropes: Mapping[str, np.ndarray]) -> GraphWriter:
    """Return the graph with an fp16 cache. ``ropes``: the float32 RoPE tables by their names in the graph, unless they
    are its inputs."""
    other = writer.fork()
    other.retype((*_CACHES, *_TABLES), TensorProto.FLOAT16)

    def rewrite(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        casts = []
        for i, name in enumerate(node.input[_QKV]):
            if name:
                casts.append(_cast(name, f"{name}/fp16", TensorProto.FLOAT16))
                node.input[i] = casts[-1].output[0]
        for i, name in enumerate(node.input[_ROPE], start=_ROPE.start):
            if name in ropes:
                node.input[i] = other.constant(f"{name}.fp16", ropes[name].astype(np.float16))
        result = node.output[0]
        node.output[0] = f"{result}/fp16"
        return [*casts, node, _cast(node.output[0], result, TensorProto.FLOAT)]

    other.rewrite("GroupQueryAttention", rewrite)
    return other


def with_int8_cache(writer: GraphWriter, scales: KVScales) -> GraphWriter:
    other = writer.fork()
    other.retype(_CACHES, TensorProto.INT8)
    of_layers = iter(scales)  # of those that have a cache, as the graph has them

    def rewrite(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        layer = int(node.input[_PAST_KEY].rpartition(".")[2])
        names = [
            other.constant(f"{kind}_scale.{layer}", of_kind[None, :, None, :])
            for kind, of_kind in zip(("key", "value"), next(of_layers))
        ]
        node.input.extend([""] * (_SCALES.start - len(node.input)) + names)
        per_channel = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        node.attribute.extend(helper.make_attribute(name, value) for name, value in per_channel.items())
        return [node]

    other.rewrite("GroupQueryAttention", rewrite)
    return other


def _cast(value: str, result: str, dtype: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [value], [result], name=result, to=dtype)
