"""The processor of this machine."""

from __future__ import annotations

import os
from pathlib import Path


def count_cores() -> int:
    """Physical cores this process may use: a second hardware thread of a core adds no memory bandwidth."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.is_file() else str(cpu))
    return len(cores)
