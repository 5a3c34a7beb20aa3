"""Decode raw images in the encodings that cameras send, named as in ROS's sensor_msgs/image_encodings.hpp.

Colours come out as RGB with 8 bits. Channels of 16 bits are scaled from 0 … 65535; YUV is ITU-R BT.601 with the limited
range (16 … 235), as OpenCV converts it; a Bayer mosaic is interpolated bilinearly.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from engine_core.errors import InvalidImageError
from engine_core.request import LIMITS
from engine_core.vision.images import Image

_DEPTH = re.compile(r"(16U|16S|32S|32F|64F)C\d+|.*compressedDepth.*")
_SHOWN = 64  # characters of a client's text in a message
_STRIP = 256  # rows converted at a time, which bounds the memory that it takes


@dataclass(frozen=True)
class Encoding:
    """An encoding of pictures, with the function that makes RGB of its bytes.

    ``convert(rows, height, width)`` returns uint8 [height, width, 3] of uint8 [rows, width * channels].
    """

    pixel_bytes: int  # in a row of the first plane
    convert: Callable[[np.ndarray, int, int], np.ndarray]
    item_bytes: int = 1  # of a channel; ``convert`` gets 8 bits of each
    factors: tuple[int, int] = (1, 1)  # width and height are multiples of these
    has_chroma_plane: bool = False  # of half as many rows

    def num_rows(self, height: int) -> int:
        return height + height // 2 if self.has_chroma_plane else height


@dataclass(frozen=True)
class Picture:
    """A picture that has been checked, as far as that goes without its pixels, and has not been decoded."""

    width: int
    height: int
    decode: Callable[[], Image]  # raises InvalidImageError


def decode_raw(encoding: str, width: int, height: int, step: int, data: Any, *, is_bigendian: bool = False) -> Image:
    """Return the picture in ``data``, as ``open_raw`` reads it. Raises InvalidImageError."""
    return open_raw(encoding, width, height, step, data, is_bigendian=is_bigendian).decode()


def open_raw(encoding: str, width: int, height: int, step: int, data: Any, *, is_bigendian: bool = False) -> Picture:
    """Return the picture in ``data``, a buffer of bytes with ``step`` bytes a row; a padded row has more than it needs.

    The image may share the memory of ``data``. Raises InvalidImageError.
    """
    kind = ENCODINGS.get(encoding)
    if kind is None:
        raise InvalidImageError(_unknown(encoding))
    check_size(width, height)
    horizontal, vertical = kind.factors
    if width % horizontal or height % vertical:
        raise InvalidImageError(
            f"An image of the encoding {encoding} is {width} × {height}, but its width has to be a multiple of "
            f"{horizontal} and its height one of {vertical}."
        )
    row_bytes, num_rows = width * kind.pixel_bytes, kind.num_rows(height)
    if step < row_bytes:
        raise InvalidImageError(
            f"An image has a step of {step} bytes, but a row of {width} pixels of {encoding} has {row_bytes}."
        )
    found = len(data)
    if found < step * num_rows:
        raise InvalidImageError(
            f"An image has {found} bytes of data, but {num_rows} rows of {step} bytes are {step * num_rows}."
        )

    def decode() -> Image:
        rows = np.frombuffer(data, np.uint8, step * num_rows).reshape(num_rows, step)[:, :row_bytes]
        if kind.item_bytes == 2:
            rows = _to_8_bits(rows, is_bigendian)
        return Image(kind.convert(rows, height, width))

    return Picture(width, height, decode)


def check_size(width: int, height: int) -> None:
    """Raises InvalidImageError for a picture without pixels, or with more than LIMITS allow."""
    if width < 1 or height < 1:
        raise InvalidImageError(f"An image is {width} × {height}, so it has no pixels.")
    LIMITS.check_image_size(width, height)


def refuse_depth(encoding: str) -> None:
    """Raises InvalidImageError if ``encoding`` is that of distances."""
    if _DEPTH.fullmatch(encoding) is not None:
        raise InvalidImageError(
            f"An image has the encoding {encoding[:_SHOWN]}, which is for depths or other measured values; models see "
            "grey and colour images, such as mono8 and rgb8."
        )


def demosaic(mosaic: np.ndarray, pattern: str) -> np.ndarray:
    """Return uint8 [height, width, 3] of a Bayer mosaic, uint8 [height, width].

    ``pattern``: the colours of the first two pixels of the first row, and of the second one: rggb, bggr, gbrg or grbg.
    """
    rgb = np.empty((*mosaic.shape, 3), np.uint8)
    padded = np.pad(mosaic, 1, mode="reflect")  # with the colours of the pattern
    for top in range(0, len(mosaic), _STRIP):
        _demosaic(padded[top : top + _STRIP + 2].astype(np.uint16), pattern, rgb[top : top + _STRIP])
    return rgb


def _demosaic(padded: np.ndarray, pattern: str, rgb: np.ndarray) -> None:
    """Fill ``rgb`` from uint16 ``padded``, which has a row or column more on each side."""
    centre = padded[1:-1, 1:-1]
    sides = padded[1:-1, :-2] + padded[1:-1, 2:]
    above = padded[:-2, 1:-1] + padded[2:, 1:-1]
    corners = padded[:-2, :-2] + padded[:-2, 2:] + padded[2:, :-2] + padded[2:, 2:]
    pair_in_row, pair_in_column = (sides + 1) >> 1, (above + 1) >> 1
    cross, corners = (sides + above + 2) >> 2, (corners + 2) >> 2
    red, blue = (divmod(pattern.index(colour), 2) for colour in "rb")
    for row in range(2):
        for column in range(2):
            at = np.s_[row::2, column::2]
            for channel, own, other in ((0, red, blue), (2, blue, red)):
                if (row, column) == own:
                    values = centre
                elif (row, column) == other:
                    values = corners
                else:
                    values = pair_in_row if row == own[0] else pair_in_column
                rgb[at + (channel,)] = values[at]
            rgb[at + (1,)] = (cross if (row, column) in (red, blue) else centre)[at]


def bayer_pattern(encoding: str) -> str:
    """Return the pattern of a Bayer encoding, for ``demosaic``; "" for another one."""
    match = re.fullmatch(r"bayer_(rggb|bggr|gbrg|grbg)(8|16)", encoding)
    return "" if match is None else match[1]


def _unknown(encoding: str) -> str:
    refuse_depth(encoding)
    shown = f"the encoding {encoding[:_SHOWN]!r}" if encoding else "no encoding"
    return f"An image has {shown}, but it must be one of {', '.join(ENCODINGS)}."


def _to_8_bits(rows: np.ndarray, is_bigendian: bool) -> np.ndarray:
    levels = np.empty((len(rows), rows.shape[1] // 2), np.uint8)
    for top in range(0, len(rows), _STRIP):
        values = np.ascontiguousarray(rows[top : top + _STRIP]).view(">u2" if is_bigendian else "<u2")
        levels[top : top + _STRIP] = (values.astype(np.uint32) + 128) // 257
    return levels


def _channels(order: tuple[int, ...], count: int, rows: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the channels ``order``, red, green and blue, of ``count`` in each pixel."""
    pixels = rows.reshape(height, width, count)
    if order == _RGB:
        return pixels[:, :, :3]
    rgb = np.empty((height, width, 3), np.uint8)
    for channel, source in enumerate(order):
        rgb[:, :, channel] = pixels[:, :, source]
    return rgb


