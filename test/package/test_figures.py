"""Each row of the README's table of speeds has a measurement, and is marked if that is older than the code.

benchmarks/results/readme_figures.json says of each row, in order, which figure is looked up where. A row is marked with
† if what it measures (``CODE``) was changed on a later day; where it was on the same day, either is right.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MARK = "†"
# What decides how fast a step is; the rest of a backend does not run in it.
CODE = {
    "cuda": tuple(f"engine_core/cuda/kernels/{name}" for name in ("*.cu", "*.cuh", "launch_configs.py")),
    "tensorrt": ("engine_core/backends/tensorrt/*exporter.py", "engine_core/backends/tensorrt/engine.py"),
    "onnxruntime": ("engine_core/backends/onnxruntime/exporter.py", "engine_core/backends/onnxruntime/session.py"),
}  # fmt: skip
FIGURES = json.loads((RESULTS / "readme_figures.json").read_text(encoding="utf-8"))


def rows() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## How fast\n")[2].partition("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("| ")][1:]


def measured(figure: dict) -> list[str]:
    """Return the dates of the measurements that round to the figure shown."""
    lines = map(json.loads, (RESULTS / figure["file"]).read_text(encoding="utf-8").splitlines())
    digits = len(figure["shown"].partition(".")[2])
    return [
        line["date"]
        for line in lines
        if all(line.get(name) == value for name, value in figure["match"].items())
        and f"{line[figure['figure']]:.{digits}f}" == figure["shown"]
    ]


def changed(code: str) -> str:
    """Return the day of the last commit that touched the code; "" without a repository."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%cs", "--", *(f":(glob){path}" for path in CODE[code])]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def test_every_row_is_looked_up():
    assert len(rows()) == len(FIGURES) and all(
        figure["shown"] in row for row, figure in zip(rows(), FIGURES, strict=True)
    )


@pytest.mark.parametrize("number", range(len(FIGURES)), ids=lambda number: f"{FIGURES[number]['shown']} ms")
def test_a_figure_is_measured_and_marked_if_it_is_older_than_the_code(number):
    figure, row = FIGURES[number], rows()[number]
    dates = measured(figure)
    assert dates, f"no measurement in {figure['file']} gives {figure['shown']}"
    if not (last := changed(figure["code"])):
        pytest.skip("needs the repository")
    advice = f"measured on {max(dates)}, {figure['code']} changed on {last}: measure again, or mark the row with {MARK}"
    assert max(dates) == last or (MARK in row) == (max(dates) < last), advice


def test_an_unknown_figure_has_no_measurement():
    assert measured({**FIGURES[0], "shown": "9.99"}) == []
    assert measured({**FIGURES[0], "match": {"shape": "none"}}) == []
