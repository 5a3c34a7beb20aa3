"""The fp8 (E4M3) matrices of gemv_packed.cu: packing and unpacking with numpy, for the builder and the tests.

The codes lie as in ``int8_layout``. ``ROWS`` has a float32 scale for each row of the matrix, ``GROUPS`` one for each
row of a tile: 128 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine_core.cuda.kernels import int8_layout
from engine_core.cuda.kernels.float_layout import (
    ROW_SCALES,
    apart,
    num_tiles,
    padded,
    side_by_side,
    split_strips,
    strips,
)
from engine_core.cuda.kernels.integer_layout import GROUP, TILE
from engine_core.formats.number_formats import ScaledFloat

_VALUES = TILE * GROUP  # bytes of a tile's codes


@dataclass(frozen=True)
class Fp8Layout:
    """One of the two; see the module."""

    has_groups: bool

    @property
    def TILE_BYTES(self) -> int:
        return _VALUES + (4 * TILE if self.has_groups else 0)

    def tiles_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Return the shape of the uint8 array that holds a matrix [rows, cols]."""
        tiles, groups = num_tiles(rows, cols)
        return (tiles, groups, self.TILE_BYTES) if self.has_groups else (tiles, groups * self.TILE_BYTES + ROW_SCALES)

    def parts(self, weight: ScaledFloat) -> tuple[np.ndarray, np.ndarray] | None:
        """Return what ``pack`` takes; None if the scales of ``weight`` are of other columns."""
        columns, scales = weight.codes.shape[1], weight.scales
        if scales.shape[1] == 1:
            groups = num_tiles(1, columns)[1] if self.has_groups else 1
            return weight.codes, np.repeat(scales, groups, axis=1)
        if not self.has_groups or weight.block_size % GROUP:
            return None
        return weight.codes, scales[:, np.arange(0, columns, GROUP) // weight.block_size]

    def pack(self, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Return the packed tiles, uint8 ``tiles_shape(rows, cols)``.

        ``codes``: uint8 [rows, cols]; ``scales``: float32 [rows, 1] or [rows, groups of 128 columns].
        """
        tiles, groups = num_tiles(*codes.shape)
        codes = padded(codes, tiles * TILE, groups * GROUP)
        scales = padded(scales, tiles * TILE, scales.shape[1])
        values = int8_layout.LAYOUT.pack_values(codes)
        return np.concatenate([values, side_by_side(scales)], axis=2) if self.has_groups else strips(values, scales)

    def unpack(self, stored: np.ndarray, shape: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return (codes, scales), the inverse of ``pack``.

        ``shape``: rows and columns of the matrix; None = of all tiles, what fills them up included.
        """
        if self.has_groups:
            values, scales = stored[..., :_VALUES], apart(stored[..., _VALUES:])
        else:
            values, scales = split_strips(stored, self.TILE_BYTES)
        codes = int8_layout.LAYOUT.unpack_values(values)
        return (codes, scales) if shape is None else (codes[: shape[0], : shape[1]], scales[: shape[0]])


ROWS, GROUPS = Fp8Layout(False), Fp8Layout(True)
