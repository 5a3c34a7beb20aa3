"""Runs test/gpu and writes one JSON line per test to benchmarks/results/gpu_tests.jsonl.

    python3 tools/gpu_tests.py [--results FILE] [pytest arguments …]

A line has: date (UTC), commit, gpu, driver_cuda (newest CUDA the driver supports), versions of the packages that
matter, test (pytest id), outcome (passed, failed, skipped, error), seconds and, unless it passed, the reason.
A new line replaces an older one of the same test on the same GPU, so that the file holds each test's last outcome. The
file is written every 10 s, so that a run that is killed leaves what it has done.
Exit status: pytest's; 1 where no GPU was found.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from result_rows import commit, now, read_rows, write_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu_tests.jsonl"
PACKAGES = ("cuda-bindings", "nvidia-cuda-nvrtc", "numpy", "onnxruntime", "tensorrt", "torch", "transformers")


_SAVE_INTERVAL = 10.0  # s


class Recorder:
    """A pytest plugin that keeps the outcome of each test and has them saved now and then."""

    def __init__(self, save: Callable[[dict[str, dict]], None]) -> None:
        self.outcomes: dict[str, dict] = {}
        self._save = save
        self._next_save = time.monotonic() + _SAVE_INTERVAL

    def pytest_runtest_logfinish(self) -> None:
        if time.monotonic() > self._next_save:
            self._save(self.outcomes)
            self._next_save = time.monotonic() + _SAVE_INTERVAL

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        entry = self.outcomes.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + report.duration, 3)
        if report.failed:
            entry["outcome"] = "failed" if report.when == "call" else "error"
            entry["reason"] = str(report.longrepr).strip().splitlines()[-1][:300]
        elif report.skipped and entry["outcome"] == "passed":
            entry["outcome"] = "skipped"
            entry["reason"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[:300]


def versions() -> dict[str, str]:
    """Return the installed version of each package of PACKAGES that is there, and Python's."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def merge(old: list[dict], new: list[dict]) -> list[dict]:
    """Return ``old`` with the lines of ``new`` in place of those of the same test and GPU, ordered by test and GPU."""
    lines = {(line["test"], line["gpu"]): line for line in [*old, *new]}
    return [lines[key] for key in sorted(lines)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write (default: %(default)s)")
    options, arguments = parser.parse_known_args(argv)
    # Behind an installation of the package, which alone has the interfaces that tests of the node need.
    sys.path[:] = [*(path for path in sys.path if path != str(ROOT)), str(ROOT)]
    from engine_core.cuda.gpu_info import find_gpus

    report = find_gpus()
    if not report.gpus:
        print(f"error: no GPU to test on: {report.why_none}", file=sys.stderr)
        return 1
    head = {
        "date": now(),
        "commit": commit(),
        "gpu": report.gpus[0].name,
        "driver_cuda": report.cuda_version,
        "versions": versions(),
    }
    old = read_rows(options.results)

    def save(outcomes: dict[str, dict]) -> None:
        new = [head | {"test": test} | outcome for test, outcome in outcomes.items()]
        write_rows(options.results, merge(old, new))

    recorder = Recorder(save)
    paths = any((ROOT / argument.partition("::")[0]).exists() for argument in arguments)
    status = pytest.main([*([] if paths else [str(ROOT / "test" / "gpu")]), *arguments], plugins=[recorder])
    save(recorder.outcomes)
    outcomes = Counter(outcome["outcome"] for outcome in recorder.outcomes.values())
    print(f"{head['gpu']}, commit {head['commit']}:", dict(outcomes))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
