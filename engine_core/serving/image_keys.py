"""Keys of prompts with images: what the KV of a prompt is found by.

The ids of an image's tokens are the same for every image, so that they do not tell one from another. In a key they are
negative numbers, one for each image.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from engine_core.vision.prompt import PlacedImage

_MOST_KNOWN = 4096  # images; one that was forgotten is a new one
_LAST = 2**31 - 1


class ImageKeys:
    """Numbers the images that were seen by their hashes. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: OrderedDict[bytes, int] = OrderedDict()  # digest → number, least recently used first
        self._next = 1

    def key(self, token_ids: np.ndarray, images: Sequence[PlacedImage]) -> np.ndarray:
        """Return int32 [n]: ``token_ids`` with the number of its image, negative, in the place of each image token."""
        if not images:
            return token_ids
        found = token_ids.copy()
        for placed in images:
            found[placed.positions] = -self._number(placed.image.digest)
        return found

    def _number(self, digest: bytes) -> int:
        with self._lock:
            number = self._numbers.pop(digest, 0)
            if not number:
                number, self._next = self._next, self._next % _LAST + 1
            self._numbers[digest] = number
            if len(self._numbers) > _MOST_KNOWN:
                self._numbers.popitem(last=False)
            return number
