"""The layout of a matrix in gemv_packed.cu: packing and unpacking with numpy, for the builder and the tests.

A matrix whose rows or columns are not whole tiles is filled up with zeros, its scales too: see ``filled``.
"""

from __future__ import annotations

import numpy as np

TILE = 16  # rows of a packed tile
GROUP = 128  # columns of a packed tile; they share one scale in each row
TILE_BYTES = TILE * GROUP // 2 + TILE * 2


def tiles_shape(rows: int, cols: int) -> tuple[int, int, int]:
    """Return the shape of the uint8 array that holds a matrix [rows, cols]."""
    return -(-rows // TILE), -(-cols // GROUP), TILE_BYTES


def pack(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the packed tiles, uint8 ``tiles_shape(rows, cols)``.

    ``values``: uint8 [rows, cols], 0 … 15; ``scales``: [rows, groups of 128 columns, the last one of what is left] of
    a 16-bit type (bf16 as uint16).
    """
    values, scales = filled(values, scales)
    rows, cols = values.shape
    # Row = half * 8 + g, column = 32 t + 8 eight + 2 pair + parity. Value 2 pair + parity of an eight is nibble
    # pair + 4 parity of its word, so that one mask gives two neighbours in 16 bits each.
    tiles = values.reshape(rows // TILE, 2, 8, cols // GROUP, 4, 4, 4, 2)
    tiles = tiles.transpose(0, 3, 1, 2, 4, 5, 7, 6)  # tile, group, half, g, t, eight, parity, pair
    nibbles = np.ascontiguousarray(tiles).reshape(rows // TILE, cols // GROUP, -1)
    packed = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    return np.concatenate([packed, join_scales(scales)], axis=2)


def unpack(tiles: np.ndarray, shape: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return (values, scales as uint16), the inverse of ``pack``.

    ``shape``: rows and columns of the matrix; None = of all tiles, what fills them up included.
    """
    num_tiles, num_groups, _ = tiles.shape
    packed, scales = tiles[..., : TILE * GROUP // 2], tiles[..., TILE * GROUP // 2 :]
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1)
    values = nibbles.reshape(num_tiles, num_groups, 2, 8, 4, 4, 2, 4).transpose(0, 2, 3, 1, 4, 5, 7, 6)
    return cropped(values.reshape(num_tiles * TILE, num_groups * GROUP), split_scales(scales), shape)


def filled(values: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both with zeros after the last row and column, so that they are whole tiles."""
    rows, cols = values.shape
    assert scales.shape == (rows, -(-cols // GROUP)) and scales.dtype.itemsize == 2, (values.shape, scales.shape)
    more_rows, more_cols = -rows % TILE, -cols % GROUP
    if not more_rows and not more_cols:
        return values, scales
    return np.pad(values, ((0, more_rows), (0, more_cols))), np.pad(scales, ((0, more_rows), (0, 0)))


def cropped(values: np.ndarray, scales: np.ndarray, shape: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return what ``filled`` was given, a matrix of ``shape``; None = both as they are."""
    if shape is None:
        return values, scales
    rows, cols = shape
    return values[:rows, :cols], scales[:rows]


def join_scales(scales: np.ndarray) -> np.ndarray:
    """Return uint8 [rows / 16, groups, 32] of 16-bit scales [rows, groups]: those of rows g and g + 8 side by side."""
    rows, groups = scales.shape
    per_tile = scales.reshape(rows // TILE, 2, 8, groups).transpose(0, 3, 2, 1)
    return np.ascontiguousarray(per_tile).view(np.uint8).reshape(rows // TILE, groups, -1)


def split_scales(joined: np.ndarray) -> np.ndarray:
    """Return uint16 [rows, groups], the inverse of ``join_scales``."""
    tiles, groups, _ = joined.shape
    per_tile = np.ascontiguousarray(joined).view(np.uint16).reshape(tiles, groups, 8, 2).transpose(0, 3, 2, 1)
    return per_tile.reshape(tiles * TILE, groups)
