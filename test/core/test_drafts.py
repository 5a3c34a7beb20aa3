"""Prompt lookup against a search through the whole text."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine_core.serving.drafts import ORDERS, Lookup, Match, TokenIndex, Trust


def search(text: list[int], tail: list[int], capacity: int, order: int) -> Match | None:
    """Return the last place in ``text`` after an n-gram of ``order`` tokens that ends ``tail``, and how much fits."""
    oldest = max(0, len(text) - capacity)
    for position in range(len(text) - 1, oldest + order - 1, -1):
        if text[position - order : position] == tail[-order:]:
            length = order
            while length < min(16, len(tail), position - oldest) and text[position - 1 - length] == tail[-1 - length]:
                length += 1
            return Match(position, length)
    return None


def expected(text: list[int], tail: list[int], capacity: int) -> Match | None:
    return next((found for order in ORDERS if (found := search(text, tail, capacity, order)) is not None), None)


@pytest.mark.parametrize("count", [0, 1, 3, 20, 64, 65, 300])
@pytest.mark.parametrize("all_at_once", [True, False])
def test_a_match_is_the_last_place_of_the_longest_ngram(count, all_at_once):
    rng = random.Random(count)
    text = [rng.randrange(4) for _ in range(count)]
    index = TokenIndex(64)
    if all_at_once:
        index.extend(np.array(text, dtype=np.int32))
        text = text[-64:]
    else:
        for token in text:
            index.add(token)
    num_right = 0
    for _ in range(200):
        tail = [rng.randrange(4) for _ in range(rng.randrange(1, 20))]
        found, right = index.find(tail), expected(text, tail, 64)
        num_right += found == right
        if found is not None:  # another n-gram may have taken its place, but none is found that is not there
            before = text[max(0, len(text) - 64) : found.position][-found.length :]
            assert len(before) == found.length >= min(ORDERS) and before == tail[-found.length :]
        token = rng.randrange(4)
        index.add(token)
        text.append(token)
    assert num_right > 140


def test_an_index_takes_no_memory_after_its_constructor():
    index = TokenIndex(128)
    places = [index._tokens.buffer_info(), *(each.buffer_info() for each in index._places.values())]
    index.extend(np.arange(100, dtype=np.int32))
    for token in range(1000):
        index.add(token)
    index.clear()
    assert index.find([1, 2, 3, 4]) is None
    assert [index._tokens.buffer_info(), *(each.buffer_info() for each in index._places.values())] == places


def guesses(lookup: Lookup, count: int) -> list[int]:
    mark, found = lookup.mark(), []
    while len(found) < count and (guess := lookup.guess()) is not None:
        found.append(guess[0])
        lookup.follow(guess[0])
    lookup.reset(mark)
    return found


def test_guesses_go_on_from_the_prompt_the_answer_and_earlier_texts():
    history = TokenIndex(64)
    history.extend(np.array([50, 51, 52, 53, 54, 55, 56], dtype=np.int32))
    lookup = Lookup(64, history, Trust())
    lookup.begin(np.array([1, 2, 3, 4, 5, 6, 7, 1, 2], dtype=np.int32))
    assert guesses(lookup, 4) == [3, 4, 5, 6]
    assert guesses(lookup, 4) == [3, 4, 5, 6], "looking ahead changes nothing"
    for token in (50, 51):
        lookup.add(token)
    assert guesses(lookup, 9) == [52, 53, 54, 55, 56]
    for token in (8, 9, 8, 9):
        lookup.add(token)
    assert guesses(lookup, 5) == [8, 9, 8, 9, 8], "a loop goes on as a loop"
    lookup.begin(np.array([9, 9, 1], dtype=np.int32))
    assert guesses(lookup, 3) == []


def test_trust_follows_what_was_right():
    trust, before = Trust(), Trust().of(3)
    for _ in range(50):
        trust.learn(3, False)
    assert trust.of(3) < 0.1 < before and trust.of(4) == Trust().of(4)
    for _ in range(200):
        trust.learn(3, True)
    assert trust.of(3) > 0.9
