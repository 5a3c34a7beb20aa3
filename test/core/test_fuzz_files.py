"""Files with anything in them: one sentence, never a traceback. EDGELLM_FUZZ_EXAMPLES sets how many are tried."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import sample_checkpoints
from engine_core.config import EngineConfig
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.companions import check_companions, eos_token_ids
from engine_core.formats.detect import quantization_of
from engine_core.formats.lora import LoraAdapter
from engine_core.formats.manifest import MANIFEST_NAME, read_manifest
from engine_core.formats.safetensors_file import SafetensorsFile, write_safetensors
from engine_core.formats.vocab_map import TENSOR_NAME, read_vocab_map, tokenizer_fingerprint
from engine_core.models.reader import check_tensors, read_spec
from engine_core.models.shapes import spec_of
from engine_core.serving.session_files import load_session
from fuzzing import fuzz, refusal

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"

NUMBERS = (0, -1, 1, 2**31, 2**63, 2**70, -(2**70), 0.5, -0.0, 1e308, 5e-324, math.nan, math.inf, -math.inf)
WORDS = ("", "x", "default", "int8", "fp8", "awq", "gptq", "compressed-tensors")
# The first and the last character of ranges that texts are drawn from: all of Unicode, lone surrogates included.
RANGES = ((0, 127), (0, 31), (97, 122), (128, 0x7FF), (0x2000, 0x206F), (0xD800, 0xDFFF), (0x10000, 0x10FFFF))


def text(random: Random, longest: int) -> str:
    return "".join(chr(random.randint(*random.choice(RANGES))) for _ in range(random.randint(0, longest)))


def anything(random: Random, depth: int = 2) -> object:
    """Return what JSON can hold, lists and objects of ``depth`` levels included."""
    kind = random.randrange(8 if depth else 6)
    if kind < 2:
        return random.choice((None, True, False, *NUMBERS))
    if kind == 2:
        return random.randint(-100, 100) if random.random() < 0.5 else random.randint(-(2**70), 2**70)
    if kind == 3:
        return random.uniform(-10, 10)
    if kind < 6:
        return random.choice(WORDS) if kind == 4 else text(random, 8)
    if kind == 6:
        return [anything(random, depth - 1) for _ in range(random.randint(0, 3))]
    return {text(random, 6): anything(random, depth - 1) for _ in range(random.randint(0, 3))}


def damage(document: dict, random: Random) -> dict:
    """Return ``document`` with one to three places replaced, removed or added."""
    document = copy.deepcopy(document)
    for _ in range(random.randint(1, 3)):
        place: dict | list = document
        while True:
            key = random.choice([*place] if isinstance(place, dict) else range(len(place))) if place else None
            if key is None or not isinstance(place[key], (dict, list)) or random.random() < 0.5:
                break
            place = place[key]
        what = random.choice(("replace", "remove", "add"))
        if what == "add" and isinstance(place, dict):
            place[text(random, 6)] = anything(random)
        elif what == "remove" and key is not None:
            del place[key]
        elif key is not None:
            place[key] = anything(random)
    return document


# One number drawn by hypothesis seeds a case: a draw for each part of a document takes ten times as long as reading it.
randoms = st.randoms(use_true_random=True, note_method_calls=False)
values = randoms.map(anything)


def damaged(*documents: dict):
    """Return a strategy of ``documents`` that are damaged."""
    return randoms.map(lambda random: damage(random.choice(documents), random))


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
@given(config=damaged(CONFIG, QUANTIZED))
def test_a_damaged_configuration(checkpoint, config):
    (checkpoint / "config.json").write_text(json.dumps(config))
    refusal(read_checkpoint, checkpoint)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_half_a_surrogate_pair_in_a_checkpoint_is_refused_and_a_whole_one_read(tmp_path, name):
    for each in ("model.safetensors", "tokenizer.json", "generation_config.json", "config.json"):
        os.symlink(DEMO / each, tmp_path / each)
    whole = json.loads((DEMO / name).read_text())
    (tmp_path / name).unlink(missing_ok=True)
    for text, is_refused in (("\U0001f916", False), ("\ud83e", True), ("x\udd16", True)):
        for change in ({"note": text}, {text: 1}, {"notes": [{"a": text}]}):
            (tmp_path / name).write_text(json.dumps(whole | change))
            found = refusal(read_checkpoint, tmp_path)
            assert (found is not None) == is_refused, (text, change, found)
            assert not is_refused or f"{name} has a text with half a surrogate pair" in str(found)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json"])
def test_half_a_surrogate_pair_in_a_chat_template_is_refused(tmp_path, name):
    """Also in a part that no message reaches."""
    template = "{{ messages[0].content }}{% if tools %}\ud800{% endif %}"
    for each in DEMO.iterdir():
        if each.name not in ("tokenizer_config.json", "chat_template.jinja"):
            os.symlink(each, tmp_path / each.name)
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    config = config if name == "tokenizer_config.json" else {}
    document = json.dumps(config | {"chat_template": template}) if name.endswith(".json") else template
    (tmp_path / name).write_bytes(document.encode("utf-8", "surrogatepass"))
    found = refusal(check_companions, Checkpoint(tmp_path), CONFIG["vocab_size"])
    assert found is not None and ("surrogate" in str(found) or "decode" in str(found)), found


@fuzz
@given(manifest=damaged(MANIFEST))
@example(manifest=MANIFEST | {"builder": {"a\nb": None}})
def test_a_damaged_manifest(tmp_path_factory, manifest):
    directory = tmp_path_factory.getbasetemp() / "fuzzed_manifest"
    directory.mkdir(exist_ok=True)
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))
    refusal(read_manifest, directory)


@fuzz
@given(tokenizer=damaged(TOKENIZER))
def test_a_damaged_tokenizer(tmp_path_factory, tokenizer):
    directory = tmp_path_factory.getbasetemp() / "fuzzed_tokenizer"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    if not (directory / "model.safetensors").exists():
        os.symlink(DEMO / "model.safetensors", directory / "model.safetensors")
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    refusal(tokenizer_fingerprint, directory / "tokenizer.json")
    opened = Checkpoint(directory)
    refusal(check_companions, opened, 3)
    refusal(eos_token_ids, opened)


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


HEADER = {
    "__metadata__": {"tokenizer": "x"}, TENSOR_NAME: {"dtype": "I32", "shape": [3], "data_offsets": [0, 12]},
    "scales": {"dtype": "F16", "shape": [1, 2], "data_offsets": [12, 16]},
}  # fmt: skip


@fuzz
@given(header=damaged(HEADER), data=st.binary(min_size=16, max_size=16) | st.just(np.arange(4, dtype="<i4").tobytes()))
def test_a_damaged_vocabulary_map(tmp_path_factory, header, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed_map.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    refusal(read_vocab_map, path, 8, DEMO)
    refusal(lambda: [SafetensorsFile(path).read(name) for name in SafetensorsFile(path).names()])


ADAPTER = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none", "use_rslora": False,
    "rank_pattern": {"model.layers.0.self_attn.q_proj": 4}, "alpha_pattern": {}, "layers_to_transform": [0],
    "layers_pattern": None, "base_model_name_or_path": "x", "modules_to_save": None, "use_dora": False,
}  # fmt: skip


@fuzz
@given(config=damaged(ADAPTER))
def test_a_damaged_adapter(tmp_path_factory, config):
    directory = tmp_path_factory.getbasetemp() / "fuzzed_adapter"
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    if not (directory / "adapter_model.safetensors").exists():
        weights = {f"{stem}{name}.weight": np.ones(shape, np.float32) for name, shape in LOW_RANK.items()}
        write_safetensors(directory / "adapter_model.safetensors", weights)
    spec = spec_of(CONFIG)
    refusal(lambda: [LoraAdapter("x", directory, spec, 8).dense(0, "qkv", range(8))])


LOW_RANK = {"A": (4, CONFIG["hidden_size"]), "B": (CONFIG["num_attention_heads"] * CONFIG["head_dim"], 4)}
SESSION = {
    "version": 1, "engine": "e", "num_turns": 1, "num_tokens": 5,
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "name": "go", "arguments": "{}"}]},
        {"role": "tool", "content": "b", "tool_call_id": "1", "name": "go"},
    ],
}  # fmt: skip


@fuzz
@given(session=damaged(SESSION) | values)
def test_a_damaged_session(tmp_path_factory, session):
    directory = tmp_path_factory.getbasetemp() / "fuzzed_sessions"
    directory.mkdir(exist_ok=True)
    (directory / "x.json").write_text(json.dumps(session))
    refusal(load_session, directory, "x", "e")


@fuzz
@given(options=st.dictionaries(st.sampled_from(["backend", "max_context", "verify_files", "colour"]), values))
def test_damaged_options(options):
    refusal(EngineConfig.from_dict, {"engine_dir": "x"} | options)


# --- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> tuple[Path, int]:
    """(a small file, where its tensors begin)."""
    import gguf_files

    directory = tmp_path_factory.mktemp("gguf")
    tokens = [chr(code) for code in range(33, 127)] + ["ab", "<|im_end|>"]
    tokenizer = {
        "ggml.model": "gpt2", "ggml.pre": "qwen2", "ggml.tokens": tokens, "ggml.merges": ["a b"],
        "ggml.token_type": [1] * 95 + [3], "ggml.eos_token_id": 95, "chat_template": "{{ messages }}",
    }  # fmt: skip
    path = gguf_files.write(directory / "x.gguf", sample_checkpoints.write(directory / "c", "Qwen3ForCausalLM"),
                            "Q8_0", tokenizer=tokenizer)  # fmt: skip
    num_bytes = sum(int(np.prod(shape)) for shape in read_spec(Checkpoint(path)).shapes().values())
    return path, path.stat().st_size - num_bytes  # a value takes more than a byte


def read_gguf(path: Path) -> None:
    """Read all that ``edgellm build`` reads of a GGUF file."""
    checkpoint = Checkpoint(path)
    spec = read_spec(checkpoint)
    check_tensors(spec, checkpoint)
    eos_token_ids(checkpoint)
    quantization_of(checkpoint, spec)
    for name in spec.shapes():
        assert checkpoint.read(name, slice(0, 2)).dtype == np.float32
    assert (checkpoint.directory / "config.json").is_file()


@fuzz
@given(data=st.data())
def test_a_damaged_gguf_file(gguf_file, tmp_path_factory, data):
    path, end = gguf_file
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(end, 6000)) | st.integers(0, 400))
        patch = data.draw(st.binary(min_size=1, max_size=12) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x7f" * 4]))
        whole[at : at + len(patch)] = patch
    length = data.draw(st.none() | st.integers(0, len(whole)))
    damaged_path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    damaged_path.write_bytes(whole[:length])
    refusal(read_gguf, damaged_path)


def test_a_gguf_file_that_is_cut_off_anywhere_in_its_header(gguf_file, tmp_path):
    path, end = gguf_file
    whole = path.read_bytes()
    read_gguf(path)
    for length in [*range(200), *range(200, end, 97), len(whole) - 1]:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        assert refusal(read_gguf, tmp_path / "cut.gguf") is not None, length


@pytest.mark.parametrize("at, value", [(8, 2**63), (16, 2**63), (8, 10**9), (16, 10**9), (4, 3 << 24), (4, 1), (0, 0)])
def test_counts_and_versions_that_no_gguf_file_can_have(gguf_file, tmp_path, at, value):
    whole = bytearray(gguf_file[0].read_bytes())
    size = 8 if at in (8, 16) else 4
    whole[at : at + size] = value.to_bytes(size, "little")
    (tmp_path / "x.gguf").write_bytes(whole)
    found = refusal(read_gguf, tmp_path / "x.gguf")
    assert found is not None and "is not a whole GGUF file" in str(found)


@pytest.mark.parametrize("broken", [b"\xed\xa0\x80", b"\xff", b"\xed\xb8\x80", b"\xc0\x80"])
@pytest.mark.parametrize("place", [b"{{ messages }}", b"<|im_end|>", b"qwen2", b"tokenizer.chat_template"])
def test_a_text_of_a_gguf_file_that_is_no_utf_8_is_refused(gguf_file, tmp_path, place, broken):
    """A lone surrogate in the bytes is one: a file's texts never have any."""
    whole = gguf_file[0].read_bytes()
    assert place in whole
    (tmp_path / "x.gguf").write_bytes(whole.replace(place, broken + place[len(broken) :]))
    found = refusal(read_gguf, tmp_path / "x.gguf")
    assert found is not None and "one of its texts is not UTF-8" in str(found)


