"""Positions with three axes (M-RoPE): time, row and column of each token of a prompt with images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine_core.models.vision import VisionSpec
from engine_core.vision.prompt import PlacedImage


def mrope_positions(spec: VisionSpec, images: Sequence[PlacedImage], length: int) -> np.ndarray:
    """Return int64 [3, length], from the start of the prompt on; behind the last image they go on one by one.

    The tokens of an image share one time and have their rows and columns, counted from it; what follows begins behind
    the largest of them.
    """
    found = np.empty((3, length), dtype=np.int64)
    position = start = 0  # of the model, and in the prompt
    for placed in images:
        first = int(placed.positions[0])
        found[:, start:first] = position + np.arange(first - start)
        position += first - start
        _, rows, columns = (size // spec.merge for size in spec.processor.grid(placed.image.height, placed.image.width))
        end = first + rows * columns
        found[0, first:end] = position
        found[1, first:end] = position + np.repeat(np.arange(rows), columns)
        found[2, first:end] = position + np.tile(np.arange(columns), rows)
        position, start = position + max(rows, columns), end
    found[:, start:] = position + np.arange(length - start)
    return found


def mrope_axes(spec: VisionSpec, num_frequencies: int) -> np.ndarray:
    """Return int64 [num_frequencies]: the axis that turns each frequency, interleaved."""
    axes = np.zeros(num_frequencies, dtype=np.int64)
    for axis in (1, 2):
        axes[axis : 3 * spec.mrope[axis] : 3] = axis
    return axes
