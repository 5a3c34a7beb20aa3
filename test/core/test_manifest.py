"""The engine directory: what is refused, and that half of one never counts as one."""

from __future__ import annotations

import dataclasses
import errno
import json
import os

import pytest

from engine_core.config import EngineConfig
from engine_core.errors import (
    BackendUnavailableError,
    BuildError,
    CheckpointError,
    ConfigurationError,
    EngineDirectoryError,
    IntegrityError,
    SchemaVersionError,
)
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.manifest import (
    MANIFEST_NAME,
    Manifest,
    list_variants,
    read_manifest,
    seal,
    select_variant,
    write_variant,
)
from engine_core.formats.safetensors_file import SafetensorsFile
from engine_core.models.rope import RopeSpec
from engine_core.models.spec import LayerSpec, ModelSpec
from engine_core.serving.engine import Engine
from engine_core.text.documents import read_documents

MODEL = ModelSpec(
    architecture="LlamaForCausalLM",
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=300,
    max_position=128,
    ropes=(RopeSpec(16, 1e4, "longrope", 64, 128, {"factor": 2.0, "short_factor": [1.0, 1.5], "flag": True}),),
    layers=(LayerSpec(0, window=7, qkv_bias=True), LayerSpec(1, qk_norm=True)),
    norm_eps=1e-5,
    attention_scale=0.3,
)
MANIFEST = Manifest("tiny", MODEL, "onnxruntime", "fp32", "fp32", 128, 1, (2,), options={"graph": "model.onnx"})


def write(directory, **changes):
    with write_variant(directory) as temporary:
        (temporary / "model.onnx").write_bytes(b"graph")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "weights").write_bytes(bytes(1000))
        seal(temporary, dataclasses.replace(MANIFEST, **changes))
    return directory


def edit(directory, change):
    path = directory / MANIFEST_NAME
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_what_is_written_is_read_again(tmp_path):
    manifest = read_manifest(write(tmp_path / "engine"))
    assert dataclasses.replace(manifest, files={}) == MANIFEST
    assert set(manifest.files) == {"model.onnx", "sub/weights"}
    assert os.listdir(tmp_path) == ["engine"]


def truncate(d):
    (d / "sub" / "weights").write_bytes(bytes(999))


def flip(d):
    (d / "sub" / "weights").write_bytes(bytes(999) + b"\1")


DAMAGE = [
    (lambda d: (d / "model.onnx").unlink(), EngineDirectoryError, "is missing"),
    (truncate, IntegrityError, "has 999 bytes, but its manifest says 1000"),
    (flip, IntegrityError, "SHA-256"),
    (lambda d: (d / MANIFEST_NAME).unlink(), EngineDirectoryError, "has no engine.json"),
    (lambda d: (d / MANIFEST_NAME).write_text("{"), EngineDirectoryError, "cannot be read as JSON"),
    (lambda d: (d / MANIFEST_NAME).write_bytes(b"\xff\xfe"), EngineDirectoryError, "cannot be read as JSON"),
    (lambda d: (d / MANIFEST_NAME).write_text("[]"), EngineDirectoryError, "not a manifest"),
    (lambda d: edit(d, lambda v: v.pop("model")), EngineDirectoryError, "model"),
    (lambda d: edit(d, lambda v: v.update(surprise=1)), EngineDirectoryError, "surprise"),
    (lambda d: edit(d, lambda v: v.update(schema_version=99, surprise=1)), SchemaVersionError, "version 99"),
    (
        lambda d: edit(d, lambda v: v["files"].update({"../x": v["files"]["model.onnx"]})),
        EngineDirectoryError,
        "outside",
    ),
]


@pytest.mark.parametrize(("damage", "error", "words"), DAMAGE)
def test_a_damaged_directory_is_refused_with_one_sentence(tmp_path, damage, error, words):
    directory = write(tmp_path / "engine")
    damage(directory)
    with pytest.raises(error, match=words) as raised:
        Engine.open(EngineConfig(directory))
    assert "\n" not in str(raised.value)


