"""What the README says of parameters and of the example is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from edgellm_ros.parameters import SPECS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return {"": '""'}.get(str(value), str(value).replace("'", '"'))


def test_the_parameter_table_is_the_declaration():
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (fixed|dynamic|at start) \|", README, re.MULTILINE)
    kinds = {True: "fixed", False: "dynamic"}
    assert rows == [
        (spec.name, shown(spec.default), "at start" if spec.read_only else kinds[spec.fixed]) for spec in SPECS
    ]


def test_the_planner_in_the_readme_is_the_example():
    example = (ROOT / "examples" / "planner_node.py").read_text(encoding="utf-8")
    assert example[example.index("import json") :].strip() in README


def test_every_interface_is_in_the_readme():
    for kind in ("msg", "srv", "action"):
        for path in (ROOT / kind).iterdir():
            assert path.stem in README or path.stem in ("ChatMessage", "SamplingOptions", "MemoryItem", "MemoryPlan")
