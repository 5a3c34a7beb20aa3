"""The layout of an 8-bit matrix in gemv_packed.cu: packing and unpacking with numpy, for the builder and the tests."""

from __future__ import annotations

import numpy as np

from engine_core.cuda.kernels.int4_layout import GROUP, TILE, cropped, filled, join_scales, split_scales

TILE_BYTES = TILE * GROUP + TILE * 2

__all__ = ["GROUP", "TILE_BYTES", "TILE", "pack", "tiles_shape", "unpack"]


def tiles_shape(rows: int, cols: int) -> tuple[int, int, int]:
    """Return the shape of the uint8 array that holds a matrix [rows, cols]."""
    return -(-rows // TILE), -(-cols // GROUP), TILE_BYTES


def pack(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the packed tiles, uint8 ``tiles_shape(rows, cols)``.

    ``values``: uint8 [rows, cols], 0 … 255; ``scales``: see ``int4_layout.pack``.
    """
    values, scales = filled(values, scales)
    return np.concatenate([pack_values(values), join_scales(scales)], axis=2)


def pack_values(values: np.ndarray) -> np.ndarray:
    """Return uint8 [rows / 16, cols / 128, 2048] of values [rows, cols] that fill their tiles."""
    rows, cols = values.shape
    # Row = half * 8 + g, column = 32 t + 16 piece + byte; a lane reads 16 bytes at once.
    tiles = values.reshape(rows // TILE, 2, 8, cols // GROUP, 4, 2, 16)
    tiles = tiles.transpose(0, 3, 1, 5, 2, 4, 6)  # tile, group, half, piece, g, t, byte
    return np.ascontiguousarray(tiles).reshape(rows // TILE, cols // GROUP, -1)


def unpack(tiles: np.ndarray, shape: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return (values, scales as uint16), the inverse of ``pack``; ``shape``: see ``int4_layout.unpack``."""
    values, scales = unpack_values(tiles[..., : TILE * GROUP]), split_scales(tiles[..., TILE * GROUP :])
    return cropped(values, scales, shape)


def unpack_values(packed: np.ndarray) -> np.ndarray:
    """Return uint8 [rows, cols], the inverse of ``pack_values``."""
    num_tiles, num_groups, _ = packed.shape
    values = packed.reshape(num_tiles, num_groups, 2, 2, 8, 4, 16).transpose(0, 2, 4, 1, 5, 3, 6)
    return values.reshape(num_tiles * TILE, num_groups * GROUP)
