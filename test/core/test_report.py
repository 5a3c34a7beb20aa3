"""``edgellm report``: a small model is measured on the CPU, and the kernels' own comparison runs on the fake GPU."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import fake_kernels
from engine_core import cli
from engine_core.backends.cuda.self_check import check_kernels
from engine_core.errors import ConfigurationError
from engine_core.hub.known_models import find_known
from engine_core.measure import bench
from engine_core.measure import report as reports
from engine_core.measure.bench import Energy
from engine_core.measure.power import CounterMeter
from engine_core.measure.report import ReportOptions
from engine_core.planning import recommend
from fake_gpu import FakeDriver, install
from small_llama import CONFIG

jsonschema = pytest.importorskip("jsonschema")
SCHEMA = json.loads(reports.SCHEMA_FILE.read_text(encoding="utf-8"))
OPTIONS = [
    "--weights",
    "fp32",
    "--backend",
    "onnxruntime",
    "--prompt-tokens",
    "4",
    "--new-tokens",
    "4",
    "--repeats",
    "1",
]


@pytest.fixture(scope="module")
def small():
    """Makes every model that is measured a small one; two are known, there is a meter, time without work is short."""
    with pytest.MonkeyPatch.context() as patch:
        known = [find_known(name) for name in ("qwen3-0.6b", "llama-3.2-1b-instruct")]
        patch.setattr(recommend, "known_models", lambda: known)
        patch.setattr(bench, "open_meter", lambda on_gpu: CounterMeter("a test", iter(range(10_000)).__next__))
        patch.setattr(bench.Benchmark.measure_energy, "__defaults__", (0.01,))  # s
        tiny = replace(find_known("qwen3-0.6b"), config=CONFIG)
        patch.setattr(reports, "find_known", lambda name: tiny if name.startswith("qwen3") else None)
        patch.setattr(reports, "_IDLE", 0.01)
        yield patch


@pytest.fixture(scope="module")
def written(small, tmp_path_factory):
    """(exit status, report, page)."""
    path = tmp_path_factory.mktemp("report") / "new" / "report.json"
    status = cli.main(["report", str(path), "--shapes", "qwen3-0.6b", *OPTIONS])
    return status, json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_a_report_that_is_there_is_kept(tmp_path, capsys):
    (tmp_path / "report.md").write_text("mine")
    assert cli.main(["report", str(tmp_path / "report.json")]) == 1
    assert "report.md is there already; name another one, or replace it with --force." in capsys.readouterr().err
    assert (tmp_path / "report.md").read_text() == "mine"


def test_the_page_does_not_replace_the_json(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "report.md")]) == 1
    assert "is the name of the readable page; name the JSON file" in capsys.readouterr().err


def test_a_report_keeps_to_the_schema(written):
    status, report, _ = written
    jsonschema.validate(report, SCHEMA)
    assert (status, report["problems"]) == (0, [])
    (line,) = report["decode"]
    assert (line["shape"], line["engine"], line["weights"], line["prompt_tokens"]) == (
        "qwen3-0.6b",
        "onnxruntime",
        "fp32",
        4,
    )
    # The meter counts a joule each time it is read; a sequence is three steps after its prompt.
    assert line["energy_source"] == "a test" and line["joules_per_token"] == round(1 / 3, 4) and line["watts"] > 0
    assert {plan["model"] for plan in report["plans"]} == {"qwen3-0.6b", "llama-3.2-1b-instruct"}


def test_the_page_shows_what_was_measured(written):
    _, report, page = written
    assert page.startswith(f"# {report['machine']['cpu']['name']}\n")
    (line,) = [line for line in page.splitlines() if "| fp32 |" in line]
    assert f"| {report['decode'][0]['ms_per_token']:.2f} |" in line


def test_a_report_names_no_folder(written):
    _, report, page = written
    assert "/" not in report["machine"]["python"]
    assert not any(text in json.dumps(report) + page for text in ("/tmp", "/home", "/root"))


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"decode": [{"shape": "x"}]},
        {"kernels": [{"name": "gemv", "error": "small", "tolerance": 1, "problem": "", "passed": True}]},
        {"machine": {}},
        {"more": 1},
    ],
)
def test_the_schema_refuses_what_is_none(written, change):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**written[1], **change}, SCHEMA)


def test_what_cannot_be_done_is_said_and_the_rest_is_there(small, tmp_path):
    options = ReportOptions(("qwen3-0.6b",), ("fp8",), "onnxruntime", (4,), 4, 1, tmp_path)
    report = reports.make_report(options)
    jsonschema.validate(report, SCHEMA)
    assert len(report["problems"]) == 1 and report["problems"][0].startswith("decode of qwen3-0.6b in fp8: ")
    assert report["plans"] and not report["decode"] and not list(tmp_path.iterdir())
    assert "Nothing was measured." in reports.page(report)


def test_energy_and_a_wrong_kernel_are_on_the_page(written):
    report = json.loads(json.dumps(written[1]))
    energy = Energy("NVML", 0.25, 12.5, 100)
    report["decode"][0] |= {"joules_per_token": energy.joules_per_token, "watts": energy.watts}
    good = {"name": "gemv", "error": 1e-6, "tolerance": 1e-3, "problem": "", "passed": True}
    report["kernels"] = [good, good | {"name": "sample", "error": None, "problem": "no", "passed": False}]
    jsonschema.validate(report, SCHEMA)
    page = reports.page(report)
    assert "| 0.250 | 12.5 |" in page and "1 of 2 agree." in page and "| sample | None |" in page


@pytest.mark.parametrize(
    "options", [{"shapes": ("gpt-9",)}, {"new_tokens": 2}, {"prompt_tokens": (0,)}, {"repeats": 0}], ids=str
)
def test_options_that_cannot_be_are_refused(small, options):
    with pytest.raises(ConfigurationError):
        reports.make_report(ReportOptions(**options))


# --- the kernels' own comparison ----------------------------------------------------------------------------

WANTED = (
    "gemv 1000",
    "gemv_packed int4 1002",
    "gemm_packed nvfp4 1002",
    "attention_decode, 16",
    "attention_prefill, 16",
    "sample",
)


def check(monkeypatch, driver: FakeDriver) -> dict[str, bool]:
    install(monkeypatch, driver)
    return {
        each.name: each.passed for each in check_kernels(dtypes=("fp16",), wanted=lambda name: name.startswith(WANTED))
    }


def test_kernels_like_their_references_pass(monkeypatch):
    driver = FakeDriver()
    found = check(monkeypatch, driver)
    assert len(found) == len(WANTED) and all(found.values()), found
    assert not driver._buffers


def test_a_kernel_that_computes_something_else_does_not_pass(monkeypatch):
    driver = FakeDriver()

    def wrong(defines: dict, args) -> None:
        fake_kernels.gemv(defines, args)
        output = fake_kernels.array_at(fake_kernels.address_of(args, 4), (defines["ROWS"],), np.float32)
        output[7] *= 1.5

    driver.kernels["gemv"] = wrong
    driver.kernels["attention_decode"] = lambda defines, args: None
    found = check(monkeypatch, driver)
    failed = {name for name, passed in found.items() if not passed}
    assert failed == {"gemv 1000×1536, fp16", "attention_decode, 16-bit KV, fp16"}
