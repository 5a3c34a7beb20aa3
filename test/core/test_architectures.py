"""tools/architectures.py: what it notes, what it computes of it, and the recorded results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import architectures
from architectures import GPUS, LIMITS, Kernel, Noted, note_launches, resident_ctas, rows_of
from cubin import Resources
from engine_core.cuda import kernels

SMALL = next(gpu for gpu in GPUS if gpu.num_sms == 8)


@pytest.fixture(scope="module")
def engines():
    return architectures.engines()


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_launch_is_within_what_a_cta_may_have(engines, gpu):
    launches = note_launches(gpu, engines["int4, 8 requests"])
    assert {each.kernel.entry for each in launches} >= {
        "gemm_packed",
        "attention_decode",
        "attention_prefill",
        "sample_pick",
    }
    for each in launches:
        assert 1 <= each.threads <= 1024 and each.shared <= gpu.max_shared, each
    decode = [each for each in launches if each.kernel.entry == "attention_decode"]
    assert all(each.grid[0] * each.grid[1] >= gpu.num_sms for each in decode)


def test_together_the_engines_have_every_source(engines):
    launched = {each.kernel.source for spec in engines.values() for each in note_launches(SMALL, spec)}
    assert launched == {path.stem for path in Path(kernels.__file__).parent.glob("*.cu")}


def test_more_sms_mean_larger_grids(engines):
    def grid(num_sms: int) -> int:
        launches = note_launches(replace(SMALL, num_sms=num_sms), engines["fp16"])
        return min(each.grid[0] for each in launches if each.kernel.entry == "gemv")

    assert grid(16) == 2 * grid(8) > 0


@pytest.mark.parametrize(
    "capability, threads, registers, shared, expected",
    [
        (87, 256, 32, 0, (6, "threads")),
        (87, 256, 64, 0, (4, "registers")),
        (87, 256, 65, 0, (3, "registers")),  # a warp takes whole blocks of 256: 28 warps in all
        (80, 256, 32, 0, (8, "threads")),
        (86, 64, 16, 0, (16, "CTAs")),
        (86, 128, 32, 49 << 10, (2, "shared memory")),
        (86, 128, 32, 50 << 10, (1, "shared memory")),  # each has 1 KiB more
        (90, 128, 32, 113 << 10, (2, "shared memory")),
        (90, 1024, 80, 0, (0, "registers")),
    ],
)
def test_ctas_of_an_sm(capability, threads, registers, shared, expected):
    assert resident_ctas(LIMITS[capability], threads, registers, shared) == expected


def test_what_does_not_fit_is_told():
    launch = Noted(Kernel("gemv", "gemv", ()), (8, 1, 1), 512, 100 << 10)
    taken = Resources(registers=128, shared=0, stack=0)

    def problems(capability: int, **changes) -> list[str]:
        gpu = replace(SMALL, capability=capability)
        own = replace(launch, **changes)
        return architectures.problems(gpu, own, taken, *resident_ctas(gpu.limits, own.threads, 128, own.shared))

    assert problems(87) == []
    assert "shared memory" in problems(86)[0]
    assert any("no CTA fits" in each for each in problems(87, threads=1024))
    assert "2048 threads" in problems(87, threads=2048)[0]


def test_a_kernel_that_two_engines_have_stands_there_once():
    row = {"gpu": "x", "kernel": "gemv", "registers": 3}
    rows = [row | {"engine": "a"}, row | {"engine": "b"}, row | {"engine": "b", "registers": 4}]
    assert architectures.merged(rows) == [row | {"engines": ["a", "b"]}, row | {"engines": ["b"], "registers": 4}]


def test_a_sample_of_the_kernels_compiles_and_fits(engines, tmp_path, monkeypatch):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError:
        pytest.skip("needs NVRTC")
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(tmp_path))
    launches = note_launches(SMALL, engines["int4"])
    sample = [next(each for each in launches if each.kernel.entry == name) for name in ("gemv_packed", "sample_pick")]
    first, second = rows_of(SMALL, "int4", sample, 1)
    assert first["problems"] == second["problems"] == []
    assert (first["grid"], first["threads"], first["macros"]["BITS"]) == ([8, 1, 1], 512, 4)
    assert 32 <= first["registers"] <= 128 and first["ctas_per_sm"] >= 1
    assert second["shared"] > 4096  # declared in sample.cu


def test_the_recorded_results_have_every_gpu_and_no_problem():
    head, *rows = map(json.loads, architectures.RESULTS.read_text(encoding="utf-8").splitlines())
    assert head.keys() - {"note"} == {"date", "commit", "nvrtc"}
    assert {row["gpu"] for row in rows} == {gpu.name for gpu in GPUS}
    assert {engine for row in rows for engine in row["engines"]} == set(architectures.engines())
    assert [row for row in rows if row["problems"]] == []
