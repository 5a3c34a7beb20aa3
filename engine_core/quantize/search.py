"""Search the changes of a layer before it is rounded, from the inputs of its linears.

int4_awq: AWQ (Lin et al. 2023, arXiv 2306.00978). Columns that meet large inputs are scaled up before rounding, by s =
mean|x|^a (and, as in the authors' code, over the weights' own mean), a from a grid, whichever gives the least squared
error of the linear's output; then each group's range is clipped where that lowers the error further. int8_smoothquant:
SmoothQuant (Xiao et al. 2022, arXiv 2211.10438), s = max|x|^a / max|w|^(1-a), which takes outliers out of the
activations.

The inverse of s goes into what makes the input: the norm before, or the rows of V and of the up projection. The result
is a checkpoint like any other.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine_core.errors import BuildError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.number_formats import from_16_bit, to_16_bit
from engine_core.models.spec import LayerSpec, LinearSpec, ModelSpec
from engine_core.quantize.calibration import Activations
from engine_core.quantize.methods import SMOOTHQUANT
from engine_core.quantize.output import Change, changed_weights
from engine_core.quantize.scheme import Scheme

_STEPS = 20  # of the grid over a
_SMOOTHING = 0.5  # SmoothQuant's a: its authors' choice for most models
_SMALLEST_RATIO, _RATIO_STEP = 0.5, 0.05
_FLOOR = np.float32(1e-4)  # below which neither an input nor a scale is told from 0
_BLOCK_ROWS = 2048  # whose errors are computed at once


def change_of(
    checkpoint: Checkpoint, spec: ModelSpec, index: int, scheme: Scheme, activations: dict[str, Activations]
) -> Change:
    """Return the changes of layer ``index``; see ``Change``."""
    layer, change = spec.layers[index], Change()
    if scheme.method == SMOOTHQUANT:
        if not layer.pre_norms:
            raise BuildError(
                f"{scheme.method} puts scales into the norms before attention and MLP, which {spec.architecture} does "
                "not have; choose int8."
            )
        for norm, linear in ((layer.input_norm, layer.qkv), (layer.mlp_norm, layer.gate_up)):
            weights = np.concatenate(changed_weights(checkpoint, linear, change))
            scale = _smoothing(weights, activations[linear.parts[0]])
            _fold_into_norm(checkpoint, spec, norm, linear, scale, scheme, change)
        return change
    for linear, sharing in _scaled(spec, layer):
        weights = np.concatenate(changed_weights(checkpoint, linear, change))
        scale = _best_scale(weights, activations[linear.parts[0]], scheme, sharing)
        if linear == layer.output:
            _fold_into_rows(spec, layer.qkv, _shared(scale, sharing), "v", change)
            change.columns[linear.parts[0]] = scale
        elif linear == layer.down:
            _fold_into_rows(spec, layer.gate_up, scale, "up", change)
            change.columns[linear.parts[0]] = scale
        else:
            norm = layer.input_norm if linear == layer.qkv else layer.mlp_norm
            _fold_into_norm(checkpoint, spec, norm, linear, scale, scheme, change)
    for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
        first = linear.parts[0]
        inputs = activations[first].kept / change.columns.get(first, 1)
        weights = np.concatenate(changed_weights(checkpoint, linear, change))
        change.ratios[first] = _best_ratios(weights, inputs, scheme)
    return change


def _scaled(spec: ModelSpec, layer: LayerSpec) -> Iterator[tuple[LinearSpec, np.ndarray | None]]:
    """(linear, for each of its inputs the row of V that makes it or None) in an order in which nothing is undone.

    Without a norm before it, nothing takes the inverse of a linear's scales.
    """
    if layer.pre_norms:
        yield layer.qkv, None
    heads = np.arange(spec.num_heads) // (spec.num_heads // spec.num_kv_heads)
    yield layer.output, (heads[:, None] * spec.head_dim + np.arange(spec.head_dim)).ravel()
    if layer.pre_norms:
        yield layer.gate_up, None
    yield layer.down, None


# --- scales -----------------------------------------------------------------------------------------


def _best_scale(weights: np.ndarray, inputs: Activations, scheme: Scheme, sharing: np.ndarray | None) -> np.ndarray:
    """float32 [in]: the scale of the grid with the least error of the output; ones if none is better than none.

    ``sharing``: inputs with the same number get the same scale.
    """
    factor = _factor(inputs.kept)
    inputs_mean = _averaged(inputs.mean, sharing)
    peaks = np.abs(weights).reshape(len(weights), -1, scheme.group_size)
    relative = np.abs(weights) / np.maximum(np.repeat(peaks.max(axis=2), scheme.group_size, axis=1), _FLOOR**2)
    weights_mean = _averaged(relative.mean(axis=0), sharing)
    best = np.ones(weights.shape[1], dtype=np.float32)
    least = _error(weights, best, factor, scheme)
    for step in range(1, _STEPS):
        exponent = step / _STEPS
        for divisor in (1.0, weights_mean ** (1 - exponent) + _FLOOR):
            scale = np.maximum(inputs_mean**exponent / divisor, _FLOOR).astype(np.float32)
            scale /= np.sqrt(scale.max() * scale.min())
            error = _error(weights, scale, factor, scheme)
            if error < least:
                best, least = scale, error
    return best


def _smoothing(weights: np.ndarray, inputs: Activations) -> np.ndarray:
    peaks = np.maximum(np.abs(weights).max(axis=0), _FLOOR)
    scale = np.maximum(inputs.peak, _FLOOR) ** _SMOOTHING / peaks ** (1 - _SMOOTHING)
    return np.maximum(scale, _FLOOR).astype(np.float32)


def _factor(inputs: np.ndarray) -> np.ndarray:
    """R [n, in] with |E Rᵀ| = |E Xᵀ| for every E and the inputs X [tokens, in]; n is the smaller of the two."""
    return inputs if len(inputs) <= inputs.shape[1] else np.linalg.qr(inputs, mode="r")


def _error(weights: np.ndarray, scale: np.ndarray, factor: np.ndarray, scheme: Scheme) -> float:
    """Return the squared error of the output, summed over the tokens and the rows."""
    total = 0.0
    for first in range(0, len(weights), _BLOCK_ROWS):
        block = weights[first : first + _BLOCK_ROWS]
        error = scheme.round(block * scale).dequantize() / scale - block
        total += float(np.square(error @ factor.T).sum(dtype=np.float64))
    return total


def _averaged(values: np.ndarray, sharing: np.ndarray | None) -> np.ndarray:
    """Means over the inputs that share a number."""
    if sharing is None:
        return values
    return (np.bincount(sharing, values) / np.bincount(sharing))[sharing]


def _shared(values: np.ndarray, sharing: np.ndarray) -> np.ndarray:
    """Return one value for each number of ``sharing``."""
    result = np.empty(sharing.max() + 1, dtype=np.float32)
    result[sharing] = values
    return result


# --- clipping ---------------------------------------------------------------------------------------


def _best_ratios(weights: np.ndarray, inputs: np.ndarray, scheme: Scheme) -> np.ndarray:
    """float32 [rows, groups]: the part of each group's range that gives the group's least error of the output."""
    rows, columns = weights.shape
    size = scheme.group_size
    gram = np.stack([inputs[:, i : i + size].T @ inputs[:, i : i + size] for i in range(0, columns, size)])
    best = np.ones((rows, columns // size), dtype=np.float32)
    for first in range(0, rows, _BLOCK_ROWS):
        block = weights[first : first + _BLOCK_ROWS]
        least = np.full((len(block), columns // size), np.inf, dtype=np.float32)
        for ratio in np.arange(1, _SMALLEST_RATIO - 1e-6, -_RATIO_STEP, dtype=np.float32):
            error = scheme.round(block, ratio).dequantize() - block
            grouped = error.reshape(len(block), -1, size).transpose(1, 0, 2)
            errors = np.einsum("grc,grc->rg", grouped @ gram, grouped)
            is_less = errors < least
            least = np.where(is_less, errors, least)
            best[first : first + _BLOCK_ROWS][is_less] = ratio
    return best


# --- folding ----------------------------------------------------------------------------------------


def _fold_into_norm(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    norm: str,
    linear: LinearSpec,
    scale: np.ndarray,
    scheme: Scheme,
    change: Change,
) -> None:
    """Divides the norm by ``scale``, and multiplies the columns by what its rounding to 16 bits makes of that."""
    offset = np.float32(spec.norm_offset)
    old = checkpoint.read(norm) + offset
    stored = from_16_bit(to_16_bit(old / scale - offset, scheme.dtype))
    new = stored + offset
    change.norms[norm] = stored
    change.columns[linear.parts[0]] = np.divide(old, new, out=np.ones_like(old), where=new != 0)


def _fold_into_rows(spec: ModelSpec, linear: LinearSpec, scale: np.ndarray, which: str, change: Change) -> None:
    """Divides the rows of V (of the QKV linear) or of up (of gate and up) by ``scale``."""
    total = spec.qkv_size if which == "v" else 2 * spec.intermediate_size
    rows = change.rows.setdefault(linear.parts[0], np.ones(total, dtype=np.float32))
    rows[total - len(scale) :] /= scale
