"""The roofline of the decode benchmark: every measurement is in it, at its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks.gpu_plot import PLOT_HEIGHT, TOP, draw, read_rows, shown  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"
ROW = dict(gpu="a GPU", shape="s & t", engine="cuda", weights="int8", kv_cache_type="int8", read_tb_s=4.0)
ROW["date"] = "2026-02-03"


def row(prompt: int, fraction: float, **changes) -> dict:
    """A step of 8 GB whose floor is 2 ms."""
    return {
        **ROW,
        "prompt_tokens": prompt,
        "step_bytes": 8e9,
        "ms_per_token": 2 / fraction,
        "fraction": fraction,
        **changes,
    }


def circles(document: str) -> dict[str, list[float]]:
    """Tip → heights of its points."""
    found: dict[str, list[float]] = {}
    for circle in ElementTree.fromstring(document).iter(f"{SVG}circle"):
        if (title := circle.find(f"{SVG}title")) is not None:
            found.setdefault(title.text, []).append(float(circle.get("cy")))
    return found


def test_points_lie_where_their_share_of_the_limit_is(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [row(32, 0.2), row(512, 0.5), row(512, 0.5, weights="fp16"), row(32, 0.8)]  # the last of a case counts
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = circles(draw(read_rows(path)))
    assert len(found) == 3
    tip = "s & t int8, int8 KV, 32 tokens: 400.0 tok/s, 3.20 TB/s, 80% of the floor's speed"
    bandwidth, share = found[tip]
    bottom = TOP + PLOT_HEIGHT
    assert abs((bottom - bandwidth) / PLOT_HEIGHT - 3.2 / 4.4) < 0.001
    assert abs((bottom - share) / PLOT_HEIGHT - 0.8 / 1.1) < 0.001


def test_a_series_is_that_of_its_last_day(tmp_path):
    path = tmp_path / "rows.jsonl"
    before = [row(32, 0.2, date="2026-02-02"), row(64, 0.3, date="2026-02-02")]
    before.append(row(128, 0.35, date="2026-02-02"))
    rows = [*before, row(32, 0.4), row(64, 0.45), row(64, 0.5, weights="fp16")]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert [each["fraction"] for each in read_rows(path)] == [0.4, 0.45, 0.5]


def test_a_single_measurement_does_not_replace_a_series(tmp_path):
    path = tmp_path / "rows.jsonl"
    series = [row(32, 0.2), row(64, 0.3)]
    alone = [row(32, 0.4, date="2026-02-04"), row(32, 0.5, date="2026-02-04", weights="fp8")]
    path.write_text("".join(json.dumps(each) + "\n" for each in series + alone))
    assert [each["fraction"] for each in read_rows(path)] == [0.2, 0.3, 0.5]


def test_one_gpu_and_one_type_of_kv_cache_are_shown():
    rows = [row(32, 0.2, kv_cache_type="fp16", gpu="old"), row(32, 0.3, kv_cache_type="fp16"), row(32, 0.4)]
    assert [each["fraction"] for each in shown(rows)] == [0.3]
    assert [each["fraction"] for each in shown(rows, "old")] == [0.2]
    assert [each["fraction"] for each in shown(rows, "", "int8")] == [0.4]


def test_the_plot_in_the_repository_is_that_of_the_results():
    results = ROOT / "benchmarks" / "results"
    rows = shown(read_rows(results / "gpu_decode.jsonl"))
    assert draw(rows) == (results / "gpu_decode.svg").read_text(encoding="utf-8")
