"""compute-sanitizer on a small model, where it is installed (it comes with the CUDA toolkit): no bad access, no race.

python3 -m pytest test/gpu/test_sanitizer.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

MODEL = Path(__file__).with_name("sanitizer_model.py")
NUM_PARTS = 6  # lines of the model: graph, no graph, several sequences, one and several with adapters, drafts
LIMIT = 540  # s


def find_sanitizer() -> str | None:
    """$PATH, then where the toolkit and its wheels put it."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), *map(Path, sys.path)]
    patterns = ("bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer", "nvidia/*/bin/compute-sanitizer")
    for place in places:
        for pattern in patterns:
            for path in place.glob(pattern) if place.is_dir() else ():
                if os.access(path, os.X_OK):
                    return str(path)
    return None


@pytest.mark.skipif(find_sanitizer() is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize(
    ("weights", "kv_cache_type"),
    [("int4", "int8"), ("fp16", "fp16"), ("int8", "int8"), ("fp8", "fp16"), ("fp8_blocks", "fp16"), ("nvfp4", "fp16")],
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool, weights, kv_cache_type):
    command = [find_sanitizer(), "--tool", tool, "--error-exitcode", "1", "--print-limit", "20"]
    command += [sys.executable, str(MODEL), weights, kv_cache_type]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout[-6000:]
    summary = "ERROR SUMMARY: 0 errors" if tool == "memcheck" else "RACECHECK SUMMARY: 0 hazards"
    parts = [line for line in done.stdout.splitlines() if line.startswith(f"{weights} {kv_cache_type}")]
    assert summary in done.stdout and len(parts) == NUM_PARTS, done.stdout[-6000:]
