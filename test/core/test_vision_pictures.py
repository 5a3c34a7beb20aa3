"""JPEG and PNG files and data URLs become images; what cannot is refused before it takes memory."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as PillowImage

from engine_core.errors import InvalidImageError
from engine_core.request import LIMITS, RequestLimits
from engine_core.vision import Image
from engine_core.vision.encodings import Picture, demosaic
from engine_core.vision.pictures import (
    MAX_EDGE,
    check_pictures,
    decode_data_url,
    decode_picture,
    limit_edge,
    limit_images,
    open_picture,
)

PIXELS = np.random.default_rng(3).integers(0, 256, (20, 30, 3), np.uint8)


def encoded(picture, form="PNG", **options) -> bytes:
    picture = picture if isinstance(picture, PillowImage.Image) else PillowImage.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width: int, height: int) -> bytes:
    """A small PNG file that says it is of this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_png_files_of_every_mode():
    colours = PillowImage.fromarray(PIXELS)
    np.testing.assert_array_equal(decode_picture(encoded(colours)).pixels, PIXELS)
    transparent = colours.copy()
    transparent.putalpha(7)
    np.testing.assert_array_equal(decode_picture(encoded(transparent)).pixels, PIXELS)
    grey, palette = colours.convert("L"), colours.quantize(16)
    np.testing.assert_array_equal(decode_picture(encoded(grey)).pixels[:, :, 2], np.asarray(grey))
    np.testing.assert_array_equal(decode_picture(encoded(palette)).pixels, np.asarray(palette.convert("RGB")))
    deep = (np.asarray(grey).astype(np.uint16) * 257) + 90
    np.testing.assert_array_equal(decode_picture(encoded(deep)).pixels[:, :, 0], np.asarray(grey))


def test_a_jpeg_file_is_turned_as_its_exif_data_says():
    data = encoded(PIXELS, "JPEG", quality=95)
    plain = decode_picture(data)
    np.testing.assert_array_equal(plain.pixels, np.asarray(PillowImage.open(io.BytesIO(data))))
    exif = PillowImage.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = decode_picture(encoded(PIXELS, "JPEG", quality=95, exif=exif))
    np.testing.assert_array_equal(turned.pixels, np.rot90(plain.pixels, -1))


def test_a_compressed_mosaic_is_interpolated():
    mosaic = np.ascontiguousarray(PIXELS[:, :, 0])
    found = decode_picture(encoded(mosaic), "bayer_rggb8").pixels
    np.testing.assert_array_equal(found, demosaic(mosaic, "rggb"))


def test_a_data_url_holds_a_picture():
    url = "data:image/png;base64," + base64.b64encode(encoded(PIXELS)).decode()
    assert decode_data_url(url) == Image(PIXELS)


def test_large_pictures_are_scaled_down():
    wide = Image(np.zeros((8, 7680, 3), np.uint8))
    assert limit_edge(wide).pixels.shape == (4, MAX_EDGE, 3)
    assert limit_edge(Image(PIXELS)).pixels is PIXELS


def test_no_more_images_are_decoded_than_their_pixels_may_take(monkeypatch):
    decoded = []

    def images():
        for index in range(5):
            decoded.append(index)
            yield Image(PIXELS)

    monkeypatch.setattr("engine_core.vision.pictures.LIMITS", RequestLimits(image_bytes=2 * PIXELS.nbytes))
    with pytest.raises(InvalidImageError, match="bytes of images, but at most"):
        limit_images(images())
    assert decoded == [0, 1, 2]
    assert limit_images([Image(PIXELS)] * 2) == (Image(PIXELS), Image(PIXELS))


