"""Pages of docs/ that are made of the files in benchmarks/results; written and checked by tools/docs_tables.py."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from architectures import ENGINES_SHOWN, GPUS, PaperGpu  # noqa: E402
from engine_core.backends.registry import backend_names  # noqa: E402
from engine_core.measure.report import decode_table, title  # noqa: E402
from engine_core.memory import format_bytes  # noqa: E402
from result_rows import read_rows  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
REPORTS = RESULTS / "reports"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- architectures ------------------------------------------------------------------------------------------

_ARCHITECTURES = """# The kernels on GPUs that are not here

`tools/architectures.py` opens the CUDA backend for each of these GPUs with a driver that only notes launches,
compiles every kernel for its architecture with NVRTC, and compares what it takes with the limits of an SM. No kernel
ran for this page: it shows that the kernels compile, fit and which launch configuration a GPU without measured ones
begins with ([kernels.md](kernels.md)); what they compute on Hopper is tested (`make gpu-test`).
`tools/docs_tables.py` writes this page from `benchmarks/results/architectures.jsonl`.
"""


def architectures() -> str:
    """Return docs/architectures.md."""
    head, *rows = read_rows(RESULTS / "architectures.jsonl")
    problems = [f"- {row['gpu']}, {row['kernel']}: {problem}" for row in rows for problem in row["problems"]]
    spilled = Counter((row["gpu"], row["kernel"], row["stack"]) for row in rows if row["stack"])
    parts = [
        _ARCHITECTURES,
        f"Compiled on {head['date']} with NVRTC {head['nvrtc']}, commit {head['commit']}: {len(rows)} kernels.\n",
        *([f"{head['note']}\n"] if "note" in head else []),  # what a new run of the script leaves out
        "## The GPUs\n",
        table(
            ["GPU", "architecture", "SMs", "threads of an SM", "CTAs of an SM", "shared memory of an SM"],
            [
                [each.name, f"sm_{each.capability}", str(each.num_sms), str(each.limits.threads), str(each.limits.ctas),
                 format_bytes(each.limits.shared)]
                for each in GPUS
            ],
        ),
        "\n## What kernels take\n",
        "Registers of a thread, then CTAs that an SM holds at a time, over all engines: Llama-3.2-1B in each weight "
        "format, with int8 KV caches, for 8 requests and with LoRA adapters; Gemma 2; OLMo 2; Qwen3 MoE.\n",
        _by_gpu(rows, lambda row: row["kernel"], _taken),
        "\n## Launch configurations of a decode step\n",
        "Llama-3.2-1B, CTAs × threads of each, and its dynamic shared memory.\n",
        *(
            f"{name}:\n\n{_by_gpu([row for row in rows if _decodes(row, name)], _label, _launch)}\n"
            for name in ENGINES_SHOWN
        ),
        "## Findings\n",
        "\n".join(problems) or "Every kernel compiles and fits every one of these GPUs.",
        "",
        "Kernels that keep some registers in local memory (bytes of a thread), which costs speed and nothing else:\n\n"
        + table(
            ["GPU", "kernel", "bytes", "variants"],
            [[gpu, kernel, str(size), str(count)] for (gpu, kernel, size), count in sorted(spilled.items())],
        )
        if spilled
        else "No kernel keeps registers in local memory.",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _by_gpu(rows: Sequence[dict], label: Callable[[dict], str], cell: Callable[[list[dict]], str]) -> str:
    """Return a table with a row for each ``label`` and a column for each GPU."""
    labels = sorted({label(row) for row in rows})

    def of(gpu: PaperGpu, name: str) -> str:
        found = [row for row in rows if row["gpu"] == gpu.name and label(row) == name]
        return cell(found) if found else "–"

    cells = [[f"`{name}`", *(of(gpu, name) for gpu in GPUS)] for name in labels]
    return table(["kernel", *(gpu.name for gpu in GPUS)], cells)


def _range(values: Iterable[int]) -> str:
    low, high = min(found := list(values)), max(found)
    return str(low) if low == high else f"{low}–{high}"


def _taken(rows: list[dict]) -> str:
    return f"{_range(row['registers'] for row in rows)}, {_range(row['ctas_per_sm'] for row in rows)}"


def _decodes(row: dict, engine: str) -> bool:
    kernels = ("gemv", "gemv_packed", "attention_decode", "sample_scan", "sample_pick")
    return engine in row["engines"] and row["kernel"] in kernels


def _label(row: dict) -> str:
    macros = row["macros"]
    return f"{row['kernel']} {macros['ROWS']}×{macros['COLS']}" if "COLS" in macros else row["kernel"]


def _launch(rows: list[dict]) -> str:
    ctas = rows[0]["grid"][0] * rows[0]["grid"][1] * rows[0]["grid"][2]
    shared = rows[0]["dynamic_shared"]
    return f"{ctas} × {rows[0]['threads']}" + (f", {shared // 1024} KiB" if shared else "")


# --- reports ------------------------------------------------------------------------------------------------

_REPORTS = """# Machines that reported

