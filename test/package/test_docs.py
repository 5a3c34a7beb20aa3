"""Pages that scripts write are up to date, and what pages name exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
