"""The choice of the KV to keep and to reuse: the policy over live slots and the KV pool. Storage is the backend's.

A prompt reuses the longest run of leading token ids that either a free slot still holds (the conversation goes on) or
an entry of the pool holds (a conversation comes back, or a system prompt). Matching is on the ids and ``KVKind``, so a
reused position is one that would have been computed. The KV type is the engine's, and so the pool's.

An entry is what one sequence had in its slot when it ended, or a system prompt. It lies in blocks of the pool that
need not be adjacent; entries share the blocks that were copied from one to the other through a slot, so that what
comes back is, bit for bit, what was computed. A conversation that goes on extends its entry: only what is new is
copied. Full, the pool drops the least recently used entry of the lowest rank (``Rank``), and no entry drops one of a
higher rank than its own: requests that are asked once, in whatever number, never drop a conversation.

Where layers of the model keep a state (``Backend.has_states``), KV alone is not enough to go on from a position: what
is reused ends where a state was kept. The slots have those of the end of what prompts share, of the prompt and of the
last steps; an entry has that of its own end and, of a conversation, that of the end of its prompt.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engine_core.backends.kv_pool import BLOCK_TOKENS
from engine_core.text.tokenizer import common_prefix_length

if TYPE_CHECKING:
    from engine_core.backends import Backend

# Copying less than this costs more calls than computing it.
_MIN_PREFIX = 8
_MAX_ENTRIES = 256  # those whose KV was dropped included: their ids tell that a conversation goes on
_NOTHING = np.empty(0, dtype=np.int32)


class Rank(enum.IntEnum):
    """The worth of an entry. The lowest is dropped first."""

    ONCE = 0  # nothing has gone on from it yet
    CONVERSATION = 1  # it goes on from an earlier one
    SESSION = 2  # a session's
    PROMPT = 3  # a system prompt, of which there are ``prompt_cache_entries`` at most


class KVKind(NamedTuple):
    """Everything that the KV of tokens depends on beside the tokens."""

    adapter: str = ""  # "" = none
    long_rope: bool = False  # of a sequence longer than the backend's ``rope_switch``


_PLAIN = KVKind()


@dataclass(eq=False)
class _Entry:
    """``ids``, int32 [n], and the blocks that hold their KV; without blocks the KV was dropped."""

    ids: np.ndarray
    kind: KVKind
    rank: Rank
    num_prompt: int  # of ``ids``, those that its sequence was given
    session: str = ""
    blocks: list[int] = field(default_factory=list)
    states: dict[int, int] = field(default_factory=dict)  # position → the place of its states in their pool

    def may_be_of(self, session: str) -> bool:
        """Tell whether the entry can become, or is, the KV of ``session``; "" takes what any session has."""
        return session == "" or self.session in ("", session)

    def agrees(self, ids: np.ndarray, length: int) -> bool:
        """Tell quickly whether ``ids`` can have the first ``length`` tokens of the entry."""
        return length <= min(len(self.ids), len(ids)) and self.ids[length - 1] == ids[length - 1]

    def shared(self, ids: np.ndarray, kind: KVKind) -> int:
        """Return how many leading tokens of ``ids`` the entry has, with the same adapter."""
        return common_prefix_length(self.ids, ids) if self.kind.adapter == kind.adapter else 0

    def common(self, ids: np.ndarray, kind: KVKind) -> int:
        """Return how many leading tokens of ``ids`` have the KV that the entry has, or had."""
        return self.shared(ids, kind) if self.kind == kind else 0


@dataclass
class _Live:
    """The contents of a slot from its start. The KV of the first ``num_stored`` is, bit for bit, that of ``entry``."""

    ids: np.ndarray
    kind: KVKind = _PLAIN
    entry: _Entry | None = None
    num_stored: int = 0
    continues: bool = False  # the prompt goes on from an earlier request


class SessionPool:
    """Track what the slots of ``backend`` and its pool hold. One thread uses it, but for ``forget`` and the figures."""

    def __init__(
        self, backend: Backend, *, num_prompts: int, prompt_tokens: int, keeps_conversations: bool = False
    ) -> None:
        """``num_prompts`` system prompts of up to ``prompt_tokens`` tokens each are kept."""
        self._backend = backend
        self._num_prompts = num_prompts
        self._prompt_tokens = prompt_tokens
        self.keeps_conversations = keeps_conversations
        # Slots and entries, least recently used first.
        self._live = {slot: _Live(_NOTHING) for slot in range(backend.num_slots)}
        self._entries: list[_Entry] = []
        self._num_users = np.zeros(backend.pool_tokens // BLOCK_TOKENS, dtype=np.int32)  # entries that use a block
        self._free_states = list(range(backend.state_places if backend.has_states else 0))
        self._forgotten: deque[str] = deque()  # sessions whose entries are to be dropped

    # --- figures: any thread --------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Return the places of the pool."""
        return len(self._num_users) * BLOCK_TOKENS

    @property
    def num_used(self) -> int:
        """Return the places that are taken, in whole blocks."""
        return int(np.count_nonzero(self._num_users)) * BLOCK_TOKENS

    def kept_tokens(self, session: str) -> int:
        """Return the tokens of a session whose KV is in the pool."""
        return max(
            (len(each.ids) for each in self._entries.copy() if each.session == session and each.blocks), default=0
        )

    def forget(self, session: str) -> None:
        """Have the entries of ``session`` dropped before the next one is looked for or stored."""
        self._forgotten.append(session)

    # --- slots ----------------------------------------------------------------------------------------

    def place(self, prompt: np.ndarray, free_slots: Sequence[int], kind: KVKind = _PLAIN) -> tuple[int, int]:
        """Make the KV of the longest known prefix of ``prompt`` (int32 [n]) valid in one of ``free_slots``.

        Returns (slot, length of the prefix). It is at most n - 1: the last token is always computed, since its logits
        are needed. The slot is the one that gains most over what is lost there of another conversation.
        """
        self._drop_forgotten()
        limit, has_states = len(prompt) - 1, self._backend.has_states
        best, saved, continues = self._find(prompt, kind)
        slot, length, most = -1, 0, -(1 << 62)
        for candidate, live in self._live.items():
            if candidate in free_slots:
                common = common_prefix_length(live.ids, prompt) if live.kind == kind else 0
                common = self._last_state(candidate, min(common, limit)) if has_states else common
                gain = max(common, saved) - (len(live.ids) - common)
                if gain > most:
                    slot, length, most = candidate, min(common, limit), gain
        live = self._live.pop(slot)
        entry, num_stored = live.entry, min(live.num_stored, length)
        if best is not None and saved > length:
            for position, place, count in _runs(best.blocks, 0, saved):
                self._backend.load_kv(slot, position, place, count)
            if has_states:
                self._backend.load_state(slot, saved, best.states[saved])
            entry, num_stored, length = best, saved, saved
        self._live[slot] = _Live(prompt[:length], kind, entry, num_stored, continues)
        return slot, length

    def place_fresh(self, free_slots: Sequence[int], prompt: np.ndarray = _NOTHING, kind: KVKind = _PLAIN) -> int:
        """Return one of ``free_slots``, whose KV is forgotten. ``prompt``: int32 [n], what will be computed there."""
        self._drop_forgotten()
        slot = next(slot for slot in self._live if slot in free_slots)
        continues = self._find(prompt, kind)[2]
        del self._live[slot]
        self._live[slot] = _Live(_NOTHING, kind, continues=continues)
        return slot

    def set_live(self, slot: int, ids: np.ndarray) -> None:
        """States what ``slot`` holds now, int32 [n]; what ``place`` found there is still at its beginning."""
        live = self._live.pop(slot)
        live.ids = np.asarray(ids, dtype=np.int32)
        live.num_stored = min(live.num_stored, len(live.ids))
        self._live[slot] = live

    def _find(self, prompt: np.ndarray, kind: KVKind) -> tuple[_Entry | None, int, bool]:
        """Return the entry that has most of ``prompt``, how much, and whether the prompt goes on from another."""
        limit = len(prompt) - 1
        best, saved, continues = None, 0, False
        for entry in self._entries:
            asked = entry.rank != Rank.PROMPT and not continues and entry.agrees(prompt, entry.num_prompt)
            if not asked and not (entry.blocks and entry.agrees(prompt, max(saved, _MIN_PREFIX))):
                continue
            continues |= asked and min(entry.shared(prompt, kind), limit) >= entry.num_prompt
            length = min(entry.common(prompt, kind), limit)
            if self._backend.has_states:
                length = max((position for position in entry.states if position <= length), default=0)
            if entry.blocks and length >= max(saved, _MIN_PREFIX):  # of several, the one used last
                best, saved = entry, length
        if best is not None:
            self._touch(best)
        return best, saved, continues

    # --- entries --------------------------------------------------------------------------------------

    def keep_prompt(self, slot: int, prefix: np.ndarray) -> None:
        """Save a system prompt, int32 [n], whose KV is valid in ``slot`` now, unless it is there already."""
        live, prefix = self._live[slot], prefix[: self._prompt_tokens]
        if len(prefix) < _MIN_PREFIX or not self._num_prompts:
            return
        prompts = [entry for entry in self._entries if entry.rank == Rank.PROMPT]
        for entry in prompts:
            if entry.common(prefix, live.kind) == len(prefix):
                self._touch(entry)
                return
        if self._backend.has_states and len(prefix) not in self._backend.state_positions(slot, marked=True):
            return  # the sequence went on from behind it
        if len(prompts) >= self._num_prompts:
            self._remove(prompts[0])
        entry = _Entry(np.array(prefix, dtype=np.int32), live.kind, Rank.PROMPT, len(prefix))
        states = {len(prefix)} if self._backend.has_states else set()
        if self._store(slot, entry, states) and live.num_stored < len(prefix):
            live.entry, live.num_stored = entry, len(prefix)

    def keep_conversation(self, slot: int, num_prompt: int, session: str = "") -> None:
        """Save what a sequence that has ended left in ``slot``; ``num_prompt``: its prompt's tokens of that.

        ``session``: the name of the session that it belongs to; "" for none.
        """
        self._drop_forgotten()
        live = self._live[slot]
        if not self.keeps_conversations or len(live.ids) < _MIN_PREFIX:
            return
        rank = Rank.SESSION if session else Rank.CONVERSATION if live.continues else Rank.ONCE
        states = self._states_of(slot, num_prompt)
        if self._backend.has_states and max(states, default=0) < _MIN_PREFIX:
            return
        for entry in self._entries:
            has_all = entry.blocks and entry.common(live.ids, live.kind) == len(live.ids)
            has_all = has_all and entry.states.keys() >= states
            if has_all and entry.rank != Rank.PROMPT and entry.may_be_of(session):
                self._note(entry, rank, session)
                return
        kept = self._extended(slot, rank, session, states)
        if kept is None:
            kept = _Entry(live.ids.copy(), live.kind, rank, num_prompt, session)
            self._store(slot, kept, states)
        else:
            kept.num_prompt = num_prompt
            self._note(kept, rank, session)
        if kept.blocks:
            live.entry, live.num_stored = kept, len(kept.ids)
            self._supersede(kept)
            for entry in self._entries:  # what it had before turns were left out of it
                is_same = session and entry.session == session and entry.kind.adapter == kept.kind.adapter
                if is_same and entry is not kept:
                    entry.rank, entry.session = Rank.ONCE, ""

    def _note(self, entry: _Entry, rank: Rank, session: str) -> None:
        """Have ``entry`` be worth ``rank`` at least, and the most recently used."""
        entry.rank, entry.session = max(entry.rank, rank), session or entry.session
        self._touch(entry)

    def _supersede(self, newer: _Entry) -> None:
        """Rank what ``newer`` goes on from lowest; a template may have changed the text of its answer."""
        older = [e for e in self._entries if e is not newer and e.rank != Rank.PROMPT]
        for entry in [e for e in older if e.session in ("", newer.session)]:
            if entry.num_prompt <= entry.shared(newer.ids[: newer.num_prompt], newer.kind):
                if len(entry.ids) <= entry.common(newer.ids, newer.kind):
                    self._remove(entry)
                else:
                    entry.rank, entry.session = Rank.ONCE, ""

    def _last_state(self, slot: int, length: int) -> int:
        """Return the last position up to ``length`` whose states ``slot`` has; 0 = the start."""
        return max((each for each in self._backend.state_positions(slot) if each <= length), default=0)

    def _states_of(self, slot: int, num_prompt: int) -> set[int]:
        """Return the positions whose states are worth keeping of a sequence that has ended in ``slot``."""
        if not self._backend.has_states:
            return set()
        length = len(self._live[slot].ids)
        return {self._last_state(slot, length), self._last_state(slot, min(num_prompt, length))} - {0}

    def _store(self, slot: int, entry: _Entry, states: set[int]) -> bool:
        """Copy the KV of ``entry`` from ``slot`` to the pool, and the states of these positions; False if there is no
        room: its ids are noted all the same."""
        live = self._live[slot]
        shared: list[int] = []
        if live.entry is not None and live.entry.blocks:
            num_shared = common_prefix_length(live.entry.ids[: live.num_stored], entry.ids) // BLOCK_TOKENS
            shared = live.entry.blocks[:num_shared]
        self._num_users[shared] += 1
        num_new = -(-len(entry.ids) // BLOCK_TOKENS) - len(shared)
        blocks = self._take(num_new, len(states), entry.rank, after=shared[-1] if shared else -1)
        if blocks is None:
            self._num_users[shared] -= 1
        else:
            entry.blocks = shared + blocks
            self._save(slot, entry.blocks, len(shared) * BLOCK_TOKENS, len(entry.ids))
            self._save_states(slot, entry, states)
        self._entries.append(entry)
        while len(self._entries) > _MAX_ENTRIES:
            self._remove(min(self._entries, key=lambda e: (bool(e.blocks), e.rank)))
        return blocks is not None

    def _extended(self, slot: int, rank: Rank, session: str, states: set[int]) -> _Entry | None:
        """Return the entry that the KV of ``slot`` goes on from, with what is new; None: there is none, or no room."""
        live = self._live[slot]
        ids, entry = live.ids, live.entry
        if entry is None or not entry.blocks or entry.rank == Rank.PROMPT or len(entry.ids) != live.num_stored:
            return None
        if not entry.may_be_of(session):  # a fork: the other session may go on from there too
            return None
        start, rank = len(entry.ids), max(rank, entry.rank)
        kept = entry.blocks[: start // BLOCK_TOKENS]
        tail = entry.blocks[len(kept) :]  # the block that is not full, if there is one
        if tail and self._num_users[tail[0]] > 1:  # another entry has it: it is copied
            start = len(kept) * BLOCK_TOKENS
        else:
            kept = kept + tail
        num_new = -(-len(ids) // BLOCK_TOKENS) - len(kept)
        num_states = len(states) - len(entry.states)
        blocks = self._take(num_new, num_states, rank, after=kept[-1] if kept else -1, spare=entry)
        if blocks is None:
            return None
        self._num_users[entry.blocks[len(kept) :]] -= 1
        entry.ids, entry.blocks = ids.copy(), kept + blocks
        self._save(slot, entry.blocks, start, len(ids))
        self._save_states(slot, entry, states)
        return entry

    def _save(self, slot: int, blocks: list[int], start: int, stop: int) -> None:
        for position, place, count in _runs(blocks, start, stop):
            self._backend.save_kv(slot, position, place, count)

    def _save_states(self, slot: int, entry: _Entry, positions: set[int]) -> None:
        """Have the entry the states of these positions of ``slot``, and no others. There is room."""
        self._free_states += entry.states.values()
        entry.states = {position: self._free_states.pop() for position in sorted(positions)}
        for position, place in entry.states.items():
            self._backend.save_state(slot, position, place)

    def _touch(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        self._entries.append(entry)

    def _remove(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        self._drop(entry)

    def _drop(self, entry: _Entry) -> None:
        """Give back the blocks and the states of an entry, whose ids stay known."""
        self._num_users[entry.blocks] -= 1
        self._free_states += entry.states.values()
        entry.blocks, entry.states = [], {}

    def _drop_forgotten(self) -> None:
        while self._forgotten:
            session = self._forgotten.popleft()
            for entry in [entry for entry in self._entries if entry.session == session]:
                self._remove(entry)

    # --- blocks ---------------------------------------------------------------------------------------

    def _take(
        self, count: int, num_states: int, rank: Rank, *, after: int, spare: _Entry | None = None
    ) -> list[int] | None:
        """Return ``count`` blocks, adjacent where there are such, for an entry of ``rank``, and see that so many states
        are free; None if there is no room.

        ``after``: the block that the first one best lies behind. ``spare``: an entry that must not be dropped.
        """
        victims = [e for e in self._entries if e.blocks and e.rank <= rank and e is not spare and e.rank != Rank.PROMPT]
        victims.sort(key=lambda entry: entry.rank)  # stable: of a rank, the least recently used first
        free_states = len(self._free_states) + sum(len(each.states) for each in victims)
        if count > self._num_free(victims) or num_states > free_states:
            return None
        for victim in victims:
            if count <= self._num_free() and num_states <= len(self._free_states):
                break
            self._drop(victim)
        taken: list[int] = []
        free = self._num_users == 0
        while len(taken) < count:
            start = after + 1
            if not (start < len(free) and free[start]):
                start = _best_run(free, count - len(taken))
            taken.append(start)
            free[start] = False
            after = start
        self._num_users[taken] += 1
        return taken

    def _num_free(self, without: Iterable[_Entry] = ()) -> int:
        """Return the number of blocks that are free, or would be if the entries ``without`` were dropped."""
        num_users = self._num_users.copy()
        for entry in without:
            num_users[entry.blocks] -= 1
        return int(np.count_nonzero(num_users == 0))


def _best_run(free: np.ndarray, count: int) -> int:
    """Return the start of the shortest run of free blocks that has ``count``, else of the longest one."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], free, [False]]).astype(np.int8)))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    enough = lengths >= count
    chosen = np.flatnonzero(enough)[lengths[enough].argmin()] if enough.any() else lengths.argmax()
    return int(starts[chosen])


def _runs(blocks: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (position, place, tokens) of each run of adjacent places that hold the positions ``start`` to ``stop``."""
    position = start
    while position < stop:
        index = last = position // BLOCK_TOKENS
        while (last + 1) * BLOCK_TOKENS < stop and blocks[last + 1] == blocks[last] + 1:
            last += 1
        end = min(stop, (last + 1) * BLOCK_TOKENS)
        yield position, blocks[index] * BLOCK_TOKENS + position % BLOCK_TOKENS, end - position
        position = end
