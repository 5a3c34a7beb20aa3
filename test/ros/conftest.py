"""The node runs in a process of its own; tests are its clients over real ROS 2. test/conftest.py sets the domain."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import rclpy

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "core")]

from fake_backend import write_engine  # noqa: E402
from llm_client import Nodes  # noqa: E402

STEP_TIME = 0.004  # s: slow enough to act while a request runs, fast enough for many tests


@pytest.fixture(scope="session", autouse=True)
def ros():
    rclpy.init()
    yield
    rclpy.shutdown()


@pytest.fixture(scope="session")
def engine_dir(tmp_path_factory):
    """An engine whose answers depend on the whole prompt and end only at max_new_tokens."""
    return write_engine(tmp_path_factory.mktemp("engine") / "fake", step_time=STEP_TIME)


@pytest.fixture
def nodes(tmp_path):
    nodes = Nodes(tmp_path)
    yield nodes
    nodes.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, engine_dir):
    """One active node for the tests of a module."""
    nodes = Nodes(tmp_path_factory.mktemp("shared"))
    yield nodes.start(engine_dir, queue_depth=32).bring_up()
    nodes.close()


DYNAMIC_DEFAULTS = {
    "busy_policy": "queue", "queue_depth": 32, "request_timeout": 0.0, "system_prompt": "", "stream_interval": 0.0,
    "temperature": 0.0, "seed": -1, "deactivate_policy": "finish", "deactivate_timeout": 5.0, "max_new_tokens": 256,
}  # fmt: skip


@pytest.fixture
def llm(shared):
    """The module's node, active and with its defaults; nothing of an earlier test is left in ``pieces``."""
    shared.pieces.clear()
    shared.must_set(**DYNAMIC_DEFAULTS)
    return shared
