"""Drive a backend step by step, for measuring and for tests; one sequence is in the first slot."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from engine_core.backends import Backend, PendingToken, SequenceStep
from engine_core.request import SamplingParams


def begin(backend: Backend, sampling: SamplingParams, prompt: np.ndarray) -> None:
    """Start a sequence in slot 0. ``sampling``: with a seed; ``prompt``: int32 [n]."""
    backend.begin(0, sampling, prompt)


def prefill(backend: Backend, token_ids: np.ndarray, position: int = 0, mask: np.ndarray | None = None) -> PendingToken:
    return backend.step([prompt_step(backend, token_ids, position)._replace(mask=mask)])[0]


def decode(backend: Backend, mask: np.ndarray | None = None) -> PendingToken:
    return backend.step([SequenceStep(0, mask=mask)])[0]


def extend(backend: Backend, token_ids: np.ndarray, position: int, adapter: str = "", *, length: int = 0) -> None:
    """Write the KV of ``token_ids`` without sampling, as for a prefix that is to be saved.

    ``length``: tokens of the prompt that it is a part of; 0 = it is the last part.
    """
    backend.begin(0, SamplingParams(seed=0), token_ids, adapter)
    backend.step([prompt_step(backend, token_ids, position, length)._replace(samples=False)])[0].result()


def prompt_step(
    backend: Backend, token_ids: np.ndarray, position: int = 0, length: int = 0, slot: int = 0
) -> SequenceStep:
    """Return the step of a part of a prompt of ``length`` tokens; 0 = it ends with the part."""
    is_long = 0 < backend.rope_switch < (length or position + len(token_ids))
    return SequenceStep(slot, token_ids, position, long_rope=is_long)


def seconds_per_step(backend: Backend, slots: Sequence[int], count: int) -> float:
    """Return the seconds of each of ``count`` decode steps of sequences that run in ``slots``.

    As the engine does, a step is queued before the tokens of the one before are read.
    """
    steps = [SequenceStep(slot) for slot in slots]
    pending = backend.step(steps)
    begin = time.perf_counter()
    for _ in range(count):
        ahead = backend.step(steps)
        assert None not in [each.result() for each in pending]
        pending = ahead
    end = time.perf_counter()
    for each in pending:
        each.result()
    return (end - begin) / count
