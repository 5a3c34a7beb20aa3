"""Keep the weights that ONNX Runtime maps from a file in the process's own memory.

The runtime maps external data and leaves what it does not pack mapped. A file that is truncated later would end the
process with SIGBUS, and one that is overwritten would change the answers. ``held_still`` keeps the file as it is while
it is being loaded, ``copy_mapped`` then puts anonymous memory with the same bytes in place of each mapping, at the same
address.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from engine_core.errors import EngineDirectoryError, InsufficientMemoryError

_MAP_FIXED = 0x10  # linux/mman.h
_MAP_FAILED = ctypes.c_void_p(-1).value
_READ_AT_ONCE = 1 << 30  # bytes
_loading = threading.Lock()  # nobody reads a mapping of this process while another load replaces it


@contextlib.contextmanager
def held_still(path: Path) -> Iterator[int]:
    """Give a descriptor of ``path``, whose contents stay as they are until the body ends; one body runs at a time.

    A read lease lets writers of the file wait, 45 s at most. Only the file's owner can take one, and not every file
    system has them; without it a change is found when the body ends. Raises EngineDirectoryError if the file cannot be
    read or has changed.
    """
    with _loading, _opened(path) as fd:
        before = _state(os.fstat(fd))
        with contextlib.suppress(OSError):
            # Told of a waiting writer by a signal that is ignored by default, where SIGIO would end the process.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        yield fd
        if not os.path.exists(path) or not before == _state(os.fstat(fd)) == _state(os.stat(path)):
            raise EngineDirectoryError(f"{path} was changed while it was being loaded; configure again.")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise EngineDirectoryError(f"{path} cannot be read ({error.strerror}); build the engine again.") from error
    try:
        yield fd
    finally:
        os.close(fd)  # and with it the lease


def copy_mapped(path: Path, fd: int) -> int:
    """Replace every mapping of ``path`` in this process by memory of its own; return the bytes copied.

    ``fd``: a descriptor of the file. No other thread may use the mappings meanwhile; private changes to them are lost.
    Raises EngineDirectoryError if the file is shorter than a mapping, InsufficientMemoryError.
    """
    copied = 0
    for start, end, writable, offset in _mappings(path):
        _copy(start, end - start, fd, offset, path)
        if not writable:
            _libc.mprotect(start, end - start, mmap.PROT_READ)
        copied += end - start
    return copied


def _copy(address: int, size: int, fd: int, offset: int, path: Path) -> None:
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    if _libc.mmap(address, size, protection, flags, -1, 0) == _MAP_FAILED:
        reason = os.strerror(ctypes.get_errno())
        raise InsufficientMemoryError(f"{size} bytes of weights cannot be held in memory ({reason}).")
    memory = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
    end = min(size, os.fstat(fd).st_size - offset)  # the last page of a file is mapped whole
    done = 0
    while done < end:
        count = os.preadv(fd, [memory[done : min(end, done + _READ_AT_ONCE)]], offset + done)
        if not count:
            raise EngineDirectoryError(f"{path} was changed while it was being loaded; configure again.")
        done += count


def _mappings(path: Path) -> list[tuple[int, int, bool, int]]:
    """Return (start, end, writable, offset in the file) of each mapping of ``path`` in this process."""
    name = str(path.resolve())
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].removesuffix(" (deleted)") == name:
            start, end = (int(part, 16) for part in fields[0].split("-"))
            found.append((start, end, fields[1][1] == "w", int(fields[2], 16)))
    return found


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
