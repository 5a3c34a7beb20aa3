"""A message class gives a schema, and the JSON that keeps to it the message."""

from __future__ import annotations

import json

import pytest
from action_msgs.msg import GoalStatus
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import Polygon, PoseStamped, PoseWithCovariance
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import ParameterDescriptor, ParameterEvent, ParameterValue

from edgellm_ros import client as module
from edgellm_ros.client import LLM, NoMessageError
from edgellm_ros.msg import FinishReason, GenerationRequest, GenerationResult
from engine_core import cli
from engine_core.message_types import MessageTypeError, MessageValueError, message_of, message_type, schema_of
from engine_core.serving.json_schema import parse_schema


def test_numbers_strings_and_times_have_bounds():
    schema = schema_of(PoseStamped, max_string=20)
    header = schema["properties"]["header"]["properties"]
    assert header["frame_id"] == {"type": "string", "maxLength": 20}
    assert header["stamp"]["properties"] == {
        "sec": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
        "nanosec": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
    }
    assert schema["properties"]["pose"]["properties"]["position"]["required"] == ["x", "y", "z"]
    covariance = schema_of(PoseWithCovariance)["properties"]["covariance"]
    assert (covariance["minItems"], covariance["maxItems"]) == (36, 36)
    value = schema_of(ParameterValue, max_items=3)["properties"]
    assert value["bool_value"] == {"type": "boolean"} and value["byte_array_value"]["maxItems"] == 3
    assert value["byte_array_value"]["items"] == {"type": "integer", "minimum": 0, "maximum": 255}
    assert schema_of(ParameterDescriptor)["properties"]["integer_range"]["maxItems"] == 1  # bounded by its type
    point = schema_of(Polygon)["properties"]["points"]["items"]["properties"]["x"]
    assert point["type"] == "number" and point["maximum"] < 3.5e38


def test_fields_are_chosen_by_their_paths():
    schema = schema_of(PoseStamped, ["pose.position.x", " header.frame_id", "pose.orientation", "pose.orientation.w"])
    assert schema["required"] == ["header", "pose"]
    pose = schema["properties"]["pose"]["properties"]
    assert list(pose["position"]["properties"]) == ["x"] and len(pose["orientation"]["properties"]) == 4
    inside = schema_of(Polygon, ["points.x"])["properties"]["points"]["items"]
    assert inside["required"] == ["x"]
    with pytest.raises(MessageTypeError, match=r"'pose\.wrong', only position, orientation"):
        schema_of(PoseStamped, ["pose.wrong"])
    with pytest.raises(MessageTypeError, match="has no fields"):
        schema_of(PoseStamped, ["header.frame_id.x"])
    with pytest.raises(MessageTypeError, match="has no fields"):
        schema_of(DiagnosticStatus, ["level.x"])


def test_constants_of_a_field_are_offered_by_name():
    level = schema_of(DiagnosticStatus)["properties"]["level"]
    assert level == {"enum": ["OK", "WARN", "ERROR", "STALE"]}
    assert message_of(DiagnosticStatus, {"level": "WARN"}).level == DiagnosticStatus.WARN
    assert message_of(DiagnosticStatus, {"level": 2}).level == DiagnosticStatus.ERROR
    status = schema_of(GoalStatus, ["status"])["properties"]["status"]
    assert "STATUS_ABORTED" in status["enum"]
    assert message_of(GoalStatus, '{"status": "STATUS_ABORTED"}').status == GoalStatus.STATUS_ABORTED
    flags = type("Flags", (), {"BITS_A": 1, "BITS_B": 2, "BITS_C": 4})
    flags.get_fields_and_field_types = staticmethod(lambda: {"bits": "uint8"})
    assert schema_of(flags)["properties"]["bits"]["type"] == "integer"


@pytest.mark.parametrize("message", [PoseStamped, PoseWithCovariance, DiagnosticStatus, ParameterEvent, GoalStatus])
def test_the_engine_takes_the_schema(message):
    from llguidance import LLMatcher

    parsed = parse_schema(json.dumps(schema_of(message)))
    assert not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(parsed)))


