"""A GGUF file as a checkpoint: tensors under Hugging Face's names, as the family's checkpoints have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine_core.errors import CheckpointError
from engine_core.formats.gguf_file import read_parts
from engine_core.formats.number_formats import QuantizedTensor, unpack_nibbles
from engine_core.formats.quantized_layouts import Rows, Stored
from engine_core.formats.weight_formats import weight_format
from engine_core.models.gguf import config_of, family_of, tensor_names
from engine_core.text.gguf_tokenizer import GgufTokenizer

_GROUP = 32  # weights of a block of Q4_0 or Q8_0
_PLAIN = ("F32", "F16", "BF16", "F64")
# Block types whose values are those of a weight format of ours.
_KEPT = {"Q4_0": "int4", "Q8_0": "int8"}


class GgufModel:
    """All parts of a model. Names are those of Hugging Face, but where a method says otherwise.

    Raises CheckpointError or UnsupportedModelError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = path.name
        parts = read_parts(path)
        for part in parts:
            part.check_types()
        self.metadata: dict[str, Any] = parts[0].metadata
        self._file_of = {name: part for part in parts for name in part.names()}
        self.num_bytes = sum(part.path.stat().st_size for part in parts)
        source = _Source(self)
        self._family = family_of(source)
        self._names = tensor_names(source, self._family)
        self.config = config_of(source, self._family)
        self._tokenizer = GgufTokenizer(self.metadata, self.label)
        ends = self._tokenizer.end_ids()
        self.generation_config: dict[str, Any] = {"eos_token_id": ends} if ends else {}

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).shape(self._names[name])

    def dtype(self, name: str) -> str:
        """Return ggml's name of the type."""
        return self._file(name).dtype(self._names[name])

    def is_rounded(self, name: str) -> bool:
        """Return True for a tensor whose type has scales."""
        return self.dtype(name) not in _PLAIN

    def read(self, name: str, rows: Rows = slice(None)) -> np.ndarray:
        """Return rows as float32, dequantized. Raises CheckpointError."""
        order = self._row_order(name)
        values = self._file(name).read(self._names[name], rows if order is None else order[rows])
        if self._family.norm_offset and name.endswith("norm.weight"):
            values -= np.float32(self._family.norm_offset)  # the file has it added
        return values

    def stored(self) -> dict[str, Stored]:
        """Return the matrices whose quantized values are those of a weight format."""
        return {
            name: self._stored(name) for name in self._names if self.dtype(name) in _KEPT and len(self.shape(name)) == 2
        }

    def write_companions(self, directory: Path) -> None:
        """Write the tokenizer's files and the configurations. Raises CheckpointError or UnsupportedModelError."""
        files = self._tokenizer.files() | {"config.json": json.dumps(self.config, indent=2)}
        if self.generation_config:
            files["generation_config.json"] = json.dumps(self.generation_config)
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")

    def _file(self, name: str):
        return self._file_of[self._names[name]]

    def _row_order(self, name: str) -> np.ndarray | None:
        """Return int64 [rows], where the file has each row of Q and K; None: in the same place."""
        part = name.split(".")[-2]
        if not self._family.gguf_pairs_rows or part not in ("q_proj", "k_proj"):
            return None
        heads = self.config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
        rows = self.shape(name)[0]
        if rows % (2 * heads):
            raise CheckpointError(f"{self.label} has {self._names[name]} of {rows} rows for {heads} heads.")
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()

    def _stored(self, name: str) -> Stored:
        kept = weight_format(_KEPT[self.dtype(name)])
        rows, columns = self.shape(name)
        blocks, order = self._file(name).blocks(self._names[name]), self._row_order(name)

        def read(which: Rows) -> QuantizedTensor:
            found = blocks[which if order is None else order[which]]
            found = found.reshape(len(found), columns // _GROUP, -1)
            scales = np.ascontiguousarray(found[..., :2]).view(np.float16)[..., 0].astype(np.float32)
            values = found[..., 2:]
            if kept.bits == 4:  # the first half of a block is in the low nibbles
                pairs = unpack_nibbles(np.ascontiguousarray(values), _GROUP)
                quantized = np.concatenate([pairs[..., 0::2], pairs[..., 1::2]], axis=-1)
            else:
                quantized = values ^ np.uint8(0x80)
            return QuantizedTensor(quantized.reshape(len(found), columns), scales, None, kept.bits, _GROUP)

        return Stored(kept, (rows, columns), _GROUP, False, read, scale_type="F16")


class _Source:
    """The file under its own names, for ``models.gguf``."""

    def __init__(self, model: GgufModel) -> None:
        self._files = model._file_of
        self.metadata, self.label = model.metadata, model.label

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].shape(name)

    def dtype(self, name: str) -> str:
        return self._files[name].dtype(name)

    def read(self, name: str) -> np.ndarray:
        return self._files[name].read(name)
