"""The tree node for BehaviorTree.CPP, built and tested without ROS where that library is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PREFIX = os.environ.get("EDGELLM_BEHAVIORTREE_CPP", "")


@pytest.mark.skipif(not PREFIX, reason="EDGELLM_BEHAVIORTREE_CPP names no installation")
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_the_tree_node_passes_its_own_test(tmp_path):
    def run(*command) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    options = ["-DEDGELLM_BT_ROS=OFF", f"-DCMAKE_PREFIX_PATH={PREFIX}", "-DCMAKE_BUILD_TYPE=Debug"]
    run("cmake", "-S", EXAMPLES / "edgellm_bt", "-B", tmp_path, *options)
    run("cmake", "--build", tmp_path)
    run("ctest", "--test-dir", tmp_path, "--output-on-failure")
