"""``top`` as its user sees it: a process with a pipe or a terminal; and the figures it draws."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from edgellm_ros.msg import EngineStatus, ErrorCode, FinishReason, GenerationMetrics, GenerationStats, RequestStatus
from edgellm_ros.top_figures import Figures
from edgellm_ros.top_view import View, bar, sparkline
from llm_client import CANCELED, NodeProcess

COMMAND = [sys.executable, "-m", "edgellm_ros.top", "--node"]
LONG = {"sampling": {"max_new_tokens": 1500}}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]")


def picture(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, name, *arguments], capture_output=True, text=True, timeout=60, env=os.environ | environment
    )


class TestOnce:
    def test_a_pipe_gets_one_picture(self, llm):
        goals = [llm.goal(request_id="the first", priority=3, **LONG), llm.goal(request_id="next", **LONG)]
        llm.status(lambda status: status.queued == 1)
        done = picture(llm.name)
        assert (done.returncode, done.stderr) == (0, "")
        assert "\x1b" not in done.stdout and "active" in done.stdout and "fake (fp32, fake)" in done.stdout
        assert "1 running, 1 waiting" in done.stdout and "kv_cache 8.00 KiB" in done.stdout
        rows = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()}
        assert "running" in rows["the first"] and "3" in rows["the first"] and "waits" in rows["next"]
        plain = picture(llm.name, "--once", PYTHONIOENCODING="ascii")
        assert plain.returncode == 0 and plain.stdout.isascii() and "the first" in plain.stdout
        for goal in goals:
            goal.cancel()
        assert [goal.result()[0] for goal in goals] == [CANCELED, CANCELED]

    def test_no_node_is_a_sentence(self):
        done = picture("nobody", "--wait", "0.3")
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "There is no node /nobody after 0.3 s.\n")


class Terminal:
    """``top`` on a terminal of 80 columns and 24 lines."""

    def __init__(self, name: str) -> None:
        self._end, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.other = other
        self.before = termios.tcgetattr(other)
        environment = {**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8"}
        environment.pop("COLUMNS", None)
        self.process = subprocess.Popen([*COMMAND, name], stdin=other, stdout=other, stderr=other, env=environment)
        self._seen = ""

    def press(self, key: str) -> None:
        os.write(self._end, key.encode())

    def until(self, *words: str, limit: float = 20.0) -> list[str]:
        """Return the lines of the first whole picture that has all ``words``."""
        end = time.monotonic() + limit
        while True:
            for shown in self._seen.split("\x1b[H")[1:-1]:
                lines = [ESCAPES.sub("", line) for line in shown.split("\r\n")]
                if all(any(word in line for line in lines) for word in words):
                    self._seen = ""
                    return lines
            self._seen = self._seen[-40_000:]
            assert time.monotonic() < end and self.process.poll() is None, (words, self._seen[-3000:])
            if select.select([self._end], [], [], 0.1)[0]:
                self._seen += os.read(self._end, 65536).decode("utf-8", "replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)
        os.close(self.other)


def test_on_a_terminal_before_the_node_and_after_it(nodes, engine_dir, tmp_path):
    llm = nodes.start(engine_dir)
    llm.node_process.stop()
    screen = Terminal(llm.name)
    try:
        screen.until("not there", "q quit")
        llm.node_process = NodeProcess(llm.name, tmp_path / "log", engine_dir=engine_dir, autostart=True)
        lines = screen.until("active", "fake (fp32, fake)", "memory", "none")
        assert len(lines) == 24 and max(map(len, lines)) <= 80
        goals = [llm.goal(request_id=name, **LONG) for name in ("first", "second", "third")]
        screen.until("1 running, 2 waiting", "third", "waits")
        screen.press("\x1b[B")
        screen.press("c")
        screen.until("Cancelled second.", "1 running, 1 waiting")
        assert goals[1].result()[1].finish_reason == FinishReason.CANCELLED
        screen.press("x")
        screen.until("Cancelled all.", "none")
        assert {goals[index].result()[1].finish_reason for index in (0, 2)} == {FinishReason.CANCELLED}
        llm.node_process.stop()
        screen.until("not there")
        llm.node_process = NodeProcess(llm.name, tmp_path / "log", engine_dir="/nonexistent", autostart=True)
        screen.until("unconfigured", "last errors", "ENGINE_DIRECTORY: ")
        screen.press("q")
        assert screen.process.wait(5) == 0
        assert termios.tcgetattr(screen.other) == screen.before
    finally:
        screen.close()


# --- the figures ------------------------------------------------------------------------------------------


def status(*tokens: int, **fields) -> EngineStatus:
    requests = [
        RequestStatus(request_id=str(index), running=True, generated_tokens=count) for index, count in enumerate(tokens)
    ]
    return EngineStatus(state=EngineStatus.ACTIVE, model_name="m", requests=requests, **fields)


def stats(name: str, tokens: int, **fields) -> GenerationStats:
    return GenerationStats(request_id=name, metrics=GenerationMetrics(generated_tokens=tokens, **fields))


class TestFigures:
    def test_a_token_is_counted_once_whichever_message_tells_it(self):
        figures = Figures()
        figures.on_status(status(10, 4), 100.0)
        figures.on_status(status(16, 4), 101.0)
        assert figures.num_tokens == 20 and figures.rate(101.0) == 10.0
        figures.on_stats(stats("0", 18, queue_time=0.25, time_to_first_token=0.5), 101.5)
        figures.on_status(status(17, 5), 101.6)  # sent before the request has ended
        assert (figures.num_tokens, figures.num_requests) == (23, 1)
        assert (list(figures.waits), list(figures.first_tokens)) == ([0.25], [0.5])
        assert figures.rates(101.9, 3) == [0.0, 0.0, 11.5] and figures.rate(104.0) == 0.0

    def test_errors_have_the_names_of_their_codes(self):
        figures = Figures()
        figures.on_stats(
            stats(
                "a",
                0,
            ),
            1.0,
        )
        refused = GenerationStats(
            request_id="b", finish_reason=FinishReason.ERROR, error_code=ErrorCode.QUEUE_FULL
        )  # fmt: skip
        figures.on_stats(refused, 1.0)
        failed = EngineStatus(error_code=ErrorCode.INTEGRITY, error_message="It is damaged.")
        figures.on_status(failed, 2.0)
        figures.on_status(failed, 3.0)  # once
        assert [(each.what, each.why) for each in figures.failures] == [
            ("b", "QUEUE_FULL"), ("node", "INTEGRITY: It is damaged."),
        ]  # fmt: skip

    def test_a_node_that_is_gone_leaves_its_errors(self):
        figures = Figures()
        figures.on_status(status(3, error_code=ErrorCode.ENGINE_FAULT, error_message="lost"), 1.0)
        figures.info = SimpleNamespace()
        figures.forget_node()
        assert figures.status is None and figures.info is None and len(figures.failures) == 1


class TestView:
    def test_sparklines_and_bars(self):
        assert sparkline([0, 1, 2, 4]) == "▁▃▅█" and sparkline([0.0, 0.0]) == "▁▁" and sparkline([]) == ""
        assert bar([25, 50], 100, 8).plain == "██████░░" and bar([1], 1000, 4).plain == "█░░░"
        assert bar([3, 3], 0, 4, ascii_only=True).plain == "####"

    @pytest.mark.parametrize("height", [10, 24])
    def test_the_selected_request_is_on_the_screen(self, height):
        view = View("/llm", Figures())
        view.figures.on_status(status(*range(40)), 1.0)
        for _ in range(30):
            view.move(1)
        console = Console(width=80, height=height, file=open(os.devnull, "w"))
        shown = console.render_lines(view.render(80, height, keys="q quit"), pad=False)
        lines = ["".join(part.text for part in line).rstrip() for line in shown]
        assert len(lines) == height and lines[-1] == "q quit" and view.chosen.request_id == "30"
        assert any(line.startswith("30 ") for line in lines)
        view.figures.on_status(status(1), 2.0)
        assert view.chosen.request_id == "0"

    def test_what_clients_name_does_not_steer_the_terminal(self):
        view = View("/llm", Figures())
        view.figures.on_status(status(1), 1.0)
        view.figures.status.requests[0].request_id = "a\x1b[2J\nb[red]"
        console = Console(width=100, file=open(os.devnull, "w"), record=True)
        console.print(view.render(100))
        text = console.export_text()
        assert "\x1b" not in text and "a [2J b[red]" in text
