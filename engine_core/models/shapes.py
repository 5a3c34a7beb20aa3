"""A checkpoint's sizes from its config.json alone: what planning needs before anything is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.gguf_file import is_gguf
from engine_core.formats.json_file import read_json
from engine_core.formats.number_formats import QuantizedTensor
from engine_core.formats.quantized_layouts import Rows, Stored
from engine_core.formats.weight_formats.base import WeightFormat
from engine_core.models.reader import read_spec
from engine_core.models.spec import ModelSpec
from engine_core.models.text_model import text_config
from engine_core.vision.preprocess import PREPROCESSOR_FILES


class ConfigCheckpoint:
    """Answers for a checkpoint of which only config.json is read; stands in for ``Checkpoint`` in ``read_spec``.

    ``stored_quantization``: its quantization_config. A quantized checkpoint has the same model inside: its plan is that
    of the variants made from it.
    """

    has_tensors = False  # nobody knows which are stored
    config_name = "config.json"

    def __init__(self, config: Mapping[str, Any], processor_directory: Path | None = None) -> None:
        """``processor_directory``: that of the image processor's files, where there are some."""
        self.config = text_config(config)
        self.processor_directory = processor_directory
        self.stored_quantization = self.config.pop("quantization_config", None)

    @classmethod
    def of(cls, directory: Path) -> ConfigCheckpoint:
        """Raises CheckpointError without a readable config.json or GGUF file."""
        if is_gguf(directory):
            return cls(Checkpoint(directory).config)
        has_processor = any((Path(directory) / name).is_file() for name in PREPROCESSOR_FILES)
        return cls(read_json(Path(directory) / "config.json"), Path(directory) if has_processor else None)

    def __contains__(self, name: str) -> bool:
        return False  # nothing is stored beside what the configuration says

    def shape(self, name: str) -> tuple[int, ...]:
        raise AssertionError("there are no tensors")

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        raise AssertionError("there are no tensors")


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """Return the model of a config.json, read from its text alone. Raises CheckpointError or UnsupportedModelError."""
    return read_spec(ConfigCheckpoint(config))


class SpecTensors:
    """The tensors of a model, by their shapes alone; stands in for ``Checkpoint`` where weights are counted.

    ``read`` gives zeros that take no memory. ``stored``: what the matrices are quantized to, symmetric, in groups of
    its own size; None = they are not quantized.
    """

    def __init__(self, spec: ModelSpec, stored: WeightFormat | None = None) -> None:
        self._shapes = spec.shapes()
        self._format = stored

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, rows: Rows = slice(None)) -> np.ndarray:
        assert isinstance(rows, slice)
        return np.broadcast_to(np.float32(0), self._shapes[name])

    def stored(self, name: str) -> Stored | None:
        """Return the layout of the matrix ``name``; None: it is not quantized."""
        if self._format is None:
            return None
        rows, columns = self._shapes[name]
        read = partial(self.quantized, name)
        return Stored(self._format, (rows, columns), self._format.group_size, has_zeros=False, read=read)

    def quantized(self, name: str, rows: Rows = slice(None)) -> QuantizedTensor:
        raise AssertionError("there are no values")

    def is_rounded(self, name: str) -> bool:
        """Return whether it is quantized."""
        return self._format is not None


def read_shapes(directory: Path) -> tuple[ConfigCheckpoint, ModelSpec]:
    """Return (configuration, spec) of a checkpoint; weights are looked at only where they are.

    Raises CheckpointError or UnsupportedModelError.
    """
    if is_gguf(directory):
        checkpoint = Checkpoint(directory)
        return ConfigCheckpoint(checkpoint.config), read_spec(checkpoint)
    stand_in = ConfigCheckpoint.of(directory)
    source: ConfigCheckpoint | Checkpoint = stand_in
    if not stand_in.stored_quantization and list(Path(directory).glob("*.safetensors")):
        source = Checkpoint(directory)
    return stand_in, read_spec(source)


def is_checkpoint(directory: Path) -> bool:
    """Return True if ``directory`` is a checkpoint rather than an engine directory."""
    return is_gguf(directory) or (Path(directory) / "config.json").is_file()
