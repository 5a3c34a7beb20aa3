"""Requests with tools and reasoning through the engine: what is refused, what comes out, and how it ends."""

from __future__ import annotations

import dataclasses
import json

import pytest

import fakes
from engine_core.errors import (
    EmptyPromptError,
    InvalidRequestError,
    InvalidSchemaError,
    InvalidTextError,
    PromptTooLongError,
)
from engine_core.request import LIMITS, ChatMessage, FinishReason, GenerationRequest, SamplingParams, Tool, ToolCall
from engine_core.serving.tools import checked_tool
from engine_core.text.conversation import to_conversation
from fakes import EOS, text_ids
from tool_templates import TEMPLATES, write

PARAMETERS = json.dumps(
    {"type": "object", "properties": {"place": {"enum": ["dock", "hall"]}, "n": {"type": "integer"}}, "required": ["n"]}
)
TOOLS = (Tool("go", "Go.", PARAMETERS), Tool("halt"))
GO = '<tool_call>\n{"name": "go", "arguments": {"place": "dock", "n": 3}}\n</tool_call>'
HALT = '<tool_call>\n{"name": "halt", "arguments": {}}\n</tool_call>'
THOUGHT = "<think>\nHm.\n</think>\n\n"
QUESTION = (ChatMessage("user", "Go!"),)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Tokenizers whose markers are plain text, so that all ids are those of the fake backend."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("hermes", "deepseek", "llama3", "plain")}
    for name, directory in made.items():
        write(directory, fakes.TEMPLATE if name == "plain" else TEMPLATES[name][0])
    return made


@pytest.fixture
def open_engine(directories):
    engines = []

    def make(script=(), name="hermes", **options):
        backend = fakes.ScriptedBackend([*script], **{"max_context": 4096, **options})
        engines.append(fakes.make_engine(backend, directories[name]))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def ask(messages=QUESTION, max_new_tokens=400, seed=0, **fields):
    sampling = SamplingParams(max_new_tokens=max_new_tokens, seed=seed)
    return GenerationRequest("r", messages=tuple(messages), sampling=sampling, **fields)


def run(engine, request):
    """Return the pieces and the result, which has to be their sum."""
    pieces = []
    result = engine.answer(request, pieces.append)
    assert "".join(piece.text for piece in pieces) == result.text
    assert "".join(piece.reasoning for piece in pieces) == result.reasoning
    assert tuple(call for piece in pieces for call in piece.tool_calls) == result.tool_calls
    assert tuple(token for piece in pieces for token in piece.token_ids) == result.token_ids
    return pieces, result


def calls_of(result):
    return [(call.name, json.loads(call.arguments)) for call in result.tool_calls]


def test_an_answer_of_reasoning_text_and_calls(open_engine):
    engine = open_engine([*text_ids(f"{THOUGHT}I go.\n{GO}\n{HALT}"), EOS])
    assert (engine.answers.format.tools, engine.answers.format.thinks) == ("hermes", True)
    _, result = run(engine, ask(tools=TOOLS))
    assert (result.reasoning, result.text, result.finish_reason) == ("Hm.", "I go.", FinishReason.TOOL_CALLS)
    assert calls_of(result) == [("go", {"place": "dock", "n": 3}), ("halt", {})]
    assert len("\nHm.\n</think>") <= result.reasoning_tokens <= len(THOUGHT)


def test_one_call_ends_the_answer_where_there_may_be_no_other(open_engine):
    script = text_ids(f"{GO}\n{HALT}")
    for fields in ({"parallel_tool_calls": False}, {"tool_choice": "go"}):
        _, result = run(open_engine(script), ask(tools=TOOLS, **fields))
        assert calls_of(result) == [("go", {"place": "dock", "n": 3})]
        assert result.finish_reason is FinishReason.TOOL_CALLS and result.generated_tokens == len(GO)


@pytest.mark.parametrize("length", [5, 30, 60, len(GO) - 14, len(GO) + 20])
def test_a_call_that_is_cut_is_not_delivered(open_engine, length):
    _, result = run(open_engine(text_ids(f"{GO}\n{HALT}")), ask(tools=TOOLS, max_new_tokens=length))
    assert result.finish_reason is FinishReason.LENGTH and result.text == ""
    assert [call.name for call in result.tool_calls] == (["go"] if length >= len(GO) - 14 else [])


def test_a_model_that_would_write_something_else_writes_a_call(open_engine):
    for seed in range(4):
        _, result = run(open_engine(), ask(tools=TOOLS, tool_choice="required", max_new_tokens=300, seed=seed))
        for name, arguments in calls_of(result):
            assert name in ("go", "halt") and arguments.keys() <= {"place", "n"}
        assert result.text == ""


