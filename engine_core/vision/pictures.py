"""Decode pictures in files: JPEG and PNG, and the data URLs of OpenAI's API that hold one."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
from PIL import Image as PillowImage

from engine_core.errors import InvalidImageError
from engine_core.request import LIMITS
from engine_core.vision.encodings import Picture, bayer_pattern, check_size, decode_raw, demosaic, refuse_depth
from engine_core.vision.images import Image
from engine_core.vision.picture_files import PictureFile, reduce_file

FORMATS = ("JPEG", "PNG")
# Longer edges are scaled down to this when a picture comes in; no supported model sees more than that.
MAX_EDGE = 4096  # pixels
_DATA_URL = re.compile(r"data:image/(jpeg|jpg|png);base64,")
_TURNS = dict(
    enumerate(
        (
            PillowImage.Transpose.FLIP_LEFT_RIGHT, PillowImage.Transpose.ROTATE_180,
            PillowImage.Transpose.FLIP_TOP_BOTTOM, PillowImage.Transpose.TRANSPOSE, PillowImage.Transpose.ROTATE_270,
            PillowImage.Transpose.TRANSVERSE, PillowImage.Transpose.ROTATE_90,
        ),
        start=2,
    )
)  # EXIF's orientation → what makes a picture upright  # fmt: skip
_16_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # Pillow's modes of grey pictures with more than 8 bits


def decode_picture(data: bytes | bytearray | memoryview, source_encoding: str = "") -> Image:
    """Return the picture in a JPEG or PNG file, as ``open_picture`` reads it. Raises InvalidImageError."""
    return open_picture(data, source_encoding).decode()


def open_picture(data: bytes | bytearray | memoryview, source_encoding: str = "") -> Picture:
    """Return the picture in a JPEG or PNG file, with its size checked and nothing decoded.

    It is upright as its EXIF data says. ``source_encoding``: of the camera's image that was compressed, if it is known:
    a Bayer mosaic is interpolated, depths are refused. Raises InvalidImageError, as its ``decode`` does.
    """
    refuse_depth(source_encoding)
    file = reduce_file(data)
    try:
        picture = None if file is None else PillowImage.open(io.BytesIO(file.data), formats=(file.format,))
    except (PillowImage.DecompressionBombError, PillowImage.DecompressionBombWarning) as error:
        raise InvalidImageError(f"An image has too many pixels: at most {LIMITS.image_pixels} are accepted.") from error
    except Exception:  # plugins raise what they meet: OSError, SyntaxError, ValueError, struct.error
        picture = None
    if picture is None or file is None:
        raise InvalidImageError(f"An image of {len(data)} bytes is no {' or '.join(FORMATS)} file.")
    check_size(picture.width, picture.height)
    decode = partial(_decode, picture, file, bayer_pattern(source_encoding), len(data))
    return Picture(picture.width, picture.height, decode)


def _decode(picture: PillowImage.Image, file: PictureFile, pattern: str, num_bytes: int) -> Image:
    with picture:
        try:
            picture.load()
            upright = _TURNS.get(file.orientation)
            turned = picture if upright is None else picture.transpose(upright)
            return Image(np.asarray(_to_rgb(turned, pattern)))
        except Exception as error:
            raise InvalidImageError(
                f"A {file.format} image of {num_bytes} bytes cannot be decoded ({_reason(error)})."
            ) from error


def decode_data_url(url: str) -> Image:
    """Return the picture in a data URL. Raises InvalidImageError, for every other URL, too."""
    return open_data_url(url).decode()


def open_data_url(url: str) -> Picture:
    """Return the picture in a data URL, as ``open_picture`` does."""
    match = _DATA_URL.match(url)
    if match is None:
        raise InvalidImageError(
            f"The URL of an image begins with {url[:32]!r}, but it must be a data URL, "
            "data:image/jpeg;base64,… or data:image/png;base64,…: nothing is fetched from the network."
        )
    try:
        data = base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidImageError(f"The data URL of an image is not valid base64 ({error}).") from None
    return open_picture(data)


def check_pictures(pictures: Iterable[Picture]) -> None:
    """Raises InvalidImageError if the pictures of a request have too many pixels together, before one is decoded."""
    count, num_bytes = 0, 0
    for picture in pictures:
        width, height = _limited_size(picture.width, picture.height)
        count, num_bytes = count + 1, num_bytes + 3 * width * height
    LIMITS.check_images(count, num_bytes)


def limit_edge(image: Image) -> Image:
    """Return the image, scaled down to ``MAX_EDGE`` if an edge of it is longer."""
    size = _limited_size(image.width, image.height)
    if size == (image.width, image.height):
        return image
    scaled = PillowImage.fromarray(np.ascontiguousarray(image.pixels)).resize(size, PillowImage.Resampling.LANCZOS)
    return Image(np.asarray(scaled))


def _limited_size(width: int, height: int) -> tuple[int, int]:
    longest = max(width, height, MAX_EDGE)
    return max(1, round(width * MAX_EDGE / longest)), max(1, round(height * MAX_EDGE / longest))


def decode_pictures(pictures: list[Picture], go_on: Callable[[], None] = lambda: None) -> tuple[Image, ...]:
    """Return the images of a request; ``pictures`` is emptied meanwhile, and ``go_on`` called before each.

    Raises InvalidImageError, and what ``go_on`` raises.
    """

    def decoded() -> Iterator[Image]:
        while pictures:
            go_on()
            yield pictures.pop(0).decode()

    return limit_images(decoded())


def limit_images(images: Iterable[Image]) -> tuple[Image, ...]:
    """Return the images of a request, which may be decoded one by one meanwhile, with no edge above ``MAX_EDGE``.

    Raises InvalidImageError as soon as they have too many pixels together: small files can hold gigabytes.
    """
    found: list[Image] = []
    size = 0
    for image in images:
        found.append(limit_edge(image))
        size += found[-1].pixels.nbytes
        LIMITS.check_images(len(found), size)
    return tuple(found)


def _to_rgb(picture: PillowImage.Image, pattern: str) -> np.ndarray | PillowImage.Image:
    """Return the picture as RGB, without transparency. ``pattern``: of the mosaic that a grey picture is."""
    if picture.mode in _16_BITS:
        values = np.asarray(picture).astype("<u2")
        grey = decode_raw("mono16", picture.width, picture.height, 2 * picture.width, values.tobytes()).pixels
        return demosaic(grey[:, :, 0], pattern) if pattern else grey
    if picture.mode == "L" and pattern:
        return demosaic(np.asarray(picture), pattern)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:100].rstrip(".") if text else type(error).__name__
