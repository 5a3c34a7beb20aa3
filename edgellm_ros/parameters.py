"""The node's parameters in ROS: declared, checked and read as ``parameter_table`` says.

*Fixed* parameters are read when the node is configured; a change while it is configured is refused with the reason.
Those *at start* are read once.
*Dynamic* ones hold from the next request on, those *at activate* from the next activate on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    ParameterType,
    SetParametersResult,
)
from rclpy.exceptions import InvalidParameterTypeException, InvalidTopicNameException
from rclpy.expand_topic_name import expand_topic_name
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.validate_full_topic_name import validate_full_topic_name

from edgellm_ros.frames import topic_problem
from edgellm_ros.parameter_table import RANDOM_SEED, SPECS, Kind, ParameterSpec
from edgellm_ros.sampling_options import OPTION_TYPES
from engine_core.config import EngineConfig
from engine_core.errors import EngineDirectoryError, RequestError
from engine_core.request import ChatMessage, GenerationRequest, RequestDefaults, SamplingParams

_TYPES = {
    bool: ParameterType.PARAMETER_BOOL,
    int: ParameterType.PARAMETER_INTEGER,
    float: ParameterType.PARAMETER_DOUBLE,
    str: ParameterType.PARAMETER_STRING,
    list: ParameterType.PARAMETER_STRING_ARRAY,
}
_NOTES = {
    Kind.FIXED: " Taken at the next configure.",
    Kind.AT_ACTIVATE: " Taken at the next activate.",
    Kind.DYNAMIC: "",
    Kind.AT_START: " Taken when the node starts.",
}
_BY_NAME = {spec.name: spec for spec in SPECS}


@dataclass(frozen=True, kw_only=True)
class Settings(RequestDefaults):
    """The parameters that may change at any time, as one consistent snapshot; a request reads exactly one."""

    busy_policy: str
    queue_depth: int
    warn_wait: float  # s; 0 = never
    deactivate_policy: str
    deactivate_timeout: float  # s
    image_topics: tuple[str, ...]  # these three are taken at activate
    image_frames: int
    image_frame_interval: float  # s
    max_image_age: float  # s; 0 = any
    http_port: int  # 0 = no endpoint; these four are taken at activate
    http_host: str
    http_api_key_file: str  # "" = no key is asked for
    http_body_limit: int  # MiB


def describe(spec: ParameterSpec) -> ParameterDescriptor:
    """Return the descriptor; rqt draws sliders from its range, whose ends it takes as inclusive."""
    descriptor = ParameterDescriptor(
        name=spec.name, type=_TYPES[type(spec.default)], description=spec.description + _NOTES[spec.kind],
    )  # fmt: skip
    if spec.choices:
        descriptor.additional_constraints = f"One of: {', '.join(spec.choices)}."
    if spec.range is not None:
        ends = {"from_value": spec.range.low, "to_value": spec.range.high}
        if isinstance(spec.default, int):
            descriptor.integer_range = [IntegerRange(**ends, step=1)]
        elif spec.range.takes_nan:  # rclpy finds no NaN in a range
            descriptor.additional_constraints = f"{spec.range}".capitalize() + ", or NaN."
        else:
            descriptor.floating_point_range = [FloatingPointRange(**ends)]
            descriptor.additional_constraints = f"{spec.range}".capitalize() + "."
    return descriptor


def declare_parameters(node: Node) -> None:
    """Declare all of them. Raises rclpy's InvalidParameterTypeException or InvalidParameterValueException.

    YAML's types are taken for the declared ones as ``_converted`` says: on the command line, in a parameter file, and
    where rclpy has the callback for it (not on Humble) by ``ros2 param set``.
    """
    for spec in SPECS:
        try:
            node.declare_parameter(spec.name, spec.default, describe(spec))
        except InvalidParameterTypeException:
            given = node.declare_parameter(spec.name, spec.default, ParameterDescriptor(dynamic_typing=True))
            node.undeclare_parameter(spec.name)
            converted = _converted(given)
            if converted is given:
                raise
            node.declare_parameter(spec.name, converted.value, describe(spec), ignore_override=True)
    if hasattr(node, "add_pre_set_parameters_callback"):
        node.add_pre_set_parameters_callback(convert_types)


def convert_types(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Return the parameters with the types that are declared, where ``_converted`` knows how."""
    return [_converted(parameter) for parameter in parameters]


