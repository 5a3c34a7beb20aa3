"""Reduce JPEG and PNG files to what their pixels need, before a decoder reads them.

Everything else in a file (EXIF data, colour profiles, compressed texts, thumbnails, further frames) changes no pixel
here, and can cost a decoder gigabytes or minutes: a decoder gets none of it. The orientation is read here.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from engine_core.errors import InvalidImageError
from engine_core.request import LIMITS

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
# Any marker but those within a scan: a stuffed 0xFF and the restarts.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_TEM, _SOI, _EOI, _SOS, _APP0, _APP1, _APP14, _APP15, _COM = 0x01, 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
_COLOURS = {_APP0: b"JFIF\0", _APP14: b"Adobe"}  # segments that say how colours are stored
_EXIF = b"Exif\0\0"
_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_ORIENTATION, _SHORT = 0x0112, 3
_MOST_TAGS = 1024


class PictureFile(NamedTuple):
    """A file without what its pixels do not need."""

    format: str  # JPEG or PNG
    data: bytes
    orientation: int  # of EXIF, 1 to 8


def reduce_file(data: bytes | bytearray | memoryview) -> PictureFile | None:
    """Return the reduced file; None if it is neither JPEG nor PNG. A damaged one is left to the decoder.

    Raises InvalidImageError for more scans or parts than LIMITS allow.
    """
    view = memoryview(data)
    if bytes(view[: len(_JPEG)]) == _JPEG:
        return _reduce_jpeg(view)
    return _reduce_png(view) if bytes(view[: len(_PNG)]) == _PNG else None


def _reduce_jpeg(view: memoryview) -> PictureFile:
    parts: list[bytes | memoryview] = [b"\xff\xd8"]
    position, num_segments, num_scans, orientation = 2, 0, 0, 1
    while (marker := _MARKER.search(view, position)) is not None:
        num_segments += 1
        _check_parts("JPEG", "segments", num_segments)
        start, body = marker.start(), marker.end()
        code = view[body - 1]
        position = body
        if code == _EOI:
            parts.append(view[start:body])
            break
        if code in (_TEM, _SOI):
            continue
        position = body + max(2, int.from_bytes(view[body : body + 2], "big"))
        content = view[body + 2 : position]
        if code == _SOS:
            num_scans += 1
            if num_scans > LIMITS.image_scans:
                raise InvalidImageError(
                    f"A JPEG image has more than {LIMITS.image_scans} scans; save it with fewer, or as a baseline one."
                )
            after = _MARKER.search(view, position)
            position = len(view) if after is None else after.start()
        elif _APP0 <= code <= _APP15 or code == _COM:
            if code == _APP1 and orientation == 1 and bytes(content[: len(_EXIF)]) == _EXIF:
                orientation = _orientation(content[len(_EXIF) :])
            known = _COLOURS.get(code)
            if known is None or bytes(content[: len(known)]) != known:
                continue
        parts.append(view[start:position])
    return PictureFile("JPEG", b"".join(parts), orientation)


def _reduce_png(view: memoryview) -> PictureFile:
    parts: list[bytes | memoryview] = [_PNG]
    position, num_chunks, orientation = len(_PNG), 0, 1
    while position + 8 <= len(view):
        num_chunks += 1
        _check_parts("PNG", "chunks", num_chunks)
        size, kind = struct.unpack_from(">I4s", view, position)
        end = position + 12 + size
        if kind in _CHUNKS:
            parts.append(view[position:end])
        elif kind == b"eXIf":
            orientation = _orientation(view[position + 8 : end - 4])
        if kind == b"IEND":
            break
        position = end
    return PictureFile("PNG", b"".join(parts), orientation)


def _check_parts(form: str, name: str, count: int) -> None:
    if count > LIMITS.image_parts:
        raise InvalidImageError(f"A {form} image has more than {LIMITS.image_parts} {name}; save it anew.")


def _orientation(exif: memoryview) -> int:
    """Return the orientation, 1 to 8, that EXIF data says; 1 where it says none."""
    order = {b"II": "<", b"MM": ">"}.get(bytes(exif[:2]))
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * min(count, _MOST_TAGS), 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, place)
            if tag == _ORIENTATION and kind == _SHORT:
                return value if 1 <= value <= 8 else 1
    except struct.error:  # it ends before that
        pass
    return 1
