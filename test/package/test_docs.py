"""Pages that scripts write are up to date, and what pages name exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgellm_ros.parameter_table import LAUNCH_SPECS

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_the_backends_is_up_to_date():
    script = ROOT / "tools" / "docs_tables.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert (result.stderr, result.returncode) == ("", 0), "run tools/docs_tables.py"


def test_the_tests_and_files_that_the_pages_name_exist():
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks/results").glob("*.md"), *ROOT.glob("*.md")]
    tests = {path: path.read_text(encoding="utf-8") for path in (ROOT / "test").rglob("*.py")}
    defined = {name for source in tests.values() for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("needs the repository")
    missing = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        missing += [name for name in re.findall(r"`(test_\w+)`", text) if name not in defined]
        for name in re.findall(r"`([\w/.-]+\.(?:py|cuh?|md|msg))`", text):
            missing += [name] if not any(f"/{path}".endswith(f"/{name}") for path in tracked) else []
    assert missing == []


def test_the_launch_arguments_that_the_pages_give_exist():
    """``ros2 launch`` ignores others without a message."""
    launch_file = (ROOT / "launch" / "llm.launch.py").read_text(encoding="utf-8")
    table = launch_file.partition("\nARGUMENTS = {\n")[2].partition("\n}\n")[0]
    known = {spec.name for spec in LAUNCH_SPECS} | set(re.findall(r'^    "(\w+)": \(', table, re.MULTILINE))
    given = [
        (page.name, name)
        for page in [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
        for line in re.findall(r"llm\.launch\.py (.*)", page.read_text(encoding="utf-8"))
        for name in re.findall(r"(\w+):=", line)
    ]
    assert given and [(page, name) for page, name in given if name not in known] == []
