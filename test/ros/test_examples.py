"""The examples do what they show, beside a node with a fake engine; test_sessions.py has the one with sessions."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from action_msgs.msg import GoalStatus
from rclpy.node import Node
from rclpy.task import Future
from std_msgs.msg import String

from edgellm_ros.client import LLM
from fake_backend import write_engine
from llm_client import Nodes
from tool_templates import TEMPLATES

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STORY = "".join(f"This is sentence {number} of a story. " for number in range(100))


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def call(name: str, **arguments: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


ANSWERS = {
    "the cup to the office": call("pick_up", object="cup"),
    "no cup here": call("drive_to", place="kitchen"),
    "Objects here: cup": call("pick_up", object="cup"),
    "Picked up: cup": call("drive_to", place="office"),
    "Objects here: book": call("put_down"),
    "Put down: cup": call("say", text="Here it is!"),
    "Said: Here": "The cup is in the office.",
    "for ever": call("put_down"),
    "the gripper is empty": call("drive_to", place="dock"),
    "Arrived: dock": call("put_down"),
    "one thing": call("say", text="One."),
    "Said: One.": call("say", text="One."),
    "a plan": '{"plan": [{"do": "navigate", "to": "kitchen"}]}',
    "a question": '{"ask": "Which cup?"}',
    "a story": STORY,
    "to the kitchen": '{"goals": [{"place": "kitchen"}, {"ahead": 1.0, "left": 0, "turn": 90}], "say": "There."}',
    "Nav2 did not get there": '{"goals": [{"place": "dock"}], "say": "I went home."}',
    "Question: hello": "small",
    "Question: plan a party": "large",
    "there coffee?": call("look", place="kitchen"),
    "In the kitchen there is": "Yes, in the kitchen.",
    "empty battery?": call("battery"),
    "Which skill": "grasp",
    "Where is it?": '{"x": 2.0, "y": 1.0}',
    "has fallen": "pick it up",
    "hello": "Good morning. How are you?",
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


PORT = free_port()
URL = f"http://127.0.0.1:{PORT}/v1"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("examples")
    engine = write_engine(
        directory / "engine", template=TEMPLATES["hermes"][0], max_context=8192, step_time=0.001, answers=ANSWERS
    )
    nodes = Nodes(directory)
    yield nodes.start(engine, max_new_tokens=4000, http_port=PORT).bring_up()
    nodes.close()


def test_the_tool_agent_runs_calls_until_the_answer_is_text(llm, capsys):
    agent = load("tool_agent")
    robot = agent.Robot()
    with LLM(f"/{llm.name}") as client:
        assert agent.run(client, robot, "bring the cup to the office") == ANSWERS["Said: Here"]
    assert (robot.place, robot.held, robot.objects["cup"]) == ("office", "", "office")
    lines = capsys.readouterr().out.splitlines()
    assert "no cup here" in lines[0] and "robot: Here it is!" in lines
    assert [line.split()[0] for line in lines if "→" in line] == [
        "pick_up", "drive_to", "pick_up", "drive_to", "put_down", "say"
    ]  # fmt: skip


def test_the_tool_agent_ends_with_a_model_that_does_not(llm, capsys):
    agent = load("tool_agent")
    assert agent.main("go on for ever", f"/{llm.name}") == 1
    captured = capsys.readouterr()
    assert "not done after 8 rounds" in captured.err and captured.out.count("→") == agent.MAX_ROUNDS


def test_the_tool_agent_asks_for_text_when_the_model_repeats_itself(llm, capsys):
    assert load("tool_agent").main("do one thing", f"/{llm.name}") == 0
    assert capsys.readouterr().out.count("robot: One.") == 1


def test_the_planner_returns_steps_or_says_why_there_are_none(llm, capsys):
    planner = load("planner_node")
    with LLM(f"/{llm.name}") as client:
        assert planner.plan(client, "make a plan") == [{"do": "navigate", "to": "kitchen"}]
        with pytest.raises(RuntimeError, match="Which cup"):
            planner.plan(client, "ask a question")


@pytest.fixture
def talk(llm, tmp_path):
    """Starts the voice loop, without sound: its espeak-ng writes down what it is told, and goes on for a minute."""
    program, spoken, processes = tmp_path / "espeak-ng", tmp_path / "spoken", []
    program.write_text(f'#!/bin/sh\ncat >> "{spoken}"\necho >> "{spoken}"\nexec sleep "${{SPEECH:-0}}"\n')
    program.chmod(0o755)

    def talk(*arguments, **variables):
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "voice_loop.py"), "--node", f"/{llm.name}", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"} | variables,
        )  # fmt: skip
        processes.append(process)
        return process, spoken

    yield talk
    for process in processes:
        process.kill()
        process.wait()


def say(process, line):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def lines_until(process, words):
    """The lines of the output up to the first one with ``words``."""
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if words in line:
            return lines
    raise AssertionError(lines)


def test_a_new_line_silences_the_voice_loop_and_is_answered(llm, talk):
    process, spoken = talk(SPEECH="60")
    say(process, "tell me a story")
    assert lines_until(process, "first sentence after")[0] == "This is sentence 0 of a story."
    lines_until(process, "sentence 3 ")
    start = time.monotonic()
    say(process, "hello")
    (silent,) = [line for line in lines_until(process, "Good morning.") if "silent" in line]
    assert 0.0 < float(silent.split()[1]) < 5000.0
    lines_until(process, "How are you?")
    say(process, "")
    process.stdin.close()
    assert "story" not in process.stdout.read() and process.wait(20) == 0
    assert time.monotonic() < start + 40  # no sentence was spoken for its minute
    words = spoken.read_text().splitlines()
    assert words[0] == "This is sentence 0 of a story." and len(words) < 4
    assert not llm.status(lambda status: not status.busy).busy


def test_the_voice_loop_hears_a_topic_and_speaks_all(llm, talk):
    process, spoken = talk("--topic", f"/{llm.name}/heard")
    publisher = llm.node.create_publisher(String, f"/{llm.name}/heard", 10)
    llm.until(publisher.get_subscription_count)
    llm.spin(0.3)  # the loop has to have found us, too
    publisher.publish(String(data="hello"))
    lines = lines_until(process, "How are you?")
    assert [line for line in lines if line[0] != "["] == ["Good morning.", "How are you?"]
    llm.until(lambda: spoken.exists() and spoken.read_text() == "Good morning.\nHow are you?\n")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


# --- Nav2 ---------------------------------------------------------------------------------------------


class SimulatedNav2:
    """Stands for rclpy's ActionClient: accepts poses and reaches those that ``reaches`` says."""

    def __init__(self, reaches=lambda pose: True):
        self.reaches, self.poses, self.cancels = reaches, [], 0

    def __call__(self, node, action_type, name):  # the ActionClient's constructor
        assert isinstance(node, Node) and name == "navigate_to_pose"
        return self

    def wait_for_server(self, timeout_sec):
        return True

    def send_goal_async(self, goal):
        self.poses.append(goal.pose)
        status = GoalStatus.STATUS_SUCCEEDED if self.reaches(goal.pose) else GoalStatus.STATUS_ABORTED
        answer = done(types.SimpleNamespace(status=status))
        return done(types.SimpleNamespace(accepted=True, get_result_async=lambda: answer))


