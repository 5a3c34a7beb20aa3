"""The chat as its user sees it: a process with a pipe or a terminal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from edgellm_ros.msg import ChatMessage
from fake_backend import write_engine
from tool_templates import TEMPLATES


@pytest.fixture
def start(llm):
    """Start chats with the module's node as processes, which end with the test."""
    processes = []

    def start(*arguments, **streams):
        command = [sys.executable, "-m", "edgellm_ros.chat", "--node", llm.name, *arguments]
        processes.append(subprocess.Popen(command, **streams))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def test_a_piped_conversation_keeps_its_turns(llm, start):
    first = llm.generate("one", sampling={"max_new_tokens": 6}).text
    turns = [("user", "one"), ("assistant", first), ("user", "two")]
    second = llm.generate(
        messages=[ChatMessage(role=r, content=c) for r, c in turns], sampling={"max_new_tokens": 6}
    ).text
    chat = start("--max-new-tokens", "6", **PIPES)
    out, err = chat.communicate("one\ntwo\n/reset\none\n/nonsense\n/quit\nnever said\n", timeout=20)
    assert chat.returncode == 0 and out == f"{first}\n{second}\n{first}\n"
    assert "/nonsense" in err and "[length limit]" in err


def test_a_long_conversation_forgets_its_oldest_turns_and_goes_on(llm, start):
    chat = start("--max-new-tokens", "40", **PIPES)
    lines = [f"this is line number {number} of a long conversation" for number in range(64)]
    out, err = chat.communicate("\n".join(lines) + "\n", timeout=60)
    assert chat.returncode == 0, err
    assert len(out.splitlines()) == len(lines) and all(out.splitlines())
    assert "the context was full" in err and "/reset" in err


def test_a_line_that_is_too_long_alone_forgets_nothing(llm, start):
    first = llm.generate("one", sampling={"max_new_tokens": 6}).text
    turns = [("user", "one"), ("assistant", first), ("user", "two")]
    second = llm.generate(
        messages=[ChatMessage(role=r, content=c) for r, c in turns], sampling={"max_new_tokens": 6}
    ).text
    chat = start("--max-new-tokens", "6", **PIPES)
    out, err = chat.communicate("one\n" + "x" * 3000 + "\ntwo\n", timeout=20)
    assert out == f"{first}\n{second}\n" and "max_context" in err and "forgotten" not in err


def test_the_node_keeps_the_conversation_of_a_session(llm, start):
    def say(text, *arguments):
        chat = start("--max-new-tokens", "40", "--session", "anna", *arguments, **PIPES)
        out, err = chat.communicate(text, timeout=60)
        assert chat.returncode == 0, err
        return out, err

    sampling = {"max_new_tokens": 40}
    first, _ = say("/reset\none\n")  # nothing to forget yet
    second, _ = say("two\n")  # another chat goes on with it
    turns = [("user", "one"), ("assistant", first[:-1]), ("user", "two")]
    messages = [ChatMessage(role=role, content=content) for role, content in turns]
    assert second == llm.generate(messages=messages, sampling=sampling).text + "\n"
    answers, err = say("".join(f"{number} {'x' * 300}\n" for number in range(8)))
    assert len(answers.splitlines()) == 8 and "the context was full: the oldest" in err
    turns = [("system", "Be brief."), ("user", "one")]
    messages = [ChatMessage(role=role, content=content) for role, content in turns]
    assert say("/system Be brief.\none\n")[0] == llm.generate(messages=messages, sampling=sampling).text + "\n"
    assert say("/reset\none\n")[0] == first
    for name in ("an/na", ""):
        chat = start("--session", name, **PIPES)
        _, err = chat.communicate("one\n", timeout=20)
        assert (chat.returncode, "letters, digits" in err) == ((1, True) if name else (0, False))


def test_errors_are_said_and_counted(llm, start):
    chat = start("--temperature", "-1", **PIPES)
    out, err = chat.communicate("hello\n", timeout=20)
    assert chat.returncode == 1 and out == "" and "temperature is -1.0" in err and "Traceback" not in err
    chat = start("--wait", "0.5", "--node", "nobody", **PIPES)
    _, err = chat.communicate("hello\n", timeout=20)
    assert chat.returncode == 1 and "/nobody/generate" in err and "Traceback" not in err


def test_ctrl_c_cancels_then_leaves(llm, start):
    terminal, chats_end = pty.openpty()
    chat = start("--max-new-tokens", "2000", stdin=chats_end, stdout=chats_end, stderr=chats_end)
    os.close(chats_end)
    seen = b""

    def until(condition, limit=15.0):
        nonlocal seen
        end = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < end, seen
            seen += os.read(terminal, 4096)

    until(lambda: b"> " in seen)
    seen = b""
    os.write(terminal, b"talk\n")
    until(lambda: len(seen) > 40)
    chat.send_signal(signal.SIGINT)
    until(lambda: b"[cancelled]" in seen)
    until(lambda: b"> " in seen[seen.index(b"[cancelled]") :])
    assert not llm.status(lambda status: not status.busy).busy
    time.sleep(0.5)  # a person's: between its prompt and its select, Python's input() does not notice a signal
    chat.send_signal(signal.SIGINT)
    assert chat.wait(5) == 130
    assert b"Traceback" not in seen
    os.close(terminal)


def test_a_line_says_that_the_model_thinks(nodes, tmp_path):
    answers = {"hello": "<think>\nHm.\n</think>\n\nGood morning.", "</think>": "At once."}
    engine = write_engine(tmp_path / "engine", template=TEMPLATES["hermes"][0], answers=answers)
    name = nodes.start(engine).bring_up().name
    for thinking, expected in (("model", (0, "Good morning.\n", "[thinking]\n")), ("off", (0, "At once.\n", ""))):
        command = [sys.executable, "-m", "edgellm_ros.chat", "--node", name, "--thinking", thinking]
        chat = subprocess.run(command, input="hello\n", capture_output=True, text=True, timeout=20)
        assert (chat.returncode, chat.stdout, chat.stderr) == expected
