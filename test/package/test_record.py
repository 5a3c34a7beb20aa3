"""The recordings of terminals: well-formed, and each row is there as long as it was on the screen."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import record  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"


def run(text: str, color: str = "default") -> tuple:
    return ((text, color, False, False),)


def test_a_row_is_drawn_once_for_each_content():
    shown = [
        (1.0, (run("a <b>"), ())),
        (2.0, (run("a <b>"), run("now", "green"))),
        (3.0, (run("end"), run("now", "green"))),
    ]
    drawn = ElementTree.fromstring(record.draw(shown, (20, 2), "t & u"))
    total = 3.0 + record._LAST
    rows = {
        "".join(group.itertext()).strip(): group.find(f"{SVG}animate")
        for group in drawn.iter(f"{SVG}g")
        if group.find(f"{SVG}text") is not None
    }
    assert rows.keys() == {"a <b>", "now", "end"}
    times = {
        text: [round(float(key) * total, 1) for key in animate.get("keyTimes").split(";")]
        for text, animate in rows.items()
    }
    assert times == {"a <b>": [0, 1.0, 3.0], "now": [0, 2.0], "end": [0, 3.0]}
    assert rows["a <b>"].get("values") == "hidden;visible;hidden"


def test_what_a_terminal_shows_becomes_pictures():
    pytest.importorskip("pyte")
    chunks = [(0.0, b"one\r\n"), (5.0, b"\x1b[32mtwo\x1b[0m"), (5.01, b"\x1b[1;1Hsix")]
    shown = list(record.pictures(chunks, (10, 2)))
    texts = [[row[0][0].strip() if row else "" for row in rows] for _, rows in shown]
    assert texts == [["one", ""], ["one", "two"], ["six", "two"]]
    assert [round(when, 2) for when, _ in shown] == [0.0, 1.0, 1.01]  # the pause is shortened
    assert shown[1][1][1][0][1] == "green"


@pytest.mark.parametrize("name", ["demo.svg", "top.svg"])
def test_the_recordings_of_the_readme_are_whole(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag == f"{SVG}svg" and len(text) < 100_000
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "") and "<script" not in text
