"""LangChain's ChatOpenAI, on which RAI and ROSA build, and the client of EmbodiedAgents against the endpoint."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
langchain_openai = pytest.importorskip("langchain_openai")

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage  # noqa: E402
from pydantic import BaseModel, Field  # noqa: E402

from fakes import END, ScriptedBackend, make_engine, text_ids  # noqa: E402
from http_endpoint import MODEL, Endpoint  # noqa: E402

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


@pytest.fixture(scope="module", params=[None, "Off I go."], ids=["any", "scripted"])
def served(request, tokenizer_dir):
    script = None if request.param is None else [*text_ids(request.param), END]
    engine = make_engine(ScriptedBackend(script, max_context=1024), tokenizer_dir)
    endpoint = Endpoint(engine)
    endpoint.says = request.param
    yield endpoint
    endpoint.close()
    engine.close()


@pytest.fixture
def llm(served):
    return langchain_openai.ChatOpenAI(
        base_url=f"{served.server.url}/v1", api_key="x", model=MODEL, max_retries=0, timeout=20, max_tokens=60
    )


def test_invoke_and_stream(llm, served):
    whole = llm.invoke(TALK)
    chunks = list(llm.stream(TALK, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == whole.content != ""
    assert whole.response_metadata["finish_reason"] == ("length" if served.says is None else "stop")
    assert served.says in (None, whole.content)
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

    @pytest.fixture(autouse=True)
    def only_any(self, served):
        if served.says is not None:
            pytest.skip("a script says what it says")

    def test_json_schema(self, llm):
        point = llm.with_structured_output(Point, method="json_schema").invoke(TALK)
        assert isinstance(point, Point) and 0 <= point.x <= 9

    def test_json_mode_asks_for_an_object(self, llm):
        with pytest.raises(openai.LengthFinishReasonError) as error:  # nobody takes half a value for a whole one
            llm.bind(response_format={"type": "json_object"}, max_tokens=8).invoke(TALK)
        assert error.value.completion.choices[0].message.content.startswith("{")


def test_the_request_of_embodied_agents(served):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "temperature": 0.7,
            "max_new_tokens": 5, "stream": False}  # fmt: skip
    status, answer = served.post(body)
    assert status == 200 and answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == 5 and not answer["choices"][0]["message"].get("tool_calls")
