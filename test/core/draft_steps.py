"""Answers of a backend step by step, with drafts that are right, wrong, or right up to a point."""

from __future__ import annotations

import numpy as np

from engine_core.backends import Backend, Draft, SequenceStep
from engine_core.measure.steps import prompt_step
from engine_core.request import SamplingParams

GREEDY = SamplingParams(seed=1)


def answer(backend: Backend, prompt: np.ndarray, count: int, slot: int = 0, sampling: SamplingParams = GREEDY) -> list:
    """Return the ``count`` tokens after a prompt, without drafts."""
    backend.begin(slot, sampling, prompt)
    tokens = [backend.step([prompt_step(backend, prompt, slot=slot)])[0].result()]
    while len(tokens) < count:
        tokens.append(backend.step([SequenceStep(slot)])[0].result())
    return tokens


def guess(expected: list[int], start: int, size: int, right: int) -> Draft:
    """Return a draft of the tokens from ``start`` on, the first ``right`` of which come."""
    ids = np.array(expected[start : start + size], dtype=np.int32)
    ids[right:] = expected[0] + 1 - ids[right:] % 2
    return Draft(ids, np.zeros(len(ids), dtype=bool))


def with_drafts(
    backend: Backend, prompt: np.ndarray, expected: list[int], slot: int = 0, sampling: SamplingParams = GREEDY
) -> list[int]:
    """Return as many tokens as ``expected`` has, in steps with drafts of many sizes and some without."""
    backend.begin(slot, sampling, prompt)
    tokens = [backend.step([prompt_step(backend, prompt, slot=slot)])[0].result()]
    number = 0
    while len(tokens) < len(expected):
        number += 1
        size = min(1 + number * 3 % backend.max_draft, len(expected) - len(tokens) - 1)
        if number % 4 == 0 or size < 1:
            tokens.append(backend.step([SequenceStep(slot)])[0].result())
            continue
        draft = guess(expected, len(tokens), size, number * 2 % (size + 1))
        tokens += backend.step([SequenceStep(slot, draft=draft)])[0].result()
    return tokens


def alternating(backend: Backend, prompts: list[np.ndarray], expected: list[list[int]]) -> list[list[int]]:
    """Return the tokens of sequences in the same steps, each of which has a draft in every other one."""
    for slot, prompt in enumerate(prompts):
        backend.begin(slot, GREEDY, prompt)
    pending = backend.step([SequenceStep(slot, prompt, 0) for slot, prompt in enumerate(prompts)])
    tokens = [[each.result()] for each in pending]
    for number in range(100):
        steps = []
        for slot, found in enumerate(tokens):
            left = len(expected[slot]) - len(found)
            if left > 1 and (number + slot) % 2:
                draft = guess(expected[slot], len(found), min(3, left - 1), (number + slot) % 3)
                steps.append(SequenceStep(slot, draft=draft))
            elif left:
                steps.append(SequenceStep(slot))
        for step, pending_token in zip(steps, backend.step(steps)):
            result = pending_token.result()
            tokens[step.slot] += result if isinstance(result, tuple) else [result]
        if not steps:
            break
    return tokens