def test_no_call_where_none_may_be(open_engine):
    _, result = run(open_engine([*text_ids(f"Yes. {GO}"), EOS]), ask(tools=TOOLS, tool_choice="none"))
    assert result.tool_calls == () and "<tool_call>" not in result.text and result.text.startswith("Yes. ")


def test_a_schema_begins_after_the_reasoning(open_engine):
    schema = '{"type":"object","properties":{"a":{"type":"integer","maximum":9}},"required":["a"]}'
    _, result = run(open_engine([*text_ids(f'{THOUGHT}{{"a":7}}'), EOS]), ask(json_schema=schema))
    assert (result.reasoning, result.text, result.finish_reason) == ("Hm.", '{"a":7}', FinishReason.STOP)
    _, result = run(open_engine([*text_ids('So.</think>{"a":8}'), EOS], "deepseek"), ask(json_schema=schema))
    assert (result.reasoning, result.text) == ("So.", '{"a":8}')
    _, result = run(open_engine([*text_ids('{"a":7}'), EOS]), ask(json_schema=schema, thinking="off"))
    assert (result.reasoning, result.text) == ("", '{"a":7}')


def test_an_answer_is_calls_or_a_value_where_both_are_asked_for(open_engine):
    schema = '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'
    for script, text, names in ((GO, "", ["go"]), ('{"a":7}', '{"a":7}', [])):
        _, result = run(open_engine([*text_ids(script), EOS]), ask(tools=TOOLS, json_schema=schema))
        assert (result.text, [call.name for call in result.tool_calls]) == (text, names)


def test_a_large_tool_is_not_kept():
    for size, is_kept in ((100, True), (1 << 16, False)):
        tool = Tool("go", "x" * size, '{"type": "object"}')
        assert (checked_tool(tool) is checked_tool(tool)) is is_kept


def test_thinking_has_a_budget(open_engine):
    script = [*text_ids("x" * 50), *text_ids("</think>\n\nYes."), EOS]
    _, result = run(open_engine(script), ask(thinking="on", thinking_budget=10, max_new_tokens=30))
    assert result.reasoning == "x" * 10 and result.finish_reason is FinishReason.LENGTH
    assert result.reasoning_tokens <= 10 + len("\n</think>")
    _, result = run(open_engine(script), ask(thinking="on"))
    assert result.reasoning == "x" * 50 and result.text == "Yes."


def test_reasoning_is_no_text_without_tools_too(open_engine):
    pieces, result = run(open_engine([*text_ids(f"{THOUGHT}Yes. "), EOS]), ask())
    assert (result.reasoning, result.text) == ("Hm.", "Yes. ")
    assert not any("think" in piece.text for piece in pieces)
    raw = GenerationRequest("r", prompt="x", sampling=SamplingParams(max_new_tokens=100))
    _, result = run(open_engine([*text_ids(f"{THOUGHT}Yes."), EOS]), raw)
    assert (result.reasoning, result.text) == ("", f"{THOUGHT}Yes.")


def test_a_conversation_with_calls_goes_on(open_engine):
    chat = [
        *QUESTION,
        ChatMessage("assistant", "", tool_calls=(ToolCall("1", "go", '{"n": 3}'),)),
        ChatMessage("tool", "done", tool_call_id="1"),
    ]
    _, result = run(open_engine([*text_ids("There."), EOS]), ask(chat, tools=TOOLS))
    assert (result.text, result.finish_reason) == ("There.", FinishReason.STOP)


def test_an_answer_is_to_the_last_call_with_its_id():
    """Agents that number their calls begin anew in each turn."""

    def turn(name: str) -> tuple[ChatMessage, ChatMessage]:
        call = ChatMessage("assistant", "", tool_calls=(ToolCall("1", name, "{}"),))
        return call, ChatMessage("tool", "done", tool_call_id="1")

    messages = (*QUESTION, *turn("go"), *turn("halt"))
    GenerationRequest("1", messages=messages).check_answered_calls()
    GenerationRequest("1", messages=messages).validate()
    assert [turn.get("name") for turn in to_conversation(messages, "")] == [None, None, "go", None, "halt"]


