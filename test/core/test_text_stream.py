"""Streamed text: whole characters in every Unicode plane, nothing of a stop string."""

from __future__ import annotations

import random

import pytest

from engine_core.text.detokenizer import Detokenizer, StopStrings
from engine_core.text.tokenizer import Tokenizer
from fakes import text_ids


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return Tokenizer(tokenizer_dir)


def stream(tokenizer, ids) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.feed(token_id) for token_id in ids), detokenizer.flush()]


def plane_sample(plane: int) -> str:
    first = plane * 0x10000
    codes = range(first, first + 0x10000, 97)
    return "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000 and c != 0xFFFD)


@pytest.mark.parametrize("plane", range(17))
def test_every_plane_comes_through_whole(tokenizer, plane):
    """One byte a token: a piece is a whole character or nothing, and together they are the text."""
    text = plane_sample(plane)
    pieces = stream(tokenizer, text_ids(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert max(len(piece) for piece in pieces) == 1


def test_combined_emoji_and_mixed_scripts(tokenizer):
    text = "Grüße 👩‍🚀🏽 こんにちは — नमस्ते\n\t🇩🇪 e\u0301"
    assert "".join(stream(tokenizer, text_ids(text))) == text


def test_bytes_that_are_no_character_neither_stall_nor_harm_what_follows(tokenizer):
    pieces = stream(tokenizer, [0xFF] * 100 + text_ids("ok é"))
    text = "".join(pieces)
    assert text == "ok é"


def test_half_a_character_at_the_end_is_left_out(tokenizer):
    """Shown as U+FFFD, the answer could never be sent back as a message."""
    for rest in ([0xF0, 0x9F], [0xC3], [0xE2, 0x82], text_ids("\ufffd")):
        assert "".join(stream(tokenizer, text_ids("a") + rest)) == "a"


def test_a_long_answer_stays_exact(tokenizer):
    rng = random.Random(5)
    text = "".join(rng.choice("ab é漢🤖\n") for _ in range(3000))
    assert "".join(stream(tokenizer, text_ids(text))) == text


def test_special_tokens_are_silent(tokenizer):
    assert "".join(stream(tokenizer, [256, *text_ids("hi"), 258, 257])) == "hi"


@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_never_leak_however_the_text_is_cut(seed):
    """Against the plain search on the whole text, over random texts of few letters so that near misses abound."""
    rng = random.Random(seed)
    stops = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
    text = "".join(rng.choice("abc") for _ in range(60))
    # What is known to be whole when each character arrives decides, as in the stream.
    end = next((e for e in range(len(text) + 1) if any(text[:e].endswith(s) for s in stops)), None)
    expected = text if end is None else text[: min(text.find(s) for s in stops if s in text[:end])]
    filter_ = StopStrings(stops)
    shown = ""
    for character in text:
        shown += filter_.feed(character)
        assert expected.startswith(shown)
    assert filter_.found == (end is not None)
    assert shown + filter_.flush() == expected


def test_text_is_held_no_longer_than_needed():
    filter_ = StopStrings(["\nUser:"])
    assert filter_.feed("Hello") == "Hello"
    assert filter_.feed("\nUs") == ""
    assert filter_.feed("ual") == "\nUsual"
    assert filter_.feed("\nUser: x") == ""
    assert filter_.found and filter_.feed("more") == "" and filter_.flush() == ""
