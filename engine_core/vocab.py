"""The reduced vocabulary: which full-vocabulary ids the rows of a smaller LM head stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine_core.errors import CheckpointError
from engine_core.safetensors_file import SafetensorsFile

VOCAB_MAP_NAME = "vocab_map.safetensors"
TENSOR_NAME = "vocab_map"


def read_vocab_map(path: Path, vocab_size: int) -> np.ndarray:
    """int32 [rows]. Raises CheckpointError unless the file has ids that ascend, from 0 to below ``vocab_size``."""
    file = SafetensorsFile(path)
    if TENSOR_NAME not in file.names():
        raise CheckpointError(f"{path} has no tensor {TENSOR_NAME!r}.")
    kept = file.raw(TENSOR_NAME)
    if kept.ndim != 1 or kept.dtype.kind != "i" or not len(kept):
        raise CheckpointError(f"The {TENSOR_NAME} of {path} is not a list of token ids.")
    kept = kept.astype(np.int64)
    if kept[0] < 0 or kept[-1] >= vocab_size or (np.diff(kept) <= 0).any():
        raise CheckpointError(f"The ids in {path} have to ascend, from 0 or more to below {vocab_size}.")
    return kept.astype(np.int32)
