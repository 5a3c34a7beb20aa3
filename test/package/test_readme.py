"""The README's three commands to a real model, executed as they stand there.

The hub is a directory. It has a small random checkpoint, or the one that EDGELLM_REAL_CHECKPOINT names.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "test" / "core"))

import fake_hub  # noqa: E402

REAL = os.environ.get("EDGELLM_REAL_CHECKPOINT")
MODEL = "Qwen/Qwen3-0.6B"
EDGELLM = f'#!/bin/sh\nexec "{sys.executable}" -m engine_core.cli "$@"\n'
# "ros2 launch edgellm_ros llm.launch.py name:=value …" where the command ros2 or launch_ros is not installed.
ROS2 = f"""#!{sys.executable}
import os, sys
from pathlib import Path
assert sys.argv[1:4] == ["launch", "edgellm_ros", "llm.launch.py"], sys.argv
values = [part for argument in ["autostart:=true", *sys.argv[4:]] for part in ("-p", argument)]
node = next(
    path for prefix in os.environ["AMENT_PREFIX_PATH"].split(os.pathsep)
    if (path := Path(prefix) / "lib" / "edgellm_ros" / "llm_node").exists()
)
os.execv(node, [str(node), "--ros-args", "-r", "__node:=llm", *values])
"""


def commands() -> list[str]:
    """Return the lines of the README's block."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## A real model in three commands\n")[2].partition("\n## ")[0]
    return re.search(r"^```sh\n(.*?)^```$", section, re.M | re.S)[1].splitlines()


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """A home directory of its own, a hub directory, and the commands on the path."""
    home = tmp_path_factory.mktemp("readme")
    model = home / "hub" / MODEL
    model.parent.mkdir(parents=True)
    if REAL:
        model.symlink_to(Path(REAL).absolute())
    else:
        fake_hub.write_checkpoint(model)
    (home / "bin").mkdir()
    for name, script in (("edgellm", EDGELLM), ("ros2", ROS2)):
        (home / "bin" / name).write_text(script)
        (home / "bin" / name).chmod(0o755)
    return os.environ | {
        "HOME": str(home),
        "EDGELLM_HUB": str(home / "hub"),
        "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]),
    }


@pytest.fixture(scope="module")
def outputs(environment) -> list[str]:
    """What the first two commands print."""
    found = []
    for command in commands()[:2]:
        result = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        found.append(result.stdout)
    return found


def test_the_first_recommends_and_the_second_ends_with_the_third(environment, outputs):
    assert len(commands()) == 3 and "edgellm get" in outputs[0]
    launch = commands()[2].replace("$HOME", environment["HOME"])
    assert outputs[1].splitlines()[-1] == launch and "tokens/s" in outputs[1]
    if REAL:
        assert re.search(r"\b[Kk]itchen|robot\b", outputs[1].partition("one sentence.\n")[2])


def test_the_third_starts_a_node_that_answers(environment, outputs, tmp_path):
    pytest.importorskip("rclpy", reason="rclpy is not installed; 'make test' provides it")
    pytest.importorskip("edgellm_ros.msg", reason="the interfaces are not built; 'make test' builds them")
    from edgellm_ros.client import LLM, NotActiveError

    with open(tmp_path / "log", "wb") as log:
        node = subprocess.Popen(
            ["bash", "-c", f"exec {commands()[2]}"], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        with LLM("/llm", wait=60.0) as llm:
            end = time.monotonic() + 60.0
            while True:
                try:
                    answer = llm.ask("hello", max_new_tokens=8)
                    break
                except NotActiveError:
                    assert node.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
                    time.sleep(0.1)
        assert 1 <= answer.metrics.generated_tokens <= 8
    finally:
        node.send_signal(signal.SIGINT)
        assert node.wait(30) == 0
