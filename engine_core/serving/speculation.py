"""Speculative decoding: steps that feed guessed tokens too, and keep those that would have been sampled anyway.

Nothing here decides about the text. The backend samples after every fed token what it would sample in a step of its
own: with the same mask, penalties and random number, since the draw of a step depends on the request's seed and the
step's number alone (a coupling by common random numbers: Daliri et al. 2024, "Coupling without communication and
drafter-invariant speculative decoding", arXiv 2408.07978). A guess is kept if it is that token. So the answer is the
one without speculation, greedy or not, and follows the same distribution.

Guesses are text that the schema forces, which is certain, and prompt lookup (``drafts``). How many tokens a step feeds
is chosen by what they promise and by what such a step costs on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq

import numpy as np

from engine_core.backends import Backend, Draft, SequenceStep
from engine_core.errors import EdgeLLMError, refusing_panics
from engine_core.request import SamplingParams, SpeculationCounts
from engine_core.serving.constraint import AnswerConstraint
from engine_core.serving.drafts import Lookup, TokenIndex, Trust
from engine_core.serving.sequence import Sequence

_HISTORY = 1 << 13  # tokens of earlier answers that are looked up
_CONTEXT = 4  # tokens of the prompt's end, kept with the answer so that its beginning is found
_LEAST_GAIN = 1.05  # tokens for the time of one, from which a draft is worth it
_LEAST_CHANCE = 0.1  # that all of a draft is right: no token is added below


class _Slot:
    """The drafts of the sequence in one slot. All its memory is taken here."""

    def __init__(self, lookup: Lookup, max_draft: int, words: int) -> None:
        self.lookup = lookup
        self.ids = np.zeros(max_draft, dtype=np.int32)
        self.forced = np.zeros(max_draft, dtype=bool)
        self.masks = np.zeros((max_draft, words), dtype=np.uint32)
        self.mask = np.zeros(words, dtype=np.uint32)  # of the first token of a step
        self.takes_drafts = True
        self.counts = SpeculationCounts()  # of this sequence


class Speculation:
    """The drafts of all running sequences of an engine. For the engine's thread."""

    def __init__(self, backend: Backend, mask_seconds: Callable[[], float]) -> None:
        """``mask_seconds`` measures how long a schema's mask takes, where drafts may depend on what is measured."""
        self._backend = backend
        is_timed = backend.max_draft and backend.step_seconds
        self._mask_cost = mask_seconds() / backend.step_seconds if is_timed else 0.0  # in plain steps
        self.max_draft = backend.max_draft  # tokens of a step's draft, at most; 0: there are none
        self.counts = SpeculationCounts()  # of all sequences
        capacity = 1 << max(0, backend.max_context - 1).bit_length()
        # Where a draft can change a text by its rounding, drafts depend on the request alone.
        self._shares = backend.exact_drafts
        self._history = TokenIndex(_HISTORY) if self._shares else None
        self._trust = Trust()
        words = (backend.vocab_size + 31) // 32
        self._slots = [
            _Slot(Lookup(capacity, self._history, self._trust), self.max_draft, words)
            for _ in range(backend.num_slots if self.max_draft else 0)
        ]

    @property
    def enabled(self) -> bool:
        return bool(self._slots)

    def begin(self, sequence: Sequence) -> None:
        """Take up a sequence that has got its slot."""
        if self._slots:
            slot = self._of(sequence)
            slot.counts = SpeculationCounts()
            slot.takes_drafts = self._takes_drafts(sequence)
            slot.lookup.begin(sequence.prepared.token_ids, None if self._shares else Trust())

    def waits(self, sequences: Seq[Sequence]) -> bool:
        """Return True if the tokens on their way are better waited for: a draft after one of them is worth it."""
        return bool(self._slots) and any(self._gains_by_waiting(sequence) for sequence in sequences)

    def add_drafts(self, sequences: Seq[Sequence], steps: list[SequenceStep]) -> None:
        """Give those of ``steps`` a draft that gain by one. ``sequences`` are their owners."""
        if not self._slots:
            return
        rows = [1 for step in steps if step.token_ids is None]
        index = 0
        for i, (sequence, step) in enumerate(zip(sequences, steps)):
            if step.token_ids is not None:
                continue
            if not sequence.unread:
                rows[index], steps[i] = self._with_draft(sequence, step, rows, index)
            index += 1

    def read(self, sequence: Sequence, step: SequenceStep, tokens: Seq[int]) -> None:
        """Note what a step has sampled."""
        if not self._slots:
            return
        slot = self._of(sequence)
        if step.draft is not None:
            forced = step.draft.forced[: max(0, len(tokens) - 1)]
            counts = SpeculationCounts(
                steps=1,
                drafted=len(step.draft.forced) - int(step.draft.forced.sum()),
                accepted=len(forced) - int(forced.sum()),
                forced=int(forced.sum()),
            )
            slot.counts += counts
            self.counts += counts
        for token in tokens:
            slot.lookup.add(token)

    def end(self, sequence: Sequence) -> SpeculationCounts:
        """Keep the answer of a sequence for later lookups, and return its counts."""
        if not self._slots:
            return SpeculationCounts()
        if self._history is not None:
            self._history.extend(sequence.prepared.token_ids[-_CONTEXT:])
            self._history.extend(np.array(sequence.token_ids, dtype=np.int32))
        return self._of(sequence).counts

    # --- helpers --------------------------------------------------------------------------------------

    def _of(self, sequence: Sequence) -> _Slot:
        assert sequence.slot is not None, "it has no slot yet"
        return self._slots[sequence.slot]

    def _gains_by_waiting(self, sequence: Sequence) -> bool:
        """Return True if a draft after the token on its way is worth waiting for that token."""
        if not sequence.unread:
            return False
        if sequence.unread[0][0].draft is not None:
            return True
        if sequence.prepared.constraint is not None or sequence.num_sampled == 0:
            return False
        slot = self._of(sequence)
        guess = slot.lookup.guess()
        if guess is None or guess[1] < _LEAST_CHANCE:
            return False
        token, chance = guess
        mark = slot.lookup.mark()
        slot.lookup.follow(token)
        size, gain = self._fill(slot, None, frozenset(), self._room(sequence, 1), [1])
        slot.lookup.reset(mark)
        return bool(size) and chance * gain + (1.0 - chance) > _LEAST_GAIN

    def _takes_drafts(self, sequence: Sequence) -> bool:
        """Return False with a LoRA adapter, whose branches may round several tokens otherwise than one, and with a
        sampling option that the backend's steps with a draft do not apply."""
        sampling, default = sequence.prepared.sampling, SamplingParams()
        undrafted = self._backend.undrafted_options
        return not sequence.adapter and all(getattr(sampling, x) == getattr(default, x) for x in undrafted)

    def _room(self, sequence: Sequence, unread: int) -> int:
        """Return how many tokens can be drafted for the answer to stay within its length, and within its RoPE's."""
        if not self._of(sequence).takes_drafts:
            return 0
        left = sequence.prepared.max_new_tokens - sequence.num_sampled
        if (left_of_rope := sequence.left_of_rope) is not None:
            left = min(left, left_of_rope)
        return min(self.max_draft, left - unread - 1)

    def _with_draft(
        self, sequence: Sequence, step: SequenceStep, rows: list[int], index: int
    ) -> tuple[int, SequenceStep]:
        """Return the tokens that a step feeds, and the step."""
        slot, constraint = self._of(sequence), sequence.prepared.constraint
        room = self._room(sequence, 0)
        if room < 1:
            return 1, step
        if step.mask is not None:
            np.copyto(slot.mask, step.mask)
            step = step._replace(mask=slot.mask)
        others = rows[:index] + rows[index + 1 :]
        mark = slot.lookup.mark()
        fork = None if constraint is None else constraint.fork()
        try:
            with refusing_panics("drafting"):
                size, _ = self._fill(slot, fork, sequence.prepared.sampling.stop_token_ids, room, others + [1])
        except EdgeLLMError:  # what is wrong with the schema shows when the answer gets there
            size = 0
        slot.lookup.reset(mark)
        if not size:
            return 1, step
        masks = None if constraint is None else slot.masks[:size]
        return 1 + size, step._replace(draft=Draft(slot.ids[:size], slot.forced[:size], masks))

    def _fill(
        self,
        slot: _Slot,
        constraint: AnswerConstraint | None,
        stop_ids: Collection[int],
        room: int,
        rows: list[int],
    ) -> tuple[int, float]:
        """Draft up to ``room`` tokens into the arrays of ``slot``; return how many are worth it, and what they gain.

        ``rows``: the tokens of every sequence of the step, this one's last. The gain is in tokens for the time of one.
        """
        cost = self._backend.step_cost
        masks = 0.0 if constraint is None else self._mask_cost  # what those of the step cost; it waits for them
        others, base = rows[:-1], len(rows) / (cost(rows) + masks)
        best, best_gain, expected, chance = 0, _LEAST_GAIN, float(len(rows)), 1.0
        for i in range(room):
            token = None if constraint is None else constraint.forced
            forced = token is not None
            if token is None:
                guess = slot.lookup.guess()
                if guess is None or chance * guess[1] < _LEAST_CHANCE:
                    break
                token = guess[0]
                chance *= guess[1]
            if token in stop_ids:
                break
            if constraint is not None:
                allowed = slot.mask if i == 0 else slot.masks[i - 1]
                if not allowed[token // 32] >> np.uint32(token % 32) & 1:
                    break
                constraint.accept(token)
                if constraint.complete:
                    break
                slot.masks[i] = constraint.mask()
                masks += self._mask_cost * (constraint.forced is None)
            slot.ids[i], slot.forced[i] = token, forced
            slot.lookup.follow(token)
            expected += chance
            gain = expected / (cost([*others, i + 2]) + masks) / base
            if gain > best_gain:
                best, best_gain = i + 1, gain
        return best, best_gain