`edgellm report` measures a machine and writes one JSON file and a readable page. It needs no model and no network:
engines are built of published shapes with random weights. It writes what the machine has, which known models fit,
whether the CUDA kernels agree with their references there, the bandwidth of the memory, decode speed, and joules per
token where the machine's energy can be read.

```sh
edgellm report                          # edgellm-report.json and edgellm-report.md in this folder; some minutes
edgellm report orin.json --weights int4 fp16 --shapes qwen3-0.6b llama-3.1-8b-instruct --directory /media/ssd
```

The files name no user, host or folder. On a Jetson, set the power mode first (`sudo nvpmodel -m 0`, `sudo
jetson_clocks`); the file says which it was. `engine_core/measure/report_schema.json` describes the file. To add one
to this page, put it into `benchmarks/results/reports` and run `tools/docs_tables.py`; `test/package/test_docs.py`
checks it against the schema.
"""


def reports() -> str:
    """Return docs/reports.md."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(REPORTS.glob("*.json"))]
    machines = [
        [
            title(each), each["date"][:10], each["edgellm"], each["machine"]["system"],
            f"{each['bandwidth']['gb_s']:.0f}" if each["bandwidth"] else "–",
            f"{sum(one['passed'] for one in each['kernels'])} of {len(each['kernels'])}" if each["kernels"] else "–",
            f"{each['idle']['watts']:.0f} W" if each["idle"] else "–",
            str(len(each["problems"])),
        ]
        for each in found
    ]  # fmt: skip
    header = ["machine", "date", "version", "system", "GB/s", "kernels that agree", "without work", "problems"]
    parts = [_REPORTS, "## Machines\n"]
    parts.append(table(header, machines) if found else "None yet.")
    if found:
        parts += ["\n## Decode, random weights\n", table(*decode_table(found))]
    return "\n".join(parts) + "\n"


# --- GPU tests and speed ------------------------------------------------------------------------------------

_GPU = """# What ran on GPUs

`tools/docs_tables.py` writes this page from the files that `make gpu-test` and `benchmarks/gpu_decode.py` leave in
`benchmarks/results`. Another kind of GPU appears here when somebody runs them there; what is compiled for others
without a run is in [architectures.md](architectures.md), and [reports.md](reports.md) has machines whose owners sent
a report.
"""


def gpu() -> str:
    """Return docs/gpu.md."""
    tests, speeds = read_rows(RESULTS / "gpu_tests.jsonl"), read_rows(RESULTS / "gpu_decode.jsonl")
    return "\n".join([_GPU, "## Tests\n", _tests(tests), "\n## Decode\n", _speeds(speeds)]) + "\n"


def _tests(lines: Sequence[dict]) -> str:
    """Each GPU's last outcomes by test file."""
    rows = []
    for gpu in sorted({line["gpu"] for line in lines}):
        for module in sorted({_module(line) for line in lines if line["gpu"] == gpu}):
            own = [line for line in lines if line["gpu"] == gpu and _module(line) == module]
            counts = Counter(line["outcome"] for line in own)
            commits = sorted({line["commit"] for line in own})
            dates = sorted(line["date"][:10] for line in own)
            rows.append(
                [
                    gpu, f"`{module}`", str(counts["passed"]), str(counts["skipped"]),
                    str(counts["failed"] + counts["error"]),
                    dates[-1] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
                    commits[0] if len(commits) == 1 else f"{len(commits)} commits",
                ]
            )  # fmt: skip
    return table(["GPU", "tests", "passed", "skipped", "failed", "date", "commit"], rows)


def _module(line: dict) -> str:
    return line["test"].partition("::")[0].rpartition("/")[2]


def _speeds(lines: Sequence[dict]) -> str:
    """The last figures of each GPU, shape, weights and prompt length."""
    last: dict[tuple, dict] = {}
    for line in lines:
        if line["engine"] in backend_names():
            key = line["gpu"], line["shape"], line["weights"], line["kv_cache_type"], line["prompt_tokens"]
            last[key] = line
    rows = [
        [
            *map(str, key), f"{line['ttft_ms']:.1f}", f"{line['ms_per_token']:.3f}",
            f"{1e3 / line['ms_per_token']:.0f}", f"{line['fraction']:.0%}", line["date"],
        ]
        for key, line in sorted(last.items())
    ]  # fmt: skip
    header = [
        "GPU",
        "shape",
        "weights",
        "KV",
        "prompt",
        "first token ms",
        "ms/token",
        "tokens/s",
        "of the limit",
        "date",
    ]
    return "Of the limit: of the speed that reading the weights and the KV cache allows.\n\n" + table(header, rows)


def pages() -> dict[Path, str]:
    """Return page → its text."""
    made = {"architectures.md": architectures, "reports.md": reports, "gpu.md": gpu}
    return {ROOT / "docs" / name: make() for name, make in made.items()}
