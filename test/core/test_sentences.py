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
    ("मैं रसोई में जा रहा हूँ। आप यहाँ रुकें॥ ठीक", ["मैं रसोई में जा रहा हूँ।", "आप यहाँ रुकें॥", "ठीक"]),
    ("أين الكوب؟ هنا.", ["أين الكوب؟", "هنا."]),
    ("میں آتا ہوں۔ آپ کہاں ہیں؟ یہاں", ["میں آتا ہوں۔", "آپ کہاں ہیں؟", "یہاں"]),
    ("Ես գալիս եմ։ Լավ", ["Ես գալիս եմ։", "Լավ"]),
    ("他说「来。」然后走了．好｡是", ["他说「来。」", "然后走了．", "好｡", "是"]),
    ("重さは３．５キロ！？はい", ["重さは３．５キロ！？", "はい"]),
    ("እመጣለሁ። የት ነህ፧ እዚህ", ["እመጣለሁ።", "የት ነህ፧", "እዚህ"]),
    ("ខ្ញុំមក។ បាទ៕ល្អ", ["ខ្ញុំមក។", "បាទ៕", "ល្អ"]),
    ("ကျွန်တော်လာမယ်။ ဟုတ်", ["ကျွန်တော်လာမယ်။", "ဟုတ်"]),
    ("ฉันไปที่ครัว แล้วหยิบถ้วย\nตกลง", ["ฉันไปที่ครัว แล้วหยิบถ้วย", "ตกลง"]),
    ("Это я. Иди сюда.", ["Это я.", "Иди сюда."]),
    ("J. Doe waits. a. Go. b. Stop.", ["J. Doe waits.", "a. Go.", "b. Stop."]),
    ("Now?! Yes‼ Go\r\nOn\u2028End", ["Now?!", "Yes‼", "Go", "On", "End"]),
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


@pytest.mark.parametrize(
    ("text", "rest"),
    [("I go to the", []), ("It weighs 3.", []), ("Really?", ["Really?"]), ("आप यहाँ रुकें।", ["आप यहाँ रुकें।"]),
     ("元気ですか？」", ["元気ですか？」"]), ("", [])],
)  # fmt: skip
def test_the_rest_of_a_cut_answer_is_given_only_if_it_is_whole(text, rest):
    splitter = SentenceSplitter()
    assert splitter.feed(text) == [] and splitter.flush(cut=True) == rest


def test_an_answer_of_nothing_but_marks_costs_no_more_per_mark():
    splitter, start = SentenceSplitter(), time.thread_time()
    for _ in range(4000):
        assert splitter.feed("!") == []
    assert time.thread_time() - start < 10.0 and splitter.flush() == ["!" * 4000]
