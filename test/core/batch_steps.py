"""Several requests on one backend, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engine_core.backends import Backend, SequenceStep
from engine_core.request import SamplingParams


@dataclass(frozen=True)
class Requests:
    """Prompts, and the sampling, the mask and the adapter (of none, if left out) of each one's ``count`` tokens."""

    prompts: list[np.ndarray]
    options: list[tuple[SamplingParams, np.ndarray | None]]
    count: int
    adapters: list[str] | None = None

    def together(
        self,
        backend: Backend,
        slots: Mapping[int, int],
        joins: Mapping[int, int] | None = None,
        leaves: Mapping[int, int] | None = None,
    ) -> dict[int, list[int]]:
        """Run requests (index → slot) and return their tokens, by index.

        Each runs from step ``joins`` (0 where it is not named) to step ``leaves`` (its end); a step is queued ahead
        of reading.
        """
        joins, leaves = joins or {}, leaves or {}
        tokens: dict[int, list[int]] = {index: [] for index in slots}
        pending: list[tuple[int, object]] = []
        for number in itertools.count():
            steps, owners = [], []
            for index, slot in slots.items():
                sampling, mask = self.options[index]
                first = joins.get(index, 0)
                if number == first:
                    backend.begin(slot, sampling, self.prompts[index], self.adapters[index] if self.adapters else "")
                    steps.append(SequenceStep(slot, self.prompts[index], 0, mask))
                elif first < number < leaves.get(index, first + self.count):
                    steps.append(SequenceStep(slot, mask=mask))
                else:
                    continue
                owners.append(index)
            queued = list(zip(owners, backend.step(steps))) if steps else []
            for index, token in pending:
                tokens[index].append(token.result())
            pending = queued
            if not pending and number > max(joins.values(), default=0):
                return tokens

    def alone(self, backend: Backend, index: int, slot: int = 0) -> list[int]:
        """Return the tokens of one request with no other beside it."""
        return self.together(backend, {index: slot})[index]
