"""Answers parted into reasoning, text and calls: the stream equals the whole at any cut, and no call is half."""

from __future__ import annotations

import json

import pytest

from engine_core.request import LIMITS, MAX_NESTING
from engine_core.text.answer import AnswerReader, AnswerScanner, ExpectedAnswer, Phase
from engine_core.text.call_formats import (
    FORMATS,
    REASONING_FORMATS,
    AnswerFormat,
    Arguments,
    Marker,
    Slot,
    UnmarkedCalls,
)

PLACE, NOTE = "kitchen", 'a "b" {c} [d] </tool_call> é🤖\n, } end'
CALLS = [
    ("drive_to", {"place": PLACE, "speed": 0.5, "via": ["hall", "door"], "stop": {"at": 3, "now": True}}),
    ("say", {"text": NOTE}),
    ("stop", {}),
]
STRINGS = {"drive_to": frozenset({"place"}), "say": frozenset({"text"}), "stop": frozenset()}
BY_NAME = {form.name: form for form in FORMATS}


class Ids:
    """Token ids of an answer: bytes, and markers from 256 on where ``tokens``."""

    def __init__(self, form, reasoning, tokens: bool):
        markers = [*form.markers, reasoning.begin, reasoning.end]
        self.ids = {marker.text: 256 + i for i, marker in enumerate(markers)} if tokens else {}

    def of(self, *parts) -> list[int]:
        found = []
        for part in parts:
            if isinstance(part, Marker) and part.text in self.ids:
                found.append(self.ids[part.text])
            else:
                found += list((part.text if isinstance(part, Marker) else part).encode())
        return found

    def decode(self, ids) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def calls_as_parts(form, calls):
    found = list(form.before)
    for index, (name, arguments) in enumerate(calls):
        found += form.between if index else ()
        for part in form.call:
            if part is Slot.NAME:
                found.append(name)
            elif part is Slot.ID:
                found.append("a1b2c3d4e")
            elif part is Slot.ARGUMENTS:
                found += arguments_as_parts(form, arguments)
            else:
                found.append(part)
    return [*found, *form.after]


def arguments_as_parts(form, arguments):
    """With bare arguments, the quote markers apart from what is between them."""
    text = form._write_arguments(arguments)
    if form.arguments is not Arguments.BARE:
        return [text]
    found = []
    for index, part in enumerate(text.split(form.quote.text)):
        found += [form.quote, part] if index else [part]
    return found


def read(ids, expected, tokens, cut=None):
    """Return the parts of each step, and the sum of them, of an answer that is cut after ``cut`` tokens."""
    reader, steps = AnswerReader(ids, expected), []
    for token in tokens[:cut]:
        reader.feed(token)
        steps.append(reader.take())
    reader.finish(cut=cut is not None)
    steps.append(reader.take())
    return (
        "".join(step.reasoning for step in steps),
        "".join(step.text for step in steps),
        [(call.name, json.loads(call.arguments)) for step in steps for call in step.calls],
    )


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("name", BY_NAME)
def test_every_cut_of_an_answer_is_a_beginning_of_the_whole(name, tokens):
    form, reasoning = BY_NAME[name], REASONING_FORMATS[0]
    if form.arguments is Arguments.BARE and not tokens:
        pytest.skip("its quote markers are tokens")
    ids = Ids(form, reasoning, tokens)
    expected = ExpectedAnswer(AnswerFormat(form, reasoning, ids.ids), may_call=True, strings=STRINGS)
    said = [] if form.may_be_bare else ["\n\nI go. 3 < 4\n"]
    answer = ids.of(reasoning.begin, "\nIt is <near>.\n", reasoning.end, *said, *calls_as_parts(form, CALLS))
    whole = read(ids, expected, answer)
    assert whole == ("It is <near>.", "I go. 3 < 4" if said else "", CALLS)
    for cut in range(len(name) % 4, len(answer), 4):
        thought, text, calls = read(ids, expected, answer, cut)
        assert whole[0].startswith(thought.rstrip()) and whole[1].startswith(text.rstrip())
        assert calls == CALLS[: len(calls)]


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
def test_text_alone_comes_through_as_it_is(tokens):
    form, reasoning = BY_NAME["hermes"], REASONING_FORMATS[0]
    ids = Ids(form, reasoning, tokens)
    expected = ExpectedAnswer(AnswerFormat(form, reasoning, ids.ids), may_call=True)
    text = " One < two.\n\n  <tool and </think> then <think>\n"
    assert read(ids, expected, ids.of(text)) == ("", text, [])
    assert read(ids, ExpectedAnswer(), ids.of(text)) == ("", text, [])