def test_sizes_are_checked_even_when_hashes_are_not(tmp_path):
    directory = write(tmp_path / "engine")
    flip(directory)
    read_manifest(directory, verify_hashes=False)
    truncate(directory)
    with pytest.raises(IntegrityError):
        read_manifest(directory, verify_hashes=False)


def test_a_missing_directory_says_how_to_make_one(tmp_path):
    with pytest.raises(EngineDirectoryError, match="does not exist.*edgellm build"):
        Engine.open(EngineConfig(tmp_path / "nowhere"))


def test_variants_are_listed_and_selected(tmp_path):
    for quantization in ("fp32", "int8", "int4"):
        write(tmp_path / "engine" / quantization, quantization=quantization)
    (tmp_path / "engine" / "notes").mkdir()
    assert set(list_variants(tmp_path / "engine")) == {"fp32", "int8", "int4"}
    assert select_variant(tmp_path / "engine").name == "int4"
    assert select_variant(tmp_path / "engine", "int8").name == "int8"
    assert select_variant(tmp_path / "engine" / "int8").name == "int8"
    with pytest.raises(EngineDirectoryError, match="no variant 'fp8'; it has fp32, int4, int8"):
        select_variant(tmp_path / "engine", "fp8")
    edit(tmp_path / "engine" / "int4", lambda v: v.update(schema_version=99))
    assert select_variant(tmp_path / "engine").name == "int8"


def test_what_an_engine_was_not_built_for_is_refused(tmp_path):
    directory = write(tmp_path / "engine")
    with pytest.raises(BackendUnavailableError, match="built for onnxruntime, not for tensorrt"):
        Engine.open(EngineConfig(directory, backend="tensorrt"))
    with pytest.raises(ConfigurationError, match="max_context is 129, but this engine was built for 128"):
        Engine.open(EngineConfig(directory, max_context=129))
    with pytest.raises(ConfigurationError, match="max_batch is 5, but the onnxruntime backend runs up to 4 sequences"):
        Engine.open(EngineConfig(directory, max_batch=5))
    write(directory, backend="abacus")
    with pytest.raises(BackendUnavailableError, match="'abacus'"):
        Engine.open(EngineConfig(directory))


@pytest.mark.parametrize(
    "values",
    [{"backend": "abacus"}, {"quantization": "int3"}, {"max_context": -1}, {"max_batch": 0}, {"num_threads": -1}],
)
def test_configuration_values_are_checked(values, tmp_path):
    with pytest.raises(ConfigurationError, match=str(next(iter(values)))):
        EngineConfig(tmp_path, **values)


def test_unknown_configuration_keys_raise(tmp_path):
    with pytest.raises(ConfigurationError, match="'max_contxt'"):
        EngineConfig.from_dict({"engine_dir": tmp_path, "max_contxt": 5})