def test_a_session_keeps_calls_and_takes_their_answers(open_engine):
    engine = open_engine([*text_ids(f"{THOUGHT}{GO}"), EOS])
    _, result = run(engine, ask(tools=TOOLS, session="s"))
    (call,) = result.tool_calls
    kept = engine.sessions.info("s").messages[-1]
    assert (kept.tool_calls, kept.reasoning, kept.content) == ((call,), "Hm.", "") and result.session_turns == 1
    answer = ChatMessage("tool", "done", tool_call_id=call.id)
    whole = [*QUESTION, ChatMessage("assistant", "", tool_calls=(call,)), answer]
    prepared = engine.prepare(ask(whole, tools=TOOLS, session="s"))  # a client may send all of it, and no reasoning
    assert prepared.request.messages == (*QUESTION, kept, answer)
    prepared.turn.leave()
    _, result = run(engine, ask([answer], tools=TOOLS, session="s"))
    assert result.session_turns == 2 and len(engine.sessions.info("s").messages) == 4
    with pytest.raises(InvalidRequestError, match="'x' is that of no tool call"):
        engine.prepare(ask([ChatMessage("tool", "done", tool_call_id="x")], tools=TOOLS, session="s"))


def test_the_oldest_turns_leave_with_their_calls(open_engine):
    engine = open_engine([*text_ids("Yes."), EOS], max_context=1024)
    turns = []
    for number in range(6):
        call = ToolCall(str(number), "go", '{"n": 3}')
        turns += [ChatMessage("user", "x" * 40), ChatMessage("assistant", "", tool_calls=(call,))]
        turns.append(ChatMessage("tool", "done", tool_call_id=str(number)))
    turns.append(ChatMessage("user", "y"))
    _, result = run(engine, ask(turns, tools=TOOLS, context_policy="drop_oldest", max_new_tokens=50))
    assert 0 < result.dropped_turns < 6 and result.text == "Yes."


def test_a_turn_leaves_with_the_one_that_answers_its_calls(open_engine):
    engine = open_engine([*text_ids("Yes."), EOS], max_context=1024)
    fields = {"tools": TOOLS, "context_policy": "drop_oldest", "max_new_tokens": 50, "session": "s"}
    call = ToolCall("late", "go", '{"n": 3}')
    answer = ChatMessage("tool", "x" * 20, tool_call_id="late")
    engine.sessions.put("s", (*QUESTION, ChatMessage("assistant", "", tool_calls=(call,)),
                              ChatMessage("user", "y" * 20), ChatMessage("assistant", "No.")), 2, 99)  # fmt: skip
    with pytest.raises(PromptTooLongError, match="tool call that a message of the last turn answers"):
        engine.prepare(ask([dataclasses.replace(answer, content="x" * 500)], **fields))
    dropped = [run(engine, ask([answer], **fields))[1].dropped_turns]
    for number in range(6):
        dropped.append(run(engine, ask([ChatMessage("user", f"{number}" * 60)], **fields))[1].dropped_turns)
        known = {call.id for message in engine.sessions.info("s").messages for call in message.tool_calls}
        answered = {message.tool_call_id for message in engine.sessions.info("s").messages} - {""}
        assert answered <= known
    assert dropped[0] == 0 and next(filter(None, dropped)) >= 2 and not answered


def test_the_same_tools_are_compiled_once_and_their_prompt_is_kept(open_engine, monkeypatch):
    engine = open_engine([*text_ids(GO), EOS])
    request = ask(tools=TOOLS)
    assert not engine.knows(request)
    run(engine, request)
    assert engine.knows(request) and engine.knows(ask(tools=TOOLS, thinking="on"))
    assert not engine.knows(ask(tools=TOOLS[:1]))
    monkeypatch.setattr(engine._constraints._checker, "check", lambda *_: pytest.fail("checked again"))
    prepared = engine.prepare(ask([ChatMessage("user", "Come!")], tools=TOOLS))
    assert len(prepared.prefix_ids) > len(PARAMETERS)


