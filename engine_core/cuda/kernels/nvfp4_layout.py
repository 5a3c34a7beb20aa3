"""The nvfp4 matrices of gemv_packed.cu: packing and unpacking with numpy, for the builder and the tests.

E2M1 codes, an E4M3 scale for every 16 columns of a row, a float32 scale for each row: parts of different tensors, which
have one scale each, are rows of one matrix.
"""

from __future__ import annotations

import numpy as np

from engine_core.cuda.kernels.float_layout import ROW_SCALES, num_tiles, padded, split_strips, strips
from engine_core.cuda.kernels.integer_layout import GROUP, TILE
from engine_core.formats.number_formats import ScaledFloat

BLOCK = 16  # columns that share an E4M3 scale
_BLOCKS = GROUP // BLOCK
_VALUES = TILE * GROUP // 2  # bytes of a tile's codes
TILE_BYTES = _VALUES + TILE * _BLOCKS
# Of eight codes each nibble has the magnitude of one and the sign of another, whose number is here: see packed.cuh.
_SIGN_OF = np.array([4, 0, 5, 1, 6, 2, 7, 3])


def tiles_shape(rows: int, cols: int) -> tuple[int, int]:
    """Return the shape of the uint8 array that holds a matrix [rows, cols]."""
    tiles, groups = num_tiles(rows, cols)
    return tiles, groups * TILE_BYTES + ROW_SCALES


def parts(weight: ScaledFloat) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what ``pack`` takes."""
    assert weight.block_scales is not None and weight.block_size == BLOCK
    return weight.codes, weight.block_scales, np.broadcast_to(weight.global_scale, (len(weight.codes), 1))


def pack(codes: np.ndarray, block_scales: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the packed tiles, uint8 ``tiles_shape(rows, cols)``.

    ``codes``: uint8 [rows, cols], 0 … 15; ``block_scales``: uint8 [rows, blocks of 16 columns], codes of E4M3, whose
    sign goes to the codes; ``scales``: float32 [rows, 1].
    """
    tiles, groups = num_tiles(*codes.shape)
    rows = tiles * TILE
    codes, block_scales = padded(codes, rows, groups * GROUP), padded(block_scales, rows, groups * _BLOCKS)
    codes = codes ^ np.repeat(block_scales >> 7 << 3, BLOCK, axis=1)
    # Row = half * 8 + g, column = 32 t + 8 eight + value, as in ``int4_layout``.
    eights = codes.reshape(tiles, 2, 8, groups, 4, 4, 8).transpose(0, 3, 1, 2, 4, 5, 6)
    nibbles = eights & 7 | eights[..., _SIGN_OF] & 8
    values = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).reshape(tiles, groups, _VALUES)
    # A lane has four: of rows g and g + 8, and of each of its two blocks.
    lanes = (block_scales & 0x7F).reshape(tiles, 2, 8, groups, 4, 2).transpose(0, 3, 2, 4, 1, 5)
    return strips(np.concatenate([values, lanes.reshape(tiles, groups, -1)], axis=2), padded(scales, rows, 1))


def unpack(stored: np.ndarray, shape: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (codes, block scales, scales), the inverse of ``pack``; ``shape``: see ``Fp8Layout.unpack``."""
    packed, scales = split_strips(stored, TILE_BYTES)
    tiles, groups, _ = packed.shape
    values, lanes = packed[..., :_VALUES], packed[..., _VALUES:]
    nibbles = np.stack([values & 15, values >> 4], axis=-1).reshape(tiles, groups, 2, 8, 4, 4, 8)
    eights = nibbles & 7 | nibbles[..., np.argsort(_SIGN_OF)] & 8
    codes = eights.transpose(0, 2, 3, 1, 4, 5, 6).reshape(tiles * TILE, groups * GROUP)
    block_scales = lanes.reshape(tiles, groups, 8, 4, 2, 2).transpose(0, 4, 2, 1, 3, 5)
    block_scales = block_scales.reshape(tiles * TILE, groups * _BLOCKS)
    if shape is None:
        return codes, block_scales, scales
    rows, cols = shape
    return codes[:rows, :cols], block_scales[:rows, : -(-cols // BLOCK)], scales[:rows]
