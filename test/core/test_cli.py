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


def test_generate_takes_tools_as_the_api_of_openai(tmp_path, capsys):
    path = tmp_path / "tools.json"
    for text, reason in (
        ("{", "no JSON list of tools"),
        ('[{"type": "function"}]', "no JSON list of tools"),
        ('[{"type": "function", "function": {"name": "a b"}}]', "name 'a b'"),
    ):
        path.write_text(text)
        assert cli.main(["generate", str(tmp_path / "none"), "hello", "--tools", str(path)]) == 1
        assert reason in capsys.readouterr().err
    path.write_text('[{"type": "function", "function": {"name": "go", "parameters": {"type": "object"}}}]')
    assert cli.main(["generate", str(tmp_path / "none"), "hello", "--tools", str(path), "--thinking", "off"]) == 1
    assert "does not exist" in capsys.readouterr().err
