"""The matrices of LoRA adapters as the CUDA kernels read them: those of all adapters side by side.

An adapter of a lower rank than the others is filled up with zeros, and so is a stacked linear that it leaves alone.
"""

from __future__ import annotations

import numpy as np

from engine_core.backends.cuda.layout import CONV_MATRICES, CudaSpec, model_matrices, pair_rows, stacked_rows
from engine_core.backends.cuda.orders import pairs_in_order
from engine_core.backends.cuda.padding import Padding
from engine_core.errors import AdapterError, BuildError
from engine_core.formats.lora import LoraAdapter
from engine_core.formats.number_formats import to_16_bit


def adapter_matrices(
    spec: CudaSpec, layer: int, matrix: str, order: np.ndarray | None = None, order_below: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the arrays lora_a and lora_b of a layer's matrix hold; see ``layout.lora_arrays``.

    ``order``: the order of the matrix's columns, int64, None = as they are; ``order_below``: that of the columns of
    ``down``, for ``gate_up``. Raises AdapterError if a value is not finite or too large for the model's 16-bit type.
    """
    pairs = [_of_adapter(spec, adapter, layer, matrix) for adapter in spec.adapters]
    a, b = np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs])
    if order_below is not None:
        b = np.stack([pairs_in_order(each, order_below) for each in b])
    return a if order is None else np.ascontiguousarray(a[..., order]), b


def _of_adapter(spec: CudaSpec, adapter: LoraAdapter, layer: int, matrix: str) -> tuple[np.ndarray, np.ndarray]:
    rank, parts = spec.lora_rank, stacked_rows(spec.model)[matrix]
    rows, columns = model_matrices(spec.model)[matrix]
    a, b = np.zeros((len(parts) * rank, columns), np.float32), np.zeros((rows, rank), np.float32)
    for number, part in enumerate(parts):
        low = adapter.dense(layer, CONV_MATRICES.get(matrix, matrix), part)
        a[number * rank : number * rank + len(low.a)] = low.a
        b[part.start : part.stop, : low.b.shape[1]] = low.b
    padding = Padding(spec.model)
    of_rows, of_columns = padding.rows(matrix), padding.columns(matrix)
    assert of_rows is not None and of_columns is not None
    if matrix == "gate_up":
        b = pair_rows(b)
    try:
        return to_16_bit(of_columns.spread(a, axis=1), spec.dtype), to_16_bit(of_rows.spread(b, axis=0), spec.dtype)
    except BuildError as error:
        raise AdapterError(
            f"The adapter {adapter.name!r} has values for {matrix} of layer {layer} that are too large for "
            f"{spec.dtype}; build the engine with bf16, or train the adapter with a lower lora_alpha."
        ) from error