@pytest.mark.parametrize("values", [
    {"tokenizer.chat_template": "\udf1ep\u2005"}, {"tokenizer.ggml.pre": "qwen2\ud800"},
    {"tokenizer.ggml.model": "\udfff"}, {"tokenizer.ggml.tokens": ["a", "\udc80"]},
    {"tokenizer.ggml.merges": ["a \udc80"]},
])  # fmt: skip
def test_half_a_surrogate_pair_in_gguf_metadata_is_refused(gguf_file, monkeypatch, values):
    assert refusal(read_changed_gguf, gguf_file[0], monkeypatch, values) is not None


@fuzz
@given(values=st.dictionaries(st.sampled_from(sorted({
    "qwen3.block_count", "qwen3.attention.head_count", "qwen3.embedding_length", "qwen3.rope.freq_base",
    "qwen3.rope.scaling.type", "qwen3.rope.scaling.factor", "qwen3.rope.dimension_count", "general.alignment",
    "qwen3.attention.key_length", "qwen3.context_length", "tokenizer.ggml.model", "tokenizer.ggml.pre", "split.count",
    "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.eos_token_id",
    "tokenizer.chat_template", "qwen3.attention.sliding_window_pattern", "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.add_bos_token",
})), values | st.lists(st.integers(-5, 100), max_size=100).map(np.array), min_size=1, max_size=3))  # fmt: skip
def test_gguf_metadata_with_anything_in_it(gguf_file, monkeypatch, values):
    refusal(read_changed_gguf, gguf_file[0], monkeypatch, values)


def read_changed_gguf(path: Path, monkeypatch, values: dict) -> None:
    """Read a GGUF file as if its metadata had ``values``, too."""
    from engine_core.formats import gguf_model

    real = gguf_model.read_parts

    def changed(path):
        parts = real(path)
        parts[0].metadata.update(values)
        return parts

    with monkeypatch.context() as patch:
        patch.setattr(gguf_model, "read_parts", changed)
        read_gguf(path)
