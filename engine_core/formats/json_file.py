"""JSON files of a checkpoint and of what comes with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from engine_core.errors import CheckpointError
from engine_core.models.fields import has_lone_surrogate

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half a pair, or one of the two of a whole one


def read_json(path: Path, *, required: bool = True) -> dict:
    """Return the JSON object in ``path``; empty if it is missing and not ``required``.

    Raises CheckpointError, also for a text in it that spells half a surrogate pair, which no tokenizer takes.
    """
    if not path.is_file():
        if not required:
            return {}
        raise CheckpointError(f"{path} is missing, so {path.parent} is not a checkpoint directory.")
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        is_whole = _SURROGATE.search(text) is None or not has_lone_surrogate(json.dumps(value, ensure_ascii=False))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    if not is_whole:
        raise CheckpointError(f"{path} has a text with half a surrogate pair, such as \\ud800; write whole characters.")
    return value
