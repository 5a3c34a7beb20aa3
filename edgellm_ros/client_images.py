"""Images of a client as messages: numpy arrays, pictures of Pillow, files, and messages as they are."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sensor_msgs.msg import CompressedImage, Image

from engine_core.paths import expand_user

_ENCODINGS = {(): "mono8", (1,): "mono8", (3,): "rgb8", (4,): "rgba8"}  # shape of a pixel → encoding
_PNG = b"\x89PNG"


def to_image_messages(images: Iterable[Any]) -> tuple[list[Image], list[CompressedImage]]:
    """Return the raw and the compressed images of a request.

    An image is a path (str or Path) of a JPEG or PNG file, an array of uint8 [height, width] or [height, width,
    channels] with grey, RGB or RGBA, a picture of Pillow, or a message. A request has its raw images first: raises
    ValueError where a raw one stands behind a compressed one, TypeError for anything else, OSError for a file that
    cannot be read, engine_core's ConfigurationError for a ~ without a home directory.
    """
    if isinstance(images, (str, Path)) or len(getattr(images, "shape", ())) in (2, 3):  # one alone
        raise TypeError(f"images is one {type(images).__name__}, but it must be a list of images.")
    raw: list[Image] = []
    compressed: list[CompressedImage] = []
    for each in images:
        message = _to_message(each)
        if isinstance(message, CompressedImage):
            compressed.append(message)
        elif compressed:
            raise ValueError("A request has arrays and raw images before files and compressed images; put them first.")
        else:
            raw.append(message)
    return raw, compressed


def _to_message(image: Any) -> Image | CompressedImage:
    if isinstance(image, (Image, CompressedImage)):
        return image
    if isinstance(image, (str, Path)):
        return _read_file(Path(image))
    if hasattr(image, "convert") and hasattr(image, "mode"):  # of Pillow, which need not be installed
        image = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
        channels = len(image.getbands())
        return _raw(image.height, image.width, () if channels == 1 else (channels,), image.tobytes())
    interface = getattr(image, "__array_interface__", None)
    if interface is None or interface["typestr"] != "|u1":
        raise TypeError(
            f"An image is {type(image).__name__}, but it must be a path, an array of uint8, a picture of Pillow or a "
            "message of sensor_msgs."
        )
    height, width, *pixel = image.shape if len(image.shape) > 1 else (0, 0, 0)
    if tuple(pixel) not in _ENCODINGS:
        raise TypeError(
            f"An image is an array of shape {tuple(image.shape)}, but it must be [height, width] or "
            "[height, width, channels] with 1, 3 (RGB) or 4 channels."
        )
    return _raw(height, width, tuple(pixel), image.tobytes())


def _raw(height: int, width: int, pixel: tuple[int, ...], data: bytes) -> Image:
    step = width * (pixel[0] if pixel else 1)
    return Image(height=height, width=width, step=step, encoding=_ENCODINGS[pixel], data=array("B", data))


def _read_file(path: Path) -> CompressedImage:
    data = expand_user(path).read_bytes()
    return CompressedImage(format="png" if data.startswith(_PNG) else "jpeg", data=array("B", data))
