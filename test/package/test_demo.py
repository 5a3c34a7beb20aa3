"""tools/demo.py, the client that "make demo" runs: it answers, and whatever ends it, no node is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed; 'make test' provides it")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Where the demo keeps its engine and its logs."""
    return tmp_path_factory.mktemp("demo")


def start(work: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--work", str(work)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, text=True, cwd=ROOT / "test", start_new_session=True, **streams)


def nodes_of(work: Path) -> list[int]:
    """Processes whose command line names this demo's engine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has ended
        if any(argument.startswith(f"engine_dir:={work}") for argument in arguments):
            found.append(int(entry.parent.name))
    return found


def read_until(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the demo ended without printing {text!r}")


def test_answers_every_command_with_its_figures(work):
    process = start(work)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    figures = r"time to first token [\d.]+ ms, \d+ tokens at \d+ tokens/s"
    answers = re.findall(rf"^you    .+\nrobot  .+\n +{figures}$", output, re.M)
    assert len(answers) == output.count("\nyou    ") >= 10
    assert output.rstrip().endswith("The node has stopped.")
    assert nodes_of(work) == []


@pytest.mark.parametrize("after", ["starting the node", "you    "])
def test_ctrl_c_stops_the_node_too(work, after):
    process = start(work)
    read_until(process, after)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert nodes_of(work) == []


def test_a_node_that_dies_is_reported_with_its_log(work):
    process = start(work)
    read_until(process, "starting the node")
    end = time.monotonic() + 20.0
    while not nodes_of(work):
        assert time.monotonic() < end, "the node did not start"
        time.sleep(0.02)
    for pid in nodes_of(work):
        os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "error: The node ended by itself with exit status -9." in output
    assert "node.log" in output
