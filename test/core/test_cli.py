"""The ``edgellm`` command as a user starts it."""

from __future__ import annotations

import argparse
import os
import pty
import re
import shlex
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
        "import sys; from engine_core import cli; cli.make_parser()\n"
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


# --- the help ---------------------------------------------------------------------------------------------


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Name → parser of each command."""
    (commands,) = (action for action in cli.make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices


@pytest.mark.parametrize("name", [name.replace("_", "-") for name in cli.COMMANDS])
class TestHelp:
    def test_every_option_says_what_it_is_for(self, name):
        silent = [action.dest for action in parsers()[name]._actions if not (action.help or "").strip()]
        assert silent == [] and parsers()[name].description

    def test_it_ends_with_an_example_that_the_parsers_take(self, name):
        """Another program may come before, and another command behind."""
        parser = parsers()[name]
        head, *lines = parser.epilog.splitlines()
        assert head == "Example:" and lines and parser.format_help().rstrip().endswith(lines[-1])
        words = [shlex.split(line) for line in lines]
        ours = [(command, arguments) for program, command, *arguments in words if program == "edgellm"]
        for command, arguments in ours:
            parsers()[command].parse_args(arguments)
        assert name in dict(ours)


# --- the first line, colours, --force ---------------------------------------------------------------------


FIRST_LINES = {
    "recommend": (["--memory", "8GiB"], r"\S+ as int\d is the best that fits a GPU; get it with: edgellm get \S+"),
    "plan": ([str(ROOT / "models/demo"), "--memory", "8GiB"], r"demo fits a GPU: int8 is recommended and takes .* MiB"),
    "inspect": ([str(ROOT / "models/demo")], r"LlamaForCausalLM with 6,820,096 parameters can be built for cuda"),
    "doctor": ([], r"\d of 3 backends can run here: "),
}


@pytest.mark.parametrize("name", FIRST_LINES)
def test_the_first_line_is_the_verdict(name, capsys):
    arguments, expected = FIRST_LINES[name]
    assert cli.main([name, *arguments]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert re.match(expected, first) and not second


def test_a_plan_that_fits_nowhere_says_so_first(capsys):
    for arguments, first in (
        (["--memory", "20MiB"], r"demo does not fit a GPU: \w+ needs [\d.]+ MiB, 20.00 MiB are free\."),
        (["--memory", "20MiB", "--quantization", "int8"], r"demo as int8 does not fit a GPU: int8 needs "),
    ):
        assert cli.main(["plan", str(ROOT / "models/demo"), *arguments]) == 1
        assert re.match(first, capsys.readouterr().out)


def test_the_recommended_column_is_marked(capsys):
    assert cli.main(["plan", str(ROOT / "models/demo"), "--memory", "8GiB"]) == 0
    header = next(line for line in capsys.readouterr().out.splitlines() if "fp16 " in line and "KV cache" not in line)
    assert re.findall(r"(\S+) \*", header) == ["int8"]


@pytest.mark.parametrize("no_color", [False, True])
def test_colours_are_for_terminals(no_color):
    environment = {**ENVIRONMENT, "TERM": "xterm-256color"} | ({"NO_COLOR": "1"} if no_color else {})
    command = [sys.executable, "-m", "engine_core.cli", "recommend", "--memory", "8GiB"]
    end, terminal = pty.openpty()
    process = subprocess.Popen(command, stdout=terminal, env=environment)
    os.close(terminal)
    shown = b""
    try:
        while block := os.read(end, 65536):
            shown += block
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0 and (b"\x1b[1;32m" in shown) is not no_color
    if not no_color:
        assert b"\x1b" not in subprocess.run(command, stdout=subprocess.PIPE, env=environment).stdout


def test_a_port_that_is_none_is_refused_before_an_engine_is_loaded(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "nowhere", "--port", "99999"])
    assert "'99999' is no port; ports are 1 to 65535" in capsys.readouterr().err


def test_an_engine_is_not_replaced_unless_asked(tmp_path, capsys):
    """All variants are looked at before the first is built."""
    (tmp_path / "engine" / "int4").mkdir(parents=True)
    (tmp_path / "engine" / "int4" / "mine").write_text("")
    command = ["build", str(ROOT / "models/demo"), str(tmp_path / "engine"), "--quantization", "int8,int4"]
    assert cli.main(command) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == (
        f"edgellm: {tmp_path}/engine/int4 is not empty; name another directory, or replace it with --force.\n"
    )
    assert not (tmp_path / "engine" / "int8").exists()
