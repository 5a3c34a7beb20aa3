"""Columns in the order in which groups are consecutive: checkpoints of GPTQ's desc_act (act-order).

Their groups are columns of like importance, wherever these lie. An engine has such a matrix's columns in the order of
the groups, and what produces its input puts that in the same order: the norm before ``qkv`` and ``gate_up``, attention
before ``o``, and before ``down`` the rows of ``gate_up``, which are put in order when the engine is built. The array
NAME_places has where each column is. Short convolutions put nothing in order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine_core.backends.cuda.layout import CONV_MATRICES
from engine_core.backends.cuda.padding import Padding
from engine_core.cuda.kernels.integer_layout import GROUP_SIZES
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.quantized_layouts import Stored
from engine_core.formats.weight_formats.base import WeightFormat
from engine_core.formats.weight_formats.integers import IntegerFormat
from engine_core.models.spec import LayerSpec, LinearSpec, ModelSpec

MATRICES = ("qkv", "o", "gate_up", "down")


def keeps_order(spec: ModelSpec) -> bool:
    """Return whether the inputs of a model's matrices can be put in another order: norms and attention do."""
    return spec.layers[0].pre_norms and not spec.num_experts and not any(layer.conv_kernel for layer in spec.layers)


def linears_of(layer: LayerSpec) -> dict[str, LinearSpec]:
    """Return the linears of a layer by the names of their fused tensors."""
    names = (*CONV_MATRICES, *MATRICES[2:]) if layer.conv_kernel else MATRICES
    return dict(zip(names, (layer.qkv, layer.output, layer.gate_up, layer.down), strict=True))


def linear_of(spec: ModelSpec, name: str) -> LinearSpec:
    """Return the linear of a fused tensor such as ``layers.3.qkv``."""
    _, index, which = name.split(".")
    return linears_of(spec.layers[int(index)])[which]


def kept_group(stored: Stored, wanted: WeightFormat) -> int:
    """Return the columns that share a scale where the kernels read integers of a checkpoint as they are; 0 = they do
    not."""
    if not isinstance(wanted, IntegerFormat) or not wanted.keeps(stored.format, stored.group_size):
        return 0
    is_row = stored.group_size >= stored.shape[1]
    return max((size for size in GROUP_SIZES if is_row or stored.group_size % size == 0), default=0)


def kept_linears(
    checkpoint: Checkpoint, spec: ModelSpec, wanted: WeightFormat
) -> Iterator[tuple[str, list[Stored], np.ndarray | None]]:
    """Yield (name of the fused tensor, its parts, the order of its columns) of linears whose integers are kept.

    All parts have groups that the kernels read, and one order; None: columns are as they are.
    """
    padding = Padding(spec)
    for index, layer in enumerate(spec.layers):
        for name, linear in linears_of(layer).items():
            parts = [checkpoint.stored(part) for part in linear.parts]
            found = [part for part in parts if part is not None and kept_group(part, wanted)]
            if len(found) < len(parts):
                continue
            order = found[0].order
            if any(not _is_same(part.order, order) for part in found):
                continue
            columns = padding.columns(name)
            assert columns is not None
            if order is not None and not (keeps_order(spec) and (name != "o" or columns.is_whole)):
                continue
            yield f"layers.{index}.{name}", found, order


def orders_of(checkpoint: Checkpoint, spec: ModelSpec, wanted: WeightFormat) -> dict[str, np.ndarray]:
    """Return the fused tensors whose columns an engine has in another order → int64 [columns], the column at each
    place."""
    found = kept_linears(checkpoint, spec, wanted)
    return {name: order for name, _, order in found if order is not None}


def filled_up(order: np.ndarray, size: int) -> np.ndarray:
    """Return ``order`` with what is added to the columns at their end: int64 [size]."""
    return np.concatenate([order, np.arange(len(order), size)])


def places_of(order: np.ndarray) -> np.ndarray:
    """Return int32 [columns]: the place of each column."""
    places = np.empty(len(order), dtype=np.int32)
    places[order] = np.arange(len(order))
    return places


def pairs_in_order(paired: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return rows of gate and up in turn, [2 n, …], in the order of the columns of ``down``, int64 [n]."""
    return paired.reshape(len(order), 2, *paired.shape[1:])[order].reshape(paired.shape)


def _is_same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))
