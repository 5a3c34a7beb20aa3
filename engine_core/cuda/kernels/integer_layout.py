"""The layouts of 4- and 8-bit integers in gemv_packed.cu: packing and unpacking with numpy, for the builder and the
tests.

A packed tile has 16 rows and 128 columns, of which 32, 64 or all 128 share a scale in each row, and a zero point if
there are any. A matrix whose rows or columns are not whole tiles is filled up with zeros, its scales too. See
packed.cuh.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TILE = 16  # rows of a packed tile
GROUP = 128  # columns of a packed tile
GROUP_SIZES = (32, 64, 128)  # columns that may share a scale


@dataclass(frozen=True)
class IntegerLayout:
    """One of them. ``group_size``: columns that share a scale; ``has_zeros``: whether they have a zero point, too."""

    bits: int  # 4 or 8
    group_size: int = GROUP
    has_zeros: bool = False

    def __post_init__(self) -> None:
        assert self.bits in (4, 8) and self.group_size in GROUP_SIZES

    @property
    def TILE_BYTES(self) -> int:
        return self._value_bytes + self._scale_bytes + self._scale_bytes // 2 * self.has_zeros

    @property
    def parts(self) -> int:
        """The groups of a tile's columns."""
        return GROUP // self.group_size

    @property
    def sums(self) -> int:
        """Float32 values that the kernels keep of a vector for a tile's columns: see ``SUMS`` there."""
        return self.parts * (1 + self.has_zeros)

    @property
    def is_parted(self) -> bool:
        """True if a tile has more than a scale for each row."""
        return self.sums > 1

    @property
    def defines(self) -> dict[str, int]:
        """Macros beside those of the weight format; none of tiles with a scale for each row."""
        return {"GROUP_SIZE": self.group_size, "ZEROS": int(self.has_zeros)} if self.is_parted else {}

    def tiles_shape(self, rows: int, cols: int) -> tuple[int, int, int]:
        """Return the shape of the uint8 array that holds a matrix [rows, cols]."""
        return -(-rows // TILE), -(-cols // GROUP), self.TILE_BYTES

    def pack(self, values: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None) -> np.ndarray:
        """Return the packed tiles, uint8 ``tiles_shape(rows, cols)``.

        ``values``: uint8 [rows, cols] below 2^bits; ``scales``: [rows, groups, the last one of what is left] of a
        16-bit type (bf16 as uint16); ``zeros``: uint8 like ``scales``, None = 2^(bits - 1) everywhere.
        """
        rows, cols = values.shape
        assert scales.shape == (rows, -(-cols // self.group_size)) and scales.dtype.itemsize == 2, scales.shape
        tiles, groups = self.tiles_shape(rows, cols)[:2]
        values = _filled(values, tiles * TILE, groups * GROUP)
        stored = [self.pack_values(values), self._join(_filled(scales, tiles * TILE, groups * self.parts))]
        if self.has_zeros:
            zeros = np.full(scales.shape, 1 << (self.bits - 1), dtype=np.uint8) if zeros is None else zeros
            assert zeros.shape == scales.shape and zeros.dtype == np.uint8, zeros.shape
            stored.append(self._join(_filled(zeros, tiles * TILE, groups * self.parts)))
        else:
            assert zeros is None
        return np.concatenate(stored, axis=2)

    def unpack(self, tiles: np.ndarray, shape: tuple[int, int] | None = None) -> tuple[np.ndarray, ...]:
        """Return (values, scales as uint16) and the zeros if there are any, the inverse of ``pack``.

        ``shape``: rows and columns of the matrix; None = of all tiles, what fills them up included.
        """
        scales_from = self._value_bytes
        zeros_from = scales_from + self._scale_bytes
        found = [
            self.unpack_values(tiles[..., :scales_from]),
            self._split(tiles[..., scales_from:zeros_from], np.dtype(np.uint16)),
        ]
        if self.has_zeros:
            found.append(self._split(tiles[..., zeros_from:], np.dtype(np.uint8)))
        if shape is None:
            return tuple(found)
        rows, cols = shape
        return found[0][:rows, :cols], *(part[:rows, : -(-cols // self.group_size)] for part in found[1:])

    # --- parts of a tile ------------------------------------------------------------------------------

    @property
    def _value_bytes(self) -> int:
        return TILE * GROUP * self.bits // 8

    @property
    def _scale_bytes(self) -> int:
        return 2 * TILE * self.parts

    def pack_values(self, values: np.ndarray) -> np.ndarray:
        """Return uint8 [rows / 16, cols / 128, bytes] of values [rows, cols] that fill their tiles."""
        rows, cols = values.shape
        # Row = half * 8 + g. Column = 32 t + 8 eight + value, or 32 eight + 8 t + value where a tile has parts.
        tiles = values.reshape(rows // TILE, 2, 8, cols // GROUP, 4, 4, 8)
        if self.parts > 1:
            tiles = tiles.swapaxes(4, 5)
        if self.bits == 8:  # a lane reads 16 bytes, two eights, at once
            tiles = tiles.reshape(*tiles.shape[:5], 2, 16).transpose(0, 3, 1, 5, 2, 4, 6)
            return np.ascontiguousarray(tiles).reshape(rows // TILE, cols // GROUP, -1)
        # Value 2 pair + parity of an eight is nibble pair + 4 parity of its word, so that one mask gives two neighbours
        # in 16 bits each.
        tiles = tiles.reshape(*tiles.shape[:6], 4, 2).transpose(0, 3, 1, 2, 4, 5, 7, 6)
        nibbles = np.ascontiguousarray(tiles).reshape(rows // TILE, cols // GROUP, -1)
        return nibbles[..., 0::2] | nibbles[..., 1::2] << 4

    def unpack_values(self, packed: np.ndarray) -> np.ndarray:
        """Return uint8 [rows, cols], the inverse of ``pack_values``."""
        num_tiles, num_groups, _ = packed.shape
        if self.bits == 8:
            values = packed.reshape(num_tiles, num_groups, 2, 2, 8, 4, 16).transpose(0, 2, 4, 1, 5, 3, 6)
        else:
            nibbles = np.stack([packed & 15, packed >> 4], axis=-1)
            values = nibbles.reshape(num_tiles, num_groups, 2, 8, 4, 4, 2, 4).transpose(0, 2, 3, 1, 4, 5, 7, 6)
        values = values.reshape(num_tiles, 2, 8, num_groups, 4, 4, 8)
        if self.parts > 1:
            values = values.swapaxes(4, 5)
        return values.reshape(num_tiles * TILE, num_groups * GROUP)

    def _join(self, per_group: np.ndarray) -> np.ndarray:
        """Return uint8 [rows / 16, tiles, bytes] of what each row has of a group: that of rows g and g + 8 is side by
        side, and the groups of a tile follow each other."""
        rows, groups = per_group.shape
        per_tile = per_group.reshape(rows // TILE, 2, 8, groups // self.parts, self.parts).transpose(0, 3, 2, 4, 1)
        return np.ascontiguousarray(per_tile).view(np.uint8).reshape(rows // TILE, groups // self.parts, -1)

    def _split(self, joined: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return [rows, groups] of ``dtype``, the inverse of ``_join``."""
        tiles, groups, _ = joined.shape
        per_tile = np.ascontiguousarray(joined).view(dtype).reshape(tiles, groups, 8, self.parts, 2)
        return per_tile.transpose(0, 4, 2, 1, 3).reshape(tiles * TILE, groups * self.parts)


def _filled(values: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Return ``values`` with zeros after the last row and column: [rows, cols]."""
    more = [(0, size - found) for size, found in zip((rows, cols), values.shape, strict=True)]
    return np.pad(values, more) if any(after for _, after in more) else values
