"""Models that come as GGUF: the same model as the checkpoint they were made of."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import gguf

import checkpoints
import gguf_files
from engine_core import cli
from engine_core.backends.cuda.build import build_cuda
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.backends.onnxruntime.session import OrtSession
from engine_core.config import EngineConfig
from engine_core.errors import BuildError, CheckpointError, UnsupportedModelError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.detect import default_quantization
from engine_core.formats.manifest import read_manifest
from engine_core.models.reader import check_tensors, read_spec
from test_padding import built

SIZES = dict(intermediate_size=256, hidden_size=128, num_attention_heads=4, num_key_value_heads=2)  # whole blocks
CASES = {
    "llama3": {},
    "llama-tied-bias": {},
    "llama-yarn": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": dict(query_pre_attn_scalar=32),
    "gemma3": {},
    "phi3": {},
    "phi3-longrope": {},
    "llama-odd": {},
    "phi3-odd": {},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make the random checkpoint of a case and its GGUF file, once each."""
    found = {}

    def make(case: str, kind: str = "F32", **overrides):
        key = (case, kind, tuple(overrides.items()))
        if key not in found:
            directory = tmp_path_factory.mktemp(case)
            checkpoint = checkpoints.write(directory / "checkpoint", case, **{**CASES[case], **overrides})
            found[key] = checkpoint, gguf_files.write(directory / f"{case}.gguf", checkpoint, kind)
        return found[key]

    return make


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_that_of_the_checkpoint(made, case):
    directory, path = made(case)
    original, found = Checkpoint(directory), Checkpoint(path)
    expected, spec = read_spec(original), read_spec(found)
    check_tensors(spec, found)
    assert spec.shapes() == expected.shapes()
    assert [layer.window for layer in spec.layers] == [layer.window for layer in expected.layers]
    for name in ("architecture", "attention_scale", "attention_softcap", "logits_softcap", "max_position", "tied"):
        assert getattr(spec, name) == pytest.approx(getattr(expected, name)), name
    for context in (32, 256):
        for rope, expected_rope in zip(spec.ropes, expected.ropes):
            for table, expected_table in zip(rope.table(context), expected_rope.table(context)):
                np.testing.assert_allclose(table, expected_table, atol=2e-4)
    for name in expected.shapes():
        np.testing.assert_allclose(found.read(name), original.read(name), rtol=0, atol=3e-7, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_an_engine_computes_what_transformers_does(made, case, tmp_path):
    directory, path = made(case)
    manifest = build_engine(path, tmp_path / "engine", quantization="fp32", max_context=64)
    assert manifest.model_name == case
    ids = np.random.default_rng(3).integers(0, manifest.model.vocab_size, 40)
    expected = checkpoints.reference_logits(checkpoints.reference(directory), ids)
    session = OrtSession(tmp_path / "engine", manifest.model, manifest.model.vocab_size, 64, 64, 1)
    for length in (1, 17, 40):
        session.prefill(ids[:length], 0)
        assert np.abs(session.logits - expected[length - 1]).max() < 2e-4, length


@pytest.mark.parametrize("kind, weight_format", [("Q4_0", "int4"), ("Q8_0", "int8")])
def test_blocks_of_32_keep_their_own_values(made, tmp_path, kind, weight_format):
    directory, path = made("llama3", kind, **SIZES)
    checkpoint, original = Checkpoint(path), Checkpoint(directory)
    assert default_quantization(path) == weight_format
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"):
        quantized = checkpoint.quantized(name, slice(8, 40))
        whole = original.read(name)
        expected = gguf.dequantize(gguf.quantize(whole, kind_of(kind)), kind_of(kind))
        np.testing.assert_array_equal(quantized.dequantize(), expected[8:40])
        np.testing.assert_array_equal(checkpoint.read(name), expected)
        np.testing.assert_array_equal(checkpoint.read(name, np.array([3, 1])), expected[[3, 1]])
        assert quantized.group_size == 32 and quantized.zeros is None
    manifest = build_engine(path, tmp_path / "engine", max_context=64)
    assert manifest.quantization == weight_format and manifest.group_size == 32
    # The head and the embedding are int8 in every integer engine.
    assert set(manifest.options["rounding_errors"]) == {"embedding", "head"}
    if kind == "Q8_0":
        assert max(manifest.options["rounding_errors"].values()) < 1e-6
    on_gpu = build_cuda(path, tmp_path / "on_gpu", quantization=weight_format, max_context=64)
    assert on_gpu.group_size == 32 and on_gpu.options["requantized"] == 0  # the head's are kept there, too
    spec, arrays, _ = built(tmp_path / "on_gpu", on_gpu, EngineConfig(tmp_path / "on_gpu"))
    assert np.array_equal(arrays["layers.2.down"], checkpoint.read("model.layers.2.mlp.down_proj.weight"))
    assert np.array_equal(arrays["head"], checkpoint.read(spec.model.head))


def kind_of(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def test_what_is_rounded_anew_is_told_with_its_loss(made, tmp_path):
    _, path = made("qwen2", "Q5_0", **SIZES)
    lines: list[str] = []
    manifest = build_engine(path, tmp_path / "engine", quantization="int4", max_context=64, report=lines.append)
    errors = manifest.options["rounding_errors"]
    assert len(errors) == manifest.options["requantized"] == 4 * manifest.model.num_layers + 1  # the embedding is tied
    (line,) = [line for line in lines if "rounded anew" in line]
    assert line in manifest.notes and max(errors, key=errors.get) in line
    from engine_core.formats.weight_formats import weight_format
    from engine_core.formats.weight_formats.base import Rounding

    weights = Checkpoint(path).read("model.layers.2.mlp.down_proj.weight")
    rounded = weight_format("int4").quantize(weights, Rounding(32)).dequantize()
    expected = np.linalg.norm(rounded - weights) / np.linalg.norm(weights)
    assert errors["layer2/down"] == pytest.approx(expected, rel=1e-3)
    assert read_manifest(tmp_path / "engine").options["rounding_errors"] == errors


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q3_K", "IQ4_XS", "Q4_1", "BF16", "F16"])
def test_other_types_are_read_as_the_package_does(tmp_path, kind):
    quantized = kind_of(kind)
    block, size = gguf.GGML_QUANT_SIZES[quantized]
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 120, (6, 256 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("output.weight", rows, raw_dtype=quantized)
    gguf_files.finish(writer, tmp_path / "x.gguf")
    from engine_core.formats.gguf_file import GgufFile

    found = GgufFile(tmp_path / "x.gguf")
    assert found.shape("output.weight") == (6, 256) and found.dtype("output.weight") == kind
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(rows, quantized)
    np.testing.assert_array_equal(found.read("output.weight", slice(1, 5)), expected[1:5])


def test_a_model_in_several_files(made, tmp_path):
    directory, path = made("qwen3")
    config = json.loads((directory / "config.json").read_text())
    everything = gguf_files.tensors(directory, config, "qwen3")
    names = sorted(everything)
    for number, part in enumerate((names[:9], names[9:]), start=1):
        values = gguf_files.configuration(config, "qwen3") if number == 1 else {}
        gguf_files.write_values(
            tmp_path / f"model-{number:05}-of-00002.gguf", "qwen3",
            values | {"split.count": 2, "split.no": number - 1}, {name: everything[name] for name in part},
        )  # fmt: skip
    found, whole = Checkpoint(tmp_path / "model-00001-of-00002.gguf"), Checkpoint(path)
    assert read_spec(found) == read_spec(whole)
    for name in read_spec(whole).shapes():
        np.testing.assert_array_equal(found.read(name), whole.read(name))
    (tmp_path / "model-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.gguf does not exist"):
        Checkpoint(tmp_path / "model-00001-of-00002.gguf")


# --- commands -------------------------------------------------------------------------------------------------


def test_the_commands_take_the_file(made, tmp_path, capsys):
    _, path = made("qwen3", "Q5_0", head_dim=32, **SIZES)
    assert cli.main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["supported"] and found["architecture"] == "Qwen3ForCausalLM" and "Q5_0" in found["dtype"]
    assert found["weights_bytes"] == path.stat().st_size
    assert "int8" in found["backends"]["onnxruntime"] and "tokenizer.json" in found["why_not"]
    assert cli.main(["plan", str(path), "--memory", "4GiB", "--backend", "onnxruntime", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "qwen3"
    assert cli.main(["quantize", str(path), str(tmp_path / "int8"), "--method", "int8", "--group-size", "32"]) == 0
    assert "were dequantized and rounded anew to int8" in capsys.readouterr().err
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    names = {name for name in config["edgellm_quantization"]["rounding_errors"]}
    assert len(names) == 7 * config["num_hidden_layers"]
    np.testing.assert_allclose(
        Checkpoint(tmp_path / "int8").read("model.layers.0.mlp.up_proj.weight"),
        Checkpoint(path).read("model.layers.0.mlp.up_proj.weight"),
        atol=2e-3,
    )
    assert cli.main(["quantize", str(path), str(tmp_path / "plain"), "--method", "fp16"]) == 0
    assert read_spec(Checkpoint(tmp_path / "plain")) == read_spec(Checkpoint(path))
    assert cli.main(["build", str(path), str(tmp_path / "engine"), "--max-context", "64"]) == 0
    assert read_manifest(tmp_path / "engine").quantization == "int8"  # the backend's own choice
    assert cli.main(["build", str(path), str(tmp_path / "cuda"), "--backend", "cuda", "--quantization", "int8"]) == 0
    options = read_manifest(tmp_path / "cuda").options
    assert options["requantized"] == len(options["rounding_errors"]) == 4 * config["num_hidden_layers"] + 1  # the head


def test_a_directory_of_gguf_files_names_one(made, tmp_path, capsys):
    directory = made("qwen3")[1].parent
    assert cli.main(["build", str(directory), str(tmp_path / "engine")]) == 1
    assert "name one of them, such as" in capsys.readouterr().err


def test_without_the_package_one_sentence_says_what_to_install(made, monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "gguf":
            raise ImportError("No module named 'gguf'", name="gguf")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BuildError, match="needs the Python package 'gguf': pip install it"):
        Checkpoint(made("qwen3")[1])


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, error, sentence",
    [
        ({"general__architecture": "mamba"}, UnsupportedModelError, "'mamba', which is not read from GGUF; gemma2, "),
        ({"qwen3__block_count": 1}, CheckpointError, "none"),
        ({"qwen3__block_count": None}, CheckpointError, "has no qwen3.block_count, expected"),
        ({"qwen3__block_count": "three"}, CheckpointError, "qwen3.block_count='three', expected a whole number"),
        ({"qwen3__attention__head_count": 0}, CheckpointError, "head_count=0, expected a whole number above 0"),
        ({"qwen3__attention__head_count": [5, 5, 4]}, CheckpointError, "expected a whole number"),
        ({"qwen3__attention__head_count_kv": 2}, CheckpointError, "5 heads for 2 KV heads"),
        ({"qwen3__attention__value_length": 12}, UnsupportedModelError, "24 values in K and of 12 in V"),
        ({"qwen3__rope__dimension_count": 12}, UnsupportedModelError, "partial_rotary_factor=0.5"),
        ({"qwen3__rope__dimension_count": 48}, CheckpointError, "dimension_count=48 for heads of 24"),
        ({"qwen3__rope__freq_base": float("nan")}, CheckpointError, "freq_base=nan"),
        ({"qwen3__rope__scaling__type": "su"}, UnsupportedModelError, "the RoPE scaling 'su'"),
        ({"qwen3__expert_count": 8}, UnsupportedModelError, "qwen3.expert_count=8"),
        ({"qwen3__attention__sliding_window": 16}, UnsupportedModelError, "sliding_window=16"),
        ({"qwen3__embedding_length": 1 << 31}, CheckpointError, "embedding_length=2147483648"),
        ({"qwen3__embedding_length": 120}, CheckpointError, "has the shape"),
        ({"split__count": 3}, CheckpointError, "one of 3 files, whose names end in -00001-of-00003.gguf"),
        ({"general__alignment": 24}, CheckpointError, "general.alignment is 24"),
    ],
)
def test_metadata_that_no_model_can_have(made, tmp_path, changes, error, sentence):
    directory, _ = made("qwen3")
    if "general__alignment" in changes:  # the writer would use it
        gguf_files.write(tmp_path / "x.gguf", directory)
        data = (tmp_path / "x.gguf").read_bytes()
        key = b"general.architecture"
        assert data.count(key) == 1
        entry = (
            (17).to_bytes(8, "little") + b"general.alignment" + (4).to_bytes(4, "little") + (24).to_bytes(4, "little")
        )
        count = int.from_bytes(data[16:24], "little") + 1
        (tmp_path / "x.gguf").write_bytes(data[:16] + count.to_bytes(8, "little") + entry + data[24:])
    else:
        gguf_files.write(tmp_path / "x.gguf", directory, **changes)
    if sentence == "none":  # a layer that is not counted is one that the model does not have
        checkpoint = Checkpoint(tmp_path / "x.gguf")
        assert read_spec(checkpoint).num_layers == 1
        return
    with pytest.raises(error, match=sentence.replace("(", r"\(")) as caught:
        checkpoint = Checkpoint(tmp_path / "x.gguf")
        check_tensors(read_spec(checkpoint), checkpoint)
    assert "\n" not in str(caught.value)


def test_a_quantization_that_is_not_read_is_named_before_anything_is_built(made, tmp_path, capsys):
    def change(tensors):
        return {name: each.astype(np.int32) if "ffn_up" in name else each for name, each in tensors.items()}

    gguf_files.write_changed(tmp_path / "x.gguf", made("qwen3")[0], change)
    for command in (["inspect"], ["build", "ENGINE"], ["plan"]):
        arguments = [str(tmp_path / "engine") if each == "ENGINE" else each for each in command[1:]]
        assert cli.main([command[0], str(tmp_path / "x.gguf"), *arguments]) == 1
        captured = capsys.readouterr()
        assert "has the type I32, which is not read." in captured.err + captured.out


def test_a_tensor_of_another_kind_of_model_is_named(made, tmp_path):
    more = {"blk.1.ffn_gate_exps.weight": np.zeros((2, 4, 4), dtype=np.float32)}
    gguf_files.write_changed(tmp_path / "x.gguf", made("qwen3")[0], lambda tensors: tensors | more)
    with pytest.raises(UnsupportedModelError, match="'blk.1.ffn_gate_exps.weight', which Qwen3ForCausalLM"):
        Checkpoint(tmp_path / "x.gguf")


def test_opening_an_engine_needs_nothing_of_the_file(made, tmp_path):
    """The manifest has the whole model."""
    from engine_core.planning.plan import plan_engine

    _, path = made("gemma3")
    build_engine(path, tmp_path / "engine", max_context=64)
    (row,) = plan_engine(tmp_path / "engine", EngineConfig(engine_dir=tmp_path / "engine"), None)
    assert row.plan is not None and row.plan.total > 0
