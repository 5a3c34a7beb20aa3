"""Replace a directory or a file whole: written beside its place, flushed to disk, and renamed when it is finished."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Give a new directory beside ``target`` to fill; it takes the place of ``target`` when the body ends.

    Its files are flushed to disk before. If the body or a rename fails, what was at ``target`` stays or comes back, and
    the new directory is removed. Leftovers of processes that were killed meanwhile are removed first, and an old
    directory that such a process had moved away comes back. Raises OSError.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(target)
    new = _beside(target, "new")
    new.chmod(0o755)
    try:
        yield new
        for path in new.rglob("*"):
            if path.is_file():
                _flush(path)
        _put_in_place(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """Give the path of an empty file beside ``target`` to write; it takes the place of ``target`` when the body ends.

    It is flushed to disk before, and readable for everyone. If the body fails, what was at ``target`` stays. Raises
    OSError.
    """
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    new = Path(name)
    try:
        yield new
        new.chmod(0o644)
        _flush(new)
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)


def _put_in_place(new: Path, target: Path) -> None:
    if not target.exists():
        os.replace(new, target)
        return
    old = _beside(target, "old")
    os.replace(target, old)  # onto an empty directory
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _beside(target: Path, kind: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.{kind}.{os.getpid()}.", dir=target.parent))


def _clear_leftovers(target: Path) -> None:
    for kind in ("old", "new"):
        prefix = f".{target.name}.{kind}."
        for path in sorted(target.parent.glob(f"{_escaped(prefix)}*")):
            pid = path.name[len(prefix) :].partition(".")[0]
            if not pid.isdigit() or _is_running(int(pid)):
                continue
            if kind == "old" and not target.exists() and any(path.iterdir()):
                os.replace(path, target)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _escaped(text: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in text)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
