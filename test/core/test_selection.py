"""``backend: auto``: the fastest variant that is there, runs here and fits; with the reason against each other one."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

import fake_gpu
from engine_core.backends import registry
from engine_core.backends.tensorrt import backend as tensorrt
from engine_core.config import EngineConfig
from engine_core.errors import (
    BackendUnavailableError,
    ConfigurationError,
    EngineDirectoryError,
    InsufficientMemoryError,
    IntegrityError,
)
from engine_core.formats.manifest import Manifest, list_variants, seal, write_variant
from engine_core.memory import MemoryItem, MemoryPlan
from engine_core.planning.selection import choose
from engine_core.serving.engine import Engine
from fakes import END, EOS, ScriptedBackend, fake_model, write_tokenizer

MANIFEST = Manifest("fake", fake_model(), "onnxruntime", "fp32", "fp32", 512, 1, (EOS, END))


class _Fake(ScriptedBackend):
    """Needs what the manifest's options say: ``bytes`` of 1000, ``missing`` (why it is unavailable), ``elsewhere``."""

    @classmethod
    def check_here(cls, manifest) -> None:
        if "elsewhere" in manifest.options:
            raise EngineDirectoryError(manifest.options["elsewhere"])

    @classmethod
    def plan(cls, directory, manifest, config) -> MemoryPlan:
        if "missing" in manifest.options:
            raise BackendUnavailableError(manifest.options["missing"])
        return MemoryPlan((MemoryItem("weights", manifest.options.get("bytes", 10)),), 1000, f"a {manifest.backend}")

    @classmethod
    def load(cls, directory, manifest, config, *, progress=None) -> ScriptedBackend:
        return cls(max_context=config.max_context)


class CudaFake(_Fake):
    pass


@pytest.fixture(autouse=True)
def fake_backends(monkeypatch):
    module = __name__
    for name in ("cuda", "tensorrt", "onnxruntime"):
        monkeypatch.setitem(registry.BACKENDS, name, (module, "CudaFake" if name == "cuda" else "_Fake"))


@pytest.fixture
def engine_dir(tmp_path):
    """Writes variants: (backend, quantization, options)."""

    def write(*variants):
        for backend, quantization, options in variants:
            with write_variant(tmp_path / "engine" / f"{backend}_{quantization}") as temporary:
                write_tokenizer(temporary)
                changes = dict(backend=backend, quantization=quantization, options=options)
                seal(temporary, dataclasses.replace(MANIFEST, **changes))
        return tmp_path / "engine"

    return write


ALL = (("cuda", "fp16", {}), ("onnxruntime", "int8", {}), ("tensorrt", "fp16", {}), ("cuda", "int4", {}))


def chosen(directory, **config) -> tuple[str, str, str]:
    choice = choose(EngineConfig(directory, **config))
    assert choice.backend is (CudaFake if choice.manifest.backend == "cuda" else _Fake)
    assert choice.config.quantization == choice.manifest.quantization and choice.config.max_context == 512
    return choice.manifest.backend, choice.manifest.quantization, choice.reason


def test_the_fastest_backend_and_its_smallest_weights_come_first(engine_dir):
    backend, quantization, reason = chosen(engine_dir(*ALL))
    assert (backend, quantization) == ("cuda", "int4")
    assert reason == (
        "cuda int4 is the fastest of 4 variants that runs here and fits; "
        "expected to be slower: cuda fp16, tensorrt fp16, onnxruntime int8."
    )


def test_parameters_narrow_the_choice(engine_dir):
    directory = engine_dir(*ALL)
    assert chosen(directory, quantization="fp16")[:2] == ("cuda", "fp16")
    assert chosen(directory, backend="tensorrt")[:2] == ("tensorrt", "fp16")
    backend, quantization, reason = chosen(directory, backend="onnxruntime")
    assert (backend, quantization) == ("onnxruntime", "int8") and "backend onnxruntime, which the parameters" in reason
    assert "fp16 (tensorrt)" in list_variants(directory)  # of two with one quantization, neither is lost


def test_what_does_not_run_here_or_fit_is_passed_over_with_its_reason(engine_dir):
    directory = engine_dir(
        ("cuda", "int4", dict(missing="No NVIDIA GPU can be used here.")),
        ("tensorrt", "fp16", dict(elsewhere="The plan was built for sm_87, but this GPU is sm_90.")),
        ("onnxruntime", "int8", dict(bytes=2000)),
        ("onnxruntime", "fp32", {}),
    )
    backend, quantization, reason = chosen(directory)
    assert (backend, quantization) == ("onnxruntime", "fp32")
    for words in (
        "not cuda int4: No NVIDIA GPU can be used here;",
        "not tensorrt fp16: The plan was built for sm_87, but this GPU is sm_90;",
        "not onnxruntime int8: The engine needs 1.95 KiB",
    ):
        assert words in reason


def test_when_none_runs_every_reason_is_given(engine_dir):
    directory = engine_dir(("cuda", "int4", dict(missing="No GPU.")), ("onnxruntime", "fp32", dict(bytes=3000)))
    with pytest.raises(BackendUnavailableError, match="None of the 2 .*cuda int4: No GPU; onnxruntime fp32: The"):
        choose(EngineConfig(directory))


def test_a_single_variant_keeps_its_own_error(engine_dir):
    directory = engine_dir(("cuda", "int4", dict(bytes=3000)))
    assert "built for cuda, in int4 alone" in chosen(directory)[2]
    with pytest.raises(InsufficientMemoryError, match="a cuda has"):
        Engine.open(EngineConfig(directory))


def test_what_is_not_there_is_named(engine_dir):
    directory = engine_dir(*ALL[:2])
    with pytest.raises(BackendUnavailableError, match="built for cuda and onnxruntime, not for tensorrt"):
        choose(EngineConfig(directory, backend="tensorrt"))
    with pytest.raises(EngineDirectoryError, match="no variant 'fp8'; it has fp16, int8"):
        choose(EngineConfig(directory, quantization="fp8"))
    with pytest.raises(ConfigurationError, match="cuda fp16: max_context is 513, but"):
        choose(EngineConfig(directory, max_context=513))


def test_damage_is_not_hidden_by_another_variant(engine_dir):
    directory = engine_dir(*ALL)
    path = directory / "cuda_int4" / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(IntegrityError, match="SHA-256"):
        choose(EngineConfig(directory))
    assert chosen(directory, verify_files=False)[:2] == ("cuda", "int4")


def test_the_engine_says_why_before_its_plan(engine_dir):
    lines = []
    engine = Engine.open(EngineConfig(engine_dir(*ALL)), lines.append)
    assert engine.backend_name == "cuda" and lines[0] == engine.backend_reason and "Memory plan" in lines[1]
    engine.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(gpu_arch="sm_87"), "built for sm_87, but Fake GPU is sm_90"),
        (dict(builder={"tensorrt": "8.6.0"}), "built by TensorRT 8.6.0, but this machine has 10.3.0"),
    ],
)
def test_a_tensorrt_plan_of_another_machine_is_found_before_it_is_loaded(monkeypatch, changes, words):
    fake_gpu.install(monkeypatch, fake_gpu.FakeDriver())
    monkeypatch.setattr(tensorrt, "TensorRT", lambda: SimpleNamespace(version="10.3.0"))
    own = dataclasses.replace(MANIFEST, backend="tensorrt", gpu_arch="sm_90", builder={"tensorrt": "10.3.0"})
    tensorrt.TensorRTBackend.check_here(own)
    with pytest.raises(EngineDirectoryError, match=words):
        tensorrt.TensorRTBackend.check_here(dataclasses.replace(own, **changes))