def _bayer(pattern: str, rows: np.ndarray, height: int, width: int) -> np.ndarray:
    return demosaic(rows, pattern)


def _interleaved(luma: int, rows: np.ndarray, height: int, width: int) -> np.ndarray:
    """Convert YUV 4:2:2, in whose four bytes the luma begins at ``luma``, 0 or 1, and the chroma at the other one."""
    y = rows[:, luma::2]
    u, v = (np.repeat(rows[:, start::4], 2, axis=1) for start in (1 - luma, 3 - luma))
    return _to_rgb(y, u, v)


def _planar(first: int, rows: np.ndarray, height: int, width: int) -> np.ndarray:
    """Convert YUV 4:2:0: a plane of luma and one of U and V in turn; ``first``: where U stands, 0 or 1."""
    u, v = (rows[height:, start::2].repeat(2, axis=0).repeat(2, axis=1) for start in (first, 1 - first))
    return _to_rgb(rows[:height], u, v)


def _to_rgb(y: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return RGB of YUV, three arrays uint8 [height, width]; the coefficients have 16 bits of fraction."""
    rgb = np.empty((*y.shape, 3), np.uint8)
    for top in range(0, len(y), _STRIP):
        strip = np.s_[top : top + _STRIP]
        luma = 76309 * (y[strip].astype(np.int32) - 16) + 32768
        blue, red = u[strip].astype(np.int32) - 128, v[strip].astype(np.int32) - 128
        values = luma + 104597 * red, luma - 25675 * blue - 53279 * red, luma + 132201 * blue
        for channel, value in enumerate(values):
            rgb[strip, :, channel] = np.clip(value >> 16, 0, 255)
    return rgb


def _plain(order: tuple[int, ...], count: int, item_bytes: int = 1) -> Encoding:
    return Encoding(count * item_bytes, partial(_channels, order, count), item_bytes)


_RGB, _BGR, _GREY = (0, 1, 2), (2, 1, 0), (0, 0, 0)
_UYVY, _YUYV = (Encoding(2, partial(_interleaved, luma), factors=(2, 1)) for luma in (1, 0))
ENCODINGS: dict[str, Encoding] = {
    "rgb8": _plain(_RGB, 3),
    "bgr8": _plain(_BGR, 3),
    "rgba8": _plain(_RGB, 4),
    "bgra8": _plain(_BGR, 4),
    "mono8": _plain(_GREY, 1),
    "rgb16": _plain(_RGB, 3, 2),
    "bgr16": _plain(_BGR, 3, 2),
    "rgba16": _plain(_RGB, 4, 2),
    "bgra16": _plain(_BGR, 4, 2),
    "mono16": _plain(_GREY, 1, 2),
    "8UC1": _plain(_GREY, 1),
    "8UC3": _plain(_BGR, 3),
    "8UC4": _plain(_BGR, 4),
    "yuv422": _UYVY,
    "uyvy": _UYVY,
    "yuv422_yuy2": _YUYV,
    "yuyv": _YUYV,
    "nv12": Encoding(1, partial(_planar, 0), factors=(2, 2), has_chroma_plane=True),
    "nv21": Encoding(1, partial(_planar, 1), factors=(2, 2), has_chroma_plane=True),
    **{
        f"bayer_{pattern}{bits}": Encoding(bits // 8, partial(_bayer, pattern), bits // 8)
        for pattern in ("rggb", "bggr", "gbrg", "grbg")
        for bits in (8, 16)
    },
}
