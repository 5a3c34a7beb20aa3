"""``plan``, ``build``, ``inspect``, ``doctor`` and configuring agree on what a backend runs, and say the same sentence.

Each asks ``engine_core.backends.capabilities``; here every backend × family × weight format × KV cache type is put to
all of them.
"""

from __future__ import annotations

import pytest

import fake_tensorrt
import sample_checkpoints
from engine_core import cli
from engine_core.backends.capabilities import all_kv_cache_types, capabilities_of
from engine_core.backends.machine import Machine
from engine_core.backends.registry import backend_names
from engine_core.backends.tensorrt import build as tensorrt_build
from engine_core.backends.tensorrt.api import TensorRT
from engine_core.backends.toolkit import BuildRequest, Size, toolkit_of
from engine_core.config import KV_CACHE_TYPES, QUANTIZATIONS, EngineConfig
from engine_core.cuda.gpu_info import GpuInfo, GpuReport
from engine_core.errors import BuildError, ConfigurationError, EdgeLLMError, UnsupportedModelError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.detect import conversion_refusal, quantization_of
from engine_core.formats.weight_formats import NAMES
from engine_core.models.shapes import read_shapes
from engine_core.planning import devices, doctor
from engine_core.planning.describe import describe_checkpoint
from engine_core.planning.estimates import CheckpointEstimate
from engine_core.planning.plan import Asked, plan_checkpoint
from engine_core.quantize import quantize_checkpoint
from fake_gpu import FakeDriver, install

CONTEXT = 128
# A GPU that lacks no number type, so that only the backends' own reasons are left; and an Orin, which lacks two.
THOR, ORIN = devices.named("thor-128gb"), devices.named("agx-orin-64gb")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(architecture, whether it is quantized) → directory; written once."""
    written = {}

    def get(architecture: str, quantized: bool = False):
        key = (architecture, quantized)
        if key not in written:
            directory = tmp_path_factory.mktemp("checkpoint")
            if quantized:
                quantize_checkpoint(get(architecture), directory / "int4", method="int4", report=lambda line: None)
                written[key] = directory / "int4"
            else:
                written[key] = sample_checkpoints.write(directory / architecture, architecture)
        return written[key]

    return get


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Builds for any backend, for tensorrt with a stand-in on a GPU that is not there."""
    driver = FakeDriver(memory=4 << 30)
    install(monkeypatch, driver)
    monkeypatch.setattr(tensorrt_build, "TensorRT", lambda: TensorRT(fake_tensorrt.make("8.6.0", driver)))

    def run(backend: str, checkpoint, weight_format: str, kv_cache_type: str = "auto"):
        out = tmp_path / "engines" / f"{backend}-{weight_format}-{kv_cache_type}"
        request = BuildRequest(checkpoint, out, weight_format, max_context=CONTEXT, kv_cache_type=kv_cache_type)
        return toolkit_of(backend).build(request, lambda line: None), out

    return run


def machine_of(device) -> Machine:
    gpu = GpuInfo(device.title, device.capability, device.num_sms, device.total, True)
    return Machine({name: "13.0" for name in doctor.PACKAGES}, GpuReport((gpu,), "13.0"))


@pytest.mark.parametrize("backend", backend_names())
def test_backends_without_drafts_refuse_speculation_only_where_it_is_asked_for(backend):
    able = capabilities_of(backend)
    refusals = {each: able.options_refusal(1, (), each) for each in ("auto", "off", "on")}
    assert refusals["auto"] is None and refusals["off"] is None
    assert (refusals["on"] is None) == able.drafts == (backend != "tensorrt")
    if refusals["on"]:
        assert refusals["on"] == (
            f"speculation is 'on', but the {backend} backend takes no drafts; set it to auto or use the backend "
            "cuda or onnxruntime."
        )


