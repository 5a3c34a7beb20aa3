"""Measure how well a variant models text: its perplexity, from the probability of each token of the text.

Perplexity is exp of the mean negative log-likelihood of the scored tokens, each given all those before it (Jelinek et
al. 1977). A reduced vocabulary cannot produce the tokens it has lost: they are counted apart, not scored, and the rest
is normalized over the rows there are, as the sampler does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine_core.serving.engine import Engine
from engine_core.text.documents import read_documents, token_sequences
from engine_core.text.tokenizer import Tokenizer

_WINDOW = 512  # tokens of plain text scored together


@dataclass(frozen=True)
class Sequence:
    """``token_ids``: int32 [n]. Those from index ``first`` on (1 or more) are scored."""

    token_ids: np.ndarray
    first: int


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and the tokens it is of."""

    perplexity: float  # of the scored tokens; NaN if there are none
    scored_tokens: int
    lost_tokens: int  # outside the reduced vocabulary
    cut_tokens: int  # beyond the engine's max_context


def measure_perplexity(
    engine: Engine, sequences: Iterable[Sequence], report: Callable[[int], None] = lambda done: None
) -> Perplexity:
    """Measure the perplexity; ``report`` is told the number of tokens fed so far, after each sequence.

    A text longer than the engine's max_context is cut there. Raises BackendUnavailableError if the engine's backend
    does not give out its probabilities, EngineFaultError.
    """
    total, scored, lost, cut, fed = 0.0, 0, 0, 0, 0
    for sequence in sequences:
        ids = sequence.token_ids[: engine.max_context]
        cut += len(sequence.token_ids) - max(len(ids), sequence.first)
        if len(ids) <= sequence.first:
            continue
        found = engine.log_probabilities(ids, sequence.first)
        covered = np.isfinite(found)
        total -= float(found[covered].sum())
        scored += int(covered.sum())
        lost += int(len(found) - covered.sum())
        fed += len(ids)
        report(fed)
    return Perplexity(math.exp(total / scored) if scored else math.nan, scored, lost, cut)


def sequences_of(path: Path, tokenizer: Tokenizer) -> Iterator[Sequence]:
    """Return the parts of a text file to score: of a chat every answer, given the conversation before it; of other
    text, all but the first token of each piece of 512.

    Raises BuildError if the file cannot be read or a chat does not fit the model's template.
    """
    if Path(path).suffix != ".jsonl":
        for ids in token_sequences(path, tokenizer, _WINDOW):
            yield Sequence(ids, 1)
        return
    for document in read_documents(path):
        if document.messages:
            for prompt, answer in document.turns(tokenizer):
                yield Sequence(np.concatenate([prompt, answer]), max(1, len(prompt)))
        else:
            ids = document.token_ids(tokenizer)
            for start in range(0, len(ids), _WINDOW):
                yield Sequence(ids[start : start + _WINDOW], 1)
