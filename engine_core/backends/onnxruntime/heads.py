"""The heads that GroupQueryAttention computes with: it takes only multiples of 16 elements, turned or not."""

from __future__ import annotations

from engine_core.models.padding import Axis, round_up
from engine_core.models.spec import ModelSpec

_GRAIN = 16


def turned_size(rope_dim: int) -> int:
    """Return the elements of a head in the graph that a RoPE table turns, which turns ``rope_dim`` in the model."""
    return round_up(rope_dim, _GRAIN)


def head_axes(model: ModelSpec) -> list[Axis]:
    """Return, for each RoPE table, where the elements of a head are in the graph and in the KV cache.

    The heads of all layers have the same size.
    """
    axes = [Axis.of_head(model.head_dim, rope.dim, _GRAIN) for rope in model.ropes]
    size = max(axis.size for axis in axes)
    return [Axis(axis.places, size) for axis in axes]
