"""tools/gpu_benchmarks.py: it refuses without a GPU, its commands are understood, and what it records of a run."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

import gpu_benchmarks
from engine_core.cuda import gpu_info
from engine_core.cuda.gpu_info import GpuInfo, GpuReport

GPU = GpuReport((GpuInfo("Fake GPU", 90, 8, 1 << 30, False),), "13.0")
FIELDS = {"run_date", "commit", "gpu", "driver_cuda", "versions", "benchmark", "arguments"}


def without_gpu() -> GpuReport:
    return GpuReport(why_none="there is no NVIDIA driver")


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Replaces the benchmarks by scripts: name → text, which finds the output file in ``output``."""

    def make(**texts: str) -> None:
        for name, text in texts.items():
            head = "import json, sys\noutput = sys.argv[-1]\n"
            (tmp_path / "benchmarks").mkdir(exist_ok=True)
            (tmp_path / "benchmarks" / f"{name}.py").write_text(head + text)
        monkeypatch.setattr(gpu_benchmarks, "ROOT", tmp_path)
        monkeypatch.setattr(
            gpu_benchmarks, "BENCHMARKS", tuple(gpu_benchmarks.Benchmark(name, "", "") for name in texts)
        )

    monkeypatch.setattr(gpu_info, "find_gpus", lambda: GPU)
    return make


GOOD = "open(output, 'a').write(json.dumps({'gpu': 'Fake GPU', 'date': '2026-11-28', 'us': 7}) + '\\n')\n"


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_without_a_gpu_it_says_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_info, "find_gpus", without_gpu)
    assert gpu_benchmarks.main(["--results", str(tmp_path / "results.jsonl")]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: no GPU to measure: there is no NVIDIA driver\n")
    assert not (tmp_path / "results.jsonl").exists()


def test_a_dry_run_needs_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu_info, "find_gpus", without_gpu)
    assert gpu_benchmarks.main(["--dry-run", "--only", "gpu_rows"]) == 0
    head, command = capsys.readouterr().out.splitlines()
    assert json.loads(head).keys() | {"benchmark", "arguments"} == FIELDS
    assert command.endswith("benchmarks/gpu_rows.py --keys 128 1024 --output LINES")


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("benchmark", gpu_benchmarks.BENCHMARKS, ids=lambda each: each.name)
def test_benchmarks_understand_their_arguments(monkeypatch, tmp_path, benchmark, quick):
    """They get as far as asking for a GPU."""

    class Asked(Exception):
        pass

    def no_device(*_):
        raise Asked

    script, *arguments = benchmark.command(quick, tmp_path / "lines")[1:]
    module = importlib.import_module(f"benchmarks.{benchmark.name}")
    assert script.endswith(f"benchmarks/{benchmark.name}.py")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    for name in ("Device", "gpu_name", "open_backend", "bench_cuda"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, no_device)
    with pytest.raises(Asked):
        module.main()


def test_each_line_says_what_it_is_of(scripts, tmp_path):
    scripts(one=GOOD, two="print('no kernel image')\nraise SystemExit(3)\n", three="")
    results = tmp_path / "results.jsonl"
    others = [{"benchmark": "one", "arguments": "", "gpu": "Other GPU"}]
    others.append({"benchmark": "one", "arguments": "--all", "gpu": "Fake GPU"})
    results.write_text("".join(json.dumps(each) + "\n" for each in others))
    for _ in range(2):  # the second run replaces the first one's lines
        assert gpu_benchmarks.main(["--results", str(results)]) == 1
        *kept, one, two, three = rows(results)
        assert kept == others
        assert one.keys() == FIELDS | {"date", "us"} and (one["gpu"], one["driver_cuda"]) == ("Fake GPU", "13.0")
        assert two.keys() == FIELDS | {"failed"} and two["failed"] == "no kernel image"
        assert three["failed"] == "it measured nothing"


def test_all_that_ran_is_success(scripts, tmp_path):
    scripts(one=GOOD)
    assert gpu_benchmarks.main(["--results", str(tmp_path / "results.jsonl")]) == 0
    assert [row["us"] for row in rows(tmp_path / "results.jsonl")] == [7]


def test_recorded_results_have_every_field():
    if not gpu_benchmarks.RESULTS.is_file():
        pytest.skip("make gpu-bench has not been recorded")
    for row in rows(gpu_benchmarks.RESULTS):
        assert row.keys() >= FIELDS, row
