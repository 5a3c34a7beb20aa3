"""The texts that a build or a quantization runs the model on, to measure the range of its activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine_core.errors import BuildError, EngineDirectoryError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.companions import open_tokenizer
from engine_core.text.documents import token_sequences

NAMES = ("calibration.jsonl", "calibration.txt")  # in a checkpoint's directory: taken by themselves


def find_calibration(checkpoint: Checkpoint, given: Path | None) -> Path | None:
    """Return ``given``, or the checkpoint's own, or None. Raises BuildError if ``given`` is no file."""
    if given is not None:
        if not Path(given).is_file():
            raise BuildError(f"The calibration text {given} does not exist.")
        return Path(given)
    return next((path for name in NAMES if (path := checkpoint.directory / name).is_file()), None)


def read_sequences(path: Path, checkpoint: Checkpoint, max_tokens: int, vocab_size: int) -> list[np.ndarray]:
    """Token ids, int32 [n] with n <= ``max_tokens`` each, of every chat and text of the file.

    Raises BuildError if the file or the checkpoint's tokenizer cannot be used.
    """
    try:
        tokenizer = open_tokenizer(checkpoint)
    except EngineDirectoryError:
        raise BuildError(
            f"The calibration text {path} cannot be used: {checkpoint.path} has no tokenizer that loads."
        ) from None
    sequences = list(token_sequences(path, tokenizer, max_tokens))
    if not sequences:
        raise BuildError(f"The calibration text {path} is empty.")
    highest = max(int(ids.max()) for ids in sequences)
    if highest >= vocab_size:
        raise BuildError(f"The tokenizer has the token {highest}, but the model only {vocab_size}.")
    return sequences
