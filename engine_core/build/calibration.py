"""Calibration text: what a build runs the model on to see how its activations spread.

A file is plain text, or JSON lines (``.jsonl``) that have a ``text`` or a list of ``messages`` (role and content) each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine_core.errors import BuildError, EdgeLLMError
from engine_core.request import ChatMessage

if TYPE_CHECKING:
    from engine_core.tokenizer import Tokenizer

NAMES = ("calibration.jsonl", "calibration.txt")  # in a checkpoint's directory: taken by themselves


def find_calibration(checkpoint: Path, given: Path | None) -> Path | None:
    """``given``, or the checkpoint's own. Raises BuildError if ``given`` is no file."""
    if given is not None:
        if not given.is_file():
            raise BuildError(f"The calibration file {given} does not exist.")
        return given
    return next((checkpoint / name for name in NAMES if (checkpoint / name).is_file()), None)


def read_sequences(path: Path, checkpoint: Path, max_tokens: int) -> list[np.ndarray]:
    """Token ids, int32 [n] with n <= ``max_tokens`` each, of every conversation and text of the file.

    Raises BuildError if the file or the checkpoint's tokenizer cannot be read.
    """
    from engine_core.tokenizer import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer(checkpoint)
        if path.suffix == ".jsonl":
            lines = text.splitlines()
            documents = [_document(tokenizer, line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
        else:
            documents = [tokenizer.encode(text)]
    except BuildError:
        raise
    except (OSError, ValueError, EdgeLLMError) as error:
        raise BuildError(f"The calibration text {path} cannot be used ({error}).") from error
    return [ids[start : start + max_tokens] for ids in documents for start in range(0, len(ids), max_tokens)]


def _document(tokenizer: Tokenizer, line: str, place: str) -> np.ndarray:
    value = json.loads(line)
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return tokenizer.encode(value["text"])
    try:
        messages = [ChatMessage(str(each["role"]), str(each["content"])) for each in value["messages"]]
    except (KeyError, TypeError):
        raise BuildError(f"{place} has neither a 'messages' list of role and content nor a 'text'.") from None
    return tokenizer.encode_messages(messages)
