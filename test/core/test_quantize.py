"""``edgellm quantize``: what is written, what reads it, what is built from it, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import resource
import signal

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnx")

import onnx

import checkpoints
import fakes
from engine_core import cli
from engine_core.backends.onnxruntime import build
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.backends.onnxruntime.exporter import Precision
from engine_core.backends.onnxruntime.plan import resolve
from engine_core.backends.onnxruntime.session import OrtSession
from engine_core.config import EngineConfig
from engine_core.errors import BackendUnavailableError, BuildError, CheckpointError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.manifest import read_manifest
from engine_core.formats.number_formats import unpack_nibbles
from engine_core.models.reader import read_spec
from engine_core.quantize import quantize_checkpoint

PROMPT = np.random.default_rng(3).integers(3, 259, size=20)
TEXT = "Bring the red cup from the kitchen, then wait. " * 40
CHAT = {"messages": [{"role": "user", "content": "Bring the red cup."}, {"role": "assistant", "content": "On my way!"}]}
# Sizes that groups of 32 divide.
SIZES = dict(hidden_size=128, intermediate_size=224, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A Llama with a tokenizer and calibration texts."""
    directory = checkpoints.write(tmp_path_factory.mktemp("original"), "llama3", dtype="bfloat16", **SIZES)
    fakes.write_tokenizer(directory)
    (directory / "calibration.jsonl").write_text(json.dumps(CHAT) + "\n" + json.dumps({"text": TEXT}) + "\n")
    return directory


@pytest.fixture(scope="module")
def quantized(original, tmp_path_factory):
    """Makes the checkpoint of a method and its options once, for tests that only read it."""

    @functools.cache
    def make(method, **options):
        out = tmp_path_factory.mktemp("quantized") / method
        if method.startswith("int4"):
            options["group_size"] = 32
        progress = []
        quantize_checkpoint(original, out, method=method, **options, progress=lambda *step: progress.append(step))
        assert progress == [(0, 3), (1, 3), (2, 3), (3, 3)]
        return out

    return make


def logits_of(engine_dir, manifest) -> np.ndarray:
    session = OrtSession(engine_dir, manifest.model, manifest.model.vocab_size, 64, 64, 1)
    session.prefill(PROMPT, 0)
    return session.logits[0].copy()


def initializers(engine_dir) -> dict:
    model = onnx.load(str(engine_dir / "model.onnx"))
    return {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}


def transformers_logits(directory) -> np.ndarray:
    """Return the logits of transformers' own model with the weights that we read."""
    import torch
    import transformers

    checkpoint = Checkpoint(directory)
    config = transformers.AutoConfig.from_pretrained(str(directory))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = getattr(transformers, config.architectures[0])._from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(checkpoint.read(name)))
    return checkpoints.reference_logits(model.eval(), PROMPT)[-1]