REFUSED = [
    (dict(tools=(Tool("a b"),)), InvalidRequestError, "name 'a b'.*1 to 64 letters"),
    (dict(tools=(Tool("a"), Tool("a"))), InvalidRequestError, "Two tools have the name 'a'"),
    (dict(tools=(Tool("a", "", "{"),)), InvalidSchemaError, "tool 'a' cannot be used: it does not parse"),
    (dict(tools=(Tool("a", "", '{"type":"array"}'),)), InvalidSchemaError, "must be that of an object"),
    (dict(tools=tuple(Tool(f"t{i}") for i in range(LIMITS.tools + 1))), InvalidRequestError, "129 tools"),
    (dict(tools=(Tool("a", "x" * (LIMITS.tool_bytes + 1)),)), InvalidRequestError, "bytes of text in its tools"),
    (dict(tools=TOOLS, tool_choice="fly"), InvalidRequestError, "tool choice is 'fly'"),
    (dict(tool_choice="required"), InvalidRequestError, "has no tools"),
    (dict(thinking="maybe"), InvalidRequestError, "thinking is 'maybe'"),
    (dict(thinking_budget=-1), InvalidRequestError, "thinking budget is -1"),
    (dict(template_variables="[1]"), InvalidRequestError, "no JSON object"),
    (dict(template_variables='{"a":' * 80 + "1" + "}" * 80), InvalidRequestError, "no JSON object"),
    (dict(template_variables='{"messages":[]}'), InvalidRequestError, "no variable 'messages'"),
    (dict(template_variables='{"a":"' + "x" * (1 << 14) + '"}'), InvalidRequestError, "template variables"),
    (dict(tools=(Tool("a", "", r'{"type": "object", "title": "\ud800"}'),)), InvalidTextError, "pair, U.D800"),
    (dict(tools=(Tool("a", "", r'{"type": "object", "properties": {"\udfff": {}}}'),)), InvalidTextError, "U.DFFF"),
    (dict(messages=(), prompt="x", tools=TOOLS), InvalidRequestError, "raw prompt"),
    (dict(messages=(), prompt="x", thinking="off"), InvalidRequestError, "raw prompt"),
    (dict(messages=(ChatMessage("assistant", ""),)), EmptyPromptError, "empty"),
]  # fmt: skip
CALLING = ChatMessage("assistant", "", tool_calls=(ToolCall("1", "go", "{}"),))
REFUSED += [
    (dict(messages=messages), InvalidTextError if "U.D800" in reason else InvalidRequestError, reason)
    for messages, reason in (
        ((*QUESTION, CALLING, ChatMessage("tool", "x", tool_call_id="2")), "'2' is that of no tool call"),
        ((*QUESTION, ChatMessage("tool", "x", tool_call_id="1"), CALLING), "'1' is that of no tool call"),
        ((*QUESTION, ChatMessage("user", "x", tool_call_id="1")), "which only a tool's message has"),
        ((*QUESTION, ChatMessage("user", "x", tool_calls=CALLING.tool_calls)), "only an assistant has"),
        ((*QUESTION, ChatMessage("user", "x", reasoning="y")), "only an assistant has"),
        (
            (*QUESTION, ChatMessage("assistant", "", tool_calls=CALLING.tool_calls * 2)),
            "Two tool calls of a message have the id '1'",
        ),
        ((*QUESTION, ChatMessage("assistant", "", tool_calls=(ToolCall("1", "go", "[]"),))), "no JSON object"),
        ((*QUESTION, ChatMessage("assistant", "", tool_calls=(ToolCall("1", "go", r'{"a": "\ud800"}'),))), "U.D800"),
        ((*QUESTION, ChatMessage("assistant", "", tool_calls=(ToolCall("1", "go", r'{"\ud800": 1}'),))), "U.D800"),
        ((*QUESTION, ChatMessage("assistant", "", tool_calls=(ToolCall("1", "g o", "{}"),))), "name 'g o'"),
        ((*QUESTION, ChatMessage("assistant", "", tool_calls=(ToolCall("1" * 300, "go", "{}"),))), "300 characters"),
        ((*QUESTION, ChatMessage("assistant", "", tool_calls=CALLING.tool_calls * 129)), "129 tool calls"),
    )
]


@pytest.mark.parametrize("fields, error, reason", REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_is_refused_in_one_sentence(open_engine, fields, error, reason):
    with pytest.raises(error, match=reason) as refused:
        open_engine().prepare(ask(**fields))
    message = str(refused.value)
    assert type(refused.value) is error and "\n" not in message and message.endswith(".") and len(message) < 400


def test_what_a_model_cannot_do_is_refused(open_engine):
    plain = open_engine(name="plain")
    for fields, reason in (
        ({"tools": TOOLS}, "chat template of this model has no tools"),
        ({"thinking": "on"}, "does not reason"),
        ({"thinking_budget": 5}, "does not reason"),
    ):
        with pytest.raises(InvalidRequestError, match=reason):
            plain.prepare(ask(**fields))
    plain.prepare(ask(thinking="off"))
    with pytest.raises(InvalidRequestError, match="JSON without a marker"):
        open_engine(name="llama3").prepare(ask(tools=TOOLS, json_schema="{}"))


@pytest.mark.parametrize("draft", [True, False])
def test_forced_text_of_calls_is_fed_at_once_and_changes_nothing(open_engine, draft):
    options = {"max_draft": 8} if draft else {}
    engine = open_engine(text_ids(f"I go.\n{GO}\n{HALT}") + [EOS], **options)
    _, result = run(engine, ask(tools=TOOLS))
    assert (result.text, calls_of(result)) == ("I go.", [("go", {"place": "dock", "n": 3}), ("halt", {})])
    assert (result.speculation.forced > 20) == draft
