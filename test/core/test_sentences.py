from __future__ import annotations

import time

import pytest

from engine_core.text.sentences import SentenceSplitter

CASES = [
    ("I go to the kitchen. Then I pick the cup!", ["I go to the kitchen.", "Then I pick the cup!"]),
    ("It weighs 3.5 kg. Really?! Yes.", ["It weighs 3.5 kg.", "Really?!", "Yes."]),
    ("Dr. Smith, e.g. the doctor, waits. Go.", ["Dr. Smith, e.g. the doctor, waits.", "Go."]),
    ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
    ("こんにちは。元気ですか？はい", ["こんにちは。", "元気ですか？", "はい"]),
    ("First line\nSecond line", ["First line", "Second line"]),
    ("1. Open the door. 2. Go in.", ["1. Open the door.", "2. Go in."]),
    ("I am in room 3. You are not.", ["I am in room 3.", "You are not."]),
    ("Wait... I see it.", ["Wait...", "I see it."]),
    ("So do I. You too.", ["So do I.", "You too."]),
    ("No end", ["No end"]),
    ('"Really?!" she said. ("Yes.") Ok', ['"Really?!"', "she said.", '("Yes.")', "Ok"]),
    ("See fig. 3 and Mr. Lee... Or st. 4.) Go.", ["See fig. 3 and Mr. Lee...", "Or st. 4.)", "Go."]),
    ("  \n ", []),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_sentences_do_not_depend_on_how_the_text_is_cut(text, expected, size):
    splitter = SentenceSplitter()
    found = [s for start in range(0, len(text), size) for s in splitter.feed(text[start : start + size])]
    assert found + splitter.flush() == expected


def test_a_sentence_is_given_as_soon_as_it_is_sure():
    splitter = SentenceSplitter()
    assert splitter.feed("I come.") == []  # "I come.5" could follow
    assert splitter.feed(" ") == ["I come."]
    assert splitter.flush() == []


def test_a_long_text_without_a_sentence_end_costs_no_more_per_piece():
    """A plan in JSON has none: every piece used to search the whole text again."""

    def seconds(splitter: SentenceSplitter) -> float:
        start = time.perf_counter()
        for _ in range(200):
            assert splitter.feed('"at": "room 3.5", ') == []
        return time.perf_counter() - start

    long = SentenceSplitter()
    long.feed("and so on " * 20_000)
    assert min(seconds(long) for _ in range(3)) < 20 * min(seconds(SentenceSplitter()) for _ in range(3))


@pytest.mark.parametrize("mark", "।؟۔։።។။॥!?")
def test_the_sentence_ends_of_other_scripts(mark):
    splitter = SentenceSplitter()
    assert splitter.feed(f"one{mark} two") == [f"one{mark}"]


@pytest.mark.parametrize("mark", "。．｡！？")
def test_full_and_half_width_ends_need_no_space(mark):
    splitter = SentenceSplitter()
    assert splitter.feed(f"one{mark}two") == [f"one{mark}"]
