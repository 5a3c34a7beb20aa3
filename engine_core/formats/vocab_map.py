"""The reduced vocabulary: which full-vocabulary ids the rows of a smaller LM head stand for.

A map belongs to one tokenizer: 'edgellm reduce-vocab' writes a fingerprint of the tokenizer's vocabulary into the file,
and every reader compares it. A map without one (other tools write such) is taken if its ids are in range.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine_core.config import EngineConfig
from engine_core.errors import CheckpointError, ConfigurationError, EngineDirectoryError
from engine_core.formats.manifest import Manifest
from engine_core.formats.safetensors_file import SafetensorsFile, write_safetensors
from engine_core.paths import expand_user

VOCAB_MAP_NAME = "vocab_map.safetensors"
TENSOR_NAME = "vocab_map"
FINGERPRINT = "tokenizer"  # the key of the file's metadata
TOKENIZER_NAME = "tokenizer.json"


def read_vocab_map(path: Path, vocab_size: int, tokenizer_dir: Path) -> np.ndarray:
    """Return int32 [rows], ascending, each id below ``vocab_size``. ``tokenizer_dir``: holds the model's
    tokenizer.json.

    Raises CheckpointError for a file that is no such list, or one made for another tokenizer.
    """
    file = SafetensorsFile(path)
    if TENSOR_NAME not in file.names():
        raise CheckpointError(f"{path} has no tensor {TENSOR_NAME!r}.")
    kept = file.raw(TENSOR_NAME)
    if kept.ndim != 1 or kept.dtype.kind != "i" or not len(kept):
        raise CheckpointError(f"The {TENSOR_NAME} of {path} is not a list of token ids.")
    kept = kept.astype(np.int64)
    if kept[0] < 0 or kept[-1] >= vocab_size or (np.diff(kept) <= 0).any():
        raise CheckpointError(f"The ids in {path} have to ascend, from 0 or more to below {vocab_size}.")
    _check_tokenizer(file, Path(tokenizer_dir) / TOKENIZER_NAME)
    return kept.astype(np.int32)


def check_ends(path: Path | str, kept: np.ndarray, eos_ids: Iterable[int]) -> None:
    """Raises CheckpointError unless every end-of-sequence id is among ``kept``."""
    missing = sorted(set(eos_ids) - set(kept.tolist()))
    if missing:
        raise CheckpointError(
            f"{path} lacks the end-of-sequence token {missing[0]}, without which no answer could end; "
            "make a map with 'edgellm reduce-vocab'."
        )


def write_vocab_map(path: Path, kept: np.ndarray, metadata: dict[str, str]) -> None:
    """Write a vocabulary map. ``kept``: int32 [rows], ascending. Raises OSError."""
    write_safetensors(path, {TENSOR_NAME: kept.astype(np.int32)}, metadata)


def vocab_map_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of the file, to be written into a copy. Raises CheckpointError."""
    return SafetensorsFile(path).metadata


def own_vocab_map(variant_dir: Path, vocab_size: int) -> np.ndarray:
    """Return the map an engine was built with, int32 [rows]. Raises EngineDirectoryError."""
    try:
        return read_vocab_map(variant_dir / VOCAB_MAP_NAME, vocab_size, variant_dir)
    except CheckpointError as error:
        raise EngineDirectoryError(str(error)) from error


def configured_vocab_map(variant_dir: Path, manifest: Manifest, config: EngineConfig) -> tuple[np.ndarray | None, bool]:
    """Return (int32 [rows] or None, whether the engine's LM head is whole and has to be cut to those rows at load).

    Raises ConfigurationError for a parameter ``vocab_map`` that this engine cannot follow, a map that is damaged or
    another tokenizer's included, and EngineDirectoryError if the engine's own map is.
    """
    vocab_size = manifest.model.vocab_size
    built = manifest.reduced_vocab_size > 0
    if config.vocab_map == "none" and built:
        raise ConfigurationError(
            "vocab_map is 'none', but this engine's LM head holds only the rows of its vocab map; "
            "build a variant without one."
        )
    own = own_vocab_map(variant_dir, vocab_size) if built else None
    if config.vocab_map in ("auto", "none"):
        return own, False
    try:
        given = read_vocab_map(expand_user(config.vocab_map), vocab_size, variant_dir)
        check_ends(config.vocab_map, given, manifest.eos_token_ids)
    except CheckpointError as error:
        raise ConfigurationError(str(error)) from error
    if own is not None and not np.array_equal(own, given):
        raise ConfigurationError(
            f"vocab_map is {config.vocab_map}, but the engine's LM head was reduced with another map; choose auto."
        )
    return given, own is None


def tokenizer_fingerprint(tokenizer_json: Path) -> str:
    """SHA-256, hexadecimal, of the vocabulary in a tokenizer.json: every id with its token, added tokens included.

    Rules of tokenizing (merges, normalization) are not part of it: a map holds for every tokenizer whose ids
    mean the same. Raises CheckpointError.
    """
    try:
        status = tokenizer_json.stat()
    except OSError as error:
        raise CheckpointError(f"{tokenizer_json} cannot be read ({error.strerror}).") from error
    return _fingerprint(tokenizer_json, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _fingerprint(path: Path, modified: int, size: int) -> str:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = values["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of the ids
            token_of = {index: entry[0] for index, entry in enumerate(vocabulary)}
        else:
            token_of = {int(token_id): token for token, token_id in vocabulary.items()}
        token_of.update({int(added["id"]): added["content"] for added in values.get("added_tokens") or ()})
    except (OSError, ArithmeticError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a tokenizer of the 'tokenizers' library ({error}).") from error
    if token_of and not 0 <= min(token_of) <= max(token_of) < 1 << 31:
        raise CheckpointError(f"{path} has token ids from {min(token_of)} to {max(token_of)}; 0 to 2^31 - 1 are read.")
    digest = hashlib.sha256()
    for token_id in sorted(token_of):
        token = str(token_of[token_id]).encode("utf-8", "surrogatepass")
        digest.update(token_id.to_bytes(4, "little") + len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()


def _check_tokenizer(file: SafetensorsFile, tokenizer_json: Path) -> None:
    expected = file.metadata.get(FINGERPRINT)
    if not expected:
        return
    if not tokenizer_json.is_file():
        raise CheckpointError(
            f"{file.path} was made for the tokenizer {expected[:12]}…, but {tokenizer_json.parent} has no "
            f"{TOKENIZER_NAME} to compare it with."
        )
    found = tokenizer_fingerprint(tokenizer_json)
    if found != expected:
        raise CheckpointError(
            f"{file.path} was made for the tokenizer {expected[:12]}…, but this model's is {found[:12]}…; "
            "make a map for this model with 'edgellm reduce-vocab'."
        )
