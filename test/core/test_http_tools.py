"""Tools and reasoning over HTTP: what OpenAI's own client sends and gets, and what is refused."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from engine_core.http.fields import FieldError, Fields  # noqa: E402
from engine_core.http.openai_requests import chat_request  # noqa: E402
from engine_core.request import ChatMessage, RequestDefaults, Tool, ToolCall  # noqa: E402
from fakes import END, ScriptedBackend, make_engine, text_ids  # noqa: E402
from http_endpoint import MODEL, Endpoint  # noqa: E402
from tool_templates import TEMPLATES, write  # noqa: E402

ASK = [{"role": "user", "content": "Go!"}]
SCHEMA = {"type": "object", "properties": {"place": {"enum": ["dock", "hall"]}}, "required": ["place"]}
GO = {"type": "function", "function": {"name": "go", "description": "Go.", "parameters": SCHEMA, "strict": True}}
HALT = {"type": "function", "function": {"name": "halt"}}
CHOOSE_GO = {"type": "function", "function": {"name": "go"}}
SAYS = (
    "<think>\nHm.\n</think>\n\nI go.\n"
    '<tool_call>\n{"name": "go", "arguments": {"place": "dock"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "halt", "arguments": {}}\n</tool_call>'
)


def start(directory, script=None, name="hermes"):
    write(directory, TEMPLATES[name][0])
    engine = make_engine(ScriptedBackend(script, max_context=4096), directory)
    return Endpoint(engine)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    """Its model thinks, speaks and calls twice, whatever it is asked."""
    endpoint = start(tmp_path_factory.mktemp("hermes"), [*text_ids(SAYS), END])
    yield endpoint
    endpoint.close()
    endpoint.state.engine.close()


@pytest.fixture
def client(endpoint):
    with endpoint.client() as client:
        yield client


def ask(client, messages=ASK, tools=(GO, HALT), max_tokens=300, **options):
    return client.chat.completions.create(
        model=MODEL, messages=messages, tools=list(tools), max_tokens=max_tokens, **options
    )


def read(body: dict):
    return chat_request(Fields({"messages": ASK} | body), RequestDefaults(), {MODEL: ""}).request


class TestAnswers:
    def test_a_whole_one(self, client):
        answer = ask(client)
        (choice,) = answer.choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I go.")
        assert choice.message.reasoning_content == "Hm."
        calls = [(call.type, call.function.name, json.loads(call.function.arguments)) for call in
                 choice.message.tool_calls]  # fmt: skip
        assert calls == [("function", "go", {"place": "dock"}), ("function", "halt", {})]
        assert len({call.id for call in choice.message.tool_calls}) == 2
        assert 0 < answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens
        assert answer.edgellm["finish_reason"] == "tool_calls"

    def test_a_stream_has_each_call_in_one_chunk(self, client):
        chunks = list(ask(client, stream=True))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm."
        assert "".join(delta.content or "" for delta in deltas) == "I go."
        calls = [call for delta in deltas for call in delta.tool_calls or []]
        assert [(call.index, call.type, call.function.name) for call in calls] == [
            (0, "function", "go"), (1, "function", "halt"),
        ]  # fmt: skip
        assert [json.loads(call.function.arguments) for call in calls] == [{"place": "dock"}, {}]
        assert all(call.id for call in calls) and chunks[-1].choices[0].finish_reason == "tool_calls"
        assert [delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]

    def test_the_accumulator_of_the_client_puts_the_calls_together(self, client):
        with client.chat.completions.stream(model=MODEL, messages=ASK, tools=[GO, HALT], max_tokens=300) as stream:
            message = stream.get_final_completion().choices[0].message
        assert [call.function.name for call in message.tool_calls] == ["go", "halt"]
        assert message.tool_calls[0].function.parsed_arguments == {"place": "dock"}

    def test_choices(self, client):
        def names(**options) -> list[str]:
            message = ask(client, **options).choices[0].message
            assert message.content is None or not message.tool_calls or message.content == "I go."
            return [call.function.name for call in message.tool_calls or []]

        assert names() == names(tool_choice="auto") == ["go", "halt"]
        assert names(parallel_tool_calls=False) == ["go"]
        assert names(tool_choice=CHOOSE_GO) == ["go"]
        assert names(tool_choice="required")[0] == "go"
        assert names(tool_choice="none", max_tokens=60) == []

    def test_calls_alone_have_no_content(self, client):
        message = ask(client, tool_choice=CHOOSE_GO, reasoning_effort="none", max_tokens=900).choices[0].message
        assert message.content is None and [call.function.name for call in message.tool_calls] == ["go"]
        assert not hasattr(message, "reasoning_content")

    def test_an_answer_goes_back_as_it_came(self, client, endpoint):
        message = ask(client).choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "done"} for call in message.tool_calls]
        turns = [*ASK, message.model_dump(), *results]
        answer = ask(client, turns, tool_choice="none", max_tokens=5)
        request = read({"messages": turns, "tools": [GO, HALT]})
        prompt = endpoint.state.engine.tokenizer.prompt(request.messages, tools=request.tools)
        assert answer.usage.prompt_tokens == len(prompt.token_ids)
        assert request.messages[1].tool_calls[0].name == "go" and request.messages[1].reasoning == "Hm."
        with pytest.raises(openai.BadRequestError, match="tool_call_id 'x' is that of no tool call"):
            ask(client, [*turns, {"role": "tool", "tool_call_id": "x", "content": ""}])


class TestRequests:
    def test_tools_and_choices(self):
        request = read({"tools": [GO, HALT], "tool_choice": CHOOSE_GO, "parallel_tool_calls": False})
        assert request.tools == (Tool("go", "Go.", json.dumps(SCHEMA)), Tool("halt"))
        assert (request.tool_choice, request.parallel_tool_calls) == ("go", False)
        request = read({"tools": [], "tool_choice": "none"})
        assert (request.tools, request.tool_choice, request.parallel_tool_calls) == ((), "none", True)

    def test_messages(self):
        call = {"id": "c1", "type": "function", "index": 0, "function": {"name": "go", "arguments": '{"place": "ö"}'}}
        request = read(
            {
                "messages": [
                    *ASK,
                    {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "Hm.", "annotations": []},
                    {"role": "tool", "content": [{"type": "text", "text": "ok"}], "tool_call_id": "c1", "name": "go"},
                ]
            }
        )
        assert request.messages[1:] == (
            ChatMessage("assistant", "", (ToolCall("c1", "go", '{"place": "ö"}'),), reasoning="Hm."),
            ChatMessage("tool", "ok", tool_call_id="c1", name="go"),
        )

    @pytest.mark.parametrize(
        "body, thinking, variables",
        [({}, "model", ""), ({"reasoning_effort": "none"}, "off", ""), ({"reasoning_effort": "low"}, "on", ""),
         ({"thinking": "on", "reasoning_effort": "high"}, "on", ""),
         ({"chat_template_kwargs": {"enable_thinking": False}}, "off", ""),
         ({"chat_template_kwargs": {"enable_thinking": True, "a": "ö"}}, "on", '{"a": "ö"}'),
         ({"chat_template_kwargs": {"enable_thinking": None}, "thinking": "off"}, "off", "")],
    )  # fmt: skip
    def test_thinking(self, body, thinking, variables):
        request = read(body | {"thinking_budget": 7})
        assert (request.thinking, request.template_variables, request.thinking_budget) == (thinking, variables, 7)

    @pytest.mark.parametrize(
        "body, param, message",
        [({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search', but only 'function'"),
         ({"tools": [{"type": "function"}]}, "tools[0].function", "has no function"),
         ({"tools": [GO, {"function": {}}]}, "tools[1].function.name", "has no name"),
         ({"tools": [{"function": {"name": "a", "parameters": "{}"}}]}, "tools[0].function.parameters",
          "must be an object"),
         ({"tools": [{"function": {"name": "a", "color": 1}}]}, "tools[0].function.color", "not supported"),
         ({"tools": [GO], "tool_choice": "go"}, "tool_choice", "an object that names a function"),
         ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "only 'function'"),
         ({"tool_choice": {"function": {"name": "auto"}}}, "tool_choice", "'auto' cannot be chosen"),
         ({"reasoning_effort": "much"}, "reasoning_effort", "one of none, minimal, low"),
         ({"reasoning_effort": "low", "thinking": "off"}, "thinking", "one switch and differ"),
         ({"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs.enable_thinking", "true or false"),
         ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": {}}}]}]},
          "messages[0].tool_calls[0].function.arguments", "must be a string"),
         ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls",
          "not supported"),
         ({"messages": [{"role": "user", "content": "a", "tool_call_id": "x"}]}, "messages[0].tool_call_id",
          "not supported")],
    )  # fmt: skip
    def test_a_field_is_refused_with_its_place(self, body, param, message):
        with pytest.raises(FieldError, match=message) as error:
            read(body)
        assert error.value.param == param


def call(arguments: str, name: str = "go") -> dict:
    return {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": name, "arguments": arguments}}]}


class TestRefusals:
    @pytest.mark.parametrize(
        "body, code, message",
        [({"tools": [GO, GO]}, "invalid_request", "Two tools have the name 'go'"),
         ({"tools": [{"function": {"name": "a b"}}]}, "invalid_request", "A tool has the name 'a b'"),
         ({"tools": [{"function": {"name": "a", "parameters": {"type": "string"}}}]}, "invalid_schema", "'a'"),
         ({"tools": [{"function": {"name": "a", "description": "\ud800"}}]}, "invalid_text", "not valid UTF-8"),
         ({"tools": [{"function": {"name": "a", "parameters": {"title": "\ud800"}}}]}, "invalid_text",
          "not valid UTF-8"),
         ({"tool_choice": "required"}, "invalid_request", "has no tools"),
         ({"tools": [GO], "tool_choice": {"function": {"name": "fly"}}}, "invalid_request", "'fly'"),
         ({"messages": [*ASK, call("[]")]}, "invalid_request", "no JSON object"),
         ({"messages": [*ASK, call("{")]}, "invalid_request", "no JSON object"),
         ({"messages": [*ASK, call("[" * 100_000)]}, "invalid_request", "no JSON object"),
         ({"chat_template_kwargs": {"color": "red"}}, "invalid_request", "no variable 'color'"),
         ({"thinking": "a lot"}, "invalid_request", "must be one of model, off, on"),
         ({"thinking_budget": -1}, "invalid_request", "The thinking budget is -1")],
    )  # fmt: skip
    def test_each_is_one_sentence(self, endpoint, body, code, message):
        status, answer = endpoint.post({"messages": ASK} | body)
        assert (status, answer["error"]["code"]) == (400, code), answer
        assert message in answer["error"]["message"] and "\n" not in answer["error"]["message"]

    def test_completions_have_no_tools(self, endpoint):
        for field, value in (("tools", [GO]), ("reasoning_effort", "low"), ("chat_template_kwargs", {})):
            status, answer = endpoint.post({"prompt": "a", field: value}, path="/v1/completions")
            assert (status, answer["error"]["param"]) == (400, field)
