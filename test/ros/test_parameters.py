"""Parameters: what is taken, what is refused and why, and that config/llm.yaml says the same."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from rcl_interfaces.msg import ParameterType
from rclpy.node import Node
from rclpy.parameter import Parameter, parameter_value_to_python

from edgellm_ros.msg import FinishReason
from edgellm_ros.parameter_table import SPECS, Kind
from edgellm_ros.parameters import check_parameters
from llm_client import ACTIVATE, CLEANUP, CONFIGURE, DEACTIVATE, HERE, UNCONFIGURED

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_config_file_starts_the_node(nodes):
    llm = nodes.start()
    config = ROOT / "config" / "llm.yaml"
    command = [sys.executable, str(HERE / "fake_llm_node.py"), "--ros-args", "--params-file", str(config)]
    other = subprocess.Popen([*command, "-r", "__node:=from_file"], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        llm.until(lambda: ("from_file", "/") in llm.node.get_node_names_and_namespaces())
        assert other.poll() is None
    finally:
        other.terminate()
        assert other.wait(5) == 0


def test_every_parameter_is_described_and_numbers_have_sliders(llm):
    for spec, descriptor in zip(SPECS, llm.describe(*(spec.name for spec in SPECS))):
        assert descriptor.description
        if descriptor.type == ParameterType.PARAMETER_INTEGER:
            assert descriptor.integer_range, spec.name
        if descriptor.type == ParameterType.PARAMETER_DOUBLE:
            assert descriptor.floating_point_range or "NaN" in descriptor.additional_constraints, spec.name


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.kind is Kind.FIXED], ids=lambda spec: spec.name)
def test_fixed_parameters_are_refused_while_configured(llm, spec):
    current = parameter_value_to_python(llm.get(spec.name)[0])
    [(taken, reason)] = llm.set(**{spec.name: current})
    assert taken, reason  # the value it has: as in a file that 'ros2 param dump' wrote
    if isinstance(current, bool):
        other = not current
    elif isinstance(current, int):
        other = current + 1
    else:
        other = f"{current}x" if isinstance(current, str) else [*current, "x"]
    [(taken, reason)] = llm.set(**{spec.name: other})
    assert not taken and reason == f"{spec.name} is fixed while the node is configured; clean up, set it and " \
        "configure again."  # fmt: skip


@pytest.mark.parametrize(("name", "other"), [("autostart", True), ("bond", "always")])
def test_what_is_read_at_the_start_takes_its_value_and_no_other(llm, name, other):
    current = parameter_value_to_python(llm.get(name)[0])
    assert llm.set(**{name: current}) == [(True, "")]
    [(taken, reason)] = llm.set(**{name: other})
    assert not taken and reason == f"{name} is read when the node starts; start it with another value."


@pytest.mark.parametrize(
    "name, value",
    [("temperature", -0.1), ("temperature", math.inf), ("top_p", math.nan), ("top_p", 0.0), ("top_k", -1), ("seed", -2),
     ("max_new_tokens", 0), ("busy_policy", "panic"), ("queue_depth", -1), ("request_timeout", math.inf),
     ("deactivate_policy", "wait"), ("autostart", True), ("temperature", "hot"), ("temperature", True),
     ("top_k", 1.0), ("system_prompt", "x" * (1 << 20)), ("system_prompt", "\ufffd"), ("stop", ["a"] * 17),
     ("stop", ["a" * 257])],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_bad_values_are_refused_with_a_reason_and_change_nothing(llm, name, value):
    before = llm.get(name)
    [(taken, reason)] = llm.set(**{name: value})
    assert not taken and llm.get(name) == before
    assert name in reason or "expected 'Type." in reason  # rclpy's own words for another type


def test_validation_has_its_own_reasons():
    for spec in SPECS:
        bad = {bool: None, int: None, float: math.nan, str: "no such choice", list: None}[type(spec.default)]
        if spec.range and (isinstance(spec.default, int) or spec.name == "temperature"):  # whose NaN is the model's
            bad = spec.range.low - 1
        if bad is not None and (spec.choices or not isinstance(bad, str)):
            result = check_parameters([Parameter(spec.name, value=bad)], configured=False)
            assert not result.successful and str(bad) in result.reason


def test_dynamic_parameters_hold_from_the_next_request_on(llm):
    llm.must_set(max_new_tokens=3)
    assert llm.generate(sampling={"ignore_eos": False}).metrics.generated_tokens == 3
    llm.must_set(max_new_tokens=5, stop=["\x7f", ""])
    answer = llm.generate(sampling={"ignore_eos": False})
    assert answer.metrics.generated_tokens == 5 and answer.finish_reason == FinishReason.LENGTH
    assert llm.generate(sampling={"max_new_tokens": 4}).metrics.generated_tokens == 4
    llm.must_set(stop=[""])


def test_fixed_parameters_are_taken_at_the_next_configure(nodes, engine_dir):
    llm = nodes.start(engine_dir).bring_up()
    assert llm.info().max_context == 2048
    assert llm.change(DEACTIVATE)
    assert not llm.set(max_context=64)[0][0]
    assert llm.change(CLEANUP)
    llm.must_set(max_context=64)
    assert llm.change(CONFIGURE) and llm.change(ACTIVATE)
    assert llm.info().max_context == 64 == llm.status(lambda status: status.max_context).max_context
    assert llm.state() != UNCONFIGURED


def test_a_whole_number_is_taken_for_a_double(nodes, tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("/**:\n  ros__parameters:\n    top_p: 1\n    request_timeout: 3\n")
    llm = nodes.start(temperature=2, params_file=file)
    values = llm.get("temperature", "top_p", "request_timeout")
    assert [parameter_value_to_python(value) for value in values] == [2.0, 1.0, 3.0]
    assert {value.type for value in values} == {ParameterType.PARAMETER_DOUBLE}
    assert [bool(d.floating_point_range) for d in llm.describe("temperature", "top_p")] == [False, True]
    if hasattr(Node, "add_pre_set_parameters_callback"):  # not on Humble
        assert llm.set(temperature=1, top_k=3) == [(True, "")] * 2
        assert parameter_value_to_python(llm.get("temperature")[0]) == 1.0
    assert llm.set(temperature=math.nan) == [(True, "")]  # the model's
    [(taken, reason)] = llm.set(temperature=101)
    assert not taken and reason


@pytest.mark.parametrize("parameter", ["temperature:=-1.0", "temperature:=101", "temperature:=hot", "backend:=abacus"])
def test_a_start_with_a_bad_parameter_ends_with_one_sentence(parameter):
    command = [sys.executable, str(HERE / "fake_llm_node.py"), "--ros-args", "-p", parameter]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and parameter.split(":")[0] in done.stderr and "Traceback" not in done.stderr