# Method → (quantization of the engine built from it, largest mean error of the logits).
METHODS = {
    "fp16": ("", 1e-2),
    "int8": ("int8", 0.05),
    "int8_smoothquant": ("int8", 0.05),
    "int4": ("int4", 0.5),
    "int4_awq": ("int4_awq", 0.5),
    "fp8": ("int8", 0.15),  # the CPU's operators have no small floats
    "nvfp4": ("int8", 0.6),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_checkpoint_near_the_original_that_is_built_as_itself(
    original, quantized, tmp_path, method
):
    quantization, tolerance = METHODS[method]
    out = quantized(method)
    assert (out / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()
    assert (out / "calibration.jsonl").is_file() and not (out / "model.safetensors.index.json").exists()
    exact = transformers_logits(original)
    error = np.abs(transformers_logits(out) - exact).mean() / exact.std()
    assert 0 < error < tolerance
    manifest = build_engine(out, tmp_path / "engine", max_context=64)
    assert manifest.quantization == (quantization or "fp32")
    assert bool(manifest.options["requantized"]) == (method in ("fp8", "nvfp4"))
    # Dequantized, whatever it is: how the quality of a type is measured that this machine does not run.
    manifest = build_engine(out, tmp_path / "fp32", quantization="fp32", max_context=64)
    np.testing.assert_allclose(logits_of(tmp_path / "fp32", manifest), transformers_logits(out), atol=2e-4)


@pytest.mark.parametrize("method", ["int8", "int8_smoothquant", "int4", "int4_awq", "fp8", "nvfp4"])
def test_transformers_reads_it_with_the_library_of_the_layout(quantized, method):
    pytest.importorskip("compressed_tensors")
    import torch
    import transformers

    out = quantized(method)
    config = transformers.CompressedTensorsConfig(run_compressed=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(out), dtype=torch.float32, quantization_config=config, attn_implementation="eager"
    )
    checkpoint = Checkpoint(out)
    name = "model.layers.1.mlp.down_proj"
    found = model.get_submodule(name).weight.detach().float().numpy()
    # The library multiplies in the type of the scales, bf16 here.
    np.testing.assert_allclose(found, checkpoint.read(f"{name}.weight"), rtol=2.0**-7, atol=1e-6)


@pytest.mark.parametrize(
    "method, symmetric",
    [("int8", True), ("int8_smoothquant", True), ("int4", True), ("int4", False), ("int4_awq", True)],
)
def test_the_engine_has_the_quantized_values_of_the_checkpoint(quantized, tmp_path, monkeypatch, method, symmetric):
    bits = 4 if method.startswith("int4") else 8
    out = quantized(method) if symmetric else quantized(method, symmetric=False)
    build_engine(out, tmp_path / "engine", max_context=64)
    tensors, checkpoint = initializers(tmp_path / "engine"), Checkpoint(out)
    for i, layer in enumerate(read_spec(checkpoint).layers):
        for name, linear in (("qkv", layer.qkv), ("output", layer.output), ("down", layer.down)):
            parts = [checkpoint.quantized(part) for part in linear.parts]
            values = np.concatenate([part.values for part in parts])
            stored = tensors[f"layer{i}/{name}.weight"]
            found = unpack_nibbles(stored, 32) if bits == 4 else stored
            np.testing.assert_array_equal(found.reshape(values.shape), values)
            scales = np.concatenate([part.regrouped(32).scales for part in parts])
            np.testing.assert_array_equal(tensors[f"layer{i}/{name}.scales"], scales)
            if not symmetric:
                zeros = np.concatenate([part.zeros for part in parts])
                found = unpack_nibbles(tensors[f"layer{i}/{name}.zeros"], zeros.shape[1])
                np.testing.assert_array_equal(found, zeros)
    # And with float activations the engine computes with just these weights.
    monkeypatch.setattr(build, "Precision", _float_activations)
    manifest = build_engine(out, tmp_path / "float", max_context=64)
    expected = transformers_logits(out)
    assert np.abs(logits_of(tmp_path / "float", manifest) - expected).mean() / expected.std() < 0.02  # int8 head


def _float_activations(*args, **kwargs) -> Precision:
    return Precision(*args, **kwargs, accuracy_level=1)


def test_levels_of_different_groups_and_of_channels_are_laid_side_by_side(original, tmp_path):
    """int8 by the row, of 224 columns, in blocks of 32 and of 128 that do not divide them."""
    quantize_checkpoint(original, tmp_path / "out", method="int8")
    checkpoint = Checkpoint(tmp_path / "out")
    for block in (32, 128):
        manifest = build_engine(tmp_path / "out", tmp_path / "engine", max_context=64, group_size=block)
        assert (manifest.quantization, manifest.group_size) == ("int8", block)
        own = checkpoint.quantized("model.layers.2.mlp.down_proj.weight")
        stored = initializers(tmp_path / "engine")["layer2/down.weight"].reshape(128, -1)
        np.testing.assert_array_equal(stored[:, :224], own.values)
        assert (stored[:, 224:] == 128).all()  # what fills the last block stands for 0
        exact = transformers_logits(original)
        assert np.abs(logits_of(tmp_path / "engine", manifest) - exact).mean() / exact.std() < 0.1


def test_awq_is_nearer_to_the_original_than_rounding_to_nearest(tmp_path):
    """With a few columns of large inputs, as trained models have them."""
    import torch
    from safetensors.torch import load_file, save_file

    directory = checkpoints.write(tmp_path / "original", "llama3", dtype="float32", **SIZES)
    fakes.write_tokenizer(directory)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[torch.arange(0, len(tensor), 19)] *= 12
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text(TEXT)
    exact = transformers_logits(directory)
    errors = {}
    for method in ("int4", "int4_awq"):
        text = {"calibration": tmp_path / "text.txt"} if method == "int4_awq" else {}
        quantize_checkpoint(directory, tmp_path / method, method=method, group_size=32, **text)
        errors[method] = np.abs(transformers_logits(tmp_path / method) - exact).mean() / exact.std()
    assert errors["int4_awq"] < 0.8 * errors["int4"], errors


@pytest.mark.parametrize(
    "backend, choices", [("onnxruntime", "fp32, int8, int4 and int4_awq"), ("tensorrt", "fp32 and fp16")]
)
@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_a_format_that_a_backend_lacks_is_refused_with_those_to_choose(
    original, quantized, tmp_path, kind, backend, choices, capsys
):
    """When asked for; and as what the checkpoint is, where the backend's own format would dequantize it."""
    command = ["--backend", backend, "--max-context", "64"]
    asked = [[original, "--quantization", kind], [quantized(kind), "--quantization", kind]]
    asked += [[quantized(kind)]] if backend == "tensorrt" else []
    for checkpoint, *options in asked:
        assert cli.main(["build", str(checkpoint), str(tmp_path / "engine"), *command, *options]) == 1
        assert f"The {backend} backend has no '{kind}' weights; it has {choices}." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_what_the_cpu_lacks_is_rounded_anew_to_int8(quantized, tmp_path, kind, capsys):
    """Unless another format is asked for. Both ways to build say so, and the manifest has what it costs."""
    notice = (
        f"The onnxruntime backend has no '{kind}' weights; it has fp32, int8, int4 and int4_awq. "
        "The weights are rounded anew to int8; --quantization chooses another."
    )
    lines: list[str] = []
    manifest = build_engine(quantized(kind), tmp_path / "engine", max_context=64, report=lines.append)
    assert manifest.quantization == "int8" and lines.count(notice) == 1
    check_rounded(manifest, lines)
    expected = transformers_logits(quantized(kind))
    assert np.abs(logits_of(tmp_path / "engine", manifest) - expected).mean() / expected.std() < 0.05
    assert cli.main(["build", str(quantized(kind)), str(tmp_path / "by_command"), "--max-context", "64"]) == 0
    assert capsys.readouterr().err.splitlines().count(notice) == 1
    assert read_manifest(tmp_path / "by_command").options == manifest.options


@pytest.mark.parametrize("asked, worst", [("int8", 0.02), ("int4", 0.2)])
@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_weights_rounded_anew_to_what_was_asked_for_are_told_and_recorded(quantized, tmp_path, kind, asked, worst):
    lines: list[str] = []
    options = dict(quantization=asked, max_context=64, report=lines.append)
    manifest = build_engine(quantized(kind), tmp_path / "engine", **options)
    assert manifest.quantization == asked and not any("--quantization" in line for line in lines)
    check_rounded(manifest, lines)
    assert max(manifest.options["rounding_errors"].values()) < worst


def check_rounded(manifest, lines) -> None:
    assert manifest.options["requantized"] == len(manifest.options["rounding_errors"]) == 4 * manifest.model.num_layers
    (note,) = [line for line in lines if f"dequantized and rounded anew to {manifest.quantization}" in line]
    assert note in manifest.notes


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_an_engine_with_weights_that_the_cpu_lacks_is_refused_in_one_sentence(original, tmp_path, kind):
    manifest = build_engine(original, tmp_path / "engine", quantization="fp32", max_context=64)
    manifest = dataclasses.replace(manifest, quantization=kind)
    with pytest.raises(BackendUnavailableError, match=f"onnxruntime backend has no '{kind}' weights"):
        resolve(tmp_path / "engine", manifest, EngineConfig(tmp_path / "engine"))


def test_a_head_of_its_own_is_quantized_when_asked_for(original, tmp_path):
    quantize_checkpoint(original, tmp_path / "plain", method="int8")
    assert Checkpoint(tmp_path / "plain").stored("lm_head.weight") is None
    quantize_checkpoint(original, tmp_path / "head", method="int8", head=True)
    checkpoint = Checkpoint(tmp_path / "head")
    assert checkpoint.stored("lm_head.weight").format.name == "int8"
    assert checkpoint.config["quantization_config"]["ignore"] == []
    exact, found = Checkpoint(original).read("lm_head.weight"), checkpoint.read("lm_head.weight")
    assert 0 < np.abs(found - exact).max() < np.abs(exact).max() / 100


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "int5"}, "no method 'int5'"),
        ({"method": "int4", "group_size": 48}, "48, expected one of 32, 64, 128"),
        ({"method": "int4", "group_size": 64}, "224 columns, which are not a multiple of the group of 64; choose 32"),
        ({"method": "fp8", "group_size": 32}, "no group size"),
        ({"method": "int8", "symmetric": False}, "no zero points"),
        ({"method": "int4", "group_size": 32, "calibration": "nowhere.txt"}, "int4 is not calibrated"),
        ({"method": "int4_awq", "group_size": 32, "calibration": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"method": "fp16", "head": True}, "quantizes nothing"),
    ],
)
def test_what_makes_no_checkpoint_is_refused_and_nothing_is_left(original, tmp_path, options, message):
    with pytest.raises(BuildError, match=message):
        quantize_checkpoint(original, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_texts_are_asked_for_where_none_are_there_and_refused_where_they_are_none(tmp_path):
    directory = checkpoints.write(tmp_path / "plain", "llama-tied-bias", **SIZES)
    with pytest.raises(BuildError, match="give a text file or JSONL chats with --calibration"):
        quantize_checkpoint(directory, tmp_path / "out", method="int4_awq", group_size=32)
    with pytest.raises(BuildError, match="head is its embedding"):
        quantize_checkpoint(directory, tmp_path / "out", method="int8", head=True)
    fakes.write_tokenizer(directory)
    for name, text in (("a.jsonl", "{"), ("b.jsonl", '{"prompt": "x"}'), ("c.txt", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(BuildError, match=name):
            quantize_checkpoint(
                directory, tmp_path / "out", method="int4_awq", group_size=32, calibration=tmp_path / name
            )
    assert not (tmp_path / "out").exists()


def test_what_is_quantized_already_is_only_dequantized(original, tmp_path):
    quantize_checkpoint(original, tmp_path / "int8", method="int8")
    with pytest.raises(BuildError, match="quantized already"):
        quantize_checkpoint(tmp_path / "int8", tmp_path / "out", method="int4", group_size=32)
    quantize_checkpoint(tmp_path / "int8", tmp_path / "out", method="fp16")
    name = "model.layers.0.mlp.up_proj.weight"
    plain = Checkpoint(tmp_path / "out")
    assert not plain.is_quantized and "quantization_config" not in plain.config
    np.testing.assert_allclose(plain.read(name), Checkpoint(tmp_path / "int8").read(name), rtol=2.0**-10)
    with pytest.raises(BuildError, match="int4_awq takes the quantized values"):
        build_engine(tmp_path / "out", tmp_path / "engine", quantization="int4_awq")
    assert build_engine(tmp_path / "int8", tmp_path / "engine", quantization="int4").quantization == "int4"


def test_weights_that_are_not_finite_are_refused(original, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(original / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    (tmp_path / "bad").mkdir()
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    (tmp_path / "bad" / "config.json").write_bytes((original / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        quantize_checkpoint(tmp_path / "bad", tmp_path / "out", method="int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_a_full_disk_leaves_nothing_and_the_old_checkpoint_as_it_was(original, tmp_path):
    quantize_checkpoint(original, tmp_path / "out", method="int4", group_size=32)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails with EFBIG instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(BuildError, match="nothing was left behind"):
            quantize_checkpoint(original, tmp_path / "out", method="int8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    quantize_checkpoint(original, tmp_path / "out", method="fp8")  # one of ours is replaced
    assert Checkpoint(tmp_path / "out").config["edgellm_quantization"]["method"] == "fp8"
    with pytest.raises(BuildError, match="not a checkpoint of 'edgellm quantize'"):
        quantize_checkpoint(original, original, method="fp8")


def test_the_command_line(original, tmp_path, capsys):
    out, engine = str(tmp_path / "out"), str(tmp_path / "engine")
    assert cli.main(["quantize", str(original), out, "--method", "int4_awq", "--group-size", "32"]) == 0
    printed = capsys.readouterr()
    assert "Calibrating on" in printed.err and printed.out.startswith(f"Wrote {out}: a checkpoint in int4_awq, ")
    assert cli.main(["quantize", str(original), out, "--method", "int8"]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert cli.main(["build", out, engine, "--max-context", "64"]) == 0
    assert json.loads((tmp_path / "engine" / "engine.json").read_text())["quantization"] == "int4_awq"
    assert cli.main(["quantize", str(tmp_path / "nothing"), out, "--method", "int8", "--force"]) == 1
    assert "does not exist" in capsys.readouterr().err
