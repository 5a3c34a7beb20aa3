"""The chat as its user sees it: a process with a pipe or a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from edgellm_ros.chat import Chat
from edgellm_ros.client import InvalidImageError
from edgellm_ros.msg import ChatMessage, GenerationResult
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
    out, err = chat.communicate("one\ntwo\n/reset\none\n/nonsense\n/quit\nnever said\n", timeout=60)
    assert chat.returncode == 0 and out == f"{first}\n{second}\n{first}\n"
    assert "/nonsense" in err and "[length limit]" in err


def test_a_long_conversation_forgets_its_oldest_turns_and_goes_on(llm, start):
    chat = start("--max-new-tokens", "40", **PIPES)
    lines = [f"this is line number {number} of a long conversation" for number in range(64)]
    out, err = chat.communicate("\n".join(lines) + "\n", timeout=60)
    assert chat.returncode == 0, err
    assert len(out.splitlines()) == len(lines) and all(out.splitlines())
    assert "there was no room" in err and "/reset" in err


def test_a_line_that_is_too_long_alone_forgets_nothing(llm, start):
    first = llm.generate("one", sampling={"max_new_tokens": 6}).text
    turns = [("user", "one"), ("assistant", first), ("user", "two")]
    second = llm.generate(
        messages=[ChatMessage(role=r, content=c) for r, c in turns], sampling={"max_new_tokens": 6}
    ).text
    chat = start("--max-new-tokens", "6", **PIPES)
    out, err = chat.communicate("one\n" + "x" * 3000 + "\ntwo\n", timeout=60)
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
    assert len(answers.splitlines()) == 8 and "there was no room: the oldest" in err
    turns = [("system", "Be brief."), ("user", "one")]
    messages = [ChatMessage(role=role, content=content) for role, content in turns]
    assert say("/system Be brief.\none\n")[0] == llm.generate(messages=messages, sampling=sampling).text + "\n"
    assert say("/reset\none\n")[0] == first
    for name in ("an/na", ""):
        chat = start("--session", name, **PIPES)
        _, err = chat.communicate("one\n", timeout=60)
        assert (chat.returncode, "letters, digits" in err) == ((1, True) if name else (0, False))


def test_errors_are_said_and_counted(llm, start):
    chat = start("--temperature", "-1", **PIPES)
    out, err = chat.communicate("hello\n", timeout=60)
    assert chat.returncode == 1 and out == "" and "temperature is -1.0" in err and "Traceback" not in err
    chat = start("--wait", "0.5", "--node", "nobody", **PIPES)
    _, err = chat.communicate("hello\n", timeout=60)
    assert chat.returncode == 1 and "/nobody/generate" in err and "Traceback" not in err


def test_ctrl_c_cancels_then_leaves(llm, start):
    terminal, chats_end = pty.openpty()
    chat = start("--max-new-tokens", "2000", stdin=chats_end, stdout=chats_end, stderr=chats_end)
    os.close(chats_end)
    seen = b""

    def until(condition, limit=60.0):
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
        chat = subprocess.run(command, input="hello\n", capture_output=True, text=True, timeout=60)
        assert (chat.returncode, chat.stdout, chat.stderr) == expected


def test_a_picture_is_shown_with_the_next_line(llm, start, tmp_path):
    """The module's model does not see, and says so; the line after that has no picture."""
    path = tmp_path / "table.png"
    path.write_bytes(b"\x89PNG")
    chat = start("--max-new-tokens", "6", **PIPES)
    lines = f"/image {path}\nwhat is this?\n/image {path}s\n/image ~0\nhello\n"
    out, err = chat.communicate(lines, timeout=60)
    assert "takes no images" in err and f"{path}s cannot be read" in err and "names a home directory" in err
    assert out == f"{llm.generate('hello', sampling={'max_new_tokens': 6}).text}\n"


class Eyes:
    """Stand for the client and for Ctrl-C: note the images of each request, and take two of them at most."""

    def __init__(self) -> None:
        self.seen: list[list[bytes]] = []

    def pieces(self, messages, images, **options) -> Eyes:
        if len(images) > 2:
            raise InvalidImageError("The prompt has too many images.")
        assert sum(len(each.get("image_offsets", ())) for each in messages) == len(images)
        self.seen.append([bytes(image.data) for image in images])
        return self

    def __iter__(self):
        return iter(["A cup."])

    def cancel(self) -> None: ...

    def during_answer(self, cancel):
        return contextlib.nullcontext()

    result = GenerationResult(text="A cup.")


def test_a_picture_is_what_the_file_had_when_it_was_named(tmp_path, capsys):
    eyes, file = Eyes(), tmp_path / "frame.jpg"
    chat = Chat(eyes, eyes, "", {})
    for content in (b"first", b"second"):
        file.write_bytes(content)
        assert chat.line(f"/image {file}") and chat.line("What is that?")
    file.unlink()
    assert chat.line("And now?") and chat.line(f"/image {file}") and chat.line("Still?")
    assert eyes.seen == [[b"first"], *[[b"first", b"second"]] * 3]
    assert f"{file} cannot be read (No such file or directory)" in capsys.readouterr().err


def test_the_oldest_turns_are_forgotten_where_their_pictures_are_too_many(tmp_path, capsys):
    eyes = Eyes()
    chat = Chat(eyes, eyes, "", {})
    chat.line("Hello!")
    for content in (b"1", b"2", b"3"):
        (tmp_path / "frame.jpg").write_bytes(content)
        chat.line(f"/image {tmp_path}/frame.jpg")
        chat.line("What is that?")
    assert eyes.seen == [[], [b"1"], [b"1", b"2"], [b"2", b"3"]]
    assert "the oldest 4 of 6 messages are forgotten" in capsys.readouterr().err
    for _ in range(3):
        chat.line(f"/image {tmp_path}/frame.jpg")
    with pytest.raises(InvalidImageError):
        chat.line("And all of these?")
    assert chat.line("Hello?") and eyes.seen[-1] == [b"2", b"3"]
