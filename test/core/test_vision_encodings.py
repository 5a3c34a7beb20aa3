"""Raw camera images become RGB, against references made pixel by pixel; what cannot is refused in one sentence."""

import numpy as np
import pytest

from engine_core.errors import InvalidImageError
from engine_core.request import LIMITS
from engine_core.vision.encodings import ENCODINGS, decode_raw, demosaic

RNG = np.random.default_rng(7)
HEIGHT, WIDTH = 6, 8


def levels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


def decode(encoding, rows, width=WIDTH, height=HEIGHT, **options):
    """``rows``: uint8 [rows, bytes]."""
    rows = np.ascontiguousarray(rows)
    return decode_raw(encoding, width, height, rows.shape[1], rows.tobytes(), **options).pixels


@pytest.mark.parametrize(
    "encoding, channels, order",
    [
        ("rgb8", 3, (0, 1, 2)), ("bgr8", 3, (2, 1, 0)), ("rgba8", 4, (0, 1, 2)), ("bgra8", 4, (2, 1, 0)),
        ("mono8", 1, (0, 0, 0)), ("8UC1", 1, (0, 0, 0)), ("8UC3", 3, (2, 1, 0)), ("8UC4", 4, (2, 1, 0)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("padding", [0, 5])
def test_channels_are_put_in_order(encoding, channels, order, padding):
    data = levels(HEIGHT, WIDTH, channels)
    rows = np.concatenate([data.reshape(HEIGHT, -1), levels(HEIGHT, padding)], axis=1)
    np.testing.assert_array_equal(decode(encoding, rows), data[:, :, list(order)])


@pytest.mark.parametrize("is_bigendian", [False, True])
def test_16_bits_are_rounded_to_8(is_bigendian):
    values = np.arange(1 << 16, dtype=">u2" if is_bigendian else "<u2")
    expected = np.round(np.arange(1 << 16) / 257)
    rows = np.pad(values.view(np.uint8).reshape(256, 512), ((0, 0), (0, 2)))
    grey = decode("mono16", rows, 256, 256, is_bigendian=is_bigendian)
    np.testing.assert_array_equal(grey[:, :, 1].ravel(), expected)
    colours = decode("bgr16", values[: 3 * 8 * 6].view(np.uint8).reshape(6, 48), 8, 6, is_bigendian=is_bigendian)
    np.testing.assert_array_equal(colours[:, :, ::-1].ravel(), expected[: 3 * 8 * 6])


def rgb_of(y: int, u: int, v: int) -> list[int]:
    red = 1.164383 * (y - 16) + 1.596027 * (v - 128)
    green = 1.164383 * (y - 16) - 0.391762 * (u - 128) - 0.812968 * (v - 128)
    blue = 1.164383 * (y - 16) + 2.017232 * (u - 128)
    return [min(255, max(0, round(value))) for value in (red, green, blue)]


@pytest.mark.parametrize("encoding, y, u, v", [("yuv422", 1, 0, 2), ("uyvy", 1, 0, 2), ("yuyv", 0, 1, 3),
                                               ("yuv422_yuy2", 0, 1, 3)])  # fmt: skip
def test_yuv_422_has_one_chroma_for_two_pixels(encoding, y, u, v):
    rows = levels(HEIGHT, 2 * WIDTH + 3)
    found = decode(encoding, rows).astype(int)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            block = rows[row, column // 2 * 4 :].astype(int)
            expected = rgb_of(block[y + column % 2 * 2], block[u], block[v])
            assert np.abs(found[row, column] - expected).max() <= 1, (row, column)


@pytest.mark.parametrize("encoding, u", [("nv12", 0), ("nv21", 1)])
def test_yuv_420_has_one_chroma_for_four_pixels(encoding, u):
    rows = levels(HEIGHT + HEIGHT // 2, WIDTH + 2)
    found = decode(encoding, rows).astype(int)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            chroma = rows[HEIGHT + row // 2, column // 2 * 2 :].astype(int)
            expected = rgb_of(int(rows[row, column]), chroma[u], chroma[1 - u])
            assert np.abs(found[row, column] - expected).max() <= 1, (row, column)


def interpolated(mosaic: np.ndarray, pattern: str) -> np.ndarray:
    """The mean of the nearest pixels that have the colour, pixel by pixel; mirrored at the border."""
    height, width = mosaic.shape
    rgb = np.zeros((height, width, 3), int)
    for y in range(height):
        for x in range(width):
            for channel, colour in enumerate("rgb"):
                near: list[tuple[int, int]] = []
                for distance in (0, 1, 2):  # itself, beside it, at its corners
                    near = near or [
                        (
                            int(
                                mosaic[abs(height - 1 - abs(height - 1 - abs(v))), width - 1 - abs(width - 1 - abs(u))]
                            ),
                            1,
                        )
                        for v in (y - 1, y, y + 1)
                        for u in (x - 1, x, x + 1)
                        if abs(v - y) + abs(u - x) == distance and pattern[v % 2 * 2 + u % 2] == colour
                    ]
                rgb[y, x, channel] = (sum(value for value, _ in near) + len(near) // 2) // len(near)
    return rgb


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_a_mosaic_is_interpolated(pattern):
    mosaic = levels(HEIGHT, WIDTH + 1)
    expected = interpolated(mosaic, pattern)
    np.testing.assert_array_equal(decode(f"bayer_{pattern}8", mosaic, WIDTH + 1), expected)
    wide = (mosaic.astype("<u2") * 257).view(np.uint8)
    np.testing.assert_array_equal(decode(f"bayer_{pattern}16", wide, WIDTH + 1), expected)


def test_strips_of_rows_join_without_a_seam():
    mosaic = levels(600, 4)
    parts = np.concatenate([demosaic(mosaic[:256], "rggb")[:-1], demosaic(mosaic[254:512], "rggb")[1:-1]])
    np.testing.assert_array_equal(demosaic(mosaic, "rggb")[:511], parts)
    rows = levels(600, 8)
    np.testing.assert_array_equal(decode("uyvy", rows, 4, 600)[500:], decode("uyvy", rows[500:], 4, 100))


def test_a_picture_may_share_the_memory_of_its_message():
    data = bytearray(levels(HEIGHT, WIDTH, 3).tobytes())
    image = decode_raw("rgb8", WIDTH, HEIGHT, 3 * WIDTH, data)
    assert np.shares_memory(image.pixels, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_every_encoding_takes_the_smallest_picture(encoding):
    image = decode_raw(encoding, 2, 2, 32, bytes(96))
    assert image.pixels.shape == (2, 2, 3)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"encoding": "rgb12"}, "the encoding 'rgb12', but it must be one of rgb8, bgr8"),
        ({"encoding": ""}, "no encoding, but it must be one of"),
        ({"encoding": "16UC1"}, "16UC1, which is for depths"),
        ({"encoding": "32FC1"}, "32FC1, which is for depths"),
        ({"width": 0}, "0 × 6, so it has no pixels"),
        ({"height": 0}, "8 × 0, so it has no pixels"),
        ({"step": 23}, "step of 23 bytes, but a row of 8 pixels of rgb8 has 24"),
        ({"data": bytes(143)}, "143 bytes of data, but 6 rows of 24 bytes are 144"),
        ({"encoding": "uyvy", "width": 7}, "multiple of 2 and its height one of 1"),
        ({"encoding": "nv12", "height": 5}, "multiple of 2 and its height one of 2"),
        ({"encoding": "nv12", "data": bytes(9 * 24 - 1)}, "9 rows of 24 bytes are 216"),
        ({"width": 1 << 16, "height": 1 << 16}, f"65536 × 65536, but at most {LIMITS.image_pixels} pixels"),
    ],
)
def test_bad_pictures_are_refused(change, words):
    values = {"encoding": "rgb8", "width": 8, "height": 6, "step": 24, "data": bytes(144)} | change
    with pytest.raises(InvalidImageError) as refused:
        decode_raw(**values)
    assert words in str(refused.value) and "\n" not in str(refused.value)
