"""``edgellm recommend``: the table of known models, the variant for a device, the rate and the mark."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from engine_core import cli
from engine_core.backends.capabilities import capabilities_of
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.backends.toolkit import Size
from engine_core.config import EngineConfig
from engine_core.errors import ConfigurationError
from engine_core.formats.manifest import read_manifest
from engine_core.host_memory import memory_bandwidth
from engine_core.hub.known_models import find_known, known_models
from engine_core.measure.bench import step_bytes
from engine_core.models.families import FAMILIES
from engine_core.planning import devices, recommend
from engine_core.planning.estimates import CheckpointEstimate
from engine_core.planning.plan import plan_engine

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
GIB = 2**30
# As the public model cards say.
PARAMETERS = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-2-2b-it": 2_614_341_888,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": 256_484_928,
    "HuggingFaceTB/SmolVLM-500M-Instruct": 507_482_304,
}


# --- the table --------------------------------------------------------------------------------------------


def test_the_sizes_are_those_of_the_model_cards():
    assert {name: find_known(name).spec.num_parameters for name in PARAMETERS} == PARAMETERS


def test_every_model_is_of_a_family_and_most_families_have_one():
    found = {model.spec.architecture for model in known_models()}
    without = "Mistral SmolLM3 Olmo2 Granite Exaone Exaone4 Ministral Ministral3 Qwen3Moe Lfm2".split()
    blind = {family.architecture for family in FAMILIES if not family.text_type}
    assert blind - found == {f"{name}ForCausalLM" for name in without}


@pytest.mark.parametrize("model", known_models(), ids=lambda model: model.name)
def test_an_entry_is_whole(model):
    assert re.fullmatch(r"[0-9a-f]{40}", model.revision) and re.fullmatch(r"[\w-]+/[\w.-]+", model.id)
    assert model.licence and model.template and 1024 <= model.context <= model.spec.max_position
    assert find_known(model.name) is find_known(model.id.upper()) is model


# --- variants ---------------------------------------------------------------------------------------------


def test_the_memory_is_that_of_the_planner_and_a_step_reads_what_the_engine_reads(tmp_path):
    build_engine(DEMO, tmp_path, quantization="int8", max_context=512)
    (row,) = plan_engine(tmp_path, EngineConfig(engine_dir=tmp_path, max_context=512), None)
    estimate = CheckpointEstimate.of_config(json.loads((DEMO / "config.json").read_text()), "demo")
    device = devices.of_memory(GIB, gpu=False)
    variant = recommend.choose_variant(estimate, device, 512, "int8")
    assert variant.plan.item("weights") == pytest.approx(row.plan.item("weights"), rel=0.01)
    assert variant.plan.item("kv_cache") == row.plan.item("kv_cache")
    manifest = read_manifest(tmp_path)
    read = step_bytes(manifest, row.plan, EngineConfig(engine_dir=tmp_path), manifest.model.vocab_size)
    found = estimate.step_bytes("int8", "onnxruntime", Size(512), device)
    assert found == pytest.approx(read, rel=0.01)
    assert estimate.step_bytes("int8", "onnxruntime", Size(512), device, kv_tokens=512) == (
        found + variant.plan.item("kv_cache")
    )


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_step_of_the_gpu_reads_the_weights_without_the_lookup(kind):
    """An embedding of its own is looked up, not read; a tied one is the head, too."""
    device = devices.named("agx-orin-64gb")
    for name in ("qwen3-0.6b", "qwen3-8b"):
        model = find_known(name)
        estimate = CheckpointEstimate.of_config(model.config, name)
        weights = estimate.plan(kind, "cuda", Size(4096), device).item("weights")
        lookup = 2 * model.spec.vocab_size * model.spec.hidden_size
        read = estimate.step_bytes(kind, "cuda", Size(4096), device)
        assert read == pytest.approx(weights - lookup, rel=0.02)


@pytest.mark.parametrize("backend, kind", [("cuda", "fp16"), ("cuda", "int4"), ("onnxruntime", "int8")])
def test_a_step_reads_the_experts_of_one_token(backend, kind):
    """Experts beyond those that a token is given add their rows of the router alone."""
    config = dict(
        architectures=["Qwen3MoeForCausalLM"], num_hidden_layers=2, hidden_size=256, moe_intermediate_size=256,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=512, num_experts_per_tok=2,
    )  # fmt: skip
    device = devices.named("agx-orin-64gb")
    few, many = (CheckpointEstimate.of_config(config | {"num_experts": count}, "moe") for count in (2, 64))
    read = [estimate.step_bytes(kind, backend, Size(256), device) for estimate in (few, many)]
    routers = 2 * (64 - 2) * 256 * (4 if backend == "onnxruntime" else 2)
    assert read[1] - read[0] == pytest.approx(routers, abs=0.01 * read[0])
    planned = [estimate.plan(kind, backend, Size(256), device).item("weights") for estimate in (few, many)]
    assert planned[1] > 8 * planned[0]


def test_int8_is_taken_unless_it_is_slow_or_too_large():
    model = find_known("qwen3-1.7b")
    estimate = CheckpointEstimate.of_config(model.config, model.name)

    def chosen(memory: int, gb_per_second: float) -> recommend.Variant:
        device = devices.with_bandwidth(devices.of_memory(memory, gpu=True), gb_per_second)
        return recommend.choose_variant(estimate, device, 4096)

    assert (chosen(16 * GIB, 100).quantization, chosen(16 * GIB, 100).is_fluent) == ("int8", True)
    assert (chosen(16 * GIB, 50).quantization, chosen(16 * GIB, 50).is_fluent) == ("int4", True)
    assert chosen(5 * GIB // 2, 100).quantization == "int4"
    assert (chosen(16 * GIB, 5).usable, chosen(16 * GIB, 5).is_fluent) == (True, False)
    assert not chosen(GIB, 100).usable
    twice = chosen(16 * GIB, 200).tokens_per_second / chosen(16 * GIB, 100).tokens_per_second
    assert twice == pytest.approx(2)


def test_a_model_that_no_kernel_of_the_gpu_runs_says_why():
    model = find_known("gemma-3-1b-it")
    estimate = CheckpointEstimate.of_config({**model.config, "head_dim": 320}, model.name)
    variant = recommend.choose_variant(estimate, devices.named("orin-nx-16gb"), 4096)
    assert variant.fits and not variant.usable and "a head size above 256" in variant.why_not


def test_a_variant_that_needs_calibration_is_refused():
    with pytest.raises(ConfigurationError, match="needs calibration texts"):
        recommend.check_rounded("int4_awq")
    for kind in ("int8", "int4", "fp16", "fp8"):
        recommend.check_rounded(kind)


# --- the mark ---------------------------------------------------------------------------------------------


def offer(name: str, rate: float, fits: bool = True, **changes) -> recommend.Offer:
    model = dataclasses.replace(find_known(name), **changes)
    device = devices.of_memory(64 * GIB if fits else 1, gpu=True)
    estimate = CheckpointEstimate.of_config(model.config, name)
    variant = recommend.choose_variant(estimate, device, 512)
    return recommend.Offer(model, dataclasses.replace(variant, tokens_per_second=rate))


def test_the_largest_fluent_model_is_marked():
    small, large, slow = offer("qwen3-0.6b", 90), offer("qwen3-4b-instruct-2507", 30), offer("qwen3-8b", 9)
    assert recommend.best_of([slow, large, small]) is large
    assert recommend.best_of([slow, offer("qwen3-4b", 30), large, small]) is large  # of its size, it answers at once
    assert recommend.best_of([slow]) is slow
    closed = offer("llama-3.2-3b-instruct", 40)
    assert recommend.best_of([closed, small]) is small
    assert recommend.best_of([closed, offer("qwen3-8b", 30, fits=False)]) is None
    assert recommend.best_of([]) is None


def test_devices_with_more_memory_get_larger_models():
    sizes = []
    for name in ("orin-nano-8gb", "orin-nx-16gb", "agx-orin-64gb"):
        best = recommend.best_of(recommend.offers(devices.named(name), "tools"))
        assert best.model.tools and best.variant.usable and best.variant.is_fluent
        sizes.append(best.model.spec.num_parameters)
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@pytest.mark.parametrize("device", [devices.named("orin-nx-16gb"), devices.of_memory(8 * GIB, gpu=False)])
def test_models_that_see_are_for_vision_alone(device):
    seeing = recommend.offers(device, "vision")
    assert seeing and all(offer.model.spec.vision is not None for offer in seeing)
    for offer in seeing:
        on_gpu = device.has_gpu and capabilities_of("cuda").model_refusal(offer.model.spec) is None
        assert offer.variant.backend == ("cuda" if on_gpu else "onnxruntime") and offer.variant.plan.item("images")
        assert recommend.is_for_cpu(offer.variant, device) == (device.has_gpu and not on_gpu)
    assert recommend.best_of(seeing).variant.usable
    for_cpu = any(recommend.is_for_cpu(offer.variant, device) for offer in seeing)
    assert any("on CPU" in note for note in recommend.notes(device, seeing)) == for_cpu
    others = {offer.model.id for task in ("chat", "tools") for offer in recommend.offers(device, task)}
    assert others == {model.id for model in known_models()} - {offer.model.id for offer in seeing}


def test_a_gpu_with_memory_of_its_own_leaves_models_that_it_does_not_run_to_this_cpu(monkeypatch):
    measured = []
    cpu = dataclasses.replace(devices.of_memory(8 * GIB, gpu=False), bandwidth=40e9)
    monkeypatch.setattr(devices, "this_cpu", lambda measure: measured.append(measure) or cpu)
    gpu = dataclasses.replace(devices.of_memory(2 * GIB, gpu=True), shared_memory=False, bandwidth=900e9)
    seeing = recommend.offers(gpu, "vision")
    for_cpu = [offer for offer in seeing if recommend.is_for_cpu(offer.variant, gpu)]
    assert measured == [True] and for_cpu and all(offer.variant.plan.available == 8 * GIB for offer in for_cpu)
    assert any("its bandwidth is measured" in note for note in recommend.notes(gpu, seeing))


# --- the command ------------------------------------------------------------------------------------------


def test_the_table_marks_one_model_and_names_the_command_that_gets_it(capsys):
    assert cli.main(["recommend", "--device", "orin-nx-16gb", "--task", "tools"]) == 0
    out = capsys.readouterr().out
    marked = [line.split()[1] for line in out.splitlines() if re.match(r"\*  \S", line)]
    assert len(marked) == 1 and f"edgellm get {marked[0]}" in out
    assert "102 GB/s" in out and "gated" in out and "smollm2" not in out


def test_json_has_the_same(capsys):
    arguments = ["recommend", "--memory", "8GiB", "--bandwidth", "68", "--json", "--max-context", "2048"]
    assert cli.main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["device"]["bandwidth"] == 68e9 and document["device"]["free"] == 8 * GIB
    entries = {entry["id"]: entry for entry in document["models"]}
    assert entries.keys() == {model.id for model in known_models() if model.does("chat")}
    assert all(entry["max_context"] == 2048 for entry in entries.values())
    best = entries[document["best"]]
    assert best["fits"] and best["total"] <= 8 * GIB and best["tokens_per_second"] >= recommend.FLUENT


def test_nothing_fits_and_wrong_options(capsys):
    assert cli.main(["recommend", "--memory", "10MiB"]) == 1
    out = capsys.readouterr().out
    assert "None of these models fits" in out and "give it with --bandwidth" in out
    assert cli.main(["recommend", "--device", "toaster"]) == 1
    with pytest.raises(SystemExit):
        cli.main(["recommend", "--bandwidth", "-3"])


# --- bandwidths -------------------------------------------------------------------------------------------


def test_the_bandwidth_of_a_gpu_is_its_drivers(driver):
    profile = devices.this_machine()
    assert profile.has_gpu and profile.bandwidth == 2 * 1e9 * 256 / 8  # 1 GHz, two transfers, 256 bits


def test_the_bandwidth_of_the_cpu_is_measured_when_asked():
    assert devices.this_cpu().bandwidth == 0
    assert 1e8 < memory_bandwidth(2, seconds=0.01, repeats=1) < 1e13
