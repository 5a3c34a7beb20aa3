"""The examples do what they show, beside a node with a fake engine; test_sessions.py has the one with sessions."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
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
    "hello": "Good morning. How are you?",
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("examples")
    engine = write_engine(
        directory / "engine", template=TEMPLATES["hermes"][0], max_context=8192, step_time=0.001, answers=ANSWERS
    )
    nodes = Nodes(directory)
    yield nodes.start(engine, max_new_tokens=4000).bring_up()
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
    publisher.publish(String(data="hello"))
    lines = lines_until(process, "How are you?")
    assert [line for line in lines if line[0] != "["] == ["Good morning.", "How are you?"]
    llm.until(lambda: spoken.exists() and spoken.read_text() == "Good morning.\nHow are you?\n")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
