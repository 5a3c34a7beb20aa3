"""Inputs of an encoder beside pixels: the places of patches, with the roundings of transformers."""

from __future__ import annotations

import math

import numpy as np

from engine_core.models.vision import SIGLIP, VisionSpec
from engine_core.vision.preprocess import ProcessedImage

_LARGEST_COORDINATE = np.float32(1.0 - 1e-6)


def encoder_inputs(spec: VisionSpec, image: ProcessedImage, part: int) -> dict[str, np.ndarray]:
    """Return the inputs of the encoder's graph for a part of an image, by their names.

    A tile: ``pixels`` float32 [1, channels, size, size]. A whole image of patches: ``pixels`` float32 [patches,
    values], ``position_taps`` int64 [patches, 4] and ``position_weights`` float32 [patches, 4], the rows of the learned
    positions to be mixed, ``cos`` and ``sin`` float32 [patches, head_dim / 2], and ``places`` int64 [1, patches], the
    row of each patch in them.
    """
    if spec.kind == SIGLIP:
        return {"pixels": image.pixels[part : part + 1]}
    _, rows, columns = image.grid
    row, column = _in_blocks(rows, columns, spec.merge)
    row_taps, row_weights = _taps(row, rows, spec.positions)
    column_taps, column_weights = _taps(column, columns, spec.positions)
    axis = spec.head_dim // 2
    exponents = np.arange(0, axis, 2, dtype=np.float32) / np.float32(axis)
    frequencies = (np.float32(1.0) / np.float32(spec.rope_theta) ** exponents).astype(np.float32)
    angles = np.concatenate([place.astype(np.float32)[:, None] * frequencies for place in (row, column)], axis=1)
    return {
        "pixels": image.pixels,
        "position_taps": (row_taps[:, :, None] * spec.positions + column_taps[:, None]).reshape(-1, 4),
        "position_weights": (row_weights[:, :, None] * column_weights[:, None]).reshape(-1, 4),
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "places": np.arange(len(angles))[None],
    }


def largest_part(spec: VisionSpec) -> ProcessedImage:
    """Return a black image that is one part, with as many tokens as any has, or a few less."""
    if spec.kind == SIGLIP:
        pixels = np.zeros((1, spec.channels, spec.tile_size, spec.tile_size), np.float32)
        return ProcessedImage(pixels, (1, 0, 0), spec.part_tokens(0))
    rows = math.isqrt(spec.most_tokens)
    columns = spec.most_tokens // rows
    patches = np.zeros((rows * columns * spec.merge**2, spec.patch_values), np.float32)
    return ProcessedImage(patches, (1, rows * spec.merge, columns * spec.merge), rows * columns)


def tile_positions(side: int, positions: int) -> np.ndarray:
    """Return int64 [side * side]: the learned position of each patch of a tile, row by row.

    The fraction of a patch's row or column among ``side`` falls into one of ``positions`` buckets.
    """
    step = 1 / positions
    edges = np.arange(1, positions, dtype=np.float64) * step
    edges = edges[edges < 1.0].astype(np.float32)
    coordinates = np.arange(side, dtype=np.float32) * (np.float32(1.0) / np.float32(side))
    buckets = np.searchsorted(edges, np.minimum(coordinates, _LARGEST_COORDINATE), side="right")
    return (buckets[:, None] * positions + buckets[None, :]).reshape(-1).astype(np.int64)


def _in_blocks(rows: int, columns: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the column of each patch, int64 [patches]: those that are merged one after another."""
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    blocks = places.reshape(2, rows // merge, merge, columns // merge, merge).transpose(0, 1, 3, 2, 4)
    row, column = blocks.reshape(2, -1)
    return row, column


def _taps(place: np.ndarray, size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the two neighbours, int64 [n, 2], among ``side`` places of each of ``size``, and their weights."""
    source = place.astype(np.float32) * np.float32(side - 1) / np.float32(max(1, size - 1))
    floor = np.floor(source)
    offsets = np.arange(2)
    taps = np.clip(floor.astype(np.int64)[:, None] + offsets, 0, side - 1)
    distance = np.abs(source[:, None] - floor[:, None] - offsets.astype(np.float32))
    return taps, np.maximum(np.float32(1) - distance, np.float32(0)).astype(np.float32)