JPEG = encoded(PIXELS, "JPEG")


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "0 bytes is no JPEG or PNG file"),
        (b"hello", "5 bytes is no JPEG or PNG file"),
        (encoded(PIXELS, "GIF"), "no JPEG or PNG file"),
        (JPEG[:-200], f"A JPEG image of {len(JPEG) - 200} bytes cannot be decoded (image file is truncated"),
        (encoded(PIXELS)[:-400], "A PNG image of"),
        (bomb(40_000, 40_000), "too many pixels"),
        (bomb(10_000, 10_000), f"10000 × 10000, but at most {LIMITS.image_pixels} pixels"),
        (bomb(LIMITS.image_edge + 1, 1), f"65537 × 1, but an edge may have at most {LIMITS.image_edge} pixels"),
        (bomb(100, 100), "A PNG image of"),
    ],
    ids=["empty", "text", "GIF", "truncated JPEG", "truncated PNG", "bomb", "large", "long strip", "little data"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_refused(data, words):
    with pytest.raises(InvalidImageError) as refused:
        decode_picture(data)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def scans(count: int) -> bytes:
    """A progressive JPEG file whose last scan comes again, up to ``count`` scans."""
    data = encoded(PIXELS, "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (count - data.count(b"\xff\xda")) + data[-2:]


def exif(num_tags: int, order: str = "<") -> bytes:
    """EXIF data of a picture to be turned by a quarter, each further tag of which says that it is half of the data."""
    size = 6 * num_tags
    tags = b"".join(struct.pack(order + "HHII", 0x9000 + tag, 7, size, size) for tag in range(1, num_tags))
    first = struct.pack(order + "HHIHH", 0x0112, 3, 1, 6, 0)
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, num_tags) + first + tags


def with_chunks(*chunks: bytes) -> bytes:
    """A PNG file with further chunks behind its header."""
    data = encoded(PIXELS)
    return data[:33] + b"".join(chunks) + data[33:]


def with_segments(*segments: bytes) -> bytes:
    return (
        JPEG[:2]
        + b"".join(segment[:2] + struct.pack(">H", len(segment)) + segment[2:] for segment in segments)
        + JPEG[2:]
    )


def test_the_scans_of_a_file_are_limited():
    decode_picture(scans(LIMITS.image_scans))
    for count in (LIMITS.image_scans + 1, 5000):
        with pytest.raises(InvalidImageError, match=f"more than {LIMITS.image_scans} scans"):
            open_picture(scans(count))
    thumbnail = b"\xff\xe1Exif\0\0" + b"\xff\xda" * 100  # those of a thumbnail are none of the picture
    np.testing.assert_array_equal(decode_picture(with_segments(thumbnail)).pixels, decode_picture(JPEG).pixels)


@pytest.mark.parametrize("order", "<>")
def test_no_tag_but_the_orientation_is_read(order):
    """Pillow would read every tag's part of the data, here half a gigabyte."""
    data = exif(5000, order)
    segments = [b"\xff\xe1Exif\0\0" + part for part in (data[:60_000], data[60_000:])]  # which Pillow puts together
    turned = decode_picture(with_segments(*segments)).pixels
    np.testing.assert_array_equal(turned, np.rot90(decode_picture(JPEG).pixels, -1))
    turned = decode_picture(with_chunks(chunk(b"eXIf", data))).pixels
    np.testing.assert_array_equal(turned, np.rot90(PIXELS, -1))


@pytest.mark.parametrize(
    "data",
    [b"", b"II*\0", b"XX*\0\0\0\0\x08", exif(2)[:15], b"II*\0\xff\xff\xff\xff", exif(3).replace(b"\x06", b"\x63")],
)  # fmt: skip
def test_damaged_exif_data_turns_nothing(data):
    np.testing.assert_array_equal(decode_picture(with_chunks(chunk(b"eXIf", data))).pixels, PIXELS)


def test_no_decoder_gets_texts_profiles_or_frames():
    zeros = zlib.compress(bytes(20 << 20))
    chunks = [
        chunk(b"zTXt", b"a\0\0" + zeros), chunk(b"iCCP", b"p\0\0" + zeros), chunk(b"iTXt", b"a\0\1\0\0\0" + zeros),
        chunk(b"acTL", struct.pack(">II", 1 << 30, 0)),
    ]  # fmt: skip
    np.testing.assert_array_equal(decode_picture(with_chunks(*chunks)).pixels, PIXELS)
    other = [PillowImage.new("RGB", (30, 20))] * 2
    animated = encoded(PIXELS, save_all=True, append_images=other)
    np.testing.assert_array_equal(decode_picture(animated).pixels, PIXELS)
    frames = decode_picture(encoded(PIXELS, "MPO", save_all=True, append_images=other))
    np.testing.assert_array_equal(frames.pixels, decode_picture(JPEG).pixels)


def test_the_parts_of_a_file_are_limited(monkeypatch):
    monkeypatch.setattr("engine_core.vision.picture_files.LIMITS", RequestLimits(image_parts=20))
    decode_picture(JPEG)
    with pytest.raises(InvalidImageError, match="more than 20 chunks"):
        open_picture(with_chunks(*[chunk(b"IDAT", b"")] * 20))
    with pytest.raises(InvalidImageError, match="more than 20 segments"):
        open_picture(with_segments(*[b"\xff\xfea"] * 20))


def test_colours_stay_as_the_file_stores_them():
    """Adobe's and JFIF's segments say how; the others are left out."""
    for mode in ("CMYK", "L", "RGB"):
        data = encoded(PillowImage.fromarray(PIXELS).convert(mode), "JPEG", comment=b"c" * 99, icc_profile=bytes(999))
        expected = np.asarray(PillowImage.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(decode_picture(data).pixels, expected)


def test_pixels_of_all_pictures_are_counted_before_one_is_decoded():
    def never():
        pytest.fail("it was decoded")

    check_pictures([Picture(4096, 4096, never)] * 5)
    with pytest.raises(InvalidImageError, match="bytes of images, but at most"):
        check_pictures([Picture(4096, 4096, never)] * 6)
    check_pictures([Picture(65536, 512, never)] * 64)  # each is scaled down to 4096 x 32


def test_depths_are_refused():
    with pytest.raises(InvalidImageError, match="16UC1, which is for depths"):
        decode_picture(encoded(PIXELS), "16UC1")


@pytest.mark.parametrize(
    "url, words",
    [
        ("https://example.org/cat.jpg", "begins with 'https://example.org/cat.jpg', but it must be a data URL"),
        ("file:///etc/passwd", "nothing is fetched"),
        ("data:image/gif;base64,AAAA", "must be a data URL"),
        ("data:image/png;base64,AA*A", "not valid base64"),
        ("data:image/png;base64,AAAA", "3 bytes is no JPEG or PNG file"),
    ],
)
def test_other_urls_are_refused(url, words):
    with pytest.raises(InvalidImageError) as refused:
        decode_data_url(url)
    assert words in str(refused.value)
