"""The image of a request: pixels, and the hash by which caches know them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

DIGEST_BYTES = 16


@dataclass(frozen=True, eq=False)
class Image:
    """A picture. Two of them are equal if they have the same pixels.

    ``pixels``: uint8 [height, width, 3], RGB, at least one pixel; nobody may write to it. ``seconds``: of a frame of a
    video, since its first frame; None: it is a picture of its own. Raises ValueError for another shape or dtype.
    """

    pixels: np.ndarray = field(repr=False)
    seconds: float | None = None

    def __post_init__(self) -> None:
        shape, dtype = self.pixels.shape, self.pixels.dtype
        if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ValueError(f"an image has pixels of {dtype} {list(shape)}, not uint8 [height, width, 3]")

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @cached_property
    def digest(self) -> bytes:
        """The BLAKE2b hash of size and pixels, ``DIGEST_BYTES`` long."""
        hashed = hashlib.blake2b(np.array([self.height, self.width], "<i8").tobytes(), digest_size=DIGEST_BYTES)
        hashed.update(np.ascontiguousarray(self.pixels).data)
        return hashed.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True)
class Clip:
    """Frames of a video, one after another, that an encoder takes at once. ``size``: height and width, in pixels, to
    which all frames of the video are brought first: those of its first one."""

    frames: tuple[Image, ...]
    size: tuple[int, int]

    @property
    def height(self) -> int:
        return self.size[0]

    @property
    def width(self) -> int:
        return self.size[1]

    @cached_property
    def digest(self) -> bytes:
        """A hash of the frames and the size, ``DIGEST_BYTES`` long, which no image has."""
        hashed = hashlib.blake2b(np.array(self.size, "<i8").tobytes(), digest_size=DIGEST_BYTES, person=b"clip")
        for frame in self.frames:
            hashed.update(frame.digest)
        return hashed.digest()
