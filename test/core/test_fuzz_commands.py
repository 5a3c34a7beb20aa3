"""Every command of ``edgellm`` with any arguments: done, or one sentence; and no file outside the folder named."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import sys
from functools import lru_cache
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("onnxruntime")

from hypothesis import given
from hypothesis import strategies as st

import vocab_checkpoints
from engine_core import cli
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.formats.signatures import SIGNATURE_SUFFIX
from engine_core.hub.known_models import TASKS, known_models
from engine_core.planning import recommend
from fuzzing import any_text, fuzz_slow

# A command's arguments without a name; where OUT is one, that folder is made by the command.
POSITIONAL = {
    "quantize": ("checkpoint", "OUT"),
    "reduce-vocab": ("checkpoint", "OUT"),
    "build": ("checkpoint", "OUT"),
    "inspect": ("target",),
    "plan": ("target",),
    "generate": ("target", "prompt"),
    "evaluate": ("target",),
    "bench": ("target",),
    "doctor": (),
    "recommend": (),
    "schema": ("type",),
    "sign": ("target",),
}
# One may reach a network, one takes minutes, one runs until a signal: test_get.py, test_report.py and test_http.py.
ELSEWHERE = {"get", "report", "serve"}
# What a command cannot do without, and what keeps it short.
USUAL = {
    "quantize": ["--method=int8"],
    "reduce-vocab": ["--texts=texts.txt", "--size=400"],
    "generate": ["--max-new-tokens=4"],
    "evaluate": ["--texts=texts.txt"],
    "bench": ["--prompt-tokens=4", "--new-tokens=3", "--repeats=1"],
    "recommend": ["--memory=8", "--bandwidth=50"],
    "sign": ["--key=key.pem"],
}
PATHS = [
    "checkpoint", "engine", "texts.txt", "chats.jsonl", "binary", "empty", "missing", "missing/deeper", "", ".",
    "/dev/null", "/proc/self/mem", "a" * 300, "texts.txt/inside", "loop", "engine/engine.json", "\udcff", "--", "-",
    "~nobody/x", "locked",
]  # fmt: skip
NUMBERS = [
    "0",
    "1",
    "2",
    "8",
    "32",
    "64",
    "400",
    "-1",
    "9999999999",
    str(2**63),
    str(10**30),
    "1.5",
    "0.25",
    "99.9",
    "1e400",
]
NUMBERS += ["nan", "inf", "-inf", "0x10", "1_000", " 1", "٣", "", "1GiB", "1e9GB", "9" * 400 + "GiB", "-1MiB", "0.1.1"]
NAMES = [
    "auto",
    "none",
    "fp32",
    "int8",
    "int4_awq",
    "fp8",
    "int8,fp32",
    ",",
    "orin-nano-8gb",
    "this",
    "12,17",
    "1,99999999",
]
values = st.sampled_from(PATHS) | st.sampled_from(NUMBERS) | st.sampled_from(NAMES) | any_text


def surrogate_escaped(text: str) -> str:
    """Return ``text`` as an argument of a process can be: no NUL, and what is not UTF-8 as lone surrogates of bytes."""
    return os.fsdecode(text.encode("utf-8", "replace")).replace("\0", "") if "\udcff" not in text else text


@lru_cache
def options(name: str) -> dict[str, list[str]]:
    """Return a command's options with the values that its help names: [""] for any, none for a flag."""
    found = {}
    text = run([name, "--help"])[1]
    for option, what in re.findall(r"^\s+(--[a-z][\w-]*)(?:[ ,]+(\{[^}]*\}|[A-Z]\w*))?", text, re.M):
        found[option] = what.strip("{}").split(",") if what.startswith("{") else [""] if what else []
    return found


