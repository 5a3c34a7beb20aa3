"""Random matrices in packed tiles, of every kind that the CUDA kernels read."""

from __future__ import annotations

import numpy as np

from engine_core.cuda.kernels.integer_layout import GROUP_SIZES
from engine_core.cuda.kernels.linear_packed import LAYOUTS
from engine_core.formats.number_formats import to_16_bit
from engine_core.formats.weight_formats import fp8, weight_format
from engine_core.formats.weight_formats.base import WeightFormat
from engine_core.formats.weight_formats.integers import IntegerFormat

KINDS = tuple(LAYOUTS)


def format_of(kind: str) -> WeightFormat:
    return fp8.BLOCKS if kind == fp8.BLOCKS.kind else weight_format(kind)


def random_parts(random: np.random.Generator, kind: str, rows: int, cols: int, dtype: str) -> tuple[np.ndarray, ...]:
    """Return what ``pack`` of ``kind``'s layout takes: every value, weights of deviation cols ** -0.5 or so."""
    groups, deviation = -(-cols // 128), cols**-0.5

    def scales(count: int, peak: float) -> np.ndarray:
        return (random.standard_normal((rows, count)) * (1.6 / peak) * deviation).astype(np.float32)

    if kind in ("int4", "int8"):
        zero = weight_format(kind).zero
        return random.integers(0, 2 * zero, (rows, cols)).astype(np.uint8), to_16_bit(scales(groups, zero), dtype)
    if kind == "nvfp4":
        blocks = random.integers(0, 256, (rows, -(-cols // 16))).astype(np.uint8)
        blocks[blocks & 0x7F == 0x7F] = 0
        return random.integers(0, 16, (rows, cols)).astype(np.uint8), blocks, scales(1, 448 * 2)
    codes = random.integers(0, 256, (rows, cols)).astype(np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    return codes, scales(1 if kind == "fp8" else groups, 128)


def random_tiles(random: np.random.Generator, kind: str, rows: int, cols: int, dtype: str) -> np.ndarray:
    """uint8, as the layout of ``kind`` stores a matrix [rows, cols]."""
    return LAYOUTS[kind].pack(*random_parts(random, kind, rows, cols, dtype))


def integer_formats(*kinds: str) -> dict[str, IntegerFormat]:
    """Name → format of integers in every group that the kernels read, with zero points and without.

    ``kinds``: int4 and int8 unless others are named. The formats of LAYOUTS are left out.
    """
    found = {}
    for kind in kinds or ("int4", "int8"):
        for group_size in GROUP_SIZES:
            for asymmetric in (False, True):
                if asymmetric or group_size != 128:
                    name = f"{kind}-g{group_size}{'-zeros' if asymmetric else ''}"
                    made = weight_format(kind).in_groups(group_size, asymmetric)
                    assert isinstance(made, IntegerFormat)
                    found[name] = made
    return found


def random_integers(
    random: np.random.Generator, stored_as: IntegerFormat, rows: int, cols: int, dtype: str
) -> tuple[np.ndarray, ...]:
    """Return what ``pack`` of the layout of ``stored_as`` takes: every value, scale and zero point."""
    groups = -(-cols // stored_as.group_size)
    values = random.integers(0, stored_as.top + 1, (rows, cols)).astype(np.uint8)
    scales = random.standard_normal((rows, groups)) * (1.6 / stored_as.zero) * cols**-0.5
    zeros = random.integers(0, stored_as.top + 1, (rows, groups)).astype(np.uint8)
    stored_scales = to_16_bit(scales.astype(np.float32), stored_as.scale_type(dtype))
    return (values, stored_scales, zeros) if stored_as.asymmetric else (values, stored_scales)
