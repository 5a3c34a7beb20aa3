"""The tokenizer of the demo model: byte-level BPE, digits one by one, spaces on their own, plan fragments whole.

A space is a token of its own, so that a word has the same tokens in "the red cup" as in ``"red cup"``: the model copies
spans, and a copy that changes its tokens is harder to learn. A fragment such as ``"},{"do":"pick","object":"`` is one
pre-token and thereby soon one token, so a step of a plan is little more than its arguments.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, SYSTEM, USER, ASSISTANT, TOOL, END = SPECIAL = (
    "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>",
)  # fmt: skip
MAX_LENGTH = 2048
_STEP = r'\{"do":"[a-z_]+"(?:,"[a-z]+":"?)?'
_PATTERN = "|".join((
    rf'\{{"plan":\[{_STEP}',  # the start of a plan
    r'\{"(?:refuse|ask)":"',
    rf'"?\}},{_STEP}',  # from one step to the next
    r'","[a-z]+":"',  # from one argument to the next
    r'"?\}\]\}|"\}',  # the end
    r"\p{L}[\p{L}\p{M}]*|\p{N}| |\s+|[^\s\p{L}\p{N}\p{M}]|\p{M}+",
))  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str, special: tuple[str, ...]) -> Tokenizer:
    """Return a byte-level BPE whose tokens stay within the matches of ``pattern``; ``special`` are its first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    return train_bpe(texts, vocab_size, _PATTERN, SPECIAL)


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers reads them."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "pad_token": PAD,
        "eos_token": END,
        "bos_token": None,
        "unk_token": None,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT, TOOL],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def render(messages: Iterable[tuple[str, str]]) -> list[tuple[str, bool]]:
    """The chat template in pieces: (text, whether the model is to produce it)."""
    pieces = []
    for role, content in messages:
        pieces.append((f"<|{role}|>", False))
        pieces.append((f"{content}{END}", role == "assistant"))
    return pieces