def done(value):
    future = Future()
    future.set_result(value)
    return future


@pytest.fixture
def nav2(monkeypatch):
    """The example, with nav2_msgs and its action simulated."""

    class NavigateToPose:
        Goal = types.SimpleNamespace

    package, actions = types.ModuleType("nav2_msgs"), types.ModuleType("nav2_msgs.action")
    actions.NavigateToPose = NavigateToPose
    monkeypatch.setitem(sys.modules, "nav2_msgs", package)
    monkeypatch.setitem(sys.modules, "nav2_msgs.action", actions)
    return load("nav2_planner")


def test_the_nav2_planner_drives_to_the_poses_of_the_plan(llm, nav2, monkeypatch):
    monkeypatch.setattr(nav2, "ActionClient", server := SimulatedNav2())
    with LLM(f"/{llm.name}") as client:
        assert nav2.carry_out(client, nav2.Navigator(llm.node), "go to the kitchen, then ahead") == "There."
    kitchen, ahead = server.poses
    assert (kitchen.header.frame_id, ahead.header.frame_id) == ("map", "base_link") and kitchen.header.stamp.sec
    assert (kitchen.pose.position.x, kitchen.pose.position.y) == nav2.PLACES["kitchen"][:2]
    assert ahead.pose.position.x == 1.0 and ahead.pose.orientation.z == pytest.approx(math.sqrt(0.5))