def test_json_becomes_the_message():
    message = message_of(
        PoseStamped, '{"header": {"stamp": {"sec": 5}, "frame_id": "map"}, "pose": {"position": {"x": 1, "y": -2.5}}}'
    )
    assert (message.header.stamp.sec, message.header.frame_id) == (5, "map")
    assert (message.pose.position.x, message.pose.position.y, message.pose.orientation.w) == (1.0, -2.5, 1.0)
    assert list(message_of(PoseWithCovariance, {"covariance": [0.5] * 36}).covariance) == [0.5] * 36
    assert message_of(ParameterValue, {"byte_array_value": [7]}).byte_array_value == [b"\x07"]
    assert message_of(Polygon, {"points": [{"x": 2.0}, {}]}).points[0].x == 2.0


@pytest.mark.parametrize(
    "message, value, reason",
    [
        (PoseStamped, "[1]", "PoseStamped is"),
        (PoseStamped, "{", "not JSON"),
        (PoseStamped, {"pse": 1}, "no such field"),
        (PoseStamped, {"pose": {"position": {"x": "1"}}}, r"pose\.position\.x is '1', but it must be a number"),
        (PoseStamped, {"pose": {"position": {"x": True}}}, "must be a number"),
        (PoseStamped, {"header": {"stamp": {"sec": 2**31}}}, "whole number from"),
        (PoseStamped, {"header": {"frame_id": "a\0b"}}, "without NUL"),
        (PoseStamped, {"header": {"frame_id": "\ud800"}}, "without NUL"),
        (PoseWithCovariance, {"covariance": [0.0] * 35}, "a list of 36"),
        (Polygon, {"points": [{"x": 1e39}]}, r"points\[0\]\.x"),
        (ParameterDescriptor, {"integer_range": [{}, {}]}, "at most 1"),
        (ParameterValue, {"bool_value": 1}, "true or false"),
        (DiagnosticStatus, {"level": "BAD"}, "whole number"),
    ],
)
def test_other_values_are_refused(message, value, reason):
    with pytest.raises(MessageValueError, match=reason):
        message_of(message, value)


def test_types_are_found_by_name():
    assert message_type("geometry_msgs/msg/PoseStamped") is message_type("geometry_msgs/PoseStamped") is PoseStamped
    assert message_type("lifecycle_msgs/srv/ChangeState") is ChangeState.Request
    assert message_type("edgellm_ros/action/Generate")().request == GenerationRequest()


def test_the_command_prints_the_schema_or_one_sentence(capsys):
    assert cli.main(["schema", "geometry_msgs/msg/PoseStamped", "--fields", "pose.position,header.frame_id"]) == 0
    assert json.loads(capsys.readouterr().out) == schema_of(PoseStamped, ["pose.position", "header.frame_id"])
    for name, reason in (
        ("no_such_msgs/msg/X", "source the ROS"),
        ("geometry_msgs/msg/X", "has no"),
        ("x", "expected"),
    ):
        assert cli.main(["schema", name]) == 1
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1


def test_the_client_asks_for_a_message(monkeypatch):
    asked = []

    def ask(_self, messages, **options):
        asked.append((messages, options))
        return GenerationResult(text='{"pose":{"position":{"x":2.0}}}', finish_reason=asked_reason)

    monkeypatch.setattr(module.LLM, "ask", ask)
    llm = LLM.__new__(LLM)
    asked_reason = FinishReason.STOP
    pose = llm.ask_for(PoseStamped, "ahead", fields=["pose.position.x"], deadline=3.0)
    assert isinstance(pose, PoseStamped) and pose.pose.position.x == 2.0
    assert asked[0][0] == "ahead" and asked[0][1]["deadline"] == 3.0
    assert json.loads(asked[0][1]["json_schema"]) == schema_of(PoseStamped, ["pose.position.x"])
    asked_reason = FinishReason.LENGTH
    with pytest.raises(NoMessageError) as caught:
        llm.ask_for(PoseStamped, "ahead")
    assert caught.value.result.text


def test_an_answer_of_a_node_is_a_message(llm):
    with LLM(llm.name) as client:
        value = client.ask_for(ParameterValue, "yes or no?", fields=["bool_value"], max_new_tokens=200)
    assert isinstance(value, ParameterValue) and value.bool_value in (True, False)
