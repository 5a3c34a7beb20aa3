"""What ``tools/start run`` starts ends with it: a service manager sends SIGTERM to the first process alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NODE = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
signal.alarm(30)
print("ready", flush=True)
signal.pause()
"""
STARTER = "import subprocess, sys, workspace; sys.exit(workspace.wait_for(subprocess.Popen(sys.argv[1:])))"


def test_sigterm_is_handed_on_and_the_end_waited_for():
    command = [sys.executable, "-c", STARTER, sys.executable, "-c", NODE]
    env = os.environ | {"PYTHONPATH": str(TOOLS)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout.readline() == "ready\n"
        starter.send_signal(signal.SIGTERM)
        rest, _ = starter.communicate(timeout=10)  # ends when no process has the pipe: none is left behind
        assert (rest, starter.returncode) == ("", 7)