def test_a_failure_leaves_nothing_and_keeps_the_old_engine(tmp_path):
    directory = write(tmp_path / "engine")
    with pytest.raises(BuildError, match="No space left"), write_variant(directory) as temporary:
        (temporary / "model.onnx").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(KeyboardInterrupt), write_variant(directory) as temporary:
        (temporary / "model.onnx").write_bytes(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["engine"]
    read_manifest(directory)


def test_an_engine_is_replaced_and_anything_else_is_not(tmp_path):
    directory = write(tmp_path / "engine")
    write(directory, quantization="int8")
    assert read_manifest(directory).quantization == "int8"
    assert os.listdir(tmp_path) == ["engine"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("1")
    with pytest.raises(BuildError, match="is not an engine directory"):
        write(tmp_path / "thesis")
    assert os.listdir(tmp_path / "thesis") == ["chapter"]


@pytest.mark.parametrize(
    "change",
    [
        {"max_context": "x"}, {"max_context": -1}, {"eos_token_ids": 5}, {"eos_token_ids": ["a"]}, {"files": []},
        {"files": {"a": {"size": 1, "sha256": 5}}}, {"files": {"a": None}}, {"model": None}, {"options": []},
        {"model": {"hidden_size": 1}}, {"model_name": None}, {"use_cuda_graph": 1}, {"colour": "red"},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_with_wrong_types_is_refused_with_one_sentence(tmp_path, change):
    write(tmp_path / "engine")
    edit(tmp_path / "engine", lambda values: values.update(change))
    with pytest.raises(EngineDirectoryError) as raised:
        read_manifest(tmp_path / "engine")
    assert "\n" not in str(raised.value) and "not a whole manifest" in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 0}, {"num_heads": 3}, {"activation": "relu"}, {"layers": []}, {"ropes": []}, {"norm_eps": "x"},
        {"layers": [{"index": 0, "rope": 1}]}, {"norm_eps": float("nan")}, {"attention_scale": True}, {"colour": "red"},
        {"ropes": [{"dim": 99, "theta": 1.0}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_model_that_cannot_be_is_refused_with_one_sentence(tmp_path, change):
    write(tmp_path / "engine")
    edit(tmp_path / "engine", lambda values: values["model"].update(change))
    with pytest.raises(EngineDirectoryError, match="not a whole manifest") as raised:
        read_manifest(tmp_path / "engine")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("field", "value", "words"), [
    ("backend", None, "backend is null, which is not a string"), ("options", 5, "options is 5, which is not an object"),
    ("max_context", "x", 'max_context is "x", which is not a whole number'), ("model", 5, "model is not an object"),
])  # fmt: skip
def test_a_field_of_another_type_is_named_in_json_words(tmp_path, field, value, words):
    write(tmp_path / "engine")
    edit(tmp_path / "engine", lambda values: values.update({field: value}))
    with pytest.raises(EngineDirectoryError, match=words):
        read_manifest(tmp_path / "engine")


def test_an_engine_of_the_first_schema_is_refused_with_the_command_that_builds_it_again(tmp_path):
    directory = write(tmp_path / "engine")
    edit(directory, lambda v: v.update(schema_version=1, geometry=v.pop("model")))
    with pytest.raises(SchemaVersionError, match="edgellm build CHECKPOINT .*/engine --backend onnxruntime") as raised:
        Engine.open(EngineConfig(directory))
    assert "--quantization fp32 --max-context 128" in str(raised.value)


@pytest.mark.parametrize("name", ["additional_chat_templates/default.jinja", "chat_template.jinja", "tokenizer.model"])
def test_a_file_that_would_be_read_and_is_not_listed_is_refused(tmp_path, name):
    path = write(tmp_path / "engine") / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{{ 'obey me' }}")
    with pytest.raises(IntegrityError, match="not listed"):
        read_manifest(tmp_path / "engine", verify_hashes=False)


def test_the_old_engine_comes_back_when_the_second_rename_fails(tmp_path, monkeypatch):
    write(tmp_path / "engine", model_name="old")
    rename, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(BuildError, match="Input/output"):
        write(tmp_path / "engine", model_name="new")
    monkeypatch.undo()
    assert read_manifest(tmp_path / "engine").model_name == "old"
    assert os.listdir(tmp_path) == ["engine"]


def test_json_that_is_nested_too_deeply_is_refused_in_one_sentence(tmp_path):
    deep = "[" * 100_000
    (tmp_path / MANIFEST_NAME).write_text(deep)
    with pytest.raises(EngineDirectoryError, match="cannot be read as JSON"):
        read_manifest(tmp_path)
    (tmp_path / "config.json").write_text(deep)
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        Checkpoint(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep.encode())
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        SafetensorsFile(tmp_path / "x.safetensors")
    (tmp_path / "texts.jsonl").write_text(deep + "\n")
    with pytest.raises(BuildError):
        list(read_documents(tmp_path / "texts.jsonl"))
