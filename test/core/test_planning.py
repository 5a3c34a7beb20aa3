"""``edgellm plan``: the textbook cases, agreement with the engines that are built, verdicts and advice."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import checkpoints
from engine_core import cli
from engine_core.backends import backend_class
from engine_core.backends.cuda.build import build_cuda
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.config import EngineConfig
from engine_core.errors import ConfigurationError
from engine_core.formats.manifest import read_manifest
from engine_core.formats.safetensors_file import write_safetensors
from engine_core.formats.vocab_map import TENSOR_NAME
from engine_core.formats.weight_formats import NAMES, weight_format
from engine_core.memory import kv_cache_bytes
from engine_core.models.shapes import spec_of
from engine_core.planning import devices, recommend
from engine_core.planning.estimates import CheckpointEstimate, Size, format_bytes_of
from engine_core.planning.plan import Asked, advice, is_possible, longest_context, plan_checkpoint, plan_engine

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
GIB = 2**30
LLAMA2_7B = dict(
    architectures=["LlamaForCausalLM"],
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    dtype="float16",
)
MISTRAL_7B = LLAMA2_7B | dict(
    architectures=["MistralForCausalLM"],
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    sliding_window=None,
)


@pytest.fixture
def config_only(tmp_path):
    """Writes a checkpoint directory that has a config.json and nothing else."""

    def write(**config) -> Path:
        directory = tmp_path / "model"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return write


@pytest.fixture(scope="module")
def demo_engines(tmp_path_factory):
    """A directory with the fp32, int8 and int4 variants of the demo model for 512 tokens, named like their weights."""
    directory = tmp_path_factory.mktemp("demo")
    for quantization in ("fp32", "int8", "int4"):
        build_engine(DEMO, directory / quantization, quantization=quantization, max_context=512)
    return directory


def rows_of(directory, device, **asked):
    return {row.quantization: row for row in plan_checkpoint(CheckpointEstimate(directory), device, Asked(**asked))}


# --- textbook ---------------------------------------------------------------------------------------------


def test_the_textbook_kv_cache_is_in_the_plan(config_only):
    """32 layers × batch 4 × 2 × 8 heads × 4,096 × 128 × 2 bytes = 2 GiB; half the context, half the bytes."""
    directory = config_only(**MISTRAL_7B)
    device = devices.named("agx-orin-64gb")
    for context, expected in ((4096, 2 * GIB), (2048, GIB)):
        row = rows_of(directory, device, contexts=(context,), batches=(4,))["fp16"]
        assert row.plan.item("kv_cache") == expected
        assert row.max_batch == 4 and not row.why_not  # the cuda backend runs it


@pytest.mark.parametrize(("config", "parameters"), [(LLAMA2_7B, 6_738_415_616), (MISTRAL_7B, 7_241_732_096)])
def test_a_7b_model_in_fp16_and_int4(config_only, config, parameters):
    """16-bit weights of 7 B parameters are 13 to 15 GB: on a 32 GB Jetson, not on a 16 GB one; int4 on 16 and 8 GB."""
    directory = config_only(**config)
    estimate = CheckpointEstimate(directory)
    assert estimate.spec.num_parameters == parameters
    plans = {name: rows_of(directory, devices.named(name), contexts=(4096,)) for name in devices.DEVICES}
    fp16 = plans["agx-orin-32gb"]["fp16"]
    assert fp16.plan.item("weights") == pytest.approx(2 * parameters, rel=0.001)
    assert fp16.usable and not plans["orin-nx-16gb"]["fp16"].usable
    for name in ("agx-orin-32gb", "orin-nx-16gb"):
        assert plans[name]["int4"].usable
        assert plans[name]["int4"].plan.item("weights") < 0.31 * fp16.plan.item("weights")
    small = plans["orin-nano-8gb"]["int4"]
    grouped_queries = config["num_key_value_heads"] == 8
    assert small.usable == grouped_queries  # 4k tokens of KV are 0.5 GiB there, and 2 GiB with a KV head per head
    assert 0 < small.longest[1, "fp16"] <= small.longest[1, "int8"]


def test_16_bit_7b_on_32_gb_ends_at_long_contexts(config_only):
    directory = config_only(**MISTRAL_7B | {"max_position_embeddings": 262144})
    row = rows_of(directory, devices.named("agx-orin-32gb"), contexts=(131072,))["fp16"]
    assert not row.fits and 32768 < row.longest[1, "fp16"] < 131072
    found = CheckpointEstimate(directory)
    for tokens, fits in ((row.longest[1, "fp16"], True), (row.longest[1, "fp16"] + 64, False)):
        plan = found.plan("fp16", "cuda", Size(tokens, 1, "fp16"), devices.named("agx-orin-32gb"))
        assert (plan.total <= plan.available) == fits


def test_number_formats():
    """Bits and scales of a 4096 × 4096 matrix."""
    values = 4096 * 4096
    sizes = {name: weight_format(name).nbytes((4096, 4096)) for name in NAMES}
    assert sizes["fp16"] == 2 * values and sizes["fp8"] == values + 2 * 4096
    assert sizes["int4_awq"] == values // 2 + 2 * values // 128
    assert sizes["nvfp4"] == values // 2 + values // 16


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("experts", [0, 8])
def test_weights_in_16_bits_are_two_bytes_of_every_parameter(experts, tied):
    more = dict(architectures=["Qwen3MoeForCausalLM"], num_experts=experts, moe_intermediate_size=768)
    spec = spec_of(LLAMA2_7B | (more if experts else {}) | {"tie_word_embeddings": tied})
    stored = weight_format("fp16")
    assert spec.num_experts == experts and spec.tied == tied
    assert format_bytes_of(spec, stored, spec.vocab_size) == 2 * spec.num_parameters
    cut = 2 * (spec.num_parameters + (1000 - (0 if tied else spec.vocab_size)) * spec.hidden_size)
    assert format_bytes_of(spec, stored, 1000) == cut


# --- agreement with what is built -------------------------------------------------------------------------


def assert_agrees(estimate, planned, quantization, backend, size, device):
    mine = estimate.plan(quantization, backend, size, device)
    assert mine.total == pytest.approx(planned.total, rel=0.01)
    for item in planned.items:
        assert mine.item(item.name) == pytest.approx(item.bytes, rel=0.01, abs=4096), item.name
    assert {item.name for item in mine.items} == {item.name for item in planned.items}


@pytest.mark.parametrize("quantization", ["fp32", "int8", "int4"])
def test_the_demo_models_plan_is_that_of_the_engine_built_from_it(demo_engines, quantization):
    engine = demo_engines / quantization
    planned = backend_class("onnxruntime").plan(engine, read_manifest(engine), EngineConfig(engine, max_context=512))
    device = devices.this_cpu()
    estimate = CheckpointEstimate(DEMO)
    assert_agrees(estimate, planned, quantization, "onnxruntime", Size(512, 1, "fp32"), device)
    other = estimate.plan(quantization, "onnxruntime", Size(256, 1, "fp32"), device)
    assert other.item("kv_cache") == planned.item("kv_cache") // 2


@pytest.mark.parametrize("quantization", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama3", "llama-tied-bias", "qwen2", "qwen3", "gemma3", "phi3"])
def test_plans_of_every_family_are_those_of_their_engines(tmp_path, name, quantization):
    pytest.importorskip("torch")
    directory = checkpoints.write(tmp_path / "checkpoint", name)
    manifest = build_engine(directory, tmp_path / "engine", quantization=quantization)
    planned = backend_class("onnxruntime").plan(tmp_path / "engine", manifest, EngineConfig(tmp_path / "engine"))
    size = Size(manifest.max_context, 1, "fp32")
    assert_agrees(CheckpointEstimate(directory), planned, quantization, "onnxruntime", size, devices.this_cpu())
    for file in directory.glob("*.safetensors"):  # config.json alone says the same
        file.unlink()
    assert_agrees(CheckpointEstimate(directory), planned, quantization, "onnxruntime", size, devices.this_cpu())


def test_a_reduced_vocabulary_is_planned_as_it_is_built(tmp_path):
    eos = json.loads((DEMO / "generation_config.json").read_text())["eos_token_id"]
    kept = sorted({*range(500), *(eos if isinstance(eos, list) else [eos])})
    import numpy as np

    write_safetensors(tmp_path / "map.safetensors", {TENSOR_NAME: np.array(kept, dtype=np.int32)})
    manifest = build_engine(
        DEMO, tmp_path / "engine", quantization="int8", max_context=512, vocab_map=tmp_path / "map.safetensors"
    )
    planned = backend_class("onnxruntime").plan(tmp_path / "engine", manifest, EngineConfig(tmp_path / "engine"))
    size = Size(512, 1, "fp32", head_rows=len(kept))
    assert_agrees(CheckpointEstimate(DEMO), planned, "int8", "onnxruntime", size, devices.this_cpu())


def test_the_plan_of_awq_is_that_of_the_engine_built_from_an_awq_checkpoint(tmp_path):
    pytest.importorskip("torch")
    from engine_core.quantize import quantize_checkpoint

    quantize_checkpoint(DEMO, tmp_path / "checkpoint", method="int4_awq", num_samples=2, sequence_length=64)
    manifest = build_engine(tmp_path / "checkpoint", tmp_path / "engine", quantization="int4_awq", max_context=512)
    planned = backend_class("onnxruntime").plan(tmp_path / "engine", manifest, EngineConfig(tmp_path / "engine"))
    for directory in (DEMO, tmp_path / "checkpoint"):
        size = Size(512, 1, "fp32")
        assert_agrees(CheckpointEstimate(directory), planned, "int4_awq", "onnxruntime", size, devices.this_cpu())


@pytest.mark.parametrize("quantization", ["fp16", "int4"])
def test_the_cuda_plan_is_that_of_the_engine_built(tmp_path, quantization):
    """Without a GPU: the bytes of the weights file, and the same arrays for the rest."""
    build_cuda(DEMO, tmp_path / "engine", quantization=quantization, max_context=1024)
    manifest = read_manifest(tmp_path / "engine")
    device = devices.named("orin-nano-8gb")
    (row,) = plan_engine(tmp_path / "engine", EngineConfig(tmp_path / "engine"), device)
    assert row.usable and row.plan.available == device.free
    assert_agrees(CheckpointEstimate(DEMO), row.plan, quantization, "cuda", Size(1024, 1, "fp16"), device)
    rope = row.plan.item("rope")
    assert manifest.files["weights.safetensors"].size == pytest.approx(row.plan.item("weights") + rope, rel=0.01)


# --- verdicts ---------------------------------------------------------------------------------------------


def test_small_floats_run_on_every_gpu(config_only):
    directory = config_only(**MISTRAL_7B)
    for name in ("agx-orin-64gb", "thor-128gb"):
        rows = rows_of(directory, devices.named(name))
        assert rows["fp8"].usable and rows["nvfp4"].usable


def test_an_fp8_cache_runs_on_every_gpu(config_only):
    """As fp8 weights do: where the GPU has no instruction for the type, its bits are moved."""
    directory = config_only(**MISTRAL_7B)
    for name in ("agx-orin-64gb", "thor-128gb"):
        device = devices.named(name)
        for kind in ("fp16", "fp8"):
            row = rows_of(directory, device)[kind]
            assert {kv for _, kv in row.longest} == {"fp16", "int8", "fp8"} and not row.only_planned
            assert row.longest[1, "fp8"] == row.longest[1, "int8"] >= row.longest[1, "fp16"]
            asked = rows_of(directory, device, contexts=(4096,), kv_cache_type="fp8", backend="cuda")[kind]
            assert asked.usable and not asked.why_not


def test_advice_names_what_fits_with_numbers(config_only):
    directory = config_only(**MISTRAL_7B)
    device = devices.named("orin-nx-16gb")
    rows = plan_checkpoint(CheckpointEstimate(directory), device, Asked(contexts=(8192,)))
    assert is_possible(rows) and is_possible(rows, "int4") and not is_possible(rows, "fp16")
    assert advice(rows) == [] and advice(rows, "int4") == []
    (sentence,) = advice(rows, "fp16", lambda quantization: 10 * GIB)
    assert "8192" in sentence and "13.29 GiB" in sentence and "10.00 GiB (enough)" in sentence
    (advised,) = re.findall(r"--quantization (\w+) fits", sentence)
    assert is_possible(rows, advised)
    small = devices.of_memory(5 * GIB, gpu=True)
    rows = plan_checkpoint(CheckpointEstimate(directory), small, Asked(contexts=(32768,)))
    (sentence,) = advice(rows)
    longest = {row.quantization: row for row in rows}["int4"].longest[1, "fp16"]
    assert 0 < longest < 32768 and f"--max-context {longest} fits" in sentence


@pytest.mark.parametrize(
    ("border", "expected"), [(100, 64), (64, 64), (63, 0), (1000, 960), (1001, 1001), (5000, 1001)]
)
def test_the_longest_context(border, expected):
    assert longest_context(lambda tokens: tokens <= border, 1001) == expected


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_small_kv_types_are_planned_with_their_scales(config_only, kind):
    directory = config_only(**MISTRAL_7B)
    shape = dict(num_layers=32, num_kv_heads=8, head_dim=128, max_context=4096)
    row = rows_of(directory, devices.named("thor-128gb"), contexts=(4096,), kv_cache_type=kind, backend="cuda")
    assert row["fp16"].plan.item("kv_cache") == kv_cache_bytes(**shape, kv_cache_type=kind)
    assert row["fp16"].usable


@pytest.mark.parametrize(
    ("text", "count"), [("16GB", 16 * 10**9), ("14.5 GiB", int(14.5 * GIB)), ("2g", 2 * GIB), ("900MiB", 900 << 20)]
)
def test_memory_sizes(text, count):
    assert devices.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "16TB", "-1GB", "a lot"])
def test_what_is_no_memory_size_is_refused(text):
    with pytest.raises(ConfigurationError, match="memory size"):
        devices.parse_bytes(text)


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_says_what_fits_in_its_exit_status(config_only, capsys):
    directory = str(config_only(**LLAMA2_7B))
    assert cli.main(["plan", directory, "--device", "agx-orin-32gb"]) == 0
    assert cli.main(["plan", directory, "--device", "orin-nx-16gb"]) == 0
    text = capsys.readouterr().out
    assert "12.55" in text and "too large" in text and "2.00 GiB assumed" in text
    assert cli.main(["plan", directory, "--device", "orin-nx-16gb", "--quantization", "fp16", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["possible"] is False and re.search(r"--quantization \w+ fits", document["advice"][0])
    assert cli.main(["plan", directory, "--device", "orin-nx-16gb", "--quantization", "nvfp4"]) == 0
    assert cli.main(["plan", directory, "--memory", "40GB", "--quantization", "fp16", "--reserve", "30GB"]) == 1
    assert cli.main(["plan", directory, "--memory", "40GB", "--quantization", "fp16"]) == 0
    capsys.readouterr()
    assert cli.main(["plan", directory, "--device", "orin-9000"]) == 1
    assert "agx-orin-64gb" in capsys.readouterr().err


def test_the_command_on_engines_of_several_variants(demo_engines, capsys):
    directory = str(demo_engines)
    assert cli.main(["plan", directory, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["quantization"] for row in document["variants"]] == ["fp32", "int4", "int8"]
    limits = ["--memory", "20MB", "--quantization", "int8", "--backend", "onnxruntime"]
    assert cli.main(["plan", directory, *limits]) == 1
    assert "too large" in capsys.readouterr().out
    assert cli.main(["plan", directory, "--max-context", "1024"]) == 1
    assert "the engine was built for 512" in capsys.readouterr().out
    assert cli.main(["plan", directory, "--quantization", "fp16"]) == 1


@pytest.mark.parametrize("name", ["max_context", "max_batch", "head_rows"])
@pytest.mark.parametrize("value", [-1, -(2**63), 2**31, 2**63, 10**30])
def test_a_size_that_no_engine_can_have_is_refused(name, value):
    with pytest.raises(ConfigurationError, match=f"{name} is {value}, expected"):
        Size(**{"max_context": 64, name: value})
    Size(2**31 - 1, 2**31 - 1, head_rows=2**31 - 1)


def test_an_offer_for_a_context_below_one_is_refused():
    with pytest.raises(ConfigurationError, match="max_context is -1, expected 1 to"):
        recommend.offers(devices.named("orin-nano-8gb"), max_context=-1)