def test_a_marker_is_a_token_where_there_is_one(tokens=True):
    form, reasoning = BY_NAME["hermes"], REASONING_FORMATS[0]
    ids = Ids(form, reasoning, tokens)
    expected = ExpectedAnswer(AnswerFormat(form, reasoning, ids.ids), may_call=True)
    text = "Write <tool_call> and <think>like this</think>."
    assert read(ids, expected, list(text.encode())) == ("", text, [])


def test_reasoning_that_the_prompt_has_begun_needs_no_marker():
    form, reasoning = BY_NAME["hermes"], REASONING_FORMATS[0]
    for tokens in (True, False):
        ids = Ids(form, reasoning, tokens)
        expected = ExpectedAnswer(AnswerFormat(form, reasoning, ids.ids), begins_reasoning=True)
        answer = ids.of("So.", reasoning.end, "\n\nYes. ")
        assert read(ids, expected, answer) == ("So.", "Yes. ", [])
        assert read(ids, expected, answer, 2) == ("So", "", [])


def test_a_label_of_the_reasoning_is_no_part_of_it():
    form, reasoning = BY_NAME["gemma4"], REASONING_FORMATS[2]
    ids = Ids(form, reasoning, True)
    expected = ExpectedAnswer(AnswerFormat(form, reasoning, ids.ids))
    answer = ids.of(reasoning.begin, "thought\n", "Hm.", reasoning.end, "Yes.")
    assert read(ids, expected, answer) == ("Hm.", "Yes.", [])


def test_llama_calls_begin_with_a_brace_or_with_the_tag():
    form = BY_NAME["llama3"]
    ids = Ids(form, REASONING_FORMATS[0], True)
    expected = ExpectedAnswer(AnswerFormat(form, None, ids.ids), may_call=True)
    bare = calls_as_parts(form, CALLS[:2])[1:]
    assert read(ids, expected, ids.of(*bare)) == ("", "", CALLS[:2])
    assert read(ids, expected, ids.of("I go.", *calls_as_parts(form, CALLS[:1]))) == ("", "I go.", CALLS[:1])
    assert read(ids, expected, ids.of("A {set}.")) == ("", "A {set}.", [])


def test_white_space_before_a_call_that_begins_with_a_brace_may_be_in_its_first_token():
    form = AnswerFormat(BY_NAME["llama3"], REASONING_FORMATS[0])
    for pieces in (
        ["Hm.</think>", ' {"name": "f"', ', "parameters": {}}'],
        ['</think>\n\n{"name": "f", "parameters": {}}'],
    ):
        scanner = AnswerScanner(ExpectedAnswer(form, begins_reasoning=True, may_call=True))
        for piece in pieces:
            scanner.feed(piece.encode())
        assert scanner.calls == [("f", {})]


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("fence", ["", "```json\n", "```"])
@pytest.mark.parametrize("before", ["", "Sure, ```this``` {is}:\n\n", "\n"])
def test_a_call_without_its_markers_is_one_at_the_beginning_of_a_line(tokens, fence, before):
    form = BY_NAME["hermes"]
    ids = Ids(form, REASONING_FORMATS[0], tokens)
    expected = ExpectedAnswer(AnswerFormat(form, None, ids.ids), may_call=True, unmarked=("drive_to", "say"))
    for head in ('{"name": "say"', '{\n  "name" : "say"'):
        call = f'{head}, "arguments": {json.dumps({"text": NOTE})}}}'
        answer = ids.of(before, fence, call, "\n```" if fence else "")
        whole = read(ids, expected, answer)
        assert whole == ("", before.strip(), [("say", {"text": NOTE})])
        for cut in range(0, len(answer), 3):
            _, text, calls = read(ids, expected, answer, cut)
            assert whole[1].startswith(text.strip()) and calls in ([], whole[2])


def test_text_before_a_call_without_markers_stays_text_in_one_piece_with_it():
    form = AnswerFormat(BY_NAME["hermes"])
    for before in ("Sure:\n", "``` json\n"):
        scanner = AnswerScanner(ExpectedAnswer(form, may_call=True, unmarked=("say",)))
        parts = scanner.feed(f'{before}{{"name": "say", "arguments": {{"text": ""}}}}'.encode())
        assert parts == [(Phase.TEXT, before.encode()), (Phase.CALLS, b'{"text": ""}')]
        assert scanner.calls == [("say", {"text": ""})]


