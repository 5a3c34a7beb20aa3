"""Tools and reasoning over ROS: calls in result, stream and feedback; nothing of them in texts and sentences."""

from __future__ import annotations

import json

import pytest

from edgellm_ros.client import LLM, InvalidRequestError
from edgellm_ros.msg import ChatMessage, ErrorCode, FinishReason, Sentence, Tool, ToolCall
from fake_backend import write_engine
from llm_client import STREAM, SUCCEEDED, Nodes
from tool_templates import TEMPLATES

SCRIPT = (
    '<think>\nHm. Is it far? No.\n</think>\n\nI go there. Wait for me!\n<tool_call>\n{"name": "go", "arguments": '
    '{"place": "dock"}}\n</tool_call>\n<tool_call>\n{"name": "go", "arguments": {"place": "hall"}}\n</tool_call>'
)
PARAMETERS = {"type": "object", "properties": {"place": {"enum": ["dock", "hall"]}}, "required": ["place"]}
TOOL = Tool(name="go", description="Go.", parameters=json.dumps(PARAMETERS))
LONG = {"max_new_tokens": 400}
CALLS = [("go", {"place": "dock"}), ("go", {"place": "hall"})]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tools")
    engine = write_engine(directory / "engine", template=TEMPLATES["hermes"][0], script=SCRIPT, step_time=0.0005)
    nodes = Nodes(directory)
    yield nodes.start(engine).bring_up()
    nodes.close()


def calls_of(message):
    return [(call.name, json.loads(call.arguments)) for call in message.tool_calls]


def test_calls_and_reasoning_are_in_result_stream_and_feedback_and_never_spoken(llm):
    spoken: list[Sentence] = []
    llm.node.create_subscription(Sentence, f"/{llm.name}/sentences", spoken.append, STREAM)
    llm.listen()
    goal = llm.goal("To the dock!", request_id="a", tools=[TOOL], sampling=LONG)
    status, result = goal.result()
    assert (status, result.finish_reason, result.error_message) == (SUCCEEDED, FinishReason.TOOL_CALLS, "")
    assert (result.reasoning, result.text) == ("Hm. Is it far? No.", "I go there. Wait for me!")
    assert calls_of(result) == CALLS and 20 < result.metrics.reasoning_tokens < 40
    llm.until(lambda: any(piece.done for piece in llm.pieces_of("a")))
    pieces = llm.pieces_of("a")
    assert "".join(piece.text for piece in pieces) == result.text
    assert "".join(piece.reasoning for piece in pieces) == result.reasoning
    assert [call for piece in pieces for call in piece.tool_calls] == list(result.tool_calls)
    assert pieces[-1].finish_reason == FinishReason.TOOL_CALLS
    assert all(call in result.tool_calls for piece in goal.feedback for call in piece.tool_calls)
    llm.until(lambda: any(sentence.done for sentence in spoken))
    assert [sentence.text for sentence in spoken if sentence.text] == ["I go there.", "Wait for me!"]


def test_a_conversation_goes_on_after_a_call(llm):
    messages = [
        ChatMessage(role="user", content="To the dock!"),
        ChatMessage(role="assistant", tool_calls=[ToolCall(id="1", name="go", arguments='{"place": "dock"}')]),
        ChatMessage(role="tool", content="arrived", tool_call_id="1"),
    ]
    answer = llm.generate(messages=messages, tools=[TOOL], parallel_tool_calls=[False], thinking="on", sampling=LONG)
    assert answer.error_code == 0 and answer.metrics.prompt_tokens > 100
    messages[2].tool_call_id = "2"
    answer = llm.generate(messages=messages, tools=[TOOL])
    assert answer.error_code == ErrorCode.INVALID_REQUEST and "'2' is that of no tool call" in answer.error_message


def test_the_node_says_what_its_model_can_do(llm):
    info = llm.info()
    assert (info.tool_format, info.thinks) == ("hermes", True)


def test_the_python_client_takes_dicts(llm):
    with LLM(f"/{llm.name}") as client:
        tool = {"name": "go", "description": "Go.", "parameters": PARAMETERS}
        variables = {"enable_thinking": True}
        result = client.ask("To the dock!", tools=[tool], tool_choice="go", template_variables=variables, **LONG)
        assert calls_of(result)[:1] == CALLS[:1] and result.finish_reason == FinishReason.TOOL_CALLS
        turns = [
            {"role": "user", "content": "To the dock!"},
            {"role": "assistant", "tool_calls": [{"id": "1", "name": "go", "arguments": "{}"}]},
            {"role": "tool", "content": "arrived", "tool_call_id": "1"},
        ]
        assert client.ask(turns, tools=[tool], parallel_tool_calls=False).error_code == 0
        with pytest.raises(InvalidRequestError, match="tool choice is 'fly'"):
            client.ask("x", tools=[tool], tool_choice="fly")
