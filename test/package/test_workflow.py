"""The hosted workflow runs only steps that tools/ci.sh has, for the distributions and Pythons that are supported."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import workspace
from ros_sources import DISTRIBUTIONS

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yaml").read_text(encoding="utf-8"))
JOBS = WORKFLOW["jobs"]
SCRIPT = (ROOT / "tools" / "ci.sh").read_text(encoding="utf-8")


def test_every_step_of_the_package_is_one_of_the_script():
    steps = set(re.findall(r"^(\w+)\(\) \{", SCRIPT, re.M))
    run = {
        name
        for job in JOBS.values()
        for step in job["steps"]
        for name in re.findall(r"tools/ci\.sh (\w+)", step.get("run", ""))
    }
    assert run == steps == {"ros", "lint", "docs", "wheel", "oldest", "aarch64"}


def test_the_tools_that_the_script_runs_exist():
    for name in re.findall(r"\btools/[\w./]+\.(?:py|yaml)", SCRIPT):
        assert (ROOT / name).is_file(), name


def test_the_matrix_has_what_is_supported():
    assert tuple(JOBS["ros"]["strategy"]["matrix"]["ros"]) == DISTRIBUTIONS
    pythons = JOBS["wheels"]["strategy"]["matrix"]["python"]
    classes = re.search(r'python_requires=">=([\d.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert pythons[0] == classes[1] and pythons == ["3.10", "3.11", "3.12", "3.13"]


def test_the_oldest_versions_are_tested_on_the_oldest_python():
    (setup,) = (step for step in JOBS["oldest"]["steps"] if step.get("uses", "").startswith("actions/setup-python"))
    assert setup["with"]["python-version"] == JOBS["wheels"]["strategy"]["matrix"]["python"][0]


def test_no_job_runs_for_ever_or_may_write():
    assert all(job["timeout-minutes"] <= 120 for job in JOBS.values())
    assert WORKFLOW["permissions"] == {"contents": "read"}


def test_a_script_to_run_is_named_from_the_current_folder(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert workspace.run_arguments(["tools/gpu_tests.py", "test"]) == [str(ROOT / "tools" / "gpu_tests.py"), "test"]
    assert workspace.run_arguments(["-m", "edgellm_ros.chat"]) == ["-m", "edgellm_ros.chat"]
    assert workspace.run_arguments([]) == []