def _converted(parameter: Parameter) -> Parameter:
    """Return a whole number as a float where a double is declared, and a truth value as "on" or "off" where these are
    choices, since YAML reads the words so; every other parameter as it is."""
    spec = _BY_NAME.get(parameter.name)
    if spec is not None and parameter.type_ == Parameter.Type.INTEGER and isinstance(spec.default, float):
        return Parameter(parameter.name, Parameter.Type.DOUBLE, float(parameter.value))
    if spec is not None and parameter.type_ == Parameter.Type.BOOL and {"on", "off"} <= set(spec.choices):
        return Parameter(parameter.name, Parameter.Type.STRING, "on" if parameter.value else "off")
    return parameter


def check_parameters(
    parameters: Sequence[Parameter], *, configured: bool, current: Callable[[str], Any] | None = None
) -> SetParametersResult:
    """Check whether the node takes these values, without side effects and always with a reason.

    Others' parameters pass, and so does a fixed parameter that gets the value it has, by ``current`` (name → value;
    None: the node is starting). None is declared read-only, since rclpy refuses those even the value they have, as
    ``ros2 param load`` of a dump sets it.
    """
    for parameter in parameters:
        spec = _BY_NAME.get(parameter.name)
        if spec is None:
            continue
        is_changed = current is None or current(spec.name) != parameter.value
        if parameter.type_ == Parameter.Type.NOT_SET:
            reason = f"{spec.name} cannot be removed."
        elif spec.kind is Kind.FIXED and configured and is_changed:
            reason = f"{spec.name} is fixed while the node is configured; clean up, set it and configure again."
        elif spec.kind is Kind.AT_START and current is not None and is_changed:
            reason = f"{spec.name} is read when the node starts; start it with another value."
        else:
            reason = spec.problem(parameter.value) or _text_problem(spec.name, parameter.value)
            if spec.name == "image_topics":
                reason = _topics_problem(parameter.value)
        if reason:
            return SetParametersResult(successful=False, reason=reason)
    return SetParametersResult(successful=True)


def _text_problem(name: str, value: Any) -> str:
    """Return why no request could be answered with these texts of the node; "" if one could."""
    if name == "system_prompt":
        request = GenerationRequest("", messages=(ChatMessage("system", value), ChatMessage("user", "x")))
    elif name == "stop":
        request = GenerationRequest("", prompt="x", stop=tuple(text for text in value if text))
    else:
        return ""
    try:
        request.validate()
    except RequestError as error:
        return f"{name} is refused as in a request: {error}"
    return ""


def _topics_problem(topics: Sequence[str]) -> str:
    """Return why the node cannot subscribe to these topics; "" if it can."""
    names = [topic for topic in topics if topic]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        return f"image_topics has {twice} twice."
    for name in names:
        try:
            validate_full_topic_name(expand_topic_name(name, "node", "/"))
        except (InvalidTopicNameException, ValueError) as error:
            return f"image_topics has {name!r}, which is no topic's name: {str(error).splitlines()[0]}"
        if problem := topic_problem(name):
            return f"image_topics is refused: {problem}"
    return ""


def check_declared(node: Node) -> str:
    """Return what is wrong with the values the node was started with; "" if nothing is."""
    return check_parameters(node.get_parameters([spec.name for spec in SPECS]), configured=False).reason


def read_engine_config(node: Node) -> EngineConfig:
    """Return the fixed parameters. Raises ConfigurationError, and EngineDirectoryError if engine_dir is empty."""
    if not node.get_parameter("engine_dir").value:
        name = node.get_fully_qualified_name()
        raise EngineDirectoryError(
            f"The parameter engine_dir is empty; set it to a directory made by 'edgellm build'. In a params_file it "
            f"belongs into the section '{name}' (or '/**'): sections of other nodes are not read."
        )
    fixed = (spec.name for spec in SPECS if spec.kind is Kind.FIXED)
    return EngineConfig.from_dict({name: node.get_parameter(name).value for name in fixed})


def read_settings(node: Node) -> Settings:
    """Return the parameters that may change; call it where parameters are set (the executor) for one snapshot."""
    kinds = (Kind.DYNAMIC, Kind.AT_ACTIVATE)
    values = {spec.name: node.get_parameter(spec.name).value for spec in SPECS if spec.kind in kinds}
    sampling = {name: values.pop(name) for name in OPTION_TYPES}
    if sampling["seed"] == RANDOM_SEED:
        sampling["seed"] = None
    for name in ("stop", "image_topics"):
        values[name] = tuple(text for text in values[name] if text)
    values["stream_interval"] /= 1000.0
    return Settings(sampling=SamplingParams(**sampling), **values)
