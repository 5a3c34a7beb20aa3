"""Several workers of pytest: each has a ROS domain of its own, and a test marked ``alone`` has the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")

SAMPLE = """
import json, os, time
import pytest

def note(alone):
    start = time.monotonic()
    time.sleep(0.1)
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps([start, time.monotonic(), alone, os.environ["ROS_DOMAIN_ID"]]) + "\\n")

@pytest.mark.parametrize("number", range(8))
def test_beside_others(number):
    note(False)

@pytest.mark.alone
@pytest.mark.parametrize("number", range(4))
def test_alone(number):
    note(True)
"""


def test_no_test_runs_beside_one_that_is_alone(tmp_path):
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    tests = Path(__file__).resolve().parents[1]
    env = os.environ | {"NOTES": str(tmp_path / "notes"), "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    env.pop("EDGELLM_TEST_DOMAIN", None)
    options = ["-p", "xdist.plugin", "-n", "2", "-p", "conftest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", "-q", *options, str(tmp_path)]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert len(notes) == 12 and len({domain for *_, domain in notes}) == 2
    lonely = [note for note in notes if note[2]]
    for one in lonely:
        for other in notes:
            assert other is one or other[1] <= one[0] or one[1] <= other[0], (one, other)
