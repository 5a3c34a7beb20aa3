"""Writes a safetensors file tensor by tensor, so that a model larger than memory can be written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

# Type as safetensors spells it → numpy; bf16 is carried as uint16, fp8 as uint8.
_TYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
    "F8_E4M3": np.uint8,
}


class TensorWriter:
    """``tensors``: name → (type as safetensors spells it, shape), in the order in which ``write`` is called."""

    def __init__(
        self, path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None
    ) -> None:
        """Raises OSError."""
        header: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            end = offset + math.prod(shape) * np.dtype(_TYPES[dtype]).itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._tensors = tensors
        self._waiting = list(tensors)
        self._file = open(path, "wb")  # noqa: SIM115  closed by close
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, values: np.ndarray) -> None:
        """Raises OSError."""
        assert values.shape == self._tensors[name][1], (name, values.shape)
        self.write_blocks(name, [values])

    def write_blocks(self, name: str, blocks: Iterable[np.ndarray]) -> None:
        """A tensor that arrives in blocks along its first axis. Raises OSError."""
        dtype, shape = self._tensors[name]
        assert self._waiting and self._waiting.pop(0) == name, f"{name} is out of order"
        written = 0
        for values in blocks:
            assert values.dtype == _TYPES[dtype], (name, values.dtype)
            self._file.write(np.ascontiguousarray(values).data)
            written += values.nbytes
        assert written == math.prod(shape) * np.dtype(_TYPES[dtype]).itemsize, (name, written)

    def abandon(self) -> None:
        """Closes the file as it is, after an error."""
        self._file.close()

    def close(self) -> None:
        """Raises OSError."""
        self._file.close()
        assert not self._waiting, f"{self._waiting[0]} was not written"
