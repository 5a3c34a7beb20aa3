"""JSON files of a checkpoint and of what comes with it."""

from __future__ import annotations

import json
from pathlib import Path

from engine_core.errors import CheckpointError


def read_json(path: Path, *, required: bool = True) -> dict:
    """Return the JSON object in ``path``; empty if it is missing and not ``required``. Raises CheckpointError."""
    if not path.is_file():
        if not required:
            return {}
        raise CheckpointError(f"{path} is missing, so {path.parent} is not a checkpoint directory.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return value