def test_a_name_that_goes_on_is_the_tools_where_nothing_else_can_be_meant():
    form = BY_NAME["hermes"]
    ids = Ids(form, REASONING_FORMATS[0], True)
    names = ("drive_to", "pick_up", "pick_up_all", "halt")
    expected = ExpectedAnswer(AnswerFormat(form, None, ids.ids), may_call=True, unmarked=names)
    for name, ends in (("drive_to", False), ("pick_up", True), ("pick_up_all", False), ("halt", True)):
        assert UnmarkedCalls(names).rest(name)[0] == ("" if ends else '"')
        answer = f'{{"name": "{name}", "arguments": {{}}}}'
        assert read(ids, expected, ids.of(answer)) == ("", "", [(name, {})])
    assert read(ids, expected, ids.of('{"name": "halter"}')) == ("", '{"name": "halter"}', [])


def test_other_json_than_a_call_stays_text():
    form = BY_NAME["hermes"]
    ids = Ids(form, REASONING_FORMATS[0], True)
    expected = ExpectedAnswer(AnswerFormat(form, None, ids.ids), may_call=True, unmarked=("say",))
    for text in (
        'It is {"name": "say", "arguments": {}}',
        '```json\n{"name": "sayer"}\n```',
        '{"name": "bob"}\n{"nam',
        "``` {",
        'a\n\n  \n{"name": "sa',
        "\u00a0{\u0085",
        '{"na me": "say", "arguments": {}}',
        '\f{"name": "say", "arguments": {}}',
        '``` json {"name": "say", "arguments": {}}',
    ):
        assert read(ids, expected, ids.of(text)) == ("", text, [])


def test_stop_strings_look_at_the_text_alone():
    form, reasoning = BY_NAME["hermes"], REASONING_FORMATS[0]
    ids = Ids(form, reasoning, True)
    expected = ExpectedAnswer(AnswerFormat(form, reasoning, ids.ids), may_call=True)
    answer = ids.of(reasoning.begin, "kitchen", reasoning.end, "Go.", *calls_as_parts(form, CALLS[:1]))
    reader = AnswerReader(ids, expected, ("kitchen",))
    for token in answer:
        reader.feed(token)
    assert not reader.stopped and reader.take().calls[0].name == "drive_to"
    reader = AnswerReader(ids, expected, ("chen",))
    for token in ids.of("the kitchen"):
        reader.feed(token)
    assert reader.stopped and reader.take().text == "the kit"


def test_ids_of_calls_differ_and_suit_every_template():
    form = BY_NAME["hermes"]
    ids = Ids(form, REASONING_FORMATS[0], True)
    reader = AnswerReader(ids, ExpectedAnswer(AnswerFormat(form, None, ids.ids), may_call=True))
    for token in ids.of(*calls_as_parts(form, CALLS)):
        reader.feed(token)
    found = [call.id for call in reader.take().calls]
    assert len(set(found)) == 3 and all(len(each) == 9 and each.isalnum() for each in found)


def test_what_is_no_call_of_the_format_is_dropped():
    form = BY_NAME["hermes"]
    ids = Ids(form, REASONING_FORMATS[0], True)
    expected = ExpectedAnswer(AnswerFormat(form, None, ids.ids), may_call=True)
    call = form.call[0]
    for wrong in ('\n{"nam": 1}', "no", '\n{"name": "a", "arguments": {"b": }}\n'):
        assert read(ids, expected, ids.of("Yes.", call, wrong, form.call[-1]))[1:] == ("Yes.", [])


def test_a_call_that_no_request_could_bring_back_is_none():
    form = BY_NAME["hermes"]
    ids = Ids(form, REASONING_FORMATS[0], True)
    expected = ExpectedAnswer(AnswerFormat(form, None, ids.ids), may_call=True)
    for levels, is_call in ((MAX_NESTING, True), (MAX_NESTING + 1, False), (5000, False)):
        nested = "[" * (levels - 1) + "]" * (levels - 1)
        answer = f'\n{{"name": "say", "arguments": {{"text": {nested}}}}}\n'
        _, _, calls = read(ids, expected, ids.of(form.call[0], answer, form.call[-1]))
        assert len(calls) == is_call
    many = calls_as_parts(form, [("stop", {})] * (LIMITS.tool_calls + 2))
    assert read(ids, expected, ids.of(*many))[2] == [("stop", {})] * LIMITS.tool_calls


def test_the_arguments_of_a_call_are_whole_characters():
    form = BY_NAME["hermes"]
    ids = Ids(form, REASONING_FORMATS[0], True)
    expected = ExpectedAnswer(AnswerFormat(form, None, ids.ids), may_call=True)
    answer = r"""{"name": "say", "arguments": {"text": "\ud83d a\udc00", "\ud83e\udd16": "\udfff"}}"""
    _, _, calls = read(ids, expected, ids.of(form.call[0], "\n", answer, "\n", form.call[-1]))
    assert calls == [("say", {"text": "\ufffd a\ufffd", "🤖": "\ufffd"})]
