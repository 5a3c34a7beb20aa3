"""LangChain's ChatOpenAI, on which RAI and ROSA build, and the client of EmbodiedAgents against the endpoint."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
langchain_openai = pytest.importorskip("langchain_openai")

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage  # noqa: E402
from langchain_core.tools import tool  # noqa: E402
from pydantic import BaseModel, Field  # noqa: E402

from fakes import END, ScriptedBackend, make_engine, text_ids  # noqa: E402
from http_endpoint import MODEL, Endpoint  # noqa: E402
from tool_templates import TEMPLATES, write  # noqa: E402

TALK = [
    SystemMessage("You drive."),
    HumanMessage("hello", name="bob"),
    AIMessage("hi", name="agent"),
    HumanMessage("on"),
]


class Point(BaseModel):
    """A place."""

    x: int = Field(ge=0, le=9)
    y: int = Field(ge=0, le=9)


@tool
def drive(place: Literal["dock", "hall"]) -> str:
    """Drive to a place."""
    return f"at the {place}"


CALL = '<tool_call>\n{"name": "drive", "arguments": {"place": "dock"}}\n</tool_call>'


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory):
    """An endpoint for each text that its model says; for "", it says anything."""
    write(directory := tmp_path_factory.mktemp("tokenizer"), TEMPLATES["hermes"][0])
    made = {}
    for text in ("", "Off I go.", CALL, '{"steps": ["go"]}'):
        script = [*text_ids(text), END] if text else None
        made[text] = Endpoint(make_engine(ScriptedBackend(script, max_context=4096), directory))
    yield made
    for endpoint in made.values():
        endpoint.close()
        endpoint.state.engine.close()


@pytest.fixture
def model(endpoints):
    """ChatOpenAI for a model that says a text."""

    def make(says=""):
        return langchain_openai.ChatOpenAI(
            base_url=f"{endpoints[says].server.url}/v1", api_key="x", model=MODEL, max_retries=0, timeout=20,
            max_tokens=200,
        )  # fmt: skip

    return make


@pytest.fixture
def llm(model):
    return model()


@pytest.mark.parametrize("says", ["", "Off I go."])
def test_invoke_and_stream(model, says):
    llm = model(says)
    whole = llm.invoke(TALK)
    chunks = list(llm.stream(TALK, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == whole.content != ""
    assert whole.response_metadata["finish_reason"] == ("stop" if says else "length")
    assert says in ("", whole.content)
    used = whole.usage_metadata
    assert used["total_tokens"] == used["input_tokens"] + used["output_tokens"] > 0
    (last,) = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert last["input_token_details"]["cache_read"] > 0

    async def together() -> list[AIMessage]:
        return await asyncio.gather(*(llm.ainvoke(TALK) for _ in range(4)))

    assert {answer.content for answer in asyncio.run(together())} == {whole.content}


def test_options(llm):
    answer = llm.bind(seed=3, temperature=1.0, stop=["zz"], max_tokens=5, extra_body={"priority": 9}).invoke(TALK)
    assert answer.usage_metadata["output_tokens"] == 5


class TestStructuredOutput:
    """The grammar chooses here, since the fake model knows no JSON."""

    @pytest.mark.parametrize("method", ["json_schema", "function_calling"])
    def test_an_object(self, llm, method):
        point = llm.with_structured_output(Point, method=method).invoke(TALK)
        assert isinstance(point, Point) and 0 <= point.x <= 9

    def test_json_mode_asks_for_an_object(self, llm):
        with pytest.raises(openai.LengthFinishReasonError) as error:  # nobody takes half a value for a whole one
            llm.bind(response_format={"type": "json_object"}, max_tokens=8).invoke(TALK)
        assert error.value.completion.choices[0].message.content.lstrip().startswith("{")


class TestTools:
    def test_a_call_its_result_and_the_answer(self, model):
        llm = model(CALL).bind_tools([drive])
        asked = llm.invoke(TALK)
        (call,) = asked.tool_calls
        assert (call["name"], call["args"], asked.content) == ("drive", {"place": "dock"}, "")
        assert asked.response_metadata["finish_reason"] == "tool_calls"
        result = drive.invoke(call)
        assert (result.tool_call_id, result.content) == (call["id"], "at the dock")
        answer = model("Off I go.").bind_tools([drive]).invoke([*TALK, asked, result])
        assert (answer.content, answer.tool_calls) == ("Off I go.", [])

    def test_a_stream(self, model):
        chunks = list(model(CALL).bind_tools([drive]).stream(TALK))
        assert sum(bool(chunk.tool_call_chunks) for chunk in chunks) == 1
        total = chunks[0]
        for chunk in chunks[1:]:
            total += chunk
        assert [(call["name"], call["args"]) for call in total.tool_calls] == [("drive", {"place": "dock"})]

    @pytest.mark.parametrize("choice", ["drive", "any", "required"])
    def test_a_forced_call(self, llm, choice):
        answer = llm.bind_tools([drive], tool_choice=choice, parallel_tool_calls=False).invoke(TALK)
        (call,) = answer.tool_calls
        assert call["name"] == "drive" and call["args"]["place"] in ("dock", "hall")

    def test_no_call(self, model):
        assert model("Off I go.").bind_tools([drive], tool_choice="none").invoke(TALK).content == "Off I go."


class TestFrameworks:
    """The requests of RAI, ROSA and EmbodiedAgents, as their sources of June 2026 make them."""

    class Plan(BaseModel):
        """Steps."""

        steps: list[Literal["go", "grip"]] = Field(max_length=2)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_rai_asks_a_planner_with_tools_for_a_schema(self, model, streaming):
        """Its messages are lists of parts; the tools are bound before the schema is asked for."""
        llm = model('{"steps": ["go"]}')
        llm.streaming = streaming
        turns = [SystemMessage("You plan."), HumanMessage([{"type": "text", "text": "Go to the dock."}])]
        assert llm.bind_tools([drive]).with_structured_output(self.Plan).invoke(turns) == self.Plan(steps=["go"])

    def test_rai_sends_a_tools_answer_as_parts_and_its_image_apart(self, model):
        asked = model(CALL).bind_tools([drive]).invoke(TALK)
        part = [{"type": "text", "text": "at the dock"}]
        told = ToolMessage(part, tool_call_id=asked.tool_calls[0]["id"], name="drive")
        llm = model("Off I go.").bind_tools([drive])
        assert llm.invoke([*TALK, asked, told]).content == "Off I go."
        url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        with pytest.raises(openai.BadRequestError, match="takes no images") as refused:
            llm.invoke([*TALK, asked, told, HumanMessage([*part, url])])
        assert "\n" not in refused.value.body["message"]

    def test_rosa_sends_back_what_it_has_streamed(self, model):
        chunks = list(model(CALL).bind_tools([drive]).stream(TALK))
        asked = chunks[0]
        for chunk in chunks[1:]:
            asked += chunk
        told = ToolMessage("at the dock", tool_call_id=asked.tool_calls[0]["id"])
        turns = [*TALK, asked, told, asked, told]  # its loop may come to the same call again
        assert model("Off I go.").bind_tools([drive]).invoke(turns).content == "Off I go."

    def test_embodied_agents_number_their_calls_anew(self, endpoints):
        """Cortex: exec_0 stands for the first call of each plan. Its components answer calls without an id."""

        def plan(name: str) -> list[dict]:
            call = {"id": "exec_0", "type": "function", "function": {"name": name, "arguments": "{}"}}
            told = {"role": "tool", "tool_call_id": "exec_0", "content": "done"}
            return [{"role": "assistant", "content": "", "tool_calls": [call]}, told]

        turns = [
            {"role": "system", "content": "Plan."},
            {"role": "user", "content": "hello"},
            *plan("go"),
            *plan("grip"),
        ]
        tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("go", "grip")]
        body = {"model": MODEL, "messages": turns, "tools": tools, "temperature": 0.7, "max_tokens": 300,
                "stream": False}  # fmt: skip
        status, answer = endpoints["Off I go."].post(body)
        assert status == 200 and answer["choices"][0]["message"]["content"] == "Off I go."
        loose = [*turns[:2], {"role": "assistant", "content": ""}, {"role": "tool", "content": "done"}]
        status, answer = endpoints["Off I go."].post(body | {"messages": loose})
        assert status == 200 and answer["choices"][0]["message"]["content"] == "Off I go."
        status, answer = endpoints["Off I go."].post(body | {"presence_penalty": 0.5})
        assert status == 400 and "use repetition_penalty" in answer["error"]["message"]

    def test_a_component_of_embodied_agents(self, endpoints):
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "temperature": 0.7,
                "max_new_tokens": 5, "stream": False}  # fmt: skip
        status, answer = endpoints[""].post(body)
        assert status == 200 and answer["choices"][0]["message"]["content"]
        assert answer["usage"]["completion_tokens"] == 5 and not answer["choices"][0]["message"].get("tool_calls")
