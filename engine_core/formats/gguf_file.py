"""Reads GGUF files, the container of llama.cpp's models: metadata, then tensors, memory-mapped.

The format is specified at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Block types (Q4_K and so on) are
dequantized by the package ``gguf``. Its reader is not used: it trusts the counts that a file states, and takes most of
a minute for a vocabulary on a robot's processor. Here every count is compared with the bytes that are left first.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine_core.errors import CheckpointError

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_PARTS = 1000  # files of one model
# Types of metadata values: number in the file → struct format, of those with a fixed size.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_FLOATS = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def is_gguf(path: Path) -> bool:
    """Return True for the name of a GGUF file, or a file that begins like one."""
    path = Path(path)
    if path.suffix.lower() == SUFFIX:
        return True
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


@dataclass(frozen=True)
class _Entry:
    type: str  # as ggml spells it
    shape: tuple[int, ...]  # as numpy has it: the values of a row are next to each other
    start: int  # byte in the file
    row_bytes: int


class GgufFile:
    """One memory-mapped file. ``metadata``: key → number, text, bool, list of texts or bools, or array of numbers.

    Raises CheckpointError if the file is missing, damaged, or has a type that the installed ``gguf`` does not know;
    ImportError without that package.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        except FileNotFoundError:
            raise CheckpointError(f"The GGUF file {path} does not exist.") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}).") from error
        try:
            self._read_header()
        except (ValueError, struct.error, OverflowError) as error:
            raise CheckpointError(f"{path} is not a whole GGUF file ({error}); fetch it again.") from error

    def _read_header(self) -> None:
        cursor = _Cursor(memoryview(self._bytes))  # type: ignore[arg-type]
        if bytes(self._bytes[:4]) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        cursor.at = 4
        version = cursor.number("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = "big-endian" if swapped else f"of version {version}"
            raise ValueError(f"it is {what}; little-endian files of the versions 2 and 3 are read")
        num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
        cursor.check(num_tensors, 24, "tensors")
        cursor.check(num_values, 13, "metadata values")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = cursor.text()
            if key in self.metadata:
                raise ValueError(f"it has the metadata {key[:60]!r} twice")
            self.metadata[key] = cursor.value(cursor.number("I"), key)
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ValueError(f"its general.alignment is {str(alignment)[:60]}, not a power of two")
        found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = cursor.text()
            if name in found:
                raise ValueError(f"it has the tensor {name[:60]!r} twice")
            found[name] = self._read_entry(cursor, name)
        base = -(-cursor.at // alignment) * alignment
        self._entries = {}
        for name, (type_name, shape, row_bytes, offset) in found.items():
            start, size = base + offset, math.prod(shape[:-1]) * row_bytes
            if offset % alignment or start + size > len(self._bytes):
                raise ValueError(f"the tensor {name[:60]!r} lies outside the file or is not aligned")
            self._entries[name] = _Entry(type_name, shape, start, row_bytes)

    def _read_entry(self, cursor: _Cursor, name: str) -> tuple[str, tuple[int, ...], int, int]:
        """Return (type, shape, bytes of a row, offset)."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        count = cursor.number("I")
        if not 0 < count <= _MAX_DIMENSIONS:
            raise ValueError(f"the tensor {name[:60]!r} has {count} dimensions")
        shape = tuple(reversed([cursor.number("Q") for _ in range(count)]))
        type_number, offset = cursor.number("I"), cursor.number("Q")
        try:
            kind = GGMLQuantizationType(type_number)
        except ValueError:
            raise ValueError(
                f"the tensor {name[:60]!r} has the type {type_number}, which the installed package gguf does not know"
            ) from None
        block, size = GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[-1] % block:
            raise ValueError(f"the tensor {name[:60]!r} has the shape {list(shape)} in blocks of {block}")
        return kind.name, shape, shape[-1] // block * size, offset

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """Return ggml's name of the type, as F16 or Q4_K."""
        return self._entries[name].type

    def check_types(self) -> None:
        """Raises CheckpointError for a tensor of a type that is not read."""
        for name in {entry.type: name for name, entry in self._entries.items()}.values():
            entry = self._entries[name]
            if entry.type not in _FLOATS:
                _dequantized(self.path, name, entry.type, np.zeros((1, entry.row_bytes), dtype=np.uint8))

    def blocks(self, name: str) -> np.ndarray:
        """Return the rows as they are stored: a read-only view of the mapped file, uint8 [..., bytes of a row]."""
        entry = self._entries[name]
        shape = (*entry.shape[:-1], entry.row_bytes)
        return self._bytes[entry.start : entry.start + math.prod(shape)].reshape(shape)

    def read(self, name: str, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Return rows (a slice or indices) of a tensor as float32, dequantized, copied. Raises CheckpointError."""
        entry, blocks = self._entries[name], self.blocks(name)
        if entry.type in _FLOATS:
            return np.array(blocks.view(_FLOATS[entry.type])[rows], dtype=np.float32)
        if len(entry.shape) == 1:
            return _dequantized(self.path, name, entry.type, blocks[None])[0][rows]
        return _dequantized(self.path, name, entry.type, blocks[rows])


def _dequantized(path: Path, name: str, type_name: str, blocks: np.ndarray) -> np.ndarray:
    """Return float32 values of uint8 [..., bytes of a row]."""
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[type_name]
    if not blocks.size:  # the package cannot split nothing into groups
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[kind]
        return np.zeros((*blocks.shape[:-1], blocks.shape[-1] // size * block), dtype=np.float32)
    try:
        with np.errstate(all="ignore"):  # a damaged scale may be infinite
            return dequantize(np.ascontiguousarray(blocks), kind).astype(np.float32, copy=False)
    except NotImplementedError:
        raise CheckpointError(f"The tensor {name!r} of {path} has the type {type_name}, which is not read.") from None


class _Cursor:
    """Reads one value after the other. Raises ValueError, or struct.error at the end of the file."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self.at = 0

    def check(self, count: int, least_bytes: int, what: str) -> None:
        """Raises ValueError if ``count`` things of at least so many bytes do not fit into the rest of the file."""
        if count * least_bytes > len(self._view) - self.at:
            raise ValueError(f"it cannot hold {count} {what}")

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self._view, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.check(length, 1, "characters of a text")
        try:
            found = bytes(self._view[self.at : self.at + length]).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("one of its texts is not UTF-8") from None
        self.at += length
        return found

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"the metadata {key[:60]!r} has the type {kind}")
        return self._array(key)

    def _array(self, key: str) -> Any:
        kind, count = self.number("I"), self.number("Q")
        if kind == _TEXT:
            self.check(count, 8, "texts of an array")
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"the metadata {key[:60]!r} is an array of the type {kind}")
        dtype = np.dtype(f"<{_SCALARS[kind]}") if _SCALARS[kind] != "?" else np.dtype(np.bool_)
        self.check(count, dtype.itemsize, "numbers of an array")
        found = np.frombuffer(self._view, dtype, count, self.at).copy()
        self.at += found.nbytes
        return found.tolist() if found.dtype == np.bool_ else found


def read_parts(path: Path) -> list[GgufFile]:
    """Return the files of one model: ``path``, or all of those that it is a part of, in order; the first has the
    metadata.

    Raises CheckpointError for one that is missing or damaged, or a tensor that two of them have.
    """
    first = GgufFile(path)
    count = first.metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= _MAX_PARTS:
        raise CheckpointError(f"{path} has split.count={str(count)[:60]}, expected at most {_MAX_PARTS}.")
    if count < 2:
        return [first]
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(f"{path} is one of {count} files, whose names end in -00001-of-{count:05}{SUFFIX}.")
    names = [path.with_name(f"{match[1]}-{index:05}-of-{count:05}{SUFFIX}") for index in range(1, count + 1)]
    parts = [first if name == path else GgufFile(name) for name in names]
    seen: set[str] = set()
    for part in parts:
        if twice := seen.intersection(part.names()):
            raise CheckpointError(f"{part.path} has the tensor {min(twice)!r}, which an earlier file has, too.")
        seen.update(part.names())
    return parts
