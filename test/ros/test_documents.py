"""What the pages say of the example and the interfaces is what the code says."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_the_planner_of_the_first_robot_is_the_example():
    example = (ROOT / "examples" / "planner_node.py").read_text(encoding="utf-8")
    page = (DOCS / "first_robot.md").read_text(encoding="utf-8")
    assert example[example.index("import json") :].strip() in page


def test_the_page_of_the_interfaces_names_each_topic_and_service_of_the_node():
    names = (DOCS / "interfaces.md").read_text(encoding="utf-8").partition("## Fields")[0]
    for kind in ("srv", "action"):
        for path in (ROOT / kind).iterdir():
            assert f"`edgellm_ros/{kind}/{path.stem}`" in names
    for topic in ("EngineStatus", "GenerationStats", "Sentence", "TokenPiece"):
        assert f"`edgellm_ros/msg/{topic}`" in names
