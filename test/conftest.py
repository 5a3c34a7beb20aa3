"""Set up every test run: threads, a ROS domain of its own, the installed package, and turns among its workers.

A test marked ``alone`` measures time or memory: it runs while no other worker runs a test, a set-up or a tear-down. Its
own set-up and tear-down run beside others.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT / "tools"))
# Last, so that what is installed comes first: the source folder edgellm_ros has no msg, srv and action.
sys.path.append(str(ROOT))

import isolation  # noqa: E402

# Before numpy and torch are imported: their matrices are so small here that a second thread costs more than it does.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Taken out of the environment: a test that runs pytest itself must not wait for its own turn.
TURNS = os.environ.pop("EDGELLM_TEST_TURNS", None)


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
    if config.getoption("numprocesses", None):  # only hands tests to workers, which inherit its environment
        os.environ["EDGELLM_TEST_TURNS"] = turns = tempfile.mkdtemp(prefix="edgellm-test-turns-")
        config.add_cleanup(lambda: shutil.rmtree(turns, ignore_errors=True))
    else:
        isolation.isolate()  # before any test initialises rclpy; child processes inherit it
    if os.environ.get("EDGELLM_REQUIRE_ROS") == "1" and why_no_ros():
        raise pytest.UsageError(why_no_ros())


class Turns:
    """The locks of a run with several workers, which hold ``running`` shared or one of them exclusively."""

    def __init__(self, directory: Path) -> None:
        self._next = open(directory / "next", "w")  # so that a test that waits to be alone is the next to start
        self._running = open(directory / "running", "w")

    def take(self, kind: int) -> None:
        """Give up what is held and wait for ``kind``, LOCK_SH or LOCK_EX."""
        self.give_up()  # two that wait for each other's shared lock would wait for ever
        fcntl.flock(self._next, fcntl.LOCK_EX)
        fcntl.flock(self._running, kind)
        fcntl.flock(self._next, fcntl.LOCK_UN)

    def give_up(self) -> None:
        fcntl.flock(self._running, fcntl.LOCK_UN)


turns = Turns(Path(TURNS)) if TURNS else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Hold the run's lock, shared, while a test runs."""
    if turns is None:
        return (yield)
    turns.take(fcntl.LOCK_SH)
    try:
        return (yield)
    finally:
        turns.give_up()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Hold the run's lock exclusively while a test runs that is marked ``alone``, but not while it is set up."""
    if turns is None or item.get_closest_marker("alone") is None:
        return (yield)
    turns.take(fcntl.LOCK_EX)
    try:
        return (yield)
    finally:
        turns.take(fcntl.LOCK_SH)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect the tests that need a GPU only where there is one: they are thousands."""
    if module_path.is_relative_to(ROOT / "test" / "gpu") and why_no_gpu():
        return Uncollected.from_parent(parent, path=module_path)
    return None


class Uncollected(pytest.Module):
    """A module of which no test can run: that it can be imported is all that is tried."""

    def collect(self) -> list:
        assert self.obj
        pytest.skip(f"needs a GPU: {why_no_gpu()}", allow_module_level=True)


def pytest_terminal_summary(terminalreporter) -> None:
    """Why tests were skipped, each reason once: pytest's own list has a line for every place."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4d} {reason}")
    for directory, reason in (("ros", why_no_ros()), ("gpu", why_no_gpu())):
        if reason:
            terminalreporter.write_line(f"test/{directory} was not run: {reason}")
