"""What the README says of the example and the interfaces is what the code says."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_planner_in_the_readme_is_the_example():
    example = (ROOT / "examples" / "planner_node.py").read_text(encoding="utf-8")
    assert example[example.index("import json") :].strip() in README


def test_every_interface_is_in_the_readme():
    for kind in ("msg", "srv", "action"):
        for path in (ROOT / kind).iterdir():
            assert path.stem in README or path.stem in ("ChatMessage", "SamplingOptions", "MemoryItem", "MemoryPlan")
