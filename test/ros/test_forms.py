"""Answers of a form by service and client, named schemas, and ~/message_schema."""

from __future__ import annotations

import json

import pytest
from geometry_msgs.msg import Point32, PoseStamped

from edgellm_ros.client import LLM
from edgellm_ros.msg import ErrorCode, Sentence
from edgellm_ros.srv import MessageSchema
from engine_core.message_types import schema_of
from fake_backend import write_engine
from llm_client import STREAM, Nodes

FORMS = {
    "choice": ({"choices": ["go to the hall.", "stay here."]}, lambda text: text in ("go to the hall.", "stay here.")),
    "regex": ({"regex": r"[a-c]{2}\."}, lambda text: len(text) == 3 and set(text) <= set("abc.")),
    "grammar": ({"grammar": 'start: "go" " left"* "."'}, lambda text: text.startswith("go") and text.endswith(".")),
    "named": ({"schema_name": "step"}, lambda text: json.loads(text) == {"do": "halt"}),
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("forms")
    schemas = directory / "schemas"
    schemas.mkdir()
    step = {"type": "object", "properties": {"do": {"const": "halt"}}, "required": ["do"]}
    (schemas / "step.json").write_text(json.dumps({**step, "additionalProperties": False}))
    (schemas / "wrong.json").write_text("{")
    nodes = Nodes(directory)
    yield nodes.start(write_engine(directory / "fake", step_time=0.0), schema_dir=str(schemas)).bring_up()
    nodes.close()


def test_answers_of_a_form_are_spoken_unless_they_are_json(llm):
    sentences: list[Sentence] = []
    llm.node.create_subscription(Sentence, f"/{llm.name}/sentences", sentences.append, STREAM)
    llm.until(lambda: llm.node.count_publishers(f"/{llm.name}/sentences"))
    llm.spin(0.3)
    for name, (form, holds) in FORMS.items():
        answer = llm.generate(request_id=name, sampling={"max_new_tokens": 200}, **form)
        assert answer.error_code == 0 and holds(answer.text), (name, answer)
        llm.until(lambda name=name: any(each.done for each in sentences if each.request_id == name))
        spoken = "".join(each.text for each in sentences if each.request_id == name)
        assert spoken == ("" if name == "named" else answer.text)


def test_named_schemas_are_listed_and_a_bad_file_is_told_by_name(llm):
    assert list(llm.info().schemas) == ["step"]
    assert "wrong.json is left out" in llm.node_process.log.read_text()
    answer = llm.generate(schema_name="wrong")
    assert (answer.error_code, "it has step" in answer.error_message) == (ErrorCode.INVALID_SCHEMA, True)


@pytest.mark.parametrize(
    "form, code",
    [
        ({"regex": "["}, ErrorCode.INVALID_SCHEMA),
        ({"choices": [""]}, ErrorCode.INVALID_SCHEMA),
        ({"choices": ["a"] * 2000}, ErrorCode.INVALID_REQUEST),
        ({"grammar": "start: <|end|>"}, ErrorCode.INVALID_SCHEMA),
        ({"regex": "a", "choices": ["a"]}, ErrorCode.INVALID_REQUEST),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_bad_form_has_its_code_and_one_sentence(llm, form, code):
    answer = llm.generate(**form)
    assert (answer.error_code, answer.text) == (code, "") and "\n" not in answer.error_message


def test_the_client_asks_for_forms_and_messages(llm):
    with LLM(f"/{llm.name}") as client:
        assert client.ask("which?", choices=["left", "right"], max_new_tokens=20).text in ("left", "right")
        assert client.ask("x?", json_schema={"enum": [7]}, compact_json=True).text == "7"
        pieces = client.pieces("point?", json_schema=schema_of(Point32, ["x"]), compact_json=True, max_new_tokens=200)
        assert "".join(pieces).startswith('{"x": ')


def test_the_schema_of_a_message_type_is_asked_for(llm):
    def ask(name, **fields):
        return llm.call(MessageSchema, "message_schema", MessageSchema.Request(type=name, **fields))

    answer = ask("geometry_msgs/msg/PoseStamped", fields=["pose.position"], max_string=9)
    assert json.loads(answer.json_schema) == schema_of(PoseStamped, ["pose.position"], max_string=9)
    assert json.loads(ask("edgellm_ros/action/Generate", max_items=2).json_schema)["required"] == ["request"]
    for name, words in {
        "os/msg/Path": "The package os is not installed",
        "geometry_msgs/msg/Nothing": "geometry_msgs has no msg/Nothing",
        "../x": "no message type",
    }.items():
        answer = ask(name)
        assert answer.error_code == ErrorCode.INVALID_REQUEST and words in answer.error_message
    answer = ask("geometry_msgs/msg/PoseStamped", fields=["nowhere"])
    assert answer.error_code == ErrorCode.INVALID_REQUEST and "no field 'nowhere'" in answer.error_message
