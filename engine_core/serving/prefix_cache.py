"""Which KV can be reused: the policy over the live KV cache and the saved prefixes. Storage is the backend's.

A prompt reuses the longest run of leading token ids that either the live cache still holds (the conversation goes
on) or a saved slot holds (the same system prompt again). Matching is on ids, so a reused position is exactly
the one that would have been computed. Slots are allocated at configure and reused least-recently-used first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine_core.text.tokenizer import common_prefix_length

if TYPE_CHECKING:
    from engine_core.backends import Backend

# Copying less than this costs more calls than computing it.
_MIN_PREFIX = 8


class PrefixCache:
    """``num_slots`` prefixes of up to ``max_tokens`` tokens each, saved in ``backend``'s slots."""

    def __init__(self, backend: Backend, num_slots: int, max_tokens: int) -> None:
        self._backend = backend
        self._max_tokens = max_tokens
        self._live = np.empty(0, dtype=np.int32)
        # Slot → ids, least recently used first.
        self._saved: dict[int, np.ndarray] = {}
        self._free = list(range(num_slots))

    def restore(self, prompt: np.ndarray) -> int:
        """Makes the KV of the longest known prefix of ``prompt`` (int32 [n]) valid; returns its length.

        At most n - 1: the last token is always computed, since its logits are needed.
        """
        limit = len(prompt) - 1
        live = min(common_prefix_length(self._live, prompt), limit)
        best, best_slot = live, None
        for slot, ids in self._saved.items():
            length = min(common_prefix_length(ids, prompt), limit)
            if length > best and length >= _MIN_PREFIX:
                best, best_slot = length, slot
        if best_slot is not None:
            self._backend.load_prefix(best_slot, best)
            self._touch(best_slot)
        self._live = prompt[:best]
        return best

    def keep(self, prefix: np.ndarray) -> None:
        """Saves ``prefix`` (int32 [n], whose KV is valid in the live cache now), unless a slot has it already."""
        prefix = prefix[: self._max_tokens]
        if len(prefix) < _MIN_PREFIX or not (self._saved or self._free):
            return
        for slot, ids in self._saved.items():
            if common_prefix_length(ids, prefix) == len(prefix):
                self._touch(slot)
                return
        slot = self._free.pop() if self._free else next(iter(self._saved))
        self._saved.pop(slot, None)
        self._backend.save_prefix(slot, len(prefix))
        self._saved[slot] = np.array(prefix, dtype=np.int32)

    def set_live(self, ids: np.ndarray) -> None:
        """States what the live cache holds from position 0 on: int32 [n]."""
        self._live = np.asarray(ids, dtype=np.int32)

    def _touch(self, slot: int) -> None:
        self._saved[slot] = self._saved.pop(slot)
