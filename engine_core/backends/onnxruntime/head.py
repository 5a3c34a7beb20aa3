"""Prunes the LM head of a whole ONNX model to the rows of a vocab map while it is loaded: no step reads the rest.

The graph is edited in memory and the kept rows are handed to the session as initializers: what is dropped is never
loaded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from engine_core.backends.onnxruntime.loaded_graph import LoadedGraph
from engine_core.errors import ConfigurationError

_NODES = ("head", "head/product")  # exporter.py: the product, and the sum with its bias


def prune_head(loaded: LoadedGraph, kept: np.ndarray, options: ort.SessionOptions) -> list[ort.OrtValue]:
    """Leave only the rows ``kept``, int32 [rows], of the head of ``loaded``; ``options`` gets those rows.

    The values returned are the rows' memory: they have to live as long as the session.
    Raises ConfigurationError if the head is not one that can be pruned.
    """
    graph, path = loaded.graph, loaded.path
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    rows = graph.output[[output.name for output in graph.output].index("logits")].type.tensor_type.shape.dim[1]
    owned = []
    for node in (node for node in graph.node if node.name in _NODES):
        for index, name in enumerate(node.input):
            if name not in tensors:
                continue
            values = _rows(_values(tensors[name], path.parent), rows.dim_value, kept)
            cut = _placeholder(loaded.onnx, f"{node.name}.kept.{index}", values, tensors[name])
            node.input[index] = cut.name
            graph.initializer.append(cut)
            owned.append(ort.OrtValue.ortvalue_from_numpy(values))  # shares the array's memory
            options.add_initializer(cut.name, owned[-1])
        for attribute in node.attribute:
            if attribute.name == "N":
                attribute.i = len(kept)
    if not owned:
        raise ConfigurationError(f"The LM head of {path} cannot be pruned at load; build it with --vocab-map.")
    rows.dim_value = len(kept)
    return owned


def _values(tensor, directory: Path) -> np.ndarray:
    from onnx import TensorProto, helper, numpy_helper

    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    file, offset = directory / place["location"], int(place["offset"])
    return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=tuple(tensor.dims))


def _rows(values: np.ndarray, num_rows: int, kept: np.ndarray) -> np.ndarray:
    """Return the rows ``kept`` of a tensor [num_rows, …], or of a flat one of so many rows (zero points)."""
    if values.size % num_rows or not values.ndim:
        raise ConfigurationError("The LM head of this engine cannot be pruned at load; build it with --vocab-map.")
    cut = np.ascontiguousarray(values.reshape(num_rows, -1)[kept])
    return cut.reshape(len(kept) * values.shape[0] // num_rows, *values.shape[1:])


def _placeholder(onnx, name: str, values: np.ndarray, source):
    """Return an initializer of the right type and shape; its bytes come from the session options."""
    if source.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.from_array(values, name)
    place = {entry.key: entry.value for entry in source.external_data}
    tensor = onnx.TensorProto(name=name, data_type=source.data_type, dims=values.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", place["location"]), ("offset", place["offset"]), ("length", str(values.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor
