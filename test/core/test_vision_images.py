"""The image of a request: what it refuses, and its hash."""

import numpy as np
import pytest

from engine_core.vision import Image


def test_the_digest_is_of_size_and_pixels():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    image = Image(pixels)
    assert (image.width, image.height, len(image.digest)) == (4, 2, 16)
    assert image == Image(pixels.copy()) and hash(image) == hash(Image(pixels.copy()))
    assert image != Image(pixels.reshape(4, 2, 3))
    changed = pixels.copy()
    changed[1, 3, 2] += 1
    assert image.digest != Image(changed).digest
    wide = np.arange(48, dtype=np.uint8).reshape(2, 8, 3)
    assert Image(wide[:, ::2]).digest == Image(wide[:, ::2].copy()).digest


@pytest.mark.parametrize("shape, dtype", [((0, 4, 3), "u1"), ((2, 4), "u1"), ((2, 4, 4), "u1"), ((2, 4, 3), "f4")])
def test_other_arrays_are_refused(shape, dtype):
    with pytest.raises(ValueError, match="height, width, 3"):
        Image(np.zeros(shape, dtype))