@pytest.mark.parametrize("architecture", sample_checkpoints.ARCHITECTURES)
@pytest.mark.parametrize("backend", backend_names())
def test_what_one_refuses_all_refuse_in_the_same_words(backend, architecture, checkpoints, build):
    """Of an architecture that is much like another one, one engine is built for each backend instead of all."""
    capabilities = capabilities_of(backend)
    _, spec = read_shapes(checkpoints(architecture))
    built = NAMES if architecture in sample_checkpoints.DISTINCT else capabilities.weight_formats[:1]
    for weight_format in NAMES:
        checkpoint = checkpoints(architecture, quantized=weight_format == "int4_awq")
        engine = None
        for kv in ("auto", *all_kv_cache_types()):
            refused = capabilities.build_refusal(spec, weight_format, kv, max_context=CONTEXT)
            if refused is not None:
                with pytest.raises((BuildError, UnsupportedModelError)) as raised:
                    build(backend, checkpoint, weight_format, kv)
                assert str(raised.value) == refused
            elif engine is None and weight_format in built:
                engine = build(backend, checkpoint, weight_format)
                assert engine[0].kv_cache_type == capabilities.kv_cache_types_for(spec, weight_format, CONTEXT)[0]
            if engine is not None:
                assert_configuring_agrees(backend, spec, *engine, kv)


def assert_configuring_agrees(backend, spec, manifest, directory, kv):
    """The engine opens with the KV cache types it has; a type that no engine of the backend has is refused as such."""
    capabilities = capabilities_of(backend)
    expected = capabilities.refusal(spec, manifest.quantization, kv, max_context=CONTEXT)
    try:
        toolkit_of(backend).engine_bytes(directory, manifest, EngineConfig(directory, kv_cache_type=kv), 16)
    except EdgeLLMError as error:
        # What this engine was not built for is another matter: int8 without text to calibrate, gemm or plain.
        if expected is None:
            assert isinstance(error, ConfigurationError) and "this engine was built for" in str(error)
        else:
            assert str(error) == expected
    else:
        assert expected is None


@pytest.mark.parametrize(
    ("architecture", "device"),
    [
        pytest.param(architecture, device, id=f"{architecture}-{device.name}")
        for architecture in sample_checkpoints.ARCHITECTURES
        for device in ((THOR, ORIN) if architecture in sample_checkpoints.DISTINCT else (ORIN,))
    ],
)
def test_plans_say_what_builds_say(architecture, device, checkpoints):
    estimate = CheckpointEstimate(checkpoints(architecture))
    for backend in backend_names():
        capabilities = capabilities_of(backend)
        for kv in ("", *all_kv_cache_types()):
            asked = Asked(contexts=(CONTEXT,), kv_cache_type=kv, backend=backend)
            rows = {row.quantization: row for row in plan_checkpoint(estimate, device, asked)}
            assert set(rows) == set(capabilities.planned_formats) >= set(capabilities.weight_formats)
            for weight_format, row in rows.items():
                sizes = dict(max_context=CONTEXT, capability=device.capability)
                assert row.why_not == (capabilities.refusal(estimate.spec, weight_format, kv, **sizes) or "")
                assert row.plan is not None
        for weight_format in set(NAMES) - set(capabilities.planned_formats):
            assert capabilities.format_refusal(weight_format) is not None


@pytest.mark.parametrize("architecture", sample_checkpoints.ARCHITECTURES)
@pytest.mark.parametrize("quantized", [False, True])
def test_inspect_lists_what_can_be_built_and_run(architecture, quantized, checkpoints):
    directory = checkpoints(architecture, quantized)
    found = describe_checkpoint(directory)
    assert found["supported"]
    checkpoint = Checkpoint(directory)
    _, spec = read_shapes(directory)
    stored = quantization_of(checkpoint, spec)
    assert stored == ("int4" if quantized else "")
    for backend in backend_names():
        capabilities = capabilities_of(backend)
        for weight_format in capabilities.planned_formats:
            reason = capabilities.refusal(spec, weight_format) or conversion_refusal(weight_format, stored)
            assert (weight_format in found["backends"][backend]) == (reason is None)
            if reason is not None:
                model_reason = capabilities.model_refusal(spec)
                name = f"{backend} {weight_format}" if model_reason is None else backend
                assert found["why_not"][name] == (model_reason or reason)
                continue
            for kv in all_kv_cache_types():
                listed = kv in found["kv_cache_types"][backend][weight_format]
                assert listed == (capabilities.refusal(spec, weight_format, kv) is None)


@pytest.mark.parametrize("device", [THOR, ORIN], ids=lambda device: device.name)
def test_doctor_says_what_holds_for_every_model(device):
    checks = {(check.backend, check.quantization): check for check in doctor.check_backends(machine_of(device))}
    for backend in backend_names():
        capabilities = capabilities_of(backend)
        assert {kind for name, kind in checks if name == backend} == set(capabilities.planned_formats)
        missing = capabilities.missing(machine_of(device))
        for weight_format in capabilities.planned_formats:
            check = checks[backend, weight_format]
            reason = capabilities.refusal(None, weight_format, capability=device.capability)
            assert check.why_not == (reason or (missing.reason if missing else ""))
            for kv in all_kv_cache_types():
                refused = capabilities.kv_cache_refusal(None, weight_format, kv)
                assert (kv in check.kv_cache_types) == (refused is None)


