"""The ``edgellm`` command as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine_core import cli

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


@pytest.mark.parametrize("how", [["-m", "engine_core.cli"], [str(ROOT / "scripts" / "edgellm")]])
def test_the_command_starts_as_a_module_and_as_the_installed_script(how):
    helped = run(sys.executable, *how, "--help")
    assert helped.returncode == 0 and all(name.replace("_", "-") in helped.stdout for name in cli.COMMANDS)
    assert run(sys.executable, *how, "plan").returncode == 2
    failed = run(sys.executable, *how, "inspect", "/nonexistent")
    assert failed.returncode == 1 and failed.stderr.startswith("edgellm: ") and failed.stderr.count("\n") == 1


def test_help_loads_nothing_heavy():
    program = (
        "import sys; from engine_core import cli; cli._parser()\n"
        "print({'numpy', 'onnx', 'onnxruntime', 'rich', 'torch', 'transformers', 'tokenizers'} & sys.modules.keys())"
    )
    assert run(sys.executable, "-c", program).stdout.strip() == "set()"
