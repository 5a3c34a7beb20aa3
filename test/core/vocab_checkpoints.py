"""Tiny random checkpoints with tokenizers of each kind, made here, for the tests of reduced vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.safetensors_file import write_safetensors
from engine_core.models.reader import read_spec

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}Instructions: {{ messages[0]['content'] }}\n{% endif %}"
    "{% for m in messages %}{% if m['role'] in ('user', 'tool') %}<|user|>{{ m['content'] }}<|end|>"
    "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if tools %}Tools: {{ tools | length }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = """The robot takes the red cup from the kitchen table and brings it to Anna, who waits in the living room.
{"plan": [{"do": "navigate", "to": "kitchen"}, {"do": "pick", "object": "red cup"}], "ok": true, "n": 12}
Überall grüßen freundliche Menschen: où est la cuisine? <think>Where?</think> <tool_call>{"a":"b"}</tool_call>
Numbers 0 1 2 3 4 5 6 7 8 9 and 10 20 30; brackets [] {} "quoted", null, false.
"""


def byte_level():
    """BPE over bytes, as of GPT-2, Llama 3 and Qwen."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    return fast


def byte_fallback():
    """SentencePiece's BPE with a byte fallback, as of Llama 2, Mistral and Gemma."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator([TEXT.replace("ü", "u")] * 4, trainers.BpeTrainer(vocab_size=250, show_progress=False))
    values = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token, _ in sorted(values["vocab"].items(), key=lambda item: item[1])]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in values["merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast


def unigram():
    """SentencePiece's Unigram without bytes: a character without a token of its own cannot be written."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.Unigram())
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=180, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    fast.train_from_iterator([TEXT] * 4, trainer)
    return fast


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "unigram": unigram}


def write_checkpoint(directory: Path, kind: str, *, padding: int = 7, tied: bool = True, **config) -> Path:
    """A Llama of random weights; its embedding has ``padding`` rows more than the tokenizer has tokens."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    fast = KINDS[kind]()
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    hf = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    hf.chat_template = TEMPLATE
    hf.save_pretrained(str(directory))
    values = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=fast.get_vocab_size() + padding,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        hidden_act="silu",
        tie_word_embeddings=tied,
        eos_token_id=fast.token_to_id("</s>"),
        bos_token_id=fast.token_to_id("<s>"),
    )
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [fast.token_to_id("</s>"), fast.token_to_id("<|end|>")]})
    )
    target = directory / "model.safetensors"
    write_safetensors(target, {} if tied else {"lm_head.weight": np.zeros(0, np.float32)})
    shapes = read_spec(Checkpoint(directory)).shapes()
    rng = np.random.default_rng(3)
    weights = {
        name: np.ones(shape, np.float32) if "norm" in name else 0.1 * rng.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }
    write_safetensors(target, weights)
    return directory


def write_chats(path: Path, chats) -> Path:
    """``chats``: lists of (role, content)."""
    lines = [json.dumps({"messages": [{"role": role, "content": content} for role, content in c]}) for c in chats]
    path.write_text("".join(line + "\n" for line in lines))
    return path
