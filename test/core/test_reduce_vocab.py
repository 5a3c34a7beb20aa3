"""``edgellm reduce-vocab``: what is always kept, how the rest is chosen, what the report says, whose map it is."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

import vocab_checkpoints
from engine_core import cli
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.config import EngineConfig
from engine_core.errors import BuildError, CheckpointError, ConfigurationError
from engine_core.formats.safetensors_file import SafetensorsFile, write_safetensors
from engine_core.formats.vocab_map import FINGERPRINT, TENSOR_NAME, read_vocab_map, tokenizer_fingerprint
from engine_core.models.shapes import spec_of
from engine_core.reduce_vocab import reduce as module
from engine_core.reduce_vocab.reduce import reduce_vocab
from engine_core.reduce_vocab.report import step_bytes
from engine_core.reduce_vocab.select import Chooser
from engine_core.reduce_vocab.texts import tokenize
from engine_core.serving.engine import Engine
from engine_core.text.documents import read_documents
from engine_core.text.tokenizer import Tokenizer

DEMO_VISION = Path(__file__).resolve().parents[2] / "models" / "demo_vision"
CHATS = [
    [("system", "Be brief."), ("user", f"bring the red cup {i}"), ("assistant", '{"plan": [{"do": "pick"}]}')]
    for i in range(12)
] + [[("user", "where is Anna?"), ("assistant", "in the kitchen"), ("user", "sure?"), ("assistant", "yes")]] * 8
ANY_TEXT = 'Fünf Ärzte 北京 😀 é́ \t\r\n \x7f "quoted\\" {}[]:, -1.5e+3 ß'


@pytest.fixture(scope="module", params=sorted(vocab_checkpoints.KINDS))
def checkpoint(request, tmp_path_factory):
    return vocab_checkpoints.write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return vocab_checkpoints.write_checkpoint(tmp_path_factory.mktemp("byte_level"), "byte_level")


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return vocab_checkpoints.write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", CHATS)


def reduce(checkpoint, out, texts, **options):
    options = {"method": "frequency", **options}
    return reduce_vocab(checkpoint, out, texts=[texts], **options)


def smallest(checkpoint, out, texts, **options) -> set[int]:
    """The ids that are always kept: what the refusal of a size of 1 says is needed."""
    with pytest.raises(BuildError, match=r"The size is 1, but \d+ tokens have to be kept") as refused:
        reduce(checkpoint, out, texts, size=1, **options)
    needed = int(str(refused.value).split("but ")[1].split()[0])
    return set(reduce(checkpoint, out, texts, size=needed, **options).ids.tolist())


# --- what is always kept ------------------------------------------------------------------------------


def test_special_tokens_ends_template_and_json_are_kept_and_padding_is_not(checkpoint, chats, tmp_path):
    kept = smallest(checkpoint, tmp_path, chats)
    tokenizer = Tokenizer(checkpoint)
    ids = tokenizer.fast.get_vocab(with_added_tokens=True)
    assert {ids[token] for token in vocab_checkpoints.SPECIAL} <= kept
    assert max(kept) < tokenizer.vocab_size
    for conversation in (
        [{"role": "system", "content": "0"}, {"role": "user", "content": "0"}, {"role": "assistant", "content": "0"}],
        [{"role": "user", "content": "0"}, {"role": "tool", "content": "0"}],
    ):
        for variables in ({}, {"tools": [{"type": "function"}]}):
            text = tokenizer.apply_template(conversation, **variables)
            assert set(tokenizer.encode(text, add_special_tokens=False).tolist()) <= kept
    by_text = {}
    for token, index in ids.items():
        by_text.setdefault(token.replace("Ġ", " ").replace("▁", " ").removeprefix(" "), set()).add(index)
    for text in (*'0123456789{}[]",:', '":', "true", "false", "null", '"},', "<think>", "</think>", "<tool_call>"):
        assert by_text.get(text, set()) <= kept, text
    assert all(by_text.get(digit) for digit in "0123456789"), "the tokenizer under test has no digits"


def test_any_text_can_still_be_written(checkpoint, chats, tmp_path):
    """With bytes: any text at all. Without: all the tokenizer can write."""
    kept = smallest(checkpoint, tmp_path, chats)
    fast = Tokenizer(checkpoint).fast
    vocabulary = fast.get_vocab(with_added_tokens=False)
    if "<0x00>" in vocabulary:
        ids = [vocabulary[f"<0x{byte:02X}>"] for byte in ANY_TEXT.encode()]
    elif "Ġ" in vocabulary:
        from tokenizers import pre_tokenizers

        pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(ANY_TEXT)
        ids = [vocabulary[character] for piece, _ in pieces for character in piece]
    else:
        assert {index for token, index in vocabulary.items() if len(token) == 1} <= kept
        ids = [vocabulary[character] for character in "▁grüßen▁où"]
        assert set(ids) <= kept and fast.decode(ids) == "grüßen où"
        return
    assert set(ids) <= kept and fast.decode(ids) == ANY_TEXT


def test_tags_and_json_runs_among_the_ordinary_tokens_are_kept(tmp_path, chats):
    """A SentencePiece tokenizer, whose tags are no added tokens here."""
    directory = vocab_checkpoints.write_checkpoint(tmp_path / "c", "byte_fallback")
    values = json.loads((directory / "tokenizer.json").read_text())
    size = len(values["model"]["vocab"])
    tags = ["<think>", "</think>", "<tool_call>", "[TOOL_CALLS]", '▁{"', '":', '"},', "▁true", "<thinker>", "true."]
    values["model"]["vocab"].update({tag: 600 + i for i, tag in enumerate(tags)})
    assert size < 600
    (directory / "tokenizer.json").write_text(json.dumps(values))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 640}))
    kept = smallest(directory, tmp_path / "out", chats)
    assert kept & set(range(600, 640)) == set(range(600, 608))


def test_keep_takes_ids_and_files(byte_level, chats, tmp_path):
    (tmp_path / "keep.txt").write_text("kitchen\nAnna\n")
    tokenizer = Tokenizer(byte_level)
    free = smallest(byte_level, tmp_path, chats)
    kept = smallest(byte_level, tmp_path, chats, keep=["400,401", str(tmp_path / "keep.txt")])
    words = {index for text in ("kitchen", " kitchen", "Anna", " Anna") for index in tokenizer.encode(text).tolist()}
    assert words - free and kept == free | words | {400, 401}
    with pytest.raises(BuildError, match="token id 99999, but the vocabulary has ids from 0"):
        reduce(byte_level, tmp_path, chats, size=400, keep=["99999"])
    with pytest.raises(BuildError, match="neither a list of token ids"):
        reduce(byte_level, tmp_path, chats, size=400, keep=["nowhere.txt"])


# --- how the rest is chosen ---------------------------------------------------------------------------


def counts(**values) -> np.ndarray:
    array = np.zeros(100, dtype=np.int64)
    for index, count in values.items():
        array[int(index[1:])] = count
    return array


def chooser(method, outputs, inputs=None) -> Chooser:
    allowed = np.ones(100, dtype=bool)
    allowed[95:] = False
    required = {"special and added": frozenset({0, 1})}
    return Chooser(method, required, allowed, outputs, counts() if inputs is None else inputs)


def test_frequency_takes_what_is_required_then_answers_then_inputs_then_the_lowest_ids():
    made = chooser("frequency", counts(_50=3, _60=9, _70=3, _0=99), counts(_80=5, _60=5, _97=50))
    order = [60, 50, 70, 80, 2, 3]
    for size in range(2, 9):
        assert made.select(size).ids.tolist() == sorted([0, 1, *order[: size - 2]])
    assert made.select(8).reasons == {"special and added": 2, "in answers": 3, "in inputs": 1, "lowest ids": 2}


def test_input_aware_fills_nine_tenths_by_class_and_the_rest_with_neighbours():
    """Answers also read, answers, inputs; then ids within 5 of those, nearest first, the core in its order."""
    outputs = counts(_50=1, _60=9, _70=3)
    inputs = counts(_50=7, _80=4, _90=2, _97=50)
    made = chooser("input_aware", outputs, inputs)
    assert made.select(7).ids.tolist() == sorted([0, 1, 50, 60, 70, 80] + [49])
    ten = made.select(10)
    assert ten.ids.tolist() == sorted([0, 1, 50, 60, 70, 80, 90] + [49, 51, 48])
    assert ten.reasons["neighbours"] == 3
    around = {i + d for i in (50, 60, 70, 80, 90) for d in range(-5, 6)} - {95}
    everything = sorted(around | {0, 1})
    assert made.select(len(everything)).ids.tolist() == everything


@pytest.mark.parametrize("method", ["frequency", "input_aware"])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 1.0])
def test_the_smallest_size_of_a_coverage_has_it_and_one_less_has_not(method, share):
    rng = np.random.default_rng(4)
    outputs = rng.zipf(1.6, size=100).clip(max=10_000) * (rng.random(100) < 0.7)
    outputs[95:] = 0
    made = chooser(method, outputs, rng.integers(0, 3, size=100))
    size = made.smallest_size(share)

    def reached(size):
        return outputs[made.select(size).ids].sum() / outputs.sum()

    assert reached(size) >= share - 1e-9 and (size == made.num_required or reached(size - 1) < share)


def test_coverage_and_fraction_choose_sizes_and_every_size_is_exact(byte_level, chats, tmp_path):
    all_covered = reduce(byte_level, tmp_path, chats, coverage=100, held_out_share=0.0)
    assert all_covered.report["texts"]["token_coverage"] == 1.0
    assert len(all_covered.ids) % 16 == 0
    vocab_size = all_covered.report["vocab_size"]
    quarter = reduce(byte_level, tmp_path, chats, fraction=0.75)
    assert 0 <= len(quarter.ids) - 0.75 * vocab_size < 16
    assert len(reduce(byte_level, tmp_path, chats, size=401).ids) == 401


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "found none"),
        ({"size": 400, "fraction": 0.5}, "found size and fraction"),
        ({"size": 5000}, "the tokenizer has 429 tokens"),
        ({"size": -3}, "a size is above 0"),
        ({"coverage": 101}, "coverage at most 100"),
        ({"size": 400, "method": "magic"}, "one of frequency, input_aware"),
        ({"size": 400, "held_out_share": 1.0}, "0 to below 1"),
    ],
)
def test_contradictory_options_are_refused(byte_level, chats, tmp_path, options, message):
    with pytest.raises(BuildError, match=message):
        reduce(byte_level, tmp_path, chats, **options)
    assert not list(tmp_path.iterdir())


# --- the texts ----------------------------------------------------------------------------------------


def test_an_answer_is_what_the_model_samples_its_stop_token_included(byte_level, tmp_path):
    path = vocab_checkpoints.write_chats(tmp_path / "c.jsonl", [CHATS[-1]])
    tokenizer = Tokenizer(byte_level)
    (document,) = read_documents(path)
    sample = tokenize(document, tokenizer)
    end = tokenizer.fast.token_to_id("<|end|>")
    expected = [[*tokenizer.encode(text).tolist(), end] for text in ("in the kitchen", "yes")]
    assert [answer.tolist() for answer in sample.answers] == expected
    assert sample.inputs.tolist() == [*tokenizer.encode("where is Anna?"), *tokenizer.encode("sure?")]


def test_all_forms_of_a_line_are_read(byte_level, tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text(
        '{"prompt": "go", "response": "yes"}\n\n{"text": "plain"}\n'
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}\n'
    )
    tokenizer = Tokenizer(byte_level)
    first, second, third = (tokenize(document, tokenizer) for document in read_documents(path))
    assert tokenizer.decode(first.answers[0]) == "yes" and tokenizer.decode(first.inputs) == "go"
    assert tokenizer.decode(second.answers[0]) == "plain" and not len(second.inputs)
    assert tokenizer.decode(third.inputs) == "a" and not third.answers


def test_paragraphs_keep_every_character(tmp_path):
    text = "\none\ntwo\n\n\nthree\n  \nfour"
    (tmp_path / "a.txt").write_text(text)
    documents = list(read_documents(tmp_path / "a.txt"))
    assert "".join(document.text for document in documents) == text
    assert [document.text.strip() for document in documents] == ["one\ntwo", "three", "four"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1 is no chat"),
        ("a.jsonl", b'{"messages": [{"content": "x"}]}\n', "a.jsonl:1 is no chat"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', "no text the model would write"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt", b"", "no text the model would write"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_texts_that_cannot_be_used_are_refused_with_the_place(byte_level, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BuildError, match=message):
        reduce(byte_level, tmp_path / "out", tmp_path / name, size=400)
    assert not (tmp_path / "out").exists()


# --- the report ---------------------------------------------------------------------------------------


def test_the_report_counts_what_the_held_out_text_loses(byte_level, chats, tmp_path):
    held = vocab_checkpoints.write_chats(
        tmp_path / "held.jsonl",
        [[("user", "x"), ("assistant", text)] for text in ("yes", "living room living", "brings freundliche")],
    )
    result = reduce(byte_level, tmp_path, chats, size=330, held_out=held)
    tokenizer = Tokenizer(byte_level)
    kept = set(result.ids.tolist())
    end = tokenizer.fast.token_to_id("<|end|>")
    answers = [[*tokenizer.encode(t).tolist(), end] for t in ("yes", "living room living", "brings freundliche")]
    flat = [index for answer in answers for index in answer]
    lost = Counter(index for index in flat if index not in kept)
    assert lost and set(answers[0]) <= kept
    found = result.report["held_out"]
    assert found["token_coverage"] == pytest.approx(1 - sum(lost.values()) / len(flat))
    assert found["whole_answers"] == pytest.approx(sum(set(a) <= kept for a in answers) / 3)
    assert {entry["id"]: entry["count"] for entry in result.report["lost"]} == dict(lost)
    first = result.report["lost"][0]
    assert first["count"] == max(lost.values()) and first["text"] == tokenizer.token_texts([first["id"]])[0]
    assert json.loads(result.report_path.read_text()) == result.report


def test_a_share_of_the_texts_is_held_out_of_the_choice(byte_level, chats, tmp_path):
    report = reduce(byte_level, tmp_path, chats, size=400, held_out_share=0.25).report
    assert (report["texts"]["documents"], report["held_out"]["documents"]) == (15, 5)
    none = reduce(byte_level, tmp_path, chats, size=400, held_out_share=0.0).report
    assert none["held_out"]["token_coverage"] is None and none["texts"]["documents"] == 20


def test_bytes_of_a_step_are_those_of_the_weights(byte_level, chats, tmp_path):
    report = reduce(byte_level, tmp_path, chats, size=400).report
    vocab_size = report["vocab_size"]
    layers = 2 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    row = next(row for row in report["step_bytes"] if (row["head"], row["layers"]) == ("fp16", "fp16"))
    assert row["step_bytes"] == 2 * (layers + 64 * vocab_size)
    assert row["saved_bytes"] == 2 * 64 * (vocab_size - 400)
    assert row["share"] == pytest.approx(row["saved_bytes"] / row["step_bytes"])


def test_a_step_reads_no_encoder_and_the_experts_of_one_token():
    config = dict(
        architectures=["Qwen3MoeForCausalLM"], num_hidden_layers=2, hidden_size=64, moe_intermediate_size=128,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=512, num_experts_per_tok=2,
    )  # fmt: skip
    few, many = (step_bytes(spec_of(config | {"num_experts": count}), 256)[0]["step_bytes"] for count in (2, 9))
    assert many - few == 2 * 2 * (9 - 2) * 64  # the routers' rows
    spec = spec_of(json.loads((DEMO_VISION / "config.json").read_text(encoding="utf-8")))
    assert spec.vision is not None
    without = dataclasses.replace(spec, vision=None)
    assert step_bytes(spec, 256) == step_bytes(without, 256)


# --- the file -----------------------------------------------------------------------------------------


def test_the_map_has_ascending_ids_and_says_whose_it_is(byte_level, chats, tmp_path):
    result = reduce(byte_level, tmp_path, chats, size=400)
    file = SafetensorsFile(result.map_path)
    assert file.dtype(TENSOR_NAME) == "I32" and (np.diff(file.raw(TENSOR_NAME)) > 0).all()
    assert np.array_equal(file.raw(TENSOR_NAME), result.ids)
    assert file.metadata["method"] == "frequency" and file.metadata["vocab_size"] == str(result.report["vocab_size"])
    assert file.metadata[FINGERPRINT] == tokenizer_fingerprint(byte_level / "tokenizer.json")
    assert {path.name for path in tmp_path.iterdir()} == {"vocab_map.safetensors", "reduced_vocab.json"}


def test_a_failed_write_leaves_the_old_map(byte_level, chats, tmp_path, monkeypatch):
    before = reduce(byte_level, tmp_path, chats, size=400)
    content = before.map_path.read_bytes()

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_vocab_map", full)
    with pytest.raises(BuildError, match="No space left on device"):
        reduce(byte_level, tmp_path, chats, size=390)
    assert before.map_path.read_bytes() == content and len(list(tmp_path.iterdir())) == 2


def test_the_same_vocabulary_in_another_file_is_the_same_tokenizer(byte_level, tmp_path):
    values = json.loads((byte_level / "tokenizer.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(values, indent=7, sort_keys=True))
    expected = tokenizer_fingerprint(byte_level / "tokenizer.json")
    assert tokenizer_fingerprint(tmp_path / "other.json") == expected
    vocabulary = values["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "other.json").write_text(json.dumps(values))
    assert tokenizer_fingerprint(tmp_path / "other.json") != expected


def test_a_map_of_another_tokenizer_is_refused_at_build_and_at_configure(byte_level, chats, tmp_path):
    other = vocab_checkpoints.write_checkpoint(tmp_path / "other", "byte_fallback")
    path = reduce(byte_level, tmp_path / "map", chats, size=400).map_path
    with pytest.raises(CheckpointError, match="was made for the tokenizer [0-9a-f]{12}…, but this model's is"):
        build_engine(other, tmp_path / "engine", vocab_map=path)
    assert not (tmp_path / "engine").exists()
    build_engine(other, tmp_path / "engine")
    with pytest.raises(ConfigurationError, match="reduce-vocab"):
        Engine.open(EngineConfig(tmp_path / "engine", vocab_map=str(path)))
    kept = SafetensorsFile(path).raw(TENSOR_NAME)
    ends = json.loads((other / "generation_config.json").read_text())["eos_token_id"]
    write_safetensors(tmp_path / "plain.safetensors", {TENSOR_NAME: np.union1d(kept, ends).astype(np.int32)})
    Engine.open(EngineConfig(tmp_path / "engine", vocab_map=str(tmp_path / "plain.safetensors"))).close()


def test_a_built_engine_carries_the_maps_metadata(byte_level, chats, tmp_path):
    path = reduce(byte_level, tmp_path / "map", chats, size=400).map_path
    manifest = build_engine(byte_level, tmp_path / "engine", vocab_map=path)
    own = tmp_path / "engine" / "vocab_map.safetensors"
    assert manifest.reduced_vocab_size == 400
    assert SafetensorsFile(own).metadata == SafetensorsFile(path).metadata
    vocab_size = manifest.model.vocab_size
    found, given = read_vocab_map(own, vocab_size, tmp_path / "engine"), read_vocab_map(path, vocab_size, byte_level)
    assert np.array_equal(found, given)
    (tmp_path / "engine" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer.json to compare it with"):
        read_vocab_map(own, vocab_size, tmp_path / "engine")


# --- the command --------------------------------------------------------------------------------------


def test_the_command_writes_the_map_and_shows_the_report(byte_level, chats, tmp_path, capsys):
    command = ["reduce-vocab", str(byte_level), str(tmp_path), "--texts", str(chats)]
    assert cli.main([*command, "--size", "400", "--method", "input_aware", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "reduced_vocab.json").read_text())
    assert (shown["size"], shown["method"]) == (400, "input_aware")
    assert cli.main([*command, "--size", "400"]) == 1
    assert "vocab_map.safetensors is there" in capsys.readouterr().err
    command.append("--force")
    assert cli.main([*command, "--coverage", "99", "--held-out", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "Coverage" in out and "share saved" in out and f"--vocab-map {tmp_path}" in out.replace("\n", "")
    assert cli.main([*command, "--size", "3"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("edgellm: The size is 3, but")
    with pytest.raises(SystemExit) as wrong:
        cli.main(command)
    assert wrong.value.code == 2
