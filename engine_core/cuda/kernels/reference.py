"""The references: what each kernel computes, in float64 with numpy, in the plainest way.

Arrays are float64 whose values are exact in the kernel's input type. Tests compare the kernels with these.
"""

from __future__ import annotations

import math

import numpy as np

from engine_core.cuda.kernels import nvfp4_layout
from engine_core.cuda.kernels.integer_layout import GROUP, IntegerLayout
from engine_core.cuda.kernels.linear_packed import LAYOUTS, layout_of
from engine_core.formats.number_formats import E2M1, E4M3, FP8_MAX, from_16_bit, to_minifloat
from engine_core.formats.weight_formats.base import WeightFormat
from engine_core.formats.weight_formats.integers import IntegerFormat


def rms_norm(rows: np.ndarray, weight: np.ndarray, eps: float, size: int = 0) -> np.ndarray:
    """Return [..., cols] normalised along the last axis, times weight [cols].

    ``size``: values that the mean is over, those after them being zeros; 0 = all.
    """
    squares = (rows**2).sum(axis=-1, keepdims=True) / (size or rows.shape[-1])
    return rows / np.sqrt(squares + eps) * weight


def silu_multiply(gate_up: np.ndarray) -> np.ndarray:
    """Return silu(gate) * up, [..., width], of [..., 2 width] whose values are (gate, up) in turn."""
    gate, up = gate_up[..., 0::2], gate_up[..., 1::2]
    return gate / (1 + np.exp(-gate)) * up


def gelu_multiply(gate_up: np.ndarray) -> np.ndarray:
    """Return gelu(gate) * up, by tanh, [..., width], of [..., 2 width] whose values are (gate, up) in turn."""
    gate, up = gate_up[..., 0::2], gate_up[..., 1::2]
    return bias_gelu(gate, np.zeros(1)) * up


def layer_norm(rows: np.ndarray, params: np.ndarray, eps: float) -> np.ndarray:
    """Return LayerNorm along the last axis of rows [..., cols]; ``params`` [3, cols]: see ``vision.layer_norm``."""
    weight, bias, added = params
    rows = rows + added
    rows = rows - rows.mean(axis=-1, keepdims=True)
    return rows / np.sqrt((rows**2).mean(axis=-1, keepdims=True) + eps) * weight + bias


def merge_patches(rows: np.ndarray, merge: int, side: int) -> np.ndarray:
    """Return [side² / merge², merge² cols] of the patches [side², cols] of a tile: neighbours in a row."""
    cols, count = rows.shape[1], side // merge
    apart = rows.reshape(count, merge, count, merge, cols).swapaxes(1, 2)
    return apart.reshape(count**2, merge**2 * cols)


def cut_patches(pixels: np.ndarray, patch: int) -> np.ndarray:
    """Return [patches, channels * patch²] of a tile's pixels [channels, size, size], row by row."""
    channels, size, _ = pixels.shape
    side = size // patch
    whole = pixels[:, : side * patch, : side * patch].reshape(channels, side, patch, side, patch)
    return whole.transpose(1, 3, 0, 2, 4).reshape(side**2, channels * patch**2)


def bias_gelu(values: np.ndarray, bias: np.ndarray, *, exact: bool = False) -> np.ndarray:
    """Return gelu(values + bias), by tanh or ``exact``."""
    x = values + bias
    if exact:
        return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def quantize_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (codes of E4M3, uint8 [n, cols]; scales, float32 [n]) of rows [n, cols]: the largest magnitude is 448."""
    peaks = np.abs(rows).max(axis=1, keepdims=True).astype(np.float32)
    factors = np.divide(FP8_MAX, peaks, out=np.zeros_like(peaks), where=peaks > 1e-30)
    return to_minifloat(rows.astype(np.float32) * factors, E4M3), peaks[:, 0] / FP8_MAX


def route(scores: np.ndarray, count: int, norm_shares: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (experts with the largest of scores [n, experts], int [n, count]; what each counts, [n, count])."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    picked = np.argsort(-weights, axis=-1, kind="stable")[:, :count]
    shares = np.take_along_axis(weights, picked, axis=-1)
    return picked, shares / shares.sum(axis=-1, keepdims=True) if norm_shares else shares


def log_probability(logits: np.ndarray, row: int) -> float:
    """Return the natural logarithm of the probability of ``row`` under the softmax of logits [rows]; -inf for -1."""
    peak = logits.max()
    return -np.inf if row < 0 else float(logits[row] - peak - np.log(np.exp(logits - peak).sum()))


def short_convolution(
    gates: np.ndarray, earlier: np.ndarray, taps: np.ndarray, bias: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return gate_2 * (a convolution of gate_1 * x over tokens + bias), [n, cols], and gate_1 * x, [n, cols].

    ``gates``: [n, 3 cols], which is gate_1, gate_2 and x; ``earlier``: gate_1 * x of the tokens before, the oldest
    first, [taps - 1, cols]; ``taps``: [taps, cols], the oldest token's first.
    """
    gate_1, gate_2, x = np.split(gates, 3, axis=1)
    inputs = gate_1 * x
    seen = np.concatenate([earlier, inputs])
    total = sum(seen[k : k + len(inputs)] * taps[k] for k in range(len(taps)))
    return gate_2 * (total + bias), inputs


def lora_expand(sums: np.ndarray, b: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return what a LoRA adapter adds to a matrix's output [n, rows].

    ``sums``: A x of n tokens, [n, parts, rank]; ``b``: [rows, rank]; ``parts``: the part of each row, int [rows].
    """
    return np.einsum("nrk,rk->nr", sums[:, parts], b)


def rotate(vectors: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return vectors [n, heads, head_dim] after RoPE by table [n, rotated / 2, 2] (cos, sin), halves rotated.

    What is past the rotated elements passes through.
    """
    half = table.shape[1]
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    first, second, rest = np.split(vectors, [half, 2 * half], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def attention(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    start: int,
    scale: float = 0.0,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
) -> np.ndarray:
    """Return [n, heads, head_dim] of causal attention, or of one in which every query sees every key.

    ``queries``: [n, heads, head_dim] at positions ``start`` …; ``keys`` and ``values``: [kv_heads, start + n,
    head_dim]. ``scale``: of scores; 0 = head_dim^-1/2. ``window``: keys that a query sees, its own included; 0 = all.
    ``softcap``: see AttentionShape.
    """
    num_queries, heads, head_dim = queries.shape
    group = heads // keys.shape[0]
    first = max(0, start + 1 - window) if window else 0  # the first key that any query sees
    last = start + np.arange(num_queries)[:, None]
    position = np.arange(first, start + num_queries)
    seen = (position <= last) & (position > last - window if window else True) | (not causal)
    output = np.empty_like(queries)
    for h in range(heads):
        k, v = keys[h // group, first:], values[h // group, first:]
        scores = queries[:, h] @ k.T * (scale or head_dim**-0.5)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        scores[~seen] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        output[:, h] = weights @ v / weights.sum(axis=1, keepdims=True)
    return output


def quantize_vectors(vectors: np.ndarray, kind: str = "int8") -> tuple[np.ndarray, np.ndarray]:
    """Return (quantized values [..., n], scales [...]) of vectors [..., n] as a KV cache of ``kind`` keeps them.

    Symmetric, one fp16 scale to a vector. Quantized values are whole numbers from -127 to 127 of int8, and of fp8 those
    of E4M3 up to 28; the cache gives back value × scale. Both are float64.
    """
    largest = {"int8": 127, "fp8": 28}[kind]
    scales = (np.abs(vectors).max(axis=-1) / largest).astype(np.float16).astype(np.float64)
    divided = vectors / np.where(scales == 0, 1, scales)[..., None]
    values = np.clip(np.rint(divided), -127, 127) if kind == "int8" else E4M3[to_minifloat(divided, E4M3)]
    return np.where(scales[..., None] == 0, 0, values.astype(np.float64)), scales


def dequantize(values: np.ndarray, scales: np.ndarray, group: int, zero: int | np.ndarray) -> np.ndarray:
    """Return weights [rows, cols] of values [rows, cols] (whole numbers) and scales [rows, groups].

    A group is ``group`` columns, the last one what is left. ``zero``: the value of 0, or [rows, groups] of them.
    """
    cols = values.shape[1]
    if isinstance(zero, np.ndarray):
        zero = np.repeat(zero.astype(np.float64), group, axis=1)[:, :cols]
    return (values.astype(np.float64) - zero) * np.repeat(scales, group, axis=1)[:, :cols]


def packed_weight(tiles: np.ndarray, kind: str | WeightFormat, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Return the weights [rows, cols] that packed ``tiles`` stand for.

    ``kind``: in ``linear_packed.LAYOUTS``, or the format, which also says the groups of integers. ``dtype``: fp16 or
    bf16, of the scales of integers.
    """
    layout = LAYOUTS[kind] if isinstance(kind, str) else layout_of(kind)
    found, *scales = layout.unpack(tiles, shape)
    if isinstance(layout, IntegerLayout):
        is_bf16 = dtype == "bf16" and not (isinstance(kind, IntegerFormat) and kind.half_scales)
        wide = from_16_bit(scales[0] if is_bf16 else scales[0].view(np.float16)).astype(np.float64)
        return dequantize(found, wide, layout.group_size, scales[1] if layout.has_zeros else 1 << (layout.bits - 1))
    if layout is nvfp4_layout:
        blocks, of_rows = (E4M3[scales[0]].astype(np.float64), scales[1].astype(np.float64))
        return E2M1[found].astype(np.float64) * np.repeat(blocks, nvfp4_layout.BLOCK, axis=1)[:, : shape[1]] * of_rows
    groups = np.repeat(scales[0].astype(np.float64), shape[1] if scales[0].shape[1] == 1 else GROUP, axis=1)
    return E4M3[found].astype(np.float64) * groups[:, : shape[1]]
