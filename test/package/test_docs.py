"""Pages that scripts write are up to date, and what pages name exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import docs_results
from edgellm_ros.parameter_table import LAUNCH_SPECS
from engine_core.measure.report import SCHEMA_FILE

ROOT = Path(__file__).resolve().parents[2]


def test_the_generated_pages_are_up_to_date():
    script = ROOT / "tools" / "docs_tables.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0), "run tools/docs_tables.py"


def test_the_reports_of_machines_keep_to_the_schema():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    for path in docs_results.REPORTS.glob("*.json"):
        jsonschema.validate(json.loads(path.read_text(encoding="utf-8")), schema)


def test_a_report_appears_on_the_page(tmp_path, monkeypatch):
    machine = {"jetson": {"model": "Jetson Orin Nano"}, "system": "Ubuntu 22.04, aarch64"}
    line = {
        "shape": "qwen3-0.6b", "weights": "int4", "engine": "cuda", "prompt_tokens": 32, "ttft_ms": 20.0,
        "ms_per_token": 12.5, "tok_s": 80.0, "gb_s": 34.0, "bandwidth_share": 0.6, "joules_per_token": 0.11,
        "watts": 9.0,
    }  # fmt: skip
    report = {"date": "2026-11-28T10:00Z", "edgellm": "1.0.0", "machine": machine, "bandwidth": None, "idle": None}
    report |= {"kernels": [{"passed": True}, {"passed": False}], "decode": [line], "problems": ["x"]}
    (tmp_path / "nano.json").write_text(json.dumps(report))
    monkeypatch.setattr(docs_results, "REPORTS", tmp_path)
    page = docs_results.reports()
    assert "| Jetson Orin Nano | 2026-11-28 | 1.0.0 | Ubuntu 22.04, aarch64 | – | 1 of 2 | – | 1 |" in page
    assert "| 12.50 | 80.0 | 34.0 | 60% | 0.110 | 9.0 |" in page


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


def anchors(page: Path) -> set[str]:
    """Return the names of the headings of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_the_links_of_the_pages_lead_somewhere():
    broken = []
    for page in [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
            if "://" in target:
                continue
            path = (page.parent / target).resolve() if target else page
            if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
                broken.append((page.name, f"{target}#{anchor}"))
    assert broken == []


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
