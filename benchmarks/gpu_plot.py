"""Draws how near decoding comes to the memory limit, from what gpu_decode.py measured.

    python3 benchmarks/gpu_plot.py [--input benchmarks/results/gpu_decode.jsonl] [--output …/gpu_decode.svg]
        [--gpu NAME] [--kv-cache-type fp16]

Left, the roofline: bytes of a step against the bandwidth it achieved, under the line of what the GPU reads at most.
Right, the share of the floor's speed by the length of the prompt. Of several measurements of one case the last counts,
and of a series of prompts only what was measured on the last day that has several of them, or any if none has.
Drawn are those of one GPU (default: the one measured last) and one type of KV cache.
Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from xml.sax.saxutils import escape

RESULTS = Path(__file__).resolve().parent / "results"
WIDTH, LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT, GAP = 1120, 70, 50, 420, 300, 100
_SERIES = ("gpu", "shape", "engine", "weights", "kv_cache_type")
_CASE = (*_SERIES, "prompt_tokens")
COLORS = ("#1b6ca8", "#d1495b", "#2e933c", "#8a4fff", "#e08e2b", "#3d5a6c", "#b23a86", "#6b7a1e")
COLORS += ("#0f8b8d", "#7f5539", "#c9a227", "#5f0f40")  # no two series of a card alike


class Axis:
    """A logarithmic (base 2 or 10) or linear scale from ``low`` to ``high`` onto pixels ``start`` to ``end``."""

    def __init__(self, low: float, high: float, start: float, end: float, base: int = 0) -> None:
        self._map = (lambda v: math.log(v, base)) if base else float
        self._low, self._high = self._map(low), self._map(high)
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        share = (self._map(value) - self._low) / ((self._high - self._low) or 1)
        return self._start + share * (self._end - self._start)


def read_rows(path: Path) -> list[dict]:
    """The last line of each case that was measured on its series' day, in the order of the cases' first lines."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    prompts: dict[tuple, dict[str, set[int]]] = {}  # series → day → lengths
    for row in rows:
        days = prompts.setdefault(tuple(row[key] for key in _SERIES), {})
        days.setdefault(row["date"], set()).add(row["prompt_tokens"])
    day_of = {series: max(days, key=lambda day: (len(days[day]) > 1, day)) for series, days in prompts.items()}
    found: dict[tuple, dict | None] = {}
    for row in rows:
        case = tuple(row[key] for key in _CASE)
        is_shown = row["date"] == day_of[tuple(row[key] for key in _SERIES)]
        found[case] = row if is_shown else found.get(case)
    return [row for row in found.values() if row is not None]


def shown(rows: list[dict], gpu: str = "", kv_cache_type: str = "fp16") -> list[dict]:
    """Those of one GPU, by default the last one's, with one type of KV cache."""
    gpu = gpu or rows[-1]["gpu"]
    return [row for row in rows if row["gpu"] == gpu and row["kv_cache_type"] == kv_cache_type]


def series_of(rows: list[dict]) -> dict[str, list[dict]]:
    """Name for the legend → its measurements by length of the prompt."""
    several_gpus = len({row["gpu"] for row in rows}) > 1
    series: dict[str, list[dict]] = {}
    for row in rows:
        kind = row["kv_cache_type"]
        name = f"{row['shape']} {row['weights']}" + (f", {kind} KV" if kind in ("int8", "fp8") else "")
        name += "" if row["engine"] == "cuda" else f", {row['engine']}"
        series.setdefault(name + (f", {row['gpu']}" if several_gpus else ""), []).append(row)
    return {name: sorted(each, key=lambda row: row["prompt_tokens"]) for name, each in series.items()}


def achieved(row: dict) -> float:
    """TB/s of a step."""
    return row["step_bytes"] / row["ms_per_token"] / 1e9


def text(x: float, y: float, words: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str = 'stroke="#ddd"') -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def frame(left: float, title: str, x: Axis, x_ticks: dict, y: Axis, y_ticks: dict, x_title: str) -> list[str]:
    bottom, right = TOP + PLOT_HEIGHT, left + PLOT_WIDTH
    parts = [text(left, TOP - 18, title, size=14), text(left + PLOT_WIDTH / 2, bottom + 38, x_title, "middle")]
    for value, words in y_ticks.items():
        parts += [line(left, y.at(value), right, y.at(value)), text(left - 8, y.at(value) + 4, words, "end")]
    for value, words in x_ticks.items():
        parts += [line(x.at(value), TOP, x.at(value), bottom), text(x.at(value), bottom + 18, words, "middle")]
    return parts


