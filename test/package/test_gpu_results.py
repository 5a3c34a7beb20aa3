"""tools/gpu_tests.py: what it records of a run, and that the recorded results are what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gpu_tests

FIELDS = {"date", "commit", "gpu", "driver_cuda", "versions", "test", "outcome", "seconds"}


def test_every_outcome_is_recorded_with_its_reason(tmp_path):
    module = tmp_path / "test_sample.py"
    module.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_left_out(): pytest.skip('no such card')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no device')\n"
        "def test_broken(broken): pass\n"
    )
    recorder = gpu_tests.Recorder(lambda outcomes: None)
    pytest.main([str(module), "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)], plugins=[recorder])
    found = {test.rpartition("::")[2]: entry for test, entry in recorder.outcomes.items()}
    assert {name: entry["outcome"] for name, entry in found.items()} == {
        "test_good": "passed", "test_bad": "failed", "test_left_out": "skipped", "test_broken": "error",
    }  # fmt: skip
    assert "no such card" in found["test_left_out"]["reason"]


def test_a_new_outcome_replaces_the_old_one_of_the_same_gpu():
    old = [{"test": "a", "gpu": "X", "outcome": "failed"}, {"test": "a", "gpu": "Y", "outcome": "failed"}]
    assert gpu_tests.merge(old, [{"test": "a", "gpu": "X", "outcome": "passed"}]) == [
        {"test": "a", "gpu": "X", "outcome": "passed"}, {"test": "a", "gpu": "Y", "outcome": "failed"},
    ]  # fmt: skip


def test_recorded_results_have_every_field():
    path: Path = gpu_tests.RESULTS
    if not path.is_file():
        pytest.skip("no GPU test has been recorded")
    for line in path.read_text(encoding="utf-8").splitlines():
        assert json.loads(line).keys() >= FIELDS, line
