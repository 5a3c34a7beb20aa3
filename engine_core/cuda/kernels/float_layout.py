"""The common part of the layouts of matrices in small floats: strips of packed tiles, and scales in float32.

A strip is a row of tiles and, where whole rows have scales, 16 of them after the tiles. See packed.cuh.
"""

from __future__ import annotations

import numpy as np

from engine_core.cuda.kernels.integer_layout import GROUP, TILE

ROW_SCALES = 128  # bytes at the end of a strip for the scales of its rows: 16 float32 values, and as many zeros


def num_tiles(rows: int, cols: int) -> tuple[int, int]:
    """Return the tiles along the rows and along the columns of a matrix."""
    return -(-rows // TILE), -(-cols // GROUP)


def padded(values: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Return ``values`` with zeros after the last row and column: at least [rows, cols]."""
    more = [(0, size - found) for size, found in zip((rows, cols), values.shape, strict=True)]
    return np.pad(values, more) if any(after for _, after in more) else values


def side_by_side(scales: np.ndarray) -> np.ndarray:
    """Return uint8 [rows / 16, groups, 64] of scales float32 [rows, groups]: those of rows g and g + 8 side by side."""
    rows, groups = scales.shape
    per_tile = scales.astype("<f4").reshape(rows // TILE, 2, 8, groups).transpose(0, 3, 2, 1)
    return np.ascontiguousarray(per_tile).view(np.uint8).reshape(rows // TILE, groups, -1)


def apart(joined: np.ndarray) -> np.ndarray:
    """Return float32 [rows, groups], the inverse of ``side_by_side``."""
    tiles, groups, _ = joined.shape
    per_tile = np.ascontiguousarray(joined).view("<f4").reshape(tiles, groups, 8, 2).transpose(0, 3, 2, 1)
    return per_tile.reshape(tiles * TILE, groups)


def strips(tiles: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return uint8 [strips, bytes of a strip] of tiles [strips, groups, bytes] and row scales float32 [rows, 1]."""
    ends = np.zeros((len(tiles), ROW_SCALES), dtype=np.uint8)
    ends[:, : 4 * TILE] = side_by_side(scales)[:, 0]
    return np.concatenate([tiles.reshape(len(tiles), -1), ends], axis=1)


def split_strips(stored: np.ndarray, tile_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (tiles, row scales), the inverse of ``strips``."""
    tiles = stored[:, :-ROW_SCALES].reshape(len(stored), -1, tile_bytes)
    return tiles, apart(stored[:, None, -ROW_SCALES : 4 * TILE - ROW_SCALES])
