"""What every engine directory has beside the weights, and what its manifest says of where it came from."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.vocab_map import (
    VOCAB_MAP_NAME,
    check_ends,
    read_vocab_map,
    vocab_map_metadata,
    write_vocab_map,
)
from engine_core.models.spec import ModelSpec

# What the tokenizer and the chat template may need; copied where the checkpoint has it.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def copy_companions(checkpoint: Checkpoint, directory: Path) -> None:
    """Tokenizer, chat template and generation settings. Raises OSError."""
    for name in _FILES:
        if (checkpoint.directory / name).is_file():
            shutil.copyfile(checkpoint.directory / name, directory / name)


def find_vocab_map(checkpoint: Checkpoint, given: Path | None) -> Path | None:
    """``given``, or else the checkpoint's own, or None: the LM head keeps all its rows."""
    own = checkpoint.directory / VOCAB_MAP_NAME
    return Path(given) if given is not None else own if own.is_file() else None


def kept_ids(vocab_map: Path | None, checkpoint: Checkpoint, spec: ModelSpec) -> np.ndarray | None:
    """int32 [rows], ascending full ids with every end-of-sequence id among them. Raises CheckpointError."""
    if vocab_map is None:
        return None
    kept = read_vocab_map(vocab_map, spec.vocab_size, checkpoint.directory)
    check_ends(vocab_map, kept, eos_token_ids(checkpoint))
    return kept


def copy_vocab_map(vocab_map: Path | None, kept: np.ndarray | None, directory: Path) -> None:
    """With what the file says of itself. Raises OSError."""
    if vocab_map is not None and kept is not None:
        write_vocab_map(directory / VOCAB_MAP_NAME, kept, vocab_map_metadata(vocab_map))


def eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Those of generation_config.json and of config.json: both are in use, and they may differ."""
    return tuple(sorted(set(config_ids(checkpoint, "eos_token_id"))))


def config_ids(checkpoint: Checkpoint, name: str) -> list[int]:
    """What config.json and generation_config.json have under ``name``: a token id, several, or none."""
    ids: list[int] = []
    for config in (checkpoint.config, checkpoint.generation_config):
        value = config.get(name)
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return [int(token_id) for token_id in ids]


def model_name(checkpoint: Checkpoint) -> str:
    name = str(checkpoint.config.get("_name_or_path") or "")
    return Path(name).name or checkpoint.directory.resolve().name


def versions(packages: Sequence[str] = ("onnx",)) -> dict[str, str]:
    """Of this project, of numpy and of ``packages``, as far as they are installed."""
    found = {}
    for package in ("edgellm_ros", *packages, "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
