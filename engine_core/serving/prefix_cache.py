"""Which KV can be reused: the policy over live slots and saved prefixes. Storage is the backend's.

A prompt reuses the longest run of leading token ids that either a free slot still holds (the conversation goes on) or
a saved entry holds (the same system prompt again). Matching is on ids, so a reused position is exactly the one that
would have been computed. Entries are allocated at configure and reused least-recently-used first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine_core.text.tokenizer import common_prefix_length

if TYPE_CHECKING:
    from engine_core.backends import Backend

# Copying less than this costs more calls than computing it.
_MIN_PREFIX = 8
_NOTHING = np.empty(0, dtype=np.int32)


class PrefixCache:
    """Track what the slots of ``backend`` hold, and ``num_entries`` prefixes of up to ``max_tokens`` tokens each."""

    def __init__(self, backend: Backend, num_entries: int, max_tokens: int) -> None:
        self._backend = backend
        self._max_tokens = max_tokens
        # Slot or entry → ids, least recently used first.
        self._live: dict[int, np.ndarray] = dict.fromkeys(range(backend.num_slots), _NOTHING)
        self._saved: dict[int, np.ndarray] = {}
        self._free = list(range(num_entries))

    def place(self, prompt: np.ndarray, free_slots: Sequence[int]) -> tuple[int, int]:
        """Make the KV of the longest known prefix of ``prompt`` (int32 [n]) valid in one of ``free_slots``.

        Returns (slot, length of the prefix). It is at most n - 1: the last token is always computed, since its logits
        are needed. The slot is the one that gains most over what is lost there of another conversation.
        """
        limit = len(prompt) - 1
        best_entry, saved = None, 0
        for entry, ids in self._saved.items():
            length = min(common_prefix_length(ids, prompt), limit)
            if length > saved and length >= _MIN_PREFIX:
                best_entry, saved = entry, length
        if best_entry is not None:
            self._saved[best_entry] = self._saved.pop(best_entry)
        slot, length, most = -1, 0, -(1 << 62)
        for candidate, ids in self._live.items():
            if candidate in free_slots:
                common = common_prefix_length(ids, prompt)
                gain = max(common, saved) - (len(ids) - common)
                if gain > most:
                    slot, length, most = candidate, min(common, limit), gain
        if best_entry is not None and saved > length:
            self._backend.load_prefix(slot, best_entry, saved)
            length = saved
        self.set_live(slot, prompt[:length])
        return slot, length

    def place_fresh(self, free_slots: Sequence[int]) -> int:
        """Return one of ``free_slots``, whose KV is forgotten."""
        slot = next(slot for slot in self._live if slot in free_slots)
        self.set_live(slot, _NOTHING)
        return slot

    def keep(self, slot: int, prefix: np.ndarray) -> None:
        """Saves ``prefix`` (int32 [n], whose KV is valid in ``slot`` now), unless an entry has it already."""
        prefix = prefix[: self._max_tokens]
        if len(prefix) < _MIN_PREFIX or not (self._saved or self._free):
            return
        for entry, ids in self._saved.items():
            if common_prefix_length(ids, prefix) == len(prefix):
                self._saved[entry] = self._saved.pop(entry)
                return
        entry = self._free.pop() if self._free else next(iter(self._saved))
        self._saved.pop(entry, None)
        self._backend.save_prefix(slot, entry, len(prefix))
        self._saved[entry] = np.array(prefix, dtype=np.int32)

    def set_live(self, slot: int, ids: np.ndarray) -> None:
        """States what ``slot`` holds from position 0 on: int32 [n]."""
        del self._live[slot]
        self._live[slot] = np.asarray(ids, dtype=np.int32)
