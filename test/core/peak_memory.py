"""How much a piece of Python lets its process grow, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import checkpoints

# Not getrusage: its peak is inherited from the process that started this one.
_PEAK = """
import re, sys
from pathlib import Path
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
"""


def growth(imports: str, code: str, *arguments: object) -> int:
    """Bytes the peak of resident memory grows by while ``code`` runs, after ``imports``; both find sys.argv[1:]."""
    program = f"{_PEAK}\n{imports}\nbefore = peak()\n{code}\nprint(peak() - before)"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    found = int(result.stdout.splitlines()[-1])
    assert found > 20e6  # or nothing was measured
    return found


def large_checkpoint(directory: Path) -> tuple[Path, int]:
    """(a bf16 Llama, its bytes: some 257 MB)."""
    sizes = dict(hidden_size=1152, intermediate_size=4608, num_hidden_layers=5, vocab_size=20000)
    checkpoints.write(directory, "llama3", dtype="bfloat16", **sizes)
    size = (directory / "model.safetensors").stat().st_size
    assert size > 200e6
    return directory, size