def test_what_the_backends_run_today(checkpoints):
    """A few facts as they are, so that the agreement above is not one on nothing."""
    specs = {name: read_shapes(checkpoints(name))[1] for name in sample_checkpoints.ARCHITECTURES}

    def runs(backend, architecture, *variant):
        return capabilities_of(backend).refusal(specs[architecture], *variant, max_context=CONTEXT) is None

    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert all(runs("cuda", name, kind, "int8") for kind in ("fp16", "int8", "int4", "int4_awq"))
        assert runs("tensorrt", name, "fp16", "int8") and not runs("tensorrt", name, "fp32", "int8")
    for name in ("Gemma2ForCausalLM", "Gemma3ForCausalLM"):
        assert runs("tensorrt", name, "fp16", "fp16") and not runs("tensorrt", name, "fp16", "int8")
    assert not runs("tensorrt", "Qwen3MoeForCausalLM", "fp16")
    for name, spec in specs.items():
        plain = spec.vision is None and not any(layer.conv_kernel for layer in spec.layers)
        on_cuda = spec.vision is None or not spec.mrope
        assert on_cuda == all(runs("cuda", name, kind, "int8") for kind in ("fp16", "int8", "int4", "fp8", "nvfp4"))
        assert (plain and not spec.num_experts) == runs("tensorrt", name, "fp16")
        assert all(runs("onnxruntime", name, kind, "int8") for kind in ("fp32", "int8", "int4", "int4_awq"))
        assert not runs("onnxruntime", name, "fp8") and not runs("onnxruntime", name, "fp16")
    assert capabilities_of("tensorrt").model_refusal(specs["SmolVLMForConditionalGeneration"]) == (
        "SmolVLMForConditionalGeneration has a vision encoder, which the tensorrt backend does not run; use the "
        "backend cuda or onnxruntime."
    )
    assert ("auto", *NAMES) == QUANTIZATIONS and set(KV_CACHE_TYPES[1:]) == {
        "fp32",
        "fp16",
        "int8",
        "fp8",
    }


@pytest.mark.parametrize("backend", ["cuda", "onnxruntime"])
@pytest.mark.parametrize("sizes", [dict(hidden_size=72, vocab_size=257), dict(hidden_size=90, intermediate_size=150)])
def test_a_model_of_odd_sizes_is_built_and_planned(tmp_path, build, backend, sizes):
    directory = sample_checkpoints.write(tmp_path / "odd", "LlamaForCausalLM", head_dim=20, **sizes)
    estimate, capabilities = CheckpointEstimate(directory), capabilities_of(backend)
    for weight_format in set(capabilities.weight_formats) - {"int4_awq"}:
        assert estimate.why_not(weight_format, backend, Size(CONTEXT), THOR) == ""
        manifest, out = build(backend, directory, weight_format)
        taken = toolkit_of(backend).engine_bytes(out, manifest, EngineConfig(out), 16)
        planned = estimate.plan_items(weight_format, backend, Size(CONTEXT), 16)
        assert planned["kv_cache"] == taken["kv_cache"] > 2 * 2 * 20 * CONTEXT * 2  # heads are filled up


@pytest.mark.parametrize("backend", backend_names())
def test_the_commands_print_the_sentence(backend, checkpoints, tmp_path, capsys):
    capabilities, checkpoint = capabilities_of(backend), str(checkpoints("LlamaForCausalLM"))
    for weight_format in NAMES:
        plan = ["plan", checkpoint, "--backend", backend, "--quantization", weight_format, "--max-context", "128"]
        status = cli.main([*plan, "--memory", "16GB"])
        planned = capsys.readouterr()
        reason = capabilities.refusal(read_shapes(checkpoint)[1], weight_format, max_context=CONTEXT)
        assert status == (reason is not None)
        assert reason is None or reason in planned.out + planned.err
        if (refused := capabilities.format_refusal(weight_format)) is not None:
            build = ["build", checkpoint, str(tmp_path / "engine"), "--backend", backend]
            assert cli.main([*build, "--quantization", weight_format]) == 1
            assert refused in capsys.readouterr().err
