"""Replace a directory or a file whole: written beside its place, flushed to disk, and renamed when it is finished.

What is being written is locked (flock) for as long as its process lives, on whatever host or in whatever container: a
new directory or file that nobody locks is what a killed process left, and the next one that writes to the same place
removes it. Another lock, on a file that is there only meanwhile, has two processes move directories to the same place
one after the other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Give a new directory beside ``target`` to fill; it takes the place of ``target`` when the body ends.

    Its files are flushed to disk before, and only their owner can write them, and new parents. If the body or a rename
    fails, what was at ``target`` stays or comes back, and the new directory and new parents of it are removed.
    Leftovers of processes that were killed meanwhile are removed first, and an old directory that such a process had
    moved away comes back. A symbolic link is followed. Raises OSError, at once where ``target`` is a mount point, which
    cannot be renamed.
    """
    target = Path(os.path.realpath(target))
    if os.path.ismount(target):
        reason = "it is a mount point, which cannot be replaced; name a directory in it"
        raise OSError(errno.EBUSY, reason, str(target))
    with _parents(target), contextlib.ExitStack() as undo:
        _clear_leftovers(target)
        new = _locked_directory(target.parent, _prefix(target, "new"), undo)  # nobody else enters it meanwhile
        yield new
        for path in new.rglob("*"):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode & ~0o022)
            if path.is_file():
                _flush(path)
        new.chmod(0o755)
        _put_in_place(new, target)


@contextlib.contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """Give the path of an empty file beside ``target`` to write; it takes the place of ``target`` when the body ends.

    It is flushed to disk before, and readable for everyone. If the body fails, what was at ``target`` stays, and new
    parents of it are removed. Leftovers of killed processes are removed. A symbolic link is followed. Raises OSError.
    """
    target = Path(os.path.realpath(target))
    with _parents(target), contextlib.ExitStack() as undo:
        _clear_leftovers(target)
        new = _locked_directory(target.parent, _prefix(target, "new"), undo) / target.name
        new.touch()
        yield new
        new.chmod(0o644)
        _flush(new)
        os.replace(new, target)


@contextlib.contextmanager
def scratch_directory(parent: Path, name: str) -> Iterator[Path]:
    """Give a new directory in ``parent``, which is removed after the body; so are those that killed processes left."""
    place = parent / name
    with contextlib.ExitStack() as undo:
        _clear_leftovers(place)
        yield _locked_directory(parent, _prefix(place, "new"), undo)


def _put_in_place(new: Path, target: Path) -> None:
    with _alone(target), contextlib.ExitStack() as locks:
        if not target.exists():
            os.replace(new, target)
            return
        with contextlib.suppress(OSError):  # a file system without locks
            locks.enter_context(_locked(target))  # the lock goes where the directory is moved to
        old = Path(tempfile.mkdtemp(prefix=_prefix(target, "old"), dir=target.parent))
        try:
            os.replace(target, old)  # onto an empty directory
            os.replace(new, target)
        except BaseException:
            with contextlib.suppress(OSError):
                old.rmdir()  # empty if the first rename failed
            if not target.exists():
                os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Wait until no other process, or other part of this one, moves directories to ``target`` or away from it."""
    path = target.parent / f".{target.name}.lock"
    with contextlib.ExitStack() as undo:
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            undo.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                break
            with contextlib.suppress(FileNotFoundError):  # whoever had the lock has removed the file
                if os.path.samestat(os.stat(path), os.fstat(handle)):
                    break
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


@contextlib.contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make the directory that ``target`` is to lie in, for its owner alone to write; remove again what was made if the
    body fails."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        for parent in reversed(missing):
            parent.mkdir(0o755, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # something else is in it by now
                parent.rmdir()
        raise


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _prefix(target: Path, kind: str) -> str:
    return f".{target.name}.{kind}."


def _locked_directory(parent: Path, prefix: str, undo: contextlib.ExitStack) -> Path:
    """Make a directory that is locked, and removed with its files, until ``undo`` ends."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        undo.callback(shutil.rmtree, made, ignore_errors=True)
        try:
            undo.enter_context(_locked(made))
        except (BlockingIOError, FileNotFoundError):  # taken for a leftover before it was locked
            continue
        except OSError:  # a file system without locks: nobody clears it up either
            return made
        if made.exists():
            return made


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Raises BlockingIOError if another process, or another part of this one, holds the lock."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _clear_leftovers(target: Path) -> None:
    found = [
        (kind, path)
        for kind in ("old", "new")
        for path in sorted(target.parent.glob(f"{_escaped(_prefix(target, kind))}*"))
    ]
    if not found:
        return
    with _alone(target):
        for kind, path in found:
            with contextlib.suppress(OSError), _locked(path):  # OSError: it is being written, or another user's
                if kind == "old" and not target.exists() and any(path.iterdir()):
                    os.replace(path, target)
                else:
                    shutil.rmtree(path, ignore_errors=True)


def _escaped(text: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in text)
