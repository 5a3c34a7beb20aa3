"""Reads and writes safetensors files with numpy alone: a length, a JSON header, then the tensors' bytes.

The format is specified at https://github.com/huggingface/safetensors. Files are memory-mapped: a tensor costs
memory only while it is looked at. They are not written with the safetensors library, because that takes all tensors of
a file at once, in memory.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine_core.errors import CheckpointError

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_BF16 = "BF16"  # no numpy type: the upper half of a float32, read as uint16
# Nor have these: their codes are read as uint8.
_CODES = ("F8_E4M3", "F8_E5M2", "F8_E8M0")
_MAX_HEADER = 100 << 20  # bytes; the limit of the reference implementation


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the file
    stop: int


class SafetensorsFile:
    """One memory-mapped file; ``metadata``: its header's texts. Raises CheckpointError if it is missing or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait for its other end
                raise ValueError("it is no file")
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}).") from error
        self._entries = self._read_header()

    def _read_header(self) -> dict[str, _Entry]:
        try:
            length = int.from_bytes(bytes(self._bytes[:8]), "little")
            if len(self._bytes) < 8 or not 2 <= length <= min(_MAX_HEADER, len(self._bytes) - 8):
                raise ValueError(f"its header cannot have {length} bytes")
            header = json.loads(bytes(self._bytes[8 : 8 + length]))
            self.metadata = {str(key): str(value) for key, value in header.get("__metadata__", {}).items()}
            return {name: self._entry(value, 8 + length) for name, value in header.items() if name != "__metadata__"}
        except (ArithmeticError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path} is not a whole safetensors file ({error}); fetch it again.") from error

    def _entry(self, value: dict, base: int) -> _Entry:
        start, stop = (base + int(offset) for offset in value["data_offsets"])
        entry = _Entry(value["dtype"], tuple(int(n) for n in value["shape"]), start, stop)
        numpy_type = _numpy_type(entry.dtype)
        if not base <= start <= stop <= len(self._bytes) or (
            numpy_type and stop - start != numpy_type.itemsize * int(np.prod(entry.shape, dtype=np.int64))
        ):
            raise ValueError("a tensor lies outside the file or has the wrong number of bytes")
        return entry

    def names(self) -> list[str]:
        return list(self._entries)

    def rename(self, new_name: Callable[[str], str]) -> None:
        """Give every tensor another name; "" leaves it out."""
        entries = ((new_name(name), entry) for name, entry in self._entries.items())
        self._entries = {name: entry for name, entry in entries if name}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """Return the format's name of the type, as F32 or BF16."""
        return self._entries[name].dtype

    def raw(self, name: str) -> np.ndarray:
        """Return the tensor as a read-only view of the mapped file; BF16 as uint16, F8_* as uint8. Raises
        CheckpointError."""
        entry = self._entries[name]
        dtype = _numpy_type(entry.dtype)
        if dtype is None:
            raise CheckpointError(f"The tensor {name!r} of {self.path} has the type {entry.dtype}, which is not read.")
        return self._bytes[entry.start : entry.stop].view(dtype).reshape(entry.shape)

    def read(self, name: str, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Rows (a slice or indices) of a floating-point tensor as float32, copied. Raises CheckpointError."""
        raw = self.raw(name)
        raw = raw[rows] if raw.ndim else raw.reshape(1)  # a scale stored without a dimension is one of one
        if self.dtype(name) == _BF16:
            return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if raw.dtype.kind != "f":
            raise CheckpointError(f"The tensor {name!r} of {self.path} has the type {self.dtype(name)}, not floats.")
        return np.array(raw, dtype=np.float32)


def _numpy_type(dtype: str) -> np.dtype | None:
    if dtype == _BF16:
        return np.dtype(np.uint16)
    if dtype in _CODES:
        return np.dtype(np.uint8)
    return np.dtype(_DTYPES[dtype]) if dtype in _DTYPES else None


class SafetensorsWriter:
    """Writes a file tensor by tensor; a context manager, which closes the file.

    ``tensors``: name → (type as safetensors spells it, shape), in the order in which they are written.
    """

    def __init__(
        self, path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None
    ) -> None:
        """Raises OSError."""
        header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            end = offset + _num_bytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._tensors = tensors
        self._waiting = list(tensors)
        self._file = open(path, "wb")  # noqa: SIM115  closed by __exit__
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        assert error or not self._waiting, f"{self._waiting[0]} was not written"

    def write(self, name: str, values: np.ndarray) -> None:
        """Writes the next tensor. Raises OSError."""
        assert values.shape == self._tensors[name][1], (name, values.shape)
        self.write_blocks(name, [values])

    def write_blocks(self, name: str, blocks: Iterable[np.ndarray]) -> None:
        """Writes the next tensor, which arrives in blocks along its first axis. Raises OSError."""
        dtype, shape = self._tensors[name]
        assert self._waiting and self._waiting.pop(0) == name, f"{name} is out of order"
        written = 0
        for values in blocks:
            assert values.dtype == _numpy_type(dtype), (name, values.dtype)
            self._file.write(np.ascontiguousarray(values).data)
            written += values.nbytes
        assert written == _num_bytes(dtype, shape), (name, written)


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    numpy_type = _numpy_type(dtype)
    assert numpy_type is not None, dtype
    return math.prod(shape) * numpy_type.itemsize


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes whole tensors, of the types numpy has, in the order given. Raises OSError."""
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    header = {name: (names[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, header, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
