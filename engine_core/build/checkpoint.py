"""A Hugging Face checkpoint directory: config.json and safetensors, one file or several, memory-mapped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from engine_core.errors import CheckpointError
from engine_core.safetensors_file import SafetensorsFile

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The configuration and the tensors of a checkpoint; nothing is read before it is asked for.

    Raises CheckpointError if config.json or the safetensors are missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"The checkpoint directory {self.directory} does not exist.")
        self.config = read_json(self.directory / "config.json")
        self.generation_config = read_json(self.directory / "generation_config.json", required=False)
        self._file_of = self._open()

    def _open(self) -> dict[str, SafetensorsFile]:
        index = self.directory / _INDEX
        if (self.directory / _SINGLE).is_file():
            file = SafetensorsFile(self.directory / _SINGLE)
            return dict.fromkeys(file.names(), file)
        if not index.is_file():
            raise CheckpointError(
                f"{self.directory} has neither {_SINGLE} nor {_INDEX}; only safetensors checkpoints are read."
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map; fetch it again.")
        files = {}
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard:
                raise CheckpointError(f"{index} names the file {shard!r}, which lies outside the checkpoint.")
            files[shard] = SafetensorsFile(self.directory / shard)
        missing = [name for name, shard in weight_map.items() if name not in files[shard].names()]
        if missing:
            shard = self.directory / weight_map[missing[0]]
            raise CheckpointError(f"{shard} lacks the tensor {missing[0]!r} its index lists.")
        return {name: files[shard] for name, shard in weight_map.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises CheckpointError if there is no such tensor."""
        return self._file(name).shape(name)

    def read(self, name: str, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Rows (a slice or indices) of the tensor as float32, copied. Raises CheckpointError."""
        return self._file(name).read(name, rows)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._file_of:
            raise CheckpointError(f"The checkpoint {self.directory} has no tensor {name!r}.")
        return self._file_of[name]


def read_json(path: Path, *, required: bool = True) -> dict:
    """The JSON object in ``path``; empty if it is missing and not ``required``. Raises CheckpointError."""
    if not path.is_file():
        if not required:
            return {}
        raise CheckpointError(f"{path} is missing, so {path.parent} is not a checkpoint directory.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return value
