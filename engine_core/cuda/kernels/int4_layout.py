"""The layout of a symmetric 4-bit matrix in gemv_packed.cu with a scale for each row of a tile; see integer_layout."""

from __future__ import annotations

from engine_core.cuda.kernels.integer_layout import GROUP, TILE, IntegerLayout

LAYOUT = IntegerLayout(4)
TILE_BYTES, tiles_shape, pack, unpack = LAYOUT.TILE_BYTES, LAYOUT.tiles_shape, LAYOUT.pack, LAYOUT.unpack

__all__ = ["GROUP", "LAYOUT", "TILE", "TILE_BYTES", "pack", "tiles_shape", "unpack"]
