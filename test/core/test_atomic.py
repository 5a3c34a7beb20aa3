"""Outputs replace older ones whole: after a full disk, a killed process, a link or a mount point in their place."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("onnxruntime")

import vocab_checkpoints
from engine_core import cli
from engine_core.formats.atomic import replaced_directory, replaced_file, scratch_directory

# A process that writes to the place it is given, with a lock on it, and tells when it is killed.
KILLED = """
import sys, time
from pathlib import Path
from engine_core.formats import atomic
with getattr(atomic, sys.argv[1])(*map(Path, sys.argv[2:])) as new:
    (new / "half" if new.is_dir() else new).write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""
COMMANDS = {
    "build": ["build", "checkpoint", "new/out", "--quantization=int8"],
    "two variants": ["build", "checkpoint", "new/out", "--quantization=fp32,int4"],
    "quantize": ["quantize", "checkpoint", "new/out", "--method=int8"],
    "reduce-vocab": ["reduce-vocab", "checkpoint", "new/out", "--texts=texts.txt", "--size=400"],
}


def tree(root):
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))
    }


@contextlib.contextmanager
def room_for(num_bytes):
    """No file may grow beyond ``num_bytes``."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = tmp_path_factory.mktemp("room")
    vocab_checkpoints.write_checkpoint(made / "checkpoint", "byte_level")
    (made / "texts.txt").write_text(vocab_checkpoints.TEXT)
    return made


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("is_new", [True, False], ids=["fresh", "existing"])
def test_a_full_disk_is_one_sentence_and_changes_nothing(checkpoint, tmp_path, monkeypatch, capsys, command, is_new):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    if not is_new:
        assert cli.main(command) == 0
        assert cli.main(command) == 1 and "--force" in capsys.readouterr().err
        command = [*command, "--force"]
        command = [word.replace("400", "410") for word in command]
    before = tree(tmp_path)
    for size in (0, 300, 1000) if "reduce-vocab" in command else (0, 300, 8000, 50_000):
        capsys.readouterr()
        with room_for(size):
            assert cli.main(command) == 1, size
        error = capsys.readouterr().err
        assert re.search(r"^edgellm: .*File too large.*nothing was left behind\.\n\Z", error, re.M), error
        assert tree(tmp_path) == before, size
    assert cli.main(command) == 0


def kill_while_it_writes(*arguments):
    process = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, arguments)], stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == b"writing\n"
        yield
        process.kill()


@pytest.mark.parametrize("kind", ["replaced_directory", "replaced_file"])
def test_what_a_killed_process_left_is_removed_and_what_a_running_one_writes_is_not(tmp_path, kind):
    replace = {"replaced_directory": replaced_directory, "replaced_file": replaced_file}[kind]
    target = tmp_path / "deeper" / "out"
    with contextlib.contextmanager(kill_while_it_writes)(kind, target):
        during = os.listdir(target.parent)
        with replace(target) as new:
            (new / "whole" if new.is_dir() else new).write_text("whole")
        assert sorted(os.listdir(target.parent)) == sorted([*during, "out"])
    with replace(target) as new:
        (new / "whole" if new.is_dir() else new).write_text("whole again")
    assert os.listdir(target.parent) == ["out"]


def test_scratch_of_a_killed_process_is_removed(tmp_path):
    with contextlib.contextmanager(kill_while_it_writes)("scratch_directory", tmp_path, "work"):
        assert len(os.listdir(tmp_path)) == 1
    with scratch_directory(tmp_path, "work") as made:
        assert os.listdir(tmp_path) == [made.name]
    assert not os.listdir(tmp_path)


def test_a_directory_that_a_killed_process_moved_away_comes_back(tmp_path):
    (tmp_path / ".out.old.x").mkdir()
    (tmp_path / ".out.old.x" / "file").write_text("old")
    (tmp_path / ".out.old.y").mkdir()  # made, nothing moved to it
    with pytest.raises(RuntimeError), replaced_directory(tmp_path / "out"):
        raise RuntimeError("killed again")
    assert tree(tmp_path) == {"out": None, "out/file": b"old"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_command_and_leaves_nothing(checkpoint, tmp_path, monkeypatch, number):
    from engine_core.backends.onnxruntime import build

    monkeypatch.chdir(checkpoint)
    monkeypatch.setattr(build, "seal", lambda *_: os.kill(os.getpid(), number))
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    inherited = signal.signal(number, usual)  # in the background of a shell it may be ignored
    command = ["build", "checkpoint", str(tmp_path / "new" / "out"), "--quantization=fp32"]
    try:
        code = cli.main(command)
    except SystemExit as ended:
        code = ended.code
    finally:
        left = signal.signal(number, inherited)
    assert code == 128 + number and not os.listdir(tmp_path)
    assert left == usual


def test_two_that_replace_a_directory_at_once_come_one_after_the_other(tmp_path, monkeypatch):
    target, replace, inside, most = tmp_path / "out", os.replace, [], []

    def slow(source, destination):
        inside.append(source)
        most.append(len(inside))
        time.sleep(0.02)
        replace(source, destination)
        inside.remove(source)

    def write(number):
        with replaced_directory(target) as new:
            (new / "number").write_text(str(number))

    write(0)
    monkeypatch.setattr(os, "replace", slow)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(1, 13)))  # none raises
    assert set(most) == {1} and int((target / "number").read_text()) > 0
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_written_belongs_to_its_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        with replaced_directory(tmp_path / "above" / "engines" / "engine") as new:
            assert new.stat().st_mode & 0o777 == 0o700
            (new / "sub").mkdir()
            (new / "sub" / "weights").write_text("x")
            (new / "link").symlink_to(tmp_path)
        with replaced_file(tmp_path / "file") as file:
            file.write_text("x")
    finally:
        os.umask(before)
    top = tmp_path / "above"
    folders = [top, top / "engines", top / "engines/engine", top / "engines/engine/sub"]
    assert {oct(path.stat().st_mode & 0o777) for path in folders} == {"0o755"}
    files = [top / "engines/engine/sub/weights", tmp_path / "file"]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}


def test_links_are_followed(tmp_path):
    (tmp_path / "v1").mkdir()
    (tmp_path / "latest").symlink_to("v1")
    with replaced_directory(tmp_path / "latest") as new:
        (new / "file").write_text("new")
    (tmp_path / "link").symlink_to("v1/file")
    with replaced_file(tmp_path / "link") as path:
        path.write_text("newer")
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "link").is_symlink()
    assert (tmp_path / "v1" / "file").read_text() == "newer"
    assert sorted(os.listdir(tmp_path)) == ["latest", "link", "v1"]


def test_a_mount_point_is_refused_before_the_work(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(checkpoint)
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path))
    assert cli.main(["build", "checkpoint", str(tmp_path), "--quantization=fp32"]) == 1
    assert "mount point" in capsys.readouterr().err and not os.listdir(tmp_path)