def run(arguments: list[str], stdin: bytes = b"") -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of a command in this process."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)  # strict, as a terminal's is
    error = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                code = cli.main(arguments)
            except SystemExit as exit:
                code = exit.code
    finally:
        sys.stdin = before
    return code, *(stream.buffer.getvalue().decode("utf-8") for stream in (out, error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with a checkpoint, an engine and texts, whole and damaged."""
    root = tmp_path_factory.mktemp("commands")
    vocab_checkpoints.write_checkpoint(root / "checkpoint", "byte_level")
    build_engine(root / "checkpoint", root / "engine", quantization="int8")
    (root / "texts.txt").write_text(vocab_checkpoints.TEXT)
    vocab_checkpoints.write_chats(root / "chats.jsonl", [[("user", "Where?"), ("assistant", "Here.")]])
    (root / "binary").write_bytes(bytes(range(256)))
    (root / "empty").mkdir()
    os.symlink("loop", root / "loop")
    (root / "locked").mkdir(mode=0o000)
    with contextlib.suppress(ImportError):  # without it, sign says that it is missing
        write_key(root / "key.pem")
    before, known = Path.cwd(), known_models()
    few = [next(model for model in known if model.does(task)) for task in TASKS]  # all take recommend seconds
    os.chdir(root)
    with mock.patch.object(recommend, "known_models", lambda: few):
        yield root
    os.chdir(before)


def write_key(path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, serialization.NoEncryption()))


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file that is there."""
    return {
        str(path.relative_to(root)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if not path.is_dir()
    }


def check(folder: Path, arguments: list[str], stdin: bytes = b"") -> None:
    """Run a command: it ends with a known status and one sentence, and writes to OUT alone, or a signature."""
    before = listing(folder)
    code, out, error = run(arguments, stdin)
    after = listing(folder)
    shutil.rmtree(folder / "OUT", ignore_errors=True)
    written = {name for name in after if before.get(name) != after[name]} | (before.keys() - after.keys())
    for signature in [name for name in written if arguments[0] == "sign" and name.endswith(SIGNATURE_SUFFIX)]:
        written.remove(signature)
        (folder / signature).unlink(missing_ok=True)
    assert all(name.startswith("OUT/") for name in written), (arguments, written)
    assert code in (0, 1, 2), (arguments, code, error)
    last = error.rstrip("\n").rpartition("\n")[2]
    if code == 2:
        assert last.startswith("edgellm"), (arguments, error)  # argparse's usage and a sentence
    elif code == 1 and not out:
        assert last.startswith("edgellm: ") and "Traceback" not in error, (arguments, error)
    assert not any(name.startswith(".") for name in os.listdir(folder)), arguments  # leftovers


def test_every_command_is_tried():
    assert set(POSITIONAL) | ELSEWHERE == {name.replace("_", "-") for name in cli.COMMANDS}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["inspect", "a\nb\x1b[2J"], 1),  # one line all the same
        (["inspect", "n" * 300], 1),
        (["generate", "engine", "--", "-"], 1),  # what comes is not UTF-8
        (["plan", "checkpoint", "--max-context=9999999999"], 1),
        (["plan", "checkpoint", f"--memory={'9' * 400}GiB"], 1),
        (["plan", "checkpoint", "--device=--"], 2),
        (["build", "checkpoint", "OUT", "--vocab-map=--"], 2),
        (["reduce-vocab", "checkpoint", "OUT", "--texts=texts.txt", "--size=400", "--keep=binary"], 1),
        (["reduce-vocab", "checkpoint", "OUT", "--texts=texts.txt", "--size=400", "--keep=\u00b2"], 1),
        (["plan", "~0"], 1),  # no user of that name has a home directory
        (["inspect", "~nobody-of-that-name/x"], 1),
        (["generate", "engine", "hello", "--trusted-keys=~0/keys"], 1),
        (["generate", "engine", "hello", "--vocab-map=~0"], 1),
        (["generate", "engine", "hello", "--lora=a:~0"], 1),
        (["generate", "engine", "hello", "--schema-dir=~0"], 1),
        (["build", "checkpoint", "OUT", "--quantization=checkpoint", "--backend=cuda"], 1),
        (["build", "checkpoint", "OUT", "--quantization=checkpoint"], 1),
        (["build", "checkpoint", "OUT", "--quantization=fp16,auto", "--backend=cuda"], 1),
        (["build", "checkpoint", "OUT", "--max-prefill=-1", "--backend=tensorrt"], 2),
        (["bench", "engine", "--prompt-tokens=4", "--new-tokens=3", "--repeats=9999999999"], 1),  # some centuries
        (["quantize", "checkpoint", "OUT", "--method=int8", "--num-samples=-1"], 2),
        (["quantize", "checkpoint", "OUT", "--method=int8", "--sequence-length=0"], 2),
        (["serve", "engine", "--body-limit=0"], 2),
        (["serve", "engine", "--queue-depth=-1"], 2),
        (["get", "qwen3-0.6b", "OUT", "--max-context=-1"], 2),
        (["report", "OUT/report.json", "--repeats=9999999999"], 1),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_odd_is_told(folder, arguments, code):
    check(folder, arguments, b"\xff\xfe")
    assert run(arguments, b"\xff\xfe")[0] == code


OUT_OF_RANGE = ["-1", str(2**63), str(10**30), "nan", "-inf", "1e400", "9" * 5000]  # int() takes 4300 digits


@pytest.mark.parametrize("name", [name for name in POSITIONAL if name != "doctor"])
def test_a_number_out_of_range_is_told(folder, name):
    """All numbers of a command: those that its parser reads, each in the place of its usual value."""
    whole = {"target": "checkpoint" if name == "plan" else "engine", "prompt": "hello", "type": "std_msgs/msg/Header"}
    commands = next(a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    for action in commands[name]._actions:
        if action.type in (None, Path):
            continue
        flag = action.option_strings[0]
        for value in OUT_OF_RANGE:
            arguments = [name, *USUAL.get(name, []), *(whole.get(each, each) for each in POSITIONAL[name])]
            check(folder, [*(each for each in arguments if not each.startswith(f"{flag}=")), f"{flag}={value}"])


@pytest.mark.parametrize("name", [name for name in POSITIONAL if name != "doctor"])
@fuzz_slow
@given(data=st.data())
def test_a_command_is_done_or_says_in_one_sentence_why_not(folder, name, data):
    whole = {"checkpoint": "checkpoint", "OUT": "OUT", "prompt": "hello", "type": "std_msgs/msg/Header"}
    whole["target"] = data.draw(st.sampled_from(["engine", "checkpoint"]))
    arguments = [name]
    if data.draw(st.integers(0, 3)):
        arguments += USUAL.get(name, [])
    for argument in POSITIONAL[name]:
        odd = argument != "OUT" and data.draw(st.integers(0, 3)) == 0
        arguments.append(surrogate_escaped(data.draw(values)) if odd else whole[argument])
    for option in data.draw(st.lists(st.sampled_from(sorted(options(name))), max_size=4, unique=True)):
        choices = options(name)[option]
        if option == "--help" or not choices:
            arguments.append(option)
            continue
        value = data.draw(st.sampled_from(choices) if choices != [""] and data.draw(st.booleans()) else values)
        arguments.append(f"{option}={surrogate_escaped(value)}")
    check(folder, arguments, data.draw(st.sampled_from([b"", b"hello", b"\xff\xfe", b"\0"])))
