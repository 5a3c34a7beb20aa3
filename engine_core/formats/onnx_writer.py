"""Writes an ONNX model node by node; weights go straight to the external data file, never through the graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper

from engine_core.formats.onnx_graph import DATA_NAME, MODEL_NAME

_ALIGNMENT = 4096  # bytes; a page, so that the runtime can map each tensor in place
IR_VERSION = 9  # what ONNX Runtime 1.17 and TensorRT 10 read
_INLINE_BYTES = 8192  # smaller tensors stand in the model file itself


class DataFile(Protocol):
    """The methods of a binary file that data is written with."""

    def tell(self) -> int: ...
    def write(self, data: bytes | memoryview, /) -> object: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class GraphWriter:
    """Collects nodes and streams tensors to ``directory``; ``save`` writes the model. A context manager."""

    def __init__(self, directory: Path, name: str, data_name: str = DATA_NAME) -> None:
        """``data_name``: of the file that the tensors go to."""
        self._directory = directory
        self._data_name = data_name
        self._name = name
        self._data = self._open_data()
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def _open_data(self) -> DataFile:
        return open(self._directory / self._data_name, "wb")

    def __enter__(self) -> GraphWriter:
        return self

    def __exit__(self, *_) -> None:
        self._data.close()

    @property
    def model_path(self) -> Path:
        return self._directory / MODEL_NAME

    # --- the graph ----------------------------------------------------------------------------------

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str | Sequence[str], domain: str = "", **attributes) -> str:
        """Adds a node; returns the name of its first output."""
        outputs = [output] if isinstance(output, str) else list(output)
        name = outputs[0].replace("/output", "")
        self._nodes.append(helper.make_node(op, list(inputs), outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def where(self, condition: str, make: Callable[[], str], otherwise: str, output: str) -> str:
        """Add a node that gives what the nodes of ``make`` do if ``condition`` holds, else ``otherwise``.

        Nodes of ``make`` run only then. Both values are float. Returns ``output``.
        """
        start = len(self._nodes)
        made = make()
        inner = self._nodes[start:]
        del self._nodes[start:]
        kept = f"{output}/kept"
        same = helper.make_node("Identity", [otherwise], [kept], name=kept)
        branches = {
            f"{name}_branch": helper.make_graph(
                nodes, f"{output}/{name}", [], [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)]
            )
            for name, nodes, value in (("then", inner, made), ("else", [same], kept))
        }
        return self.node("If", [condition], output, **branches)

    def cases(self, selector: str, makes: Sequence[Callable[[], Sequence[str]]], outputs: Sequence[str]) -> None:
        """Add nodes that give what the nodes of ``makes[selector]`` do; those of the others do not run.

        ``selector``: the name of an int64 scalar. Each of ``makes`` returns the names of its results, all of them float
        and made by its own nodes, which are called ``outputs`` here.
        """
        start, branches = len(self._nodes), []
        for index, make in enumerate(makes):
            made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in make()]
            branches.append(helper.make_graph(self._nodes[start:], f"{outputs[0]}/case{index}", [], made))
            del self._nodes[start:]
        graph = branches.pop()
        for index in reversed(range(len(branches))):
            prefix = f"{outputs[0]}/from{index}"
            names = [f"{prefix}/{place}" for place in range(len(outputs))] if index else list(outputs)
            number = self.constant(f"{prefix}/number", np.int64(index))
            nodes = [
                helper.make_node("Equal", [selector, number], [f"{prefix}/is"], name=f"{prefix}/is"),
                helper.make_node(
                    "If", [f"{prefix}/is"], names, name=prefix, then_branch=branches[index], else_branch=graph
                ),
            ]
            made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
            graph = helper.make_graph(nodes, prefix, [], made)
        if branches:
            self._nodes += graph.node
            return
        self._nodes += graph.node
        for made, name in zip(graph.output, outputs):
            self.node("Identity", [made.name], name)

    def fork(self) -> GraphWriter:
        """Another graph over the same data file: what is changed in one is not in the other."""
        other = copy.copy(self)
        other._nodes = copy.deepcopy(self._nodes)
        other._inputs, other._outputs = copy.deepcopy(self._inputs), copy.deepcopy(self._outputs)
        other._initializers = dict(self._initializers)
        return other

    def retype(self, prefixes: tuple[str, ...], dtype: int) -> None:
        """Gives the graph's inputs and outputs whose names start so the element type ``dtype``."""
        for value in (*self._inputs, *self._outputs):
            if value.name.startswith(prefixes):
                value.type.tensor_type.elem_type = dtype

    def rewrite(self, op: str, replace: Callable[[onnx.NodeProto], Sequence[onnx.NodeProto]]) -> None:
        """Puts what ``replace`` makes of each node of kind ``op`` in its place."""
        nodes: list[onnx.NodeProto] = []
        for node in self._nodes:
            nodes.extend(replace(node) if node.op_type == op else (node,))
        self._nodes = nodes

    # --- tensors ------------------------------------------------------------------------------------

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add a tensor that is there as a whole. A name that was added before is the same tensor."""
        if name in self._initializers:
            return name
        value = np.asarray(value, order="C")
        if value.nbytes > _INLINE_BYTES:
            return self.stream(name, value.dtype, value.shape, [value])
        self._initializers[name] = onnx.numpy_helper.from_array(value, name)
        return name

    def stream(self, name: str, dtype: np.dtype, shape: Sequence[int], blocks: Iterable[np.ndarray]) -> str:
        """Add a tensor that arrives in blocks along its first axis; only one of them is in memory at a time."""
        assert name not in self._initializers
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
        offset = self._data.tell()
        for block in blocks:
            self._data.write(np.ascontiguousarray(block, dtype=dtype).data)
        length = self._data.tell() - offset
        expected = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        assert length == expected, f"{name} has {length} bytes"
        self._initializers[name] = _external(name, _onnx_type(dtype), shape, self._data_name, offset, length)
        return name

    def alias(self, name: str, of: str, shape: Sequence[int]) -> str:
        """Add the bytes of the streamed tensor ``of`` under another name and shape."""
        place = {entry.key: entry.value for entry in self._initializers[of].external_data}
        onnx_type = self._initializers[of].data_type
        self._initializers[name] = _external(
            name, onnx_type, shape, self._data_name, int(place["offset"]), int(place["length"])
        )
        return name

    def add_to_attribute(self, attribute: str, amount: int) -> bool:
        """Adds ``amount`` to the integer ``attribute`` of every node that has it; False if none has."""
        found = [a for node in self._nodes for a in node.attribute if a.name == attribute]
        for each in found:
            each.i += amount
        return bool(found)

    def save(self, opsets: dict[str, int], name: str = MODEL_NAME, ir_version: int = IR_VERSION) -> None:
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        model = helper.make_model(
            graph,
            producer_name="edgellm_ros",
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
            ir_version=ir_version,
        )
        self._data.flush()
        (self._directory / name).write_bytes(model.SerializeToString(deterministic=True))


def _onnx_type(dtype: np.dtype) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _external(
    name: str, onnx_type: int, shape: Sequence[int], location: str, offset: int, length: int
) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=onnx_type, dims=list(shape))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor
