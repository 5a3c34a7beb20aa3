"""Filling weights up to the sizes that the kernels read.

The kernels read 16 bytes at a time and heads in pieces of 16 elements. A hidden or intermediate size that is no
multiple of 8, or a head size that is none of 16, is rounded up, and so are the weights, at build. Elements that are
added stay 0 from the embedding to the head. Two numbers keep to the model's own size: the mean of an RMSNorm and the
scale of attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from engine_core.models.padding import Axis, round_up
from engine_core.models.spec import ModelSpec

_GRAIN = 8  # values of 16 bits in 16 bytes
_HEAD_GRAIN = 16


def padded_size(size: int) -> int:
    """Return the hidden or intermediate size that the kernels compute with."""
    return round_up(size, _GRAIN)


def head_axis(spec: ModelSpec) -> Axis:
    """Return the elements of a head as the kernels have them, those that RoPE rotates first."""
    return head_axis_of(spec.head_dim, spec.ropes[0].dim)


def head_axis_of(head_dim: int, rotated: int) -> Axis:
    """Return the same of a head whose first ``rotated`` elements RoPE rotates."""
    return Axis.of_head(head_dim, rotated, _HEAD_GRAIN)


def padded_head(spec: ModelSpec) -> int:
    """Return the head size that the kernels compute with."""
    return head_axis(spec).size


def padded_rope(spec: ModelSpec) -> int:
    """Return how many elements of a head the kernels rotate."""
    return round_up(spec.ropes[0].dim, _HEAD_GRAIN)


class Padding:
    """The axes of a model's fused weights, by the last part of their names in ``weight_arrays``."""

    def __init__(self, spec: ModelSpec, *, paired: bool = True) -> None:
        """``paired``: rows of gate and up in turn, else all of gate, then all of up."""
        hidden, inner = (Axis.at_the_end(size, _GRAIN) for size in (spec.hidden_size, spec.intermediate_size))
        both = Axis.at_the_end(2 * spec.intermediate_size, 2 * _GRAIN) if paired else inner.repeated(2)
        head = head_axis(spec)
        qkv = head.repeated(spec.num_heads + 2 * spec.num_kv_heads)
        q_norm = k_norm = head
        if spec.layers[0].wide_qk_norm:
            q_norm, k_norm = head.repeated(spec.num_heads), head.repeated(spec.num_kv_heads)
        self._rows = {
            "norm": hidden, "input_norm": hidden, "post_norm": hidden, "q_norm": q_norm, "k_norm": k_norm,
            "attention_out_norm": hidden, "mlp_out_norm": hidden,
            "qkv": qkv, "o": hidden, "gate_up": both, "down": hidden,
            "conv_in": hidden.repeated(3), "conv_out": hidden, "conv_bias": hidden,
            "conv_in_bias": hidden.repeated(3), "conv_out_bias": hidden,
            "qkv_bias": qkv, "o_bias": hidden, "gate_up_bias": both, "down_bias": hidden,
        }  # fmt: skip
        self._columns = {
            "embed": hidden, "head": hidden, "router": hidden, "qkv": hidden, "gate_up": hidden, "down": inner,
            "o": head.repeated(spec.num_heads), "conv_in": hidden, "conv_out": hidden, "conv": hidden,
        }  # fmt: skip

    def rows(self, name: str) -> Axis | None:
        """Return the first axis of the weight ``name``; None: it has the tokens' rows, to which none are added."""
        return self._rows.get(name)

    def columns(self, name: str) -> Axis | None:
        """Return the second axis of the weight ``name``; None: it has one axis only."""
        return self._columns.get(name)

    def fill(self, name: str, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the weight ``name``, given in blocks of rows, filled up; in blocks, too, where no rows are added."""
        rows, columns = self.rows(name), self.columns(name)
        if columns is not None:
            blocks = (columns.spread(block, axis=1) for block in blocks)
        if rows is None or rows.is_whole:
            yield from blocks
        else:
            yield rows.spread(np.concatenate(list(blocks)), axis=0)
