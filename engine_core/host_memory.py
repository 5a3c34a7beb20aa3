"""The main memory a process can take now, within the cgroups (version 1 and 2) that limit it; and its bandwidth."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

_COPIED = 32 << 20  # bytes a thread copies at a time: more than caches hold
_NO_LIMIT = 1 << 60  # version 1 writes "no limit" as the largest multiple of a page


def available_memory(proc: Path = Path("/proc"), root: Path = Path("/")) -> int:
    """Return the bytes the kernel calls available, or less where a memory cgroup or one around it has less left.

    Page cache that can be reclaimed at once (``inactive_file``) counts as free. ``root`` is where mount points begin.
    """
    left = [_meminfo(proc)]
    for version, mount_root, mount_point in _mounts(proc):
        if (path := _own_path(proc, version)) is None:
            continue
        top = root / mount_point.lstrip("/")
        relative = PurePosixPath(path)
        if relative.is_relative_to(mount_root):
            relative = relative.relative_to(mount_root)
        elif mount_root != "/":  # seen from inside another cgroup namespace
            relative = PurePosixPath()
        parts = [part for part in relative.parts if part not in ("/", "..")]
        for depth in range(len(parts), -1, -1):
            left.extend(_left_in(top.joinpath(*parts[:depth]), version))
    return max(0, min(left))


def memory_bandwidth(num_threads: int = 0, seconds: float = 0.1, repeats: int = 3) -> float:
    """Measure the bytes per second that so many threads read and write together by copying; 0 = one a core.

    The best of ``repeats`` measurements of ``seconds`` each, as other programs take their share.
    """
    import numpy as np

    from engine_core.host_cpu import count_cores

    num_threads = num_threads or min(16, count_cores())
    together = threading.Barrier(num_threads)

    def copy(_: int) -> list[float]:
        source, target = np.ones(_COPIED, np.uint8), np.ones(_COPIED, np.uint8)
        rates = []
        for _ in range(repeats):
            together.wait()
            start, num_bytes = time.perf_counter(), 0
            while num_bytes == 0 or time.perf_counter() < start + seconds:
                np.copyto(target, source)
                num_bytes += 2 * _COPIED
            rates.append(num_bytes / (time.perf_counter() - start))
        return rates

    with ThreadPoolExecutor(num_threads) as pool:
        return max(map(sum, zip(*pool.map(copy, range(num_threads)))))


def _meminfo(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _mounts(proc: Path) -> Iterator[tuple[int, str, str]]:
    """(version, root within the hierarchy, mount point) of each mounted memory hierarchy."""
    for line in _lines(proc / "self" / "mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        mount_root, mount_point = (field.replace("\\040", " ") for field in fields[3:5])
        if kind[0] == "cgroup2":
            yield 2, mount_root, mount_point
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            yield 1, mount_root, mount_point


def _own_path(proc: Path, version: int) -> str | None:
    """Return the path of this process within the hierarchy; None if it is not in one."""
    for line in _lines(proc / "self" / "cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number == "0" and not controllers) if version == 2 else ("memory" in controllers.split(",")):
            return path or "/"
    return None


def _left_in(directory: Path, version: int) -> list[int]:
    """Return the bytes that each limit of one cgroup leaves; empty where there is none."""
    stat = {}
    for line in _lines(directory / "memory.stat"):
        name, _, value = line.partition(" ")
        stat[name] = int(value) if value.strip().isdigit() else 0
    if version == 2:
        used = _number(directory / "memory.current")
        limits = [_number(directory / "memory.max"), _number(directory / "memory.high")]
        reclaimable = stat.get("inactive_file", 0)
    else:
        used = _number(directory / "memory.usage_in_bytes")
        limits = [_number(directory / "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit")]
        reclaimable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
    if used is None:
        return []
    return [limit - max(0, used - reclaimable) for limit in limits if limit is not None and limit < _NO_LIMIT]


def _number(path: Path) -> int | None:
    """Return the number in a file; None without one ("max") or without the file."""
    text = "".join(_lines(path)[:1]).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
