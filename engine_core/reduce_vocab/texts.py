"""The user's texts for ``reduce_vocab``: what is written and what is read, counted.

A chat's answers are what the LM head has to write; all else of it is input. In a plain text every token counts as
written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine_core.text.documents import Document, read_documents
from engine_core.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """A tokenized document: ``inputs`` int32 [n]; ``answers`` int32 [m] each, as sampled, stop token included."""

    inputs: np.ndarray
    answers: tuple[np.ndarray, ...]


@dataclass
class Counts:
    """The number of times that each id occurs, int64 [vocab_size]."""

    outputs: np.ndarray
    inputs: np.ndarray
    documents: int = 0

    @classmethod
    def zeros(cls, vocab_size: int) -> Counts:
        return cls(np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64))

    def add(self, sample: Sample, *, all_inputs: bool = False) -> None:
        """Add a document. ``all_inputs``: the answers are examples of what is read, not of what is written."""
        for answer in sample.answers:
            _tally(self.inputs if all_inputs else self.outputs, answer)
        _tally(self.inputs, sample.inputs)
        self.documents += 1


def _tally(counts: np.ndarray, ids: np.ndarray) -> None:
    inside = ids[ids < len(counts)]
    if len(inside):
        found = np.bincount(inside)
        counts[: len(found)] += found


def tokenize(document: Document, tokenizer: Tokenizer) -> Sample:
    """Raises BuildError if the chat template refuses the document."""
    read = [
        tokenizer.encode(message["content"], add_special_tokens=False)
        for message in document.messages
        if message["role"] != "assistant" and message["content"]
    ]
    inputs = np.concatenate([np.empty(0, dtype=np.int32), *read])
    return Sample(inputs, tuple(answer for _, answer in document.turns(tokenizer)))


def split(paths: Sequence[Path], held_out: Path | None, share: float) -> Iterator[tuple[Document, bool]]:
    """Return (document, whether it is held out): all of ``held_out``, or else ``share`` of the texts, evenly spread."""
    index = 0
    for path in paths:
        for document in read_documents(path):
            index += 1
            yield document, held_out is None and int(index * share) > int((index - 1) * share)
    if held_out is not None:
        for document in read_documents(held_out):
            yield document, True
