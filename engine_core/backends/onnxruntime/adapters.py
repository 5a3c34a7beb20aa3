"""LoRA adapters on the CPU: low-rank branches beside the matrices, whose own matrices are inputs of the graph.

The branches are put into the graph when it is loaded, so that any engine directory serves any adapter. A session has
one set of inputs for each adapter; a sequence without one binds matrices of rank 0, which add zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine_core.backends.onnxruntime.loaded_graph import LoadedGraph
from engine_core.formats.lora import LoraAdapter
from engine_core.models.spec import ModelSpec

# Matrix of ModelSpec.layer_matrices → its name in the graph.
_NAMES = {"qkv": "qkv", "o": "output", "gate_up": "gate_up", "down": "down"}
# Input name → its array, for an adapter.
Matrices = dict[str, np.ndarray]


@dataclass(frozen=True)
class Site:
    """A place that adapters add to: the product of a layer's matrix, or one of its halves once it is split."""

    layer: int
    matrix: str  # of ModelSpec.layer_matrices
    rows: range  # of the matrix
    columns: int
    half: str = ""  # gate or up

    @property
    def products(self) -> tuple[str, str]:
        """The names that the product may have: before a bias is added, or as it is."""
        name = f"layer{self.layer}/{_NAMES[self.matrix]}"
        return f"{name}/product", f"{name}/output"

    @property
    def inputs(self) -> tuple[str, str]:
        """The graph's inputs: float32 [columns, rank] and [rank, rows], or [rank, 1] of rank 0."""
        name = f"lora.{self.layer}.{self.half or self.matrix}"
        return f"{name}.a", f"{name}.b"


def sites(spec: ModelSpec, adapters: Sequence[LoraAdapter]) -> list[Site]:
    """Return where any of ``adapters`` adds something.

    Gate and up are apart: their matrices B stacked would be half zeros, which cost as much to read as the rest.
    """
    found = []
    for layer, layer_spec in enumerate(spec.layers):
        for matrix, (rows, columns) in spec.matrices_of(layer_spec).items():
            halves = {"gate": range(rows // 2), "up": range(rows // 2, rows)} if matrix == "gate_up" else {}
            for half, part in (halves or {"": range(rows)}).items():
                if any(adapter.rank_of(layer, matrix, part) for adapter in adapters):
                    found.append(Site(layer, matrix, part, columns, half))
    return found


def num_bytes(adapters: Sequence[LoraAdapter], places: Sequence[Site]) -> int:
    """Return the bytes of ``matrices`` of all adapters."""
    ranks = ((site, adapter.rank_of(site.layer, site.matrix, site.rows)) for site in places for adapter in adapters)
    return sum(4 * rank * (site.columns + len(site.rows)) for site, rank in ranks)


def matrices(adapter: LoraAdapter | None, places: Sequence[Site]) -> Matrices:
    """Return what the inputs of the branches are bound to; None: to what adds nothing."""
    found: Matrices = {}
    for site in places:
        name_a, name_b = site.inputs
        if adapter is None or not adapter.rank_of(site.layer, site.matrix, site.rows):
            found[name_a] = np.zeros((site.columns, 0), np.float32)
            found[name_b] = np.zeros((0, 1), np.float32)  # broadcast over the rows
        else:
            low = adapter.dense(site.layer, site.matrix, site.rows)
            found[name_a], found[name_b] = np.ascontiguousarray(low.a.T), np.ascontiguousarray(low.b.T)
    return found


def add_branches(loaded: LoadedGraph, places: Sequence[Site]) -> None:
    """Put the branches of ``places`` into the graph."""
    helper, floats = loaded.onnx.helper, loaded.onnx.TensorProto.FLOAT
    graph = loaded.graph
    makers = {name: node for node in graph.node for name in node.output}
    behind: dict[str, list] = {}  # name of what a node makes → the nodes that follow it
    for site in places:
        product = next(name for name in site.products if name in makers)
        value = f"layer{site.layer}/gated/{site.half}" if site.half else product
        maker, base = makers[value], f"{value}/base"
        maker.output[list(maker.output).index(value)] = base
        names = site.inputs
        graph.input.append(helper.make_tensor_value_info(names[0], floats, [site.columns, f"{names[0]}.rank"]))
        graph.input.append(helper.make_tensor_value_info(names[1], floats, [f"{names[0]}.rank", f"{names[1]}.rows"]))
        small, added = f"{value}/shrunk", f"{value}/expanded"
        behind.setdefault(maker.output[0], []).extend(
            [
                helper.make_node("MatMul", [makers[product].input[0], names[0]], [small], name=small),
                helper.make_node("MatMul", [small, names[1]], [added], name=added),
                helper.make_node("Add", [base, added], [value], name=f"{value}/adapted"),
            ]
        )
    nodes = []
    for node in graph.node:
        nodes += [node, *behind.get(node.output[0], ())]
    copies = [loaded.onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
