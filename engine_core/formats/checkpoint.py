"""A Hugging Face checkpoint directory: config.json and safetensors, one file or several, memory-mapped.

Weights that are quantized (``formats/quantized_layouts.py``) have the name, the shape and the values they stand for,
like others.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from engine_core.errors import CheckpointError
from engine_core.formats.number_formats import QuantizedTensor
from engine_core.formats.quantized_layouts import Stored, find_stored
from engine_core.formats.safetensors_file import SafetensorsFile
from engine_core.formats.weight_formats.integers import IntegerFormat

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MODELOPT = "hf_quant_config.json"


class Checkpoint:
    """The configuration and the tensors of a checkpoint; nothing is read before it is asked for.

    Raises CheckpointError if config.json or the safetensors are missing or damaged, UnsupportedModelError for a
    quantization that is not read.
    """

    has_tensors = True  # see engine_core.models.shapes.ConfigCheckpoint

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        _check_directory(self.directory)
        self.config = read_json(self.directory / "config.json")
        self.generation_config = read_json(self.directory / "generation_config.json", required=False)
        self._file_of = self._open()
        self._stored = find_stored(self._quantization(), self._file_of)

    def _quantization(self) -> dict:
        """Return the configuration with its quantization_config, which ModelOpt may have put into a file of its own."""
        side = self.directory / _MODELOPT
        if self.config.get("quantization_config") or not side.is_file():
            return self.config
        found = read_json(side).get("quantization")
        algorithm = found.get("quant_algo") if isinstance(found, dict) else None
        if not algorithm:
            return self.config
        return {**self.config, "quantization_config": {"quant_method": "modelopt", "quant_algo": algorithm}}

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
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map of tensor names to file names; fetch it again.")
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
        return name in self._file_of or name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises CheckpointError if there is no such tensor."""
        return self._stored[name].shape if name in self._stored else self._file(name).shape(name)

    def read(self, name: str, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Rows (a slice or indices) of the tensor as float32, dequantized, copied. Raises CheckpointError."""
        if name in self._stored:
            return self._stored[name].dequantize(rows)
        return self._file(name).read(name, rows)

    def dtype(self, name: str) -> str:
        """Return safetensors' name of the type of a tensor that is not quantized. Raises CheckpointError."""
        return self._file(name).dtype(name)

    # --- quantized weights --------------------------------------------------------------------------

    @property
    def is_quantized(self) -> bool:
        return bool(self._stored)

    def stored(self, name: str) -> Stored | None:
        """Return the layout of a quantized weight; None for one that is not quantized."""
        return self._stored.get(name)

    def quantized(self, name: str, rows: slice | np.ndarray = slice(None)) -> QuantizedTensor | None:
        """Rows of a weight in integers with its own values, scales and zeros; None if it is nothing of the kind, or if
        its groups are not consecutive columns (GPTQ's desc_act), which only ``read`` puts right."""
        stored = self._stored.get(name)
        if stored is None or stored.order is not None or not isinstance(stored.format, IntegerFormat):
            return None
        found = stored.read(rows)
        assert isinstance(found, QuantizedTensor)
        return found

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._file_of:
            raise CheckpointError(f"The checkpoint {self.directory} has no tensor {name!r}.")
        return self._file_of[name]


def _check_directory(directory: Path) -> None:
    """Raises CheckpointError for what is no checkpoint directory, with what to do."""
    if directory.suffix.lower() == ".gguf":
        raise CheckpointError(
            f"{directory} is a GGUF file, which this version does not read; take the model's safetensors checkpoint."
        )
    if not directory.exists():
        is_model_id = len(directory.parts) == 2 and not directory.is_absolute() and not directory.parent.exists()
        hint = ""
        if is_model_id:
            hint = f" If it is a model of a hub, download it first: 'hf download {directory} --local-dir DIR'."
        raise CheckpointError(f"The checkpoint directory {directory} does not exist.{hint}")
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; a checkpoint is a directory with config.json and safetensors.")
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory} has an adapter_config.json: a LoRA adapter is not applied by a build; merge it into its base "
            "model first, or remove that file if the weights are merged already."
        )


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
