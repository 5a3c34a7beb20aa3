"""What holds for all tests: a ROS domain of their own, the installed package, and GPU tests that say why they rest."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT / "tools"))
# Last, so that what is installed comes first: the source folder edgellm_ros has no msg, srv and action.
sys.path.append(str(ROOT))

import isolation  # noqa: E402

isolation.isolate()  # before any test initialises rclpy; child processes inherit it


@lru_cache(maxsize=1)
def why_no_gpu() -> str:
    """Empty if the CUDA driver has a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no CUDA driver (libcuda.so.1) on this machine"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the CUDA driver finds no GPU"
    return ""


@lru_cache(maxsize=1)
def why_no_ros() -> str:
    """Empty if rclpy and the built interfaces can be imported."""
    if importlib.util.find_spec("rclpy") is None:
        return "rclpy is not installed; 'make test' provides it"
    try:
        importlib.import_module("edgellm_ros.msg")
    except ImportError:
        return "the built interfaces of edgellm_ros are not on sys.path before its source folder; use 'make test'"
    return ""


# The ROS tests import the interfaces at the top; without a ROS the core's tests still run.
collect_ignore = ["ros"] if why_no_ros() else []


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("EDGELLM_REQUIRE_ROS") == "1" and why_no_ros():
        raise pytest.UsageError(why_no_ros())


def pytest_terminal_summary(terminalreporter) -> None:
    """Why tests were skipped, each reason once: pytest's own list has a line for every place."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4d} {reason}")
    if reason := why_no_ros():
        terminalreporter.write_line(f"test/ros was not run: {reason}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := why_no_gpu():
        skip = pytest.mark.skip(reason=f"needs a GPU: {reason}")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