def test_the_nav2_planner_plans_again_where_a_goal_is_not_reached(llm, nav2, monkeypatch, capsys):
    monkeypatch.setattr(nav2, "ActionClient", server := SimulatedNav2(lambda pose: pose.pose.position.x == 0.0))
    with LLM(f"/{llm.name}") as client:
        assert nav2.carry_out(client, nav2.Navigator(llm.node), "go to the kitchen") == "I went home."
        assert [pose.pose.position.x for pose in server.poses] == [4.0, 0.0]
        monkeypatch.setattr(nav2, "ActionClient", SimulatedNav2(lambda pose: False))
        with pytest.raises(RuntimeError, match="with 3 plans"):
            nav2.carry_out(client, nav2.Navigator(llm.node), "go to the kitchen")


# --- clients of other kinds ---------------------------------------------------------------------------


def test_the_router_chooses_a_model_and_falls_back_to_the_fast_one(llm, capsys):
    router = load("two_models")
    node = f"/{llm.name}"
    assert router.main(["hello", "--fast", node, "--big", node]) == 0
    assert capsys.readouterr().out == "[small] Good morning. How are you?\n"
    assert router.main(["plan", "a", "party", "--fast", node, "--big", node]) == 0
    assert capsys.readouterr().out.startswith("[large] ")
    assert router.main(["plan", "a", "party", "--fast", node, "--big", "/nobody"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("[small] ") and "No node offers /nobody/generate" in captured.err


def test_the_langchain_agent_runs_calls_until_the_answer_is_text(llm, capsys):
    pytest.importorskip("langchain_openai")
    agent = load("langchain_agent")
    assert agent.main(["is", "there", "coffee?", "--url", URL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("look {'place': 'kitchen'} → In the kitchen") and lines[-1] == "Yes, in the kitchen."
    assert agent.main(["empty", "battery?", "--url", URL]) == 1
    assert "not done after 8 rounds" in capsys.readouterr().err


def test_openais_client_streams_chooses_and_gets_json(llm, capsys):
    pytest.importorskip("openai")
    assert load("openai_client").main(["hello", "--url", URL]) == 0
    assert capsys.readouterr().out.splitlines() == ["Good morning. How are you?", "skill: grasp", "point: 2.0 1.0"]


@pytest.fixture
def trees():
    pytest.importorskip("py_trees", reason="needs py_trees, of tools/requirements-test.txt")
    return load("py_trees_behaviour")


def test_the_behaviour_for_py_trees_succeeds_with_an_answer_and_fails_without(llm, trees, capsys):
    assert trees.main(["the cup has fallen", "--node", f"/{llm.name}"]) == 0
    assert capsys.readouterr().out == "pick it up\n"
    assert trees.main(["the cup has fallen", "--node", "/nobody"]) == 1
    assert "No node offers /nobody/generate" in capsys.readouterr().err


def test_the_behaviour_for_py_trees_cancels_when_the_tree_goes_elsewhere(llm, trees):
    from py_trees.blackboard import Blackboard
    from py_trees.common import Status

    Blackboard.set("question", "tell me a story")
    with LLM(f"/{llm.name}") as client:
        ask = trees.AskModel("ask", client)
        while not ask.feedback_message:
            ask.tick_once()
            assert ask.status is Status.RUNNING
            time.sleep(0.01)
        ask.stop(Status.INVALID)
        assert ask._asked.ended.wait(10.0) and ask._asked.text in STORY and ask._asked.text != STORY
        assert not llm.status(lambda status: not status.busy).busy
        Blackboard.set("question", "hello")
        ask.tick_once()
        while ask.status is Status.RUNNING:
            time.sleep(0.01)
            ask.tick_once()
        assert ask.status is Status.SUCCESS and Blackboard.get("answer") == "Good morning. How are you?"
