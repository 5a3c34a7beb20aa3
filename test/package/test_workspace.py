"""Setting up and ending what ``tools/start`` starts, where either is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import workspace  # noqa: E402

NODE = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
signal.alarm(30)
print("ready", flush=True)
signal.pause()
"""
STARTER = "import subprocess, sys, workspace; sys.exit(workspace.wait_for(subprocess.Popen(sys.argv[1:])))"


def test_sigterm_is_handed_on_and_the_end_waited_for():
    """A service manager sends SIGTERM to the first process alone."""
    command = [sys.executable, "-c", STARTER, sys.executable, "-c", NODE]
    env = os.environ | {"PYTHONPATH": str(TOOLS)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout.readline() == "ready\n"
        starter.send_signal(signal.SIGTERM)
        rest, _ = starter.communicate(timeout=10)  # ends when no process has the pipe: none is left behind
        assert (rest, starter.returncode) == ("", 7)


def test_an_environment_whose_removal_was_interrupted_is_removed_the_next_time(tmp_path, monkeypatch):
    venv = tmp_path / ".venv"
    (venv / "lib").mkdir(parents=True)
    (venv / "lib64").symlink_to("lib")
    (venv / "pyvenv.cfg").touch()
    remove = workspace.shutil.rmtree

    def interrupted(path):
        if path == venv:
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(workspace.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workspace.remove_environment(venv)
    assert {path.name for path in venv.iterdir()} == {"lib64", "pyvenv.cfg"}
    monkeypatch.undo()
    workspace.remove_environment(venv)
    assert not venv.exists()


def test_a_folder_that_is_no_environment_is_kept(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(workspace.SetupError, match="move it away"):
        workspace.remove_environment(tmp_path)
    assert (tmp_path / "mine").exists()
