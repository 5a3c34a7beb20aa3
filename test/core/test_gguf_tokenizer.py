"""Tokenizers from GGUF metadata: the same tokens as the tokenizer that the metadata was taken from."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from engine_core.errors import CheckpointError, UnsupportedModelError
from engine_core.request import ChatMessage
from engine_core.text.gguf_tokenizer import GgufTokenizer
from engine_core.text.tokenizer import Tokenizer as EngineTokenizer

TEXTS = [
    "The robot turns left at 12:30 and waits 250 ms.",
    "  two spaces,\ttabs\n\n\nand lines \r\n end   ",
    "I'm, WE'LL, they've — it's “quoted”; naïve Grüße 123456",
    "Привет, мир! 東京 मस्ते 🤖🚀 \u200b",
    "x",
    "a/b\\c/d//e != f && (g <= 0x1F)",
    "def f(x):\n    return x**2  # square\n",
    "",
]
# The pattern that each model's own tokenizer.json has.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def train(steps, *, normalizer=None, ignore_merges=False) -> Tokenizer:
    """A byte-level BPE with three control tokens and a tool tag at its end."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROLS])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False, special=False)])
    return tokenizer


def split(pattern: str) -> list:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def metadata_of(tokenizer: Tokenizer, name: str, *, padding: int = 5, **values) -> dict:
    """Return the metadata that llama.cpp's converter writes. ``name``: the pre-tokenizer; ``padding``: rows of the
    embedding without a token."""
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.get)
    types = [3 if token in CONTROLS else 4 if token == "<tool_call>" else 1 for token in tokens]
    tokens += [f"[PAD{len(tokens) + i}]" for i in range(padding)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    found = {
        "model": "gpt2", "pre": name, "tokens": tokens, "merges": merges,
        "token_type": np.array(types + [5] * padding, dtype=np.int32), "eos_token_id": vocabulary["<|im_end|>"],
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (found | values).items() if value is not None}


def opened(metadata: dict, directory) -> EngineTokenizer:
    for name, text in GgufTokenizer(metadata, "x.gguf").files().items():
        (directory / name).write_text(text, encoding="utf-8")
    return EngineTokenizer(directory)


KINDS = {
    "qwen2": dict(steps=split(QWEN2), normalizer=normalizers.NFC()),
    "llama-bpe": dict(steps=split(LLAMA3), ignore_merges=True),
    "smaug-bpe": dict(steps=split(LLAMA3)),
    "gpt-2": dict(steps=[pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "smollm": dict(steps=[pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
}


@pytest.mark.parametrize("pre", KINDS)
def test_byte_level_tokens_are_those_of_the_original(tmp_path, pre):
    original = train(**KINDS[pre])
    metadata = metadata_of(original, pre, add_bos_token=False) | {"tokenizer.chat_template": TEMPLATE}
    found = opened(metadata, tmp_path)
    for text in [*TEXTS, "<|im_start|>user<tool_call>{}", "<|im_en|>", "cafe\u0301"]:
        assert found.encode(text).tolist() == original.encode(text).ids, text
        assert found.decode(original.encode(text).ids) == original.decode(original.encode(text).ids)
    assert found.vocab_size == original.get_vocab_size()
    assert found.eos_token_id == original.token_to_id("<|im_end|>")
    assert GgufTokenizer(metadata, "x").end_ids() == sorted(map(original.token_to_id, ("<|endoftext|>", "<|im_end|>")))
    ids = found.encode_messages([ChatMessage("user", "a <|im_end|> b")])
    assert ids.tolist().count(original.token_to_id("<|im_end|>")) == 1  # what a message spells is text


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("HelloWorld 12345 a/b\n", {"gpt-4o": ["Hello", "World", " ", "123", "45", " a", "/b", "\n"],
                                    "tekken": ["Hello", "World", " ", "1", "2", "3", "4", "5", " a", "/b", "\n"],
                                    "llama-bpe": ["HelloWorld", " ", "123", "45", " a", "/b", "\n"],
                                    "qwen2": ["HelloWorld", " ", "1", "2", "3", "4", "5", " a", "/b", "\n"],
                                    "smollm": ["HelloWorld", " ", "1", "2", "3", "4", "5", " a", "/", "b", "\n"],
                                    "gpt-2": ["HelloWorld", " 12345", " a", "/", "b", "\n"]}),
        ("it's IT'S", {"gpt-4o": ["it's", " IT'S"], "tekken": ["it", "'s", " IT", "'S"],
                       "llama-bpe": ["it", "'s", " IT", "'S"], "gpt-2": ["it", "'s", " IT", "'", "S"]}),
    ],
)  # fmt: skip
def test_a_pre_tokenizer_cuts_texts_as_its_model_was_trained(text, pieces):
    original = train(split(LLAMA3))
    for pre, expected in pieces.items():
        files = GgufTokenizer(metadata_of(original, pre), "x.gguf").files()
        cutter = Tokenizer.from_str(files["tokenizer.json"]).pre_tokenizer
        found = [text[start:end] for _, (start, end) in cutter.pre_tokenize_str(text)]
        assert found == expected, pre


@pytest.mark.parametrize(
    "pre, values, ends",
    [
        ("llama-bpe", {}, (True, False)),  # unless the file says otherwise
        ("qwen2", {}, (False, False)),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ("llama-bpe", {"add_bos_token": False}, (False, False)),
        ("llama-bpe", {"bos_token_id": None}, (False, False)),
        ("llama-bpe", {"bos_token_id": 1 << 20}, (False, False)),
    ],
)
def test_texts_begin_and_end_as_the_file_says(tmp_path, pre, values, ends):
    original = train(split(LLAMA3))
    bos = original.token_to_id("<|endoftext|>")
    found = opened(metadata_of(original, pre, **{"bos_token_id": bos} | values), tmp_path)
    inside = original.encode("The robot").ids
    expected = [bos] * ends[0] + inside + [original.token_to_id("<|im_end|>")] * ends[1]
    assert found.encode("The robot").tolist() == expected
    assert found.encode("The robot", add_special_tokens=False).tolist() == inside


# --- SentencePiece ------------------------------------------------------------------------------------------------

PIECES = ["▁", "t", "h", "e", "r", "o", "b", "i", "n", "s", "a", "\n"]
MERGED = ["he", "the", "▁the", "ro", "bo", "robo", "▁robo", "in", "▁▁", "▁▁▁▁", "ss", "▁ssss"]


def sentence_piece(prefix: bool, **values) -> dict:
    """Return the metadata of a SentencePiece BPE with byte fallback. ``prefix``: a space before every text."""
    controls = ["<unk>", "<s>", "</s>"]
    spaces = ["  ", "\n\n", "<tag>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*controls, *spaces, *byte_tokens, *MERGED[:-4], "▁▁▁▁", "s", "▁ssss", *[p for p in PIECES if p != "s"]]
    types = [2, 3, 3, 4, 4, 4, *[6] * 256]
    types += [1] * (len(tokens) - len(types))
    found = {
        "model": "llama", "pre": "default", "tokens": tokens, "token_type": np.array(types, dtype=np.int32),
        "scores": -np.arange(len(tokens), dtype=np.float32), "unknown_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "add_space_prefix": prefix,
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in (found | values).items()}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_tokens(tmp_path, prefix):
    metadata = sentence_piece(prefix)
    tokens = list(metadata["tokenizer.ggml.tokens"])
    found = opened(metadata, tmp_path)

    def encoded(text: str) -> list[str]:
        ids = found.encode(text)
        assert ids[0] == 1  # as SentencePiece vocabularies want it
        return [
            tokens[index].replace("  ", "▁▁") if not tokens[index].strip(" ") else tokens[index] for index in ids[1:]
        ]

    assert encoded("the robot") == (["▁the"] if prefix else ["the"]) + ["▁robo", "t"]
    assert encoded("in é") == (["▁"] if prefix else []) + ["in", "▁", "<0xC3>", "<0xA9>"]
    assert encoded("a\n\nb<tag>") == (["▁"] if prefix else []) + ["a", "\n\n"] + (["▁"] if prefix else []) + [
        "b",
        "<tag>",
    ]
    assert "▁▁" in encoded("a  b")
    for text in ("the robot é 🤖", "  a\n b  ", "<0x41> <s>"):
        ids = found.encode(text)[1:]
        assert found.fast.decode(ids.tolist(), skip_special_tokens=False) == text
    assert found.encode("<0x41>")[1:].tolist() != [tokens.index("<0x41>")]  # a spelled byte is text
    assert found.eos_token_id == 2


def test_a_file_without_a_tokenizer_has_no_files():
    assert GgufTokenizer({}, "x.gguf").files() == {} and GgufTokenizer({}, "x.gguf").end_ids() == []


@pytest.mark.parametrize(
    "changes, error, sentence",
    [
        ({"model": "t5"}, UnsupportedModelError, "kind 't5', which is not read; gpt2"),
        ({"model": 3}, CheckpointError, "tokenizer.ggml.model=3, expected a string"),
        ({"pre": "poro-chat"}, UnsupportedModelError, "'poro-chat', which is not read; codeshell, "),
        ({"pre": None}, UnsupportedModelError, "'default', which is not read"),
        ({"tokens": []}, CheckpointError, "has no tokens"),
        ({"tokens": None}, CheckpointError, "expected a list of strings"),
        ({"token_type": np.zeros(3, dtype=np.int32)}, CheckpointError, "whole numbers"),
        ({"merges": ["a b c"]}, CheckpointError, "a merge of 3 parts: 'a b c'"),
        ({"merges": ["a \u0100"]}, CheckpointError, "cannot be built"),
        ({"merges": None}, CheckpointError, "tokenizer.ggml.merges"),
        ({"eos_token_id": -1}, CheckpointError, "eos_token_id=-1"),
        ({"add_bos_token": 1}, CheckpointError, "add_bos_token=1, expected true or false"),
    ],
)
def test_a_vocabulary_that_is_none_is_told_in_one_sentence(changes, error, sentence):
    metadata = metadata_of(train(split(QWEN2)), "qwen2", **changes)
    with pytest.raises(error, match=sentence) as caught:
        tokenizer = GgufTokenizer(metadata, "x.gguf")
        tokenizer.end_ids()
        tokenizer.files()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_token_twice_and_a_piece_without_end_are_refused():
    metadata = metadata_of(train(split(QWEN2)), "qwen2")
    metadata["tokenizer.ggml.tokens"][9] = metadata["tokenizer.ggml.tokens"][8]
    with pytest.raises(CheckpointError, match="twice"):
        GgufTokenizer(metadata, "x.gguf").files()
    metadata = sentence_piece(True)
    metadata["tokenizer.ggml.tokens"][-1] = "a" * 5000
    with pytest.raises(CheckpointError, match="a token of 5000 characters"):
        GgufTokenizer(metadata, "x.gguf").files()
