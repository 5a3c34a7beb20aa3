"""Guess the tokens that come next: prompt lookup over fixed memory, and how far a guess is to be trusted.

Prompt lookup (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding) takes what followed the same n-gram
before: in the prompt, in the answer so far, and in the answers of earlier requests.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ORDERS = (4, 2)  # tokens of the n-grams that are looked up, the longest first
_LONGEST_MATCH = 16  # tokens compared beyond the n-gram
_MOST_TOKENS = 1 << 30  # after which an index starts anew
_FACTORS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
_LEARNED = 0.98  # what an outcome weighs when the next one comes
_PRIOR_WEIGHT = 4.0  # outcomes that the first guess of a probability counts for
# Tokens that match before a guess → the probability that it is right, before anything is known.
_PRIORS = (0.0, 0.0, 0.25, 0.35, 0.45, 0.5, 0.55, 0.6, 0.65)


class Match(NamedTuple):
    """A place where the last tokens stand, too: ``position`` is that of the token after them."""

    position: int
    length: int  # tokens that are the same


class TokenIndex:
    """The last ``capacity`` tokens of a text, and where its n-grams were seen last.

    All memory is taken by the constructor: 4 bytes a token, and 16 for its n-grams. ``capacity``: a power of two.
    """

    def __init__(self, capacity: int) -> None:
        assert capacity & (capacity - 1) == 0
        self._ring = capacity - 1
        self._mask = 2 * capacity - 1
        self._tokens = array("i", bytes(4 * capacity))
        self._places = {order: array("i", b"\xff" * (8 * capacity)) for order in ORDERS}
        self.count = 0  # tokens that were added since the start

    def clear(self) -> None:
        self.count = 0
        for places in self._places.values():
            np.frombuffer(places, dtype=np.int32)[:] = -1

    def __getitem__(self, position: int) -> int:
        """Return the token at ``position``, one of the last ``capacity``."""
        return self._tokens[position & self._ring]

    def add(self, token: int) -> None:
        if self.count == _MOST_TOKENS:
            self.clear()
        tokens, ring, count = self._tokens, self._ring, self.count
        for order, places in self._places.items():
            if count >= order:
                key = 0
                for i in range(order):
                    key += tokens[(count - 1 - i) & ring] * _FACTORS[i]
                places[(key ^ key >> 15) & self._mask] = count
        tokens[count & ring] = token
        self.count = count + 1

    def extend(self, ids: np.ndarray) -> None:
        """Add ``ids``, int32 [n]; only the last ``capacity`` of them matter."""
        ids = ids[-(self._ring + 1) :]
        if self.count or not len(ids):
            for token in ids.tolist():
                self.add(token)
            return
        np.frombuffer(self._tokens, dtype=np.int32)[: len(ids)] = ids
        wide = ids.astype(np.int64)
        for order, places in self._places.items():
            if len(ids) > order:
                keys = sum(wide[order - 1 - i : len(ids) - 1 - i] * _FACTORS[i] for i in range(order))
                np.frombuffer(places, dtype=np.int32)[(keys ^ keys >> 15) & self._mask] = np.arange(order, len(ids))
        self.count = len(ids)

    def find(self, tail: Sequence[int]) -> Match | None:
        """Return where the longest end of ``tail`` stood last, of those that are looked up."""
        tokens, ring, size = self._tokens, self._ring, len(tail)
        oldest = self.count - ring - 1
        for order, places in self._places.items():
            if size < order:
                continue
            key = 0
            for i in range(order):
                key += tail[size - 1 - i] * _FACTORS[i]
            position = places[(key ^ key >> 15) & self._mask]
            if position < 0 or position <= oldest:
                continue
            length, most = 0, min(size, position - max(0, oldest), _LONGEST_MATCH)
            while length < most and tokens[(position - 1 - length) & ring] == tail[size - 1 - length]:
                length += 1
            if length >= order:
                return Match(position, length)
        return None


class Trust:
    """The probability that a guess is right, by the length of its match; learned from every guess, drafted or not."""

    def __init__(self) -> None:
        self._hits = [_PRIOR_WEIGHT * prior for prior in _PRIORS]
        self._tries = [_PRIOR_WEIGHT] * len(_PRIORS)

    def of(self, length: int) -> float:
        i = min(length, len(_PRIORS) - 1)
        return self._hits[i] / self._tries[i]

    def learn(self, length: int, is_right: bool) -> None:
        i = min(length, len(_PRIORS) - 1)
        self._hits[i] = _LEARNED * self._hits[i] + is_right
        self._tries[i] = _LEARNED * self._tries[i] + 1.0


class Lookup:
    """The guesses for one sequence, from its own text first, then from ``history``, the text of earlier ones.

    ``capacity``: tokens of its text that are kept, a power of two.
    """

    def __init__(self, capacity: int, history: TokenIndex | None, trust: Trust) -> None:
        self._own = TokenIndex(capacity)
        self._history = history
        self._trust = trust
        self._tail: list[int] = []  # the last tokens of the text, and what is followed after them
        self._num_known = 0  # of them, in the text
        self._source: TokenIndex | None = None  # where the match is that the next guess comes from
        self._position = self._length = 0

    def begin(self, prompt: np.ndarray, trust: Trust | None = None) -> None:
        """Start with a prompt, int32 [n]. ``trust``: of this sequence alone; None = goes on with what is known."""
        self._trust = trust or self._trust
        self._own.clear()
        self._own.extend(prompt)
        self._tail = prompt[-_LONGEST_MATCH:].tolist()
        self._num_known = len(self._tail)
        self._find()

    def add(self, token: int) -> None:
        """Go on by a token of the answer, and learn whether it was guessed."""
        guess = self._next()
        if guess is not None:
            self._trust.learn(self._length, guess == token)
        self._own.add(token)
        self._num_known += 1
        self.follow(token)
        del self._tail[:-_LONGEST_MATCH]
        self._num_known = len(self._tail)

    def guess(self) -> tuple[int, float] | None:
        """Return the token that may come next, and the probability that it does; None without a guess."""
        token = self._next()
        return None if token is None else (token, self._trust.of(self._length))

    def follow(self, token: int) -> None:
        """Take ``token`` as the next one; ``mark`` and ``reset`` undo it."""
        goes_on = self._next() == token
        self._tail.append(token)
        if goes_on and self._length >= ORDERS[0]:
            self._position += 1
            self._length = min(self._length + 1, _LONGEST_MATCH)
        else:
            self._find()

    def mark(self) -> tuple[int, TokenIndex | None, int, int]:
        """Return what ``reset`` takes to forget all tokens that are followed from now on."""
        return len(self._tail), self._source, self._position, self._length

    def reset(self, mark: tuple[int, TokenIndex | None, int, int]) -> None:
        size, self._source, self._position, self._length = mark
        del self._tail[size:]

    def _next(self) -> int | None:
        """Return the token at the place of the match; a match that runs into its own text goes round."""
        source = self._source
        if source is None:
            return None
        if self._position < source.count:
            return source[self._position]
        distance = source.count + len(self._tail) - self._num_known - self._position
        return self._tail[-distance] if source is self._own and 0 < distance <= len(self._tail) else None

    def _find(self) -> None:
        tail = self._tail[-_LONGEST_MATCH:]
        self._source = None
        for source in (self._own, self._history):
            match = source.find(tail) if source is not None else None
            if match is not None and (self._source is None or match.length > self._length):
                self._source, (self._position, self._length) = source, match
