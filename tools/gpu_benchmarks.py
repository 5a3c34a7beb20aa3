"""Runs the benchmarks of the GPU backends and writes their figures to benchmarks/results/gpu_bench.jsonl.

    python3 tools/gpu_benchmarks.py [--only NAME ...] [--quick] [--dry-run] [--results FILE]

A line has what the benchmark measured and: run_date (UTC), commit, gpu, driver_cuda (newest CUDA the driver supports),
versions of the packages that matter, benchmark and arguments; of one that failed, failed (the last line it wrote)
instead of figures. The lines of a run replace the older ones of the same benchmark with the same arguments on the same
GPU. The file is written after each benchmark, so that a run that is killed leaves what it has done.
Exit status: 0; 1 where no GPU was found or a benchmark failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_tests import versions
from result_rows import ROOT, commit, now, read_rows, write_rows

RESULTS = ROOT / "benchmarks" / "results" / "gpu_bench.jsonl"


@dataclass(frozen=True)
class Benchmark:
    """A script of benchmarks/ that takes --output, with its arguments."""

    name: str
    arguments: str
    quick: str  # arguments for a look: one small shape
    package: str = ""  # that it needs beside the CUDA backend's

    def command(self, quick: bool, output: Path) -> list[str]:
        script = ROOT / "benchmarks" / f"{self.name}.py"
        return [
            sys.executable,
            str(script),
            *shlex.split(self.quick if quick else self.arguments),
            "--output",
            str(output),
        ]


_SMALL = "--shapes llama-3.2-1b --weights int4"
BENCHMARKS = (
    Benchmark("gpu_decode", "--weights fp16 int8 int4 fp8 nvfp4", f"{_SMALL} --contexts 32 512"),
    Benchmark("gpu_rows", "--keys 128 1024", _SMALL),
    Benchmark("gpu_batch", "", f"{_SMALL} --batches 2 8"),
    Benchmark("lora", "--batches 1 8", _SMALL),
    Benchmark("gpu_trt", "", "--shapes llama-3.2-1b --layers 2", package="tensorrt"),
)


def run(benchmark: Benchmark, quick: bool) -> tuple[list[dict[str, Any]], str]:
    """Run a benchmark; return the lines it measured, and why it failed ("": it did not)."""
    with tempfile.TemporaryDirectory(prefix="edgellm-bench-") as folder:
        output = Path(folder) / "lines.jsonl"
        with subprocess.Popen(
            benchmark.command(quick, output), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            last = ""
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
        lines = read_rows(output)
    if process.returncode:
        return lines, last or f"exit status {process.returncode}"
    return lines, "" if lines else "it measured nothing"


def merge(old: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """Return ``old`` with the lines of ``new`` in place of those of the same benchmark, arguments and GPU."""
    replaced = {_what(line) for line in new}
    return [*(line for line in old if _what(line) not in replaced), *new]


def _what(line: dict) -> tuple[str, str, str]:
    return line["benchmark"], line["arguments"], line["gpu"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="one small shape each, to see that all of them run")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and what each line will say")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write (default: %(default)s)")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from engine_core.cuda.gpu_info import find_gpus

    report = find_gpus()
    head = {
        "run_date": now(),
        "commit": commit(),
        "gpu": report.gpus[0].name if report.gpus else "",
        "driver_cuda": report.cuda_version,
        "versions": versions(),
    }
    wanted = [benchmark for benchmark in BENCHMARKS if benchmark.name in options.only]
    if options.dry_run:
        print(json.dumps(head))
        for benchmark in wanted:
            print(shlex.join(benchmark.command(options.quick, Path("LINES"))))
        return 0
    if not report.gpus:
        print(f"error: no GPU to measure: {report.why_none}", file=sys.stderr)
        return 1
    failed = 0
    for benchmark in wanted:
        if benchmark.package and importlib.util.find_spec(benchmark.package) is None:
            print(f"{benchmark.name} is left out: {benchmark.package} is not installed.", flush=True)
            continue
        print(f"--- {benchmark.name}", flush=True)
        lines, reason = run(benchmark, options.quick)
        failed += bool(reason)
        own = {"benchmark": benchmark.name, "arguments": benchmark.quick if options.quick else benchmark.arguments}
        # A benchmark's own "gpu" is the device's name as well.
        found = [{**line, **head, **own} for line in lines]
        if reason:
            found.append({**head, **own, "failed": reason[:300]})
        write_rows(options.results, merge(read_rows(options.results), found))
    print(f"{head['gpu']}, commit {head['commit']}: {len(wanted)} benchmarks, {failed} failed; see {options.results}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