def curve(points: list[tuple[float, float]], color: str, tips: list[str]) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>']
    for (x, y), tip in zip(points, tips, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"><title>{escape(tip)}</title></circle>')
    return parts


def draw(rows: list[dict]) -> str:
    """The SVG document."""
    series = series_of(rows)
    bottom = TOP + PLOT_HEIGHT
    peak = max(row["read_tb_s"] for row in rows)
    sizes = [row["step_bytes"] / 1e9 for row in rows]
    bytes_axis = Axis(min(sizes) / 1.3, max(sizes) * 1.3, LEFT, LEFT + PLOT_WIDTH, base=10)
    speed_axis = Axis(0, peak * 1.1, bottom, TOP)
    second = LEFT + PLOT_WIDTH + GAP
    prompts = sorted({row["prompt_tokens"] for row in rows})
    prompt_axis = Axis(prompts[0], prompts[-1], second + 15, second + PLOT_WIDTH - 15, base=2)
    share_axis = Axis(0, 1.1, bottom, TOP)
    ticks = [v for power in range(-3, 3) for v in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)]
    parts = frame(
        *(LEFT, "Bandwidth a decode step achieves, TB/s"),
        *(bytes_axis, {v: f"{v:g}" for v in ticks if min(sizes) / 1.3 < v < max(sizes) * 1.3}),
        *(speed_axis, {v: str(v) for v in range(math.floor(peak) + 1)}, "GB a step reads: weights and KV cache"),
    )
    for gpu in sorted({row["gpu"] for row in rows}):
        limits = sorted({row["read_tb_s"] for row in rows if row["gpu"] == gpu})
        for height in map(speed_axis.at, limits):
            parts.append(line(LEFT, height, LEFT + PLOT_WIDTH, height, 'stroke="#222" stroke-dasharray="6 4"'))
        words = " or ".join(map(str, limits))
        parts.append(text(LEFT + PLOT_WIDTH, speed_axis.at(limits[-1]) - 6, f"{gpu} reads {words} TB/s", "end"))
    parts += frame(
        *(second, "Share of the floor's speed"),
        *(prompt_axis, {v: f"{v:,}" for v in prompts}),
        *(share_axis, {v / 5: f"{v * 20} %" for v in range(6)}, "tokens of the prompt"),
    )
    for i, (name, each) in enumerate(series.items()):
        color = COLORS[i % len(COLORS)]
        tips = [
            f"{name}, {row['prompt_tokens']:,} tokens: {1e3 / row['ms_per_token']:.1f} tok/s, {achieved(row):.2f} TB/s,"
            f" {row['fraction']:.0%} of the floor's speed"
            for row in each
        ]
        speeds = [(bytes_axis.at(row["step_bytes"] / 1e9), speed_axis.at(achieved(row))) for row in each]
        shares = [(prompt_axis.at(row["prompt_tokens"]), share_axis.at(row["fraction"])) for row in each]
        parts += curve(speeds, color, tips) + curve(shares, color, tips)
        x, y = LEFT + i % 3 * 350, bottom + 72 + i // 3 * 20
        parts += [f'<circle cx="{x}" cy="{y - 4}" r="5" fill="{color}"/>', text(x + 12, y, name)]
    height = bottom + 90 + (len(series) + 2) // 3 * 20
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
    head += f'font-family="sans-serif" font-size="12"><rect width="{WIDTH}" height="{height}" fill="white"/>'
    return "\n".join([head, *parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=RESULTS / "gpu_decode.jsonl")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_decode.svg")
    parser.add_argument("--gpu", default="")
    parser.add_argument("--kv-cache-type", default="fp16")
    options = parser.parse_args()
    rows = shown(read_rows(options.input), options.gpu, options.kv_cache_type)
    options.output.write_text(draw(rows), encoding="utf-8")
    print(f"{options.output}: {len(rows)} measurements")


if __name__ == "__main__":
    main()
