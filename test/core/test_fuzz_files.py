"""Files with anything in them: one sentence, never a traceback. EDGELLM_FUZZ_EXAMPLES sets how many are tried."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_core.config import EngineConfig
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.companions import check_tokenizer, eos_token_ids
from engine_core.formats.detect import quantization_of
from engine_core.formats.manifest import MANIFEST_NAME, read_manifest
from engine_core.formats.safetensors_file import SafetensorsFile
from engine_core.formats.vocab_map import tokenizer_fingerprint
from engine_core.models.reader import check_tensors, read_spec
from fuzzing import fuzz, refusal

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from([0, -1, 1, 2**31, 2**63, "", "x", "default", "int8", "fp8", "awq", "gptq", "compressed-tensors"]),
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def damaged(draw, document: dict):
    """``document`` with one to three places replaced, removed or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        place = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys)) if keys else None
            if key is None or not isinstance(place[key], (dict, list)) or draw(st.booleans()):
                break
            place = place[key]
        what = draw(st.sampled_from(["replace", "remove", "add"]))
        if what == "add" and isinstance(place, dict):
            place[draw(st.text(max_size=6))] = draw(values)
        elif what == "remove" and key is not None:
            del place[key]
        elif key is not None:
            place[key] = draw(values)
    return document


CONFIG = json.loads((DEMO / "config.json").read_text())
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    "added_tokens": [{"id": 2, "content": "<s>", "special": True}],
}
MANIFEST = {
    "schema_version": 2, "model_name": "m", "backend": "onnxruntime", "quantization": "int8", "kv_cache_type": "fp32",
    "max_context": 64, "max_batch": 1, "eos_token_ids": [2], "options": {"a": 1}, "builder": {"numpy": "2"},
    "files": {"model.onnx": {"size": 5, "sha256": "x"}},
    "model": {"architecture": "LlamaForCausalLM", "hidden_size": 8, "intermediate_size": 8, "num_heads": 1,
              "num_kv_heads": 1, "head_dim": 8, "vocab_size": 3, "max_position": 64, "norm_eps": 1e-6,
              "ropes": [{"dim": 8, "theta": 1e4, "parameters": {"factor": 2.0}}],
              "layers": [{"index": 0, "window": 4}]},
}  # fmt: skip
QUANTIZED = CONFIG | {
    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "bits": 4, "weight_block_size": [128, 128],
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "block_structure": [1, 2]}}}, "sparsity_config": {},
    },
    "edgellm_quantization": {"method": "int4"},
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz")
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        os.symlink(DEMO / name, directory / name)
    return directory


def read_checkpoint(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    spec = read_spec(checkpoint)
    check_tensors(spec, checkpoint)
    eos_token_ids(checkpoint)
    quantization_of(checkpoint, spec)


@fuzz
@given(config=damaged(CONFIG) | damaged(QUANTIZED))
def test_a_damaged_configuration(checkpoint, config):
    (checkpoint / "config.json").write_text(json.dumps(config))
    refusal(read_checkpoint, checkpoint)


@fuzz
@given(manifest=damaged(MANIFEST))
def test_a_damaged_manifest(tmp_path_factory, manifest):
    directory = tmp_path_factory.getbasetemp() / "fuzzed_manifest"
    directory.mkdir(exist_ok=True)
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))
    refusal(read_manifest, directory)


@fuzz
@given(tokenizer=damaged(TOKENIZER))
def test_a_damaged_tokenizer(checkpoint, tmp_path_factory, tokenizer):
    directory = tmp_path_factory.getbasetemp() / "fuzzed_tokenizer"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    if not (directory / "model.safetensors").exists():
        os.symlink(DEMO / "model.safetensors", directory / "model.safetensors")
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    refusal(tokenizer_fingerprint, directory / "tokenizer.json")
    opened = Checkpoint(directory)
    refusal(check_tokenizer, opened, 3)
    refusal(eos_token_ids, Checkpoint(checkpoint) if not (checkpoint / "config.json").exists() else opened)


@fuzz
@given(data=st.binary(max_size=200), at=st.integers(0, 4000), length=st.integers(0, 2**64 - 1) | st.none())
def test_a_damaged_safetensors_file(tmp_path_factory, data, at, length):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    with open(DEMO / "model.safetensors", "rb") as file:
        whole = bytearray(file.read(8192))
    whole[at : at + len(data)] = data
    if length is not None:
        whole[:8] = np.uint64(length).tobytes()
    path.write_bytes(whole)

    def read() -> None:
        file = SafetensorsFile(path)
        for name in file.names():
            file.read(name)

    refusal(read)


@fuzz
@given(options=st.dictionaries(st.sampled_from(["backend", "max_context", "verify_files", "colour"]), values))
def test_damaged_options(options):
    refusal(EngineConfig.from_dict, {"engine_dir": "x"} | options)
