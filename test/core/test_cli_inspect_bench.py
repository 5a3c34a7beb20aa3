"""``edgellm inspect`` and ``edgellm bench``."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine_core import cli
from engine_core.backends.cuda.build import build_cuda
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.config import EngineConfig
from engine_core.measure.bench import Benchmark, step_bytes
from engine_core.planning.plan import plan_engine
from tool_templates import TEMPLATES

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"
PARAMETERS = 6_820_096


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Two variants of the demo model."""
    directory = tmp_path_factory.mktemp("engine")
    for quantization in ("int8", "fp32"):
        build_engine(DEMO, directory / quantization, quantization=quantization, max_context=256)
    return directory


# --- inspect ----------------------------------------------------------------------------------------------


def test_inspect_shows_every_variant_and_file(engine, capsys):
    assert cli.main(["inspect", str(engine)]) == 0
    text = capsys.readouterr().out
    for words in ("fp32", "int8", "LlamaForCausalLM", "model.onnx.data", "kv_cache", "rows of the LM head", "ok"):
        assert words in text
    assert cli.main(["inspect", str(engine), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [variant["manifest"]["quantization"] for variant in document["variants"]] == ["fp32", "int8"]
    assert all(variant["verified"] and variant["plan"]["fits"] for variant in document["variants"])
    assert all((variant["tool_format"], variant["thinks"]) == ("", False) for variant in document["variants"])
    assert cli.main(["inspect", str(engine), "--json", "--quantization", "int8"]) == 0
    assert len(json.loads(capsys.readouterr().out)["variants"]) == 1


def test_inspect_finds_a_damaged_file_unless_told_not_to(engine, tmp_path, capsys):
    shutil.copytree(engine / "int8", tmp_path / "engine")
    data = tmp_path / "engine" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    assert cli.main(["inspect", str(tmp_path / "engine")]) == 1
    captured = capsys.readouterr()
    assert "SHA-256" in captured.err and captured.out == ""
    assert cli.main(["inspect", str(tmp_path / "engine"), "--no-verify"]) == 0
    assert "size ok" in capsys.readouterr().out


def test_inspect_says_what_a_checkpoint_is(capsys):
    assert cli.main(["inspect", str(DEMO), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["supported"], found["parameters"]) == ("checkpoint", True, PARAMETERS)
    assert (found["dtype"], found["tied_head"], found["vocab_size"]) == ("BF16", True, 2048)
    assert found["backends"]["onnxruntime"] == ["fp32", "int8", "int4"]
    assert found["backends"]["cuda"] == ["fp16", "fp8", "int8", "int4", "nvfp4"]
    assert cli.main(["inspect", str(DEMO)]) == 0
    assert "6,820,096" in capsys.readouterr().out


def test_inspect_says_whether_a_model_has_tools_and_thinks(tmp_path, capsys):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["hermes"][0])
    cli.main(["inspect", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["tool_format"], found["thinks"]) == ("hermes", True)
    cli.main(["inspect", str(tmp_path)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["tool", "format", "hermes"] in rows and ["thinks", "yes"] in rows
    (tmp_path / "tokenizer.json").write_text("{")
    cli.main(["inspect", str(tmp_path), "--json"])
    assert "tool_format" not in json.loads(capsys.readouterr().out)


def write_config(directory: Path, **changes) -> Path:
    config = json.loads((DEMO / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(architectures=["MambaForCausalLM"]), "The architecture MambaForCausalLM is not supported"),
        (dict(rope_scaling={"rope_type": "spiral"}, rope_parameters=None), "spiral"),
    ],
)
def test_inspect_says_why_a_checkpoint_is_not_supported(tmp_path, capsys, changes, words):
    assert cli.main(["inspect", str(write_config(tmp_path, **changes))]) == 1
    text = capsys.readouterr().out
    assert words in text and "there are no safetensors here" in text


def test_inspect_says_which_backend_lacks_what(tmp_path, capsys):
    directory = write_config(tmp_path, head_dim=320)
    assert cli.main(["inspect", str(directory), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"]["cuda"] == [] and "head size above 256" in found["why_not"]["cuda"]
    assert found["backends"]["onnxruntime"]


def test_inspect_says_how_many_experts_there_are(tmp_path, capsys):
    experts = dict(num_experts=12, num_experts_per_tok=3, moe_intermediate_size=48)
    write_config(tmp_path, architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", **experts)
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["experts"], found["intermediate_size"]) == ("12, 3 for a token", 48)


# --- bench ------------------------------------------------------------------------------------------------


def test_bench_measures_and_prints_json(engine, capsys):
    command = ["bench", str(engine), "--quantization", "int8", "--prompt-tokens", "8", "40", "--new-tokens", "16"]
    assert cli.main([*command, "--repeats", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    short, long = document["results"]
    assert (short["prompt_tokens"], long["prompt_tokens"]) == (8, 40)
    for line in document["results"]:
        assert line["weights"] == "int8" and line["repeats"] == 2 and line["threads"] >= 1
        assert min(line["ttft_ms"], line["ms_per_token"]) > 0
        assert line["tok_s"] == pytest.approx(1e3 / line["ms_per_token"], rel=0.01)
        assert line["gb_s"] == pytest.approx(line["bytes_per_step"] / line["ms_per_token"] / 1e6, rel=0.01, abs=0.01)
    assert cli.main([*command, "--repeats", "1"]) == 0
    text = capsys.readouterr().out
    first = r"demo, int8 on onnxruntime: [\d.]+ tokens/s, first token after [\d.]+ ms \(8 prompt tokens\)\.\n\n"
    assert re.match(first, text)
    assert "{" not in text


def test_bench_refuses_what_does_not_fit_the_context(engine, capsys):
    assert cli.main(["bench", str(engine), "--prompt-tokens", "200", "--new-tokens", "100"]) == 1
    assert "max_context is 256" in capsys.readouterr().err
    assert cli.main(["bench", str(engine), "--new-tokens", "1"]) == 1
    assert cli.main(["bench", str(engine), "--backend", "cuda"]) == 1


def test_bench_runs_the_tokens_the_engine_would(engine):
    """Every step has a token: nothing ends early and none is counted twice."""
    with Benchmark(EngineConfig(engine, quantization="fp32")) as bench:
        first, between = bench._run(np.arange(1, 9, dtype=np.int32), 12)
        assert first > 0 and len(between) == 11 and (between > 0).all()
        timing = bench.measure(8, 12, 2)
        assert timing.per_token_p95 >= 0.5 * timing.per_token and bench.load_time > 0


def test_bytes_of_a_step(engine, tmp_path):
    """fp32: every parameter once. cuda fp16: likewise in 2 bytes; int4: a head of its own, the embedding not read."""
    (row,) = plan_engine(engine, EngineConfig(engine, quantization="fp32"), None)
    with Benchmark(EngineConfig(engine, quantization="fp32")) as bench:
        assert bench.bytes_per_step == pytest.approx(4 * PARAMETERS, rel=0.005)
        assert bench.plan.total == row.plan.total
    with Benchmark(EngineConfig(engine, quantization="int8")) as bench:  # 1 byte and a scale for 32 of them
        assert bench.bytes_per_step == pytest.approx(PARAMETERS * (1 + 4 / 32), rel=0.01)
    for quantization, expected in (("fp16", 2 * PARAMETERS), ("int4", PARAMETERS * (0.5 + 2 / 128))):
        manifest = build_cuda(DEMO, tmp_path / quantization, quantization=quantization, max_context=64)
        config = EngineConfig(tmp_path / quantization)
        assert step_bytes(manifest, row.plan, config, 2048) == pytest.approx(expected, rel=0.01)


def test_interrupting_bench_leaves_no_traceback(engine):
    command = [sys.executable, "-m", "engine_core.cli", "bench", str(engine), "--repeats", "100000"]
    command += ["--prompt-tokens", "32", "--new-tokens", "128"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        # A shell has its background jobs ignore it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        maps = Path(f"/proc/{process.pid}/maps")
        deadline = time.monotonic() + 60
        while "onnxruntime_pybind11_state" not in maps.read_text():  # the imports are over
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err.strip()) == (130, "", "")
