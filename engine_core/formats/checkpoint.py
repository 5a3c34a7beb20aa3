"""A model before it is built: a Hugging Face directory (config.json and safetensors) or a GGUF file, memory-mapped.

Weights that are quantized (``quantized_layouts.py``, ``gguf_model.py``) have the name, the shape and the values they
stand for, like others.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine_core.errors import BuildError, CheckpointError
from engine_core.formats.atomic import scratch_directory
from engine_core.formats.gguf_file import SUFFIX, is_gguf
from engine_core.formats.json_file import read_json
from engine_core.formats.number_formats import QuantizedTensor
from engine_core.formats.quantized_layouts import Stored, find_stored, has_fp8_activations
from engine_core.formats.safetensors_file import SafetensorsFile
from engine_core.formats.weight_formats.integers import IntegerFormat
from engine_core.models.text_model import tensor_renaming, text_config

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MODELOPT = "hf_quant_config.json"


class TensorFile(Protocol):
    """A file that holds tensors; see ``SafetensorsFile``."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str: ...

    def read(self, name: str, rows: slice | np.ndarray = ...) -> np.ndarray: ...


class Checkpoint:
    """The configuration and the tensors of a checkpoint; nothing is read before it is asked for.

    ``path``: the directory, or the GGUF file, of which several may be one model. Raises CheckpointError if config.json,
    the safetensors or the GGUF file are missing or damaged, UnsupportedModelError for a quantization or an architecture
    that is not read, BuildError without the package ``gguf`` where it is needed.
    """

    has_tensors = True  # see engine_core.models.shapes.ConfigCheckpoint

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.is_gguf = is_gguf(self.path)
        self._file_of: dict[str, TensorFile]
        self.config: dict[str, Any]
        self.fp8_activations = False  # whether its fp8 weights are meant for activations in fp8
        if self.is_gguf:
            self._gguf = _open_gguf(self.path)
            self.config, self.generation_config = self._gguf.config, self._gguf.generation_config
            self._file_of = dict.fromkeys(self._gguf.names(), self._gguf)
            self._stored = self._gguf.stored()
            return
        _check_directory(self.path)
        whole = read_json(self.path / "config.json")
        self.config = text_config(whole)
        self.generation_config = read_json(self.path / "generation_config.json", required=False)
        files = _renamed(self._open(), tensor_renaming(whole))
        self._file_of = dict(files)
        quantization = self._quantization()
        self._stored = find_stored(quantization, files)
        self.fp8_activations = has_fp8_activations(quantization)

    def _quantization(self) -> dict:
        """Return the configuration with its quantization_config, which ModelOpt may have put into a file of its own."""
        side = self.path / _MODELOPT
        if self.config.get("quantization_config") or not side.is_file():
            return self.config
        found = read_json(side).get("quantization")
        algorithm = found.get("quant_algo") if isinstance(found, dict) else None
        if not algorithm:
            return self.config
        return {**self.config, "quantization_config": {"quant_method": "modelopt", "quant_algo": algorithm}}

    @property
    def name(self) -> str:
        """The model's name, as far as the path has it."""
        return self.path.resolve().stem if self.is_gguf else self.path.resolve().name

    @property
    def config_name(self) -> str:
        """The name, in messages, of what the configuration is read from."""
        return self.path.name if self.is_gguf else "config.json"

    @cached_property
    def directory(self) -> Path:
        """The directory with the tokenizer's files and config.json; of a GGUF file, one made for this object's life.

        Raises CheckpointError or UnsupportedModelError for a tokenizer that is not read, BuildError if it cannot be
        written.
        """
        if not self.is_gguf:
            return self.path
        life = contextlib.ExitStack()
        weakref.finalize(self, life.close)
        try:
            made = life.enter_context(scratch_directory(Path(tempfile.gettempdir()), "edgellm-gguf"))
            self._gguf.write_companions(made)
        except OSError as error:
            raise BuildError(
                f"The tokenizer's files of {self.path} could not be written to the directory for temporary files "
                f"({error.strerror or error}); name another one with TMPDIR."
            ) from error
        return made

    @property
    def processor_directory(self) -> Path | None:
        """The directory with the files of an image processor; None of a GGUF file, which has none."""
        return None if self.is_gguf else self.path

    @property
    def num_bytes(self) -> int:
        """Bytes of the files that hold tensors. Raises CheckpointError."""
        return self._gguf.num_bytes if self.is_gguf else stored_bytes(self.path)

    def dtypes(self) -> list[str]:
        """Return the types of the stored tensors, each as often as it occurs."""
        return [file.dtype(name) for name, file in self._file_of.items()]

    def _open(self) -> dict[str, SafetensorsFile]:
        index = self.path / _INDEX
        if (self.path / _SINGLE).is_file():
            file = SafetensorsFile(self.path / _SINGLE)
            return dict.fromkeys(file.names(), file)
        if not index.is_file():
            raise CheckpointError(
                f"{self.path} has neither {_SINGLE} nor {_INDEX}; safetensors checkpoints and GGUF files are read."
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map of tensor names to file names; fetch it again.")
        files = {}
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard:
                raise CheckpointError(f"{index} names the file {shard!r}, which lies outside the checkpoint.")
            files[shard] = SafetensorsFile(self.path / shard)
        missing = [name for name, shard in weight_map.items() if name not in files[shard].names()]
        if missing:
            shard = self.path / weight_map[missing[0]]
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
        """Return the file's name of the type of a tensor that is not quantized. Raises CheckpointError."""
        return self._file(name).dtype(name)

    # --- quantized weights --------------------------------------------------------------------------

    @property
    def is_quantized(self) -> bool:
        """True if any weight is; in a GGUF file, any whose values are those of a weight format."""
        return bool(self._stored)

    def is_rounded(self, name: str) -> bool:
        """Return True for a tensor that is quantized, in a format of ours or in another type with scales."""
        return name in self._stored or (self.is_gguf and name in self._file_of and self._gguf.is_rounded(name))

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

    def _file(self, name: str) -> TensorFile:
        if name not in self._file_of:
            raise CheckpointError(f"The checkpoint {self.path} has no tensor {name!r}.")
        return self._file_of[name]


def _renamed(files: dict[str, SafetensorsFile], new_name: Callable[[str], str] | None) -> dict[str, SafetensorsFile]:
    """Return the files by the new names of their tensors; see ``text_model.tensor_renaming``."""
    if new_name is None:
        return files
    for file in {id(file): file for file in files.values()}.values():
        file.rename(new_name)
    return {name: file for old, file in files.items() if (name := new_name(old))}


def _open_gguf(path: Path):
    """Return the model in a GGUF file. Raises BuildError without the package that reads its types."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise BuildError(f"Reading {path.name} needs the Python package {error.name!r}: pip install it.") from error
    from engine_core.formats.gguf_model import GgufModel

    return GgufModel(path)


def stored_bytes(directory: Path) -> int:
    """Return the bytes of the safetensors files in ``directory``; 0 if there are none. Raises CheckpointError."""
    try:
        return sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read ({error}).") from error


def _check_directory(directory: Path) -> None:
    """Raises CheckpointError for what is no checkpoint directory, with what to do."""
    if not directory.exists():
        is_model_id = len(directory.parts) == 2 and not directory.is_absolute() and not directory.parent.exists()
        hint = ""
        if is_model_id:
            hint = f" If it is a model of a hub, download it first: 'hf download {directory} --local-dir DIR'."
        raise CheckpointError(f"The checkpoint directory {directory} does not exist.{hint}")
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is a file; a checkpoint is a directory with config.json and safetensors, or a GGUF file."
        )
    if not (directory / "config.json").is_file() and (files := sorted(directory.glob(f"*{SUFFIX}"))):
        raise CheckpointError(f"{directory} has no config.json but GGUF files; name one of them, such as {files[0]}.")
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory} has an adapter_config.json: a LoRA adapter is not applied by a build; merge it into its base "
            "model first, or remove that file if the weights are merged already."
        )
