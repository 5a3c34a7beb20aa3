"""The tokens a reduced vocabulary has to keep, whatever the texts: without them some answer could not be written.

Every character can still be written (the tokenizer's bytes or alphabet), every JSON value too, and everything the
model's own format uses: special tokens, the chat template, tags of tools and reasoning.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from engine_core.errors import InvalidRequestError
from engine_core.text.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_TAG_WORDS = (
    "think thinking thought reasoning reflection scratchpad answer tool tools tool_call tool_calls tool_response "
    "tool_result tool_output tool_code function functions function_call function_response code image audio"
).split()
_TAG = re.compile(rf"</?(?:{'|'.join(_TAG_WORDS)})>|<\|[a-z_]+\|>|\[/?[A-Z]+(?:_[A-Z]+)*\]")
# Punctuation of JSON in the runs that serializers write, a blank or a line break at either end.
_JSON = re.compile(r"[ \n]?[{}\[\]\":,]{1,5}[ \n]?")
_JSON_WORDS = {"true", "false", "null"}
_BYTE_LEVEL, _BYTE_FALLBACK, _CHARACTERS = "byte level", "byte fallback", "characters"


@dataclass(frozen=True)
class TokenTexts:
    """Return the text that each id writes. ``kind``: how the tokenizer writes an unknown character."""

    texts: dict[int, str]  # U+FFFD where a token is a part of a character
    byte_ids: frozenset[int]  # tokens of one byte
    unknown_id: int  # what the model falls back to; -1: it needs nothing
    kind: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenTexts:
        values = json.loads(tokenizer.fast.to_str())
        vocabulary = {index: token for token, index in tokenizer.fast.get_vocab(with_added_tokens=True).items()}
        added, unknown_id = tokenizer.special_ids, _unknown_id(values["model"])
        if _has_byte_level(values):
            by_character = _byte_level_alphabet()
            bytes_of = {
                index: bytes(by_character[character] for character in token)
                for index, token in vocabulary.items()
                if index not in added and all(character in by_character for character in token)
            }
            texts = vocabulary | {index: raw.decode("utf-8", "replace") for index, raw in bytes_of.items()}
            byte_ids = frozenset(index for index, raw in bytes_of.items() if len(raw) == 1)
            return cls(texts, byte_ids, unknown_id, _BYTE_LEVEL)
        continuing = values["model"].get("continuing_subword_prefix") or ""
        texts = {index: token.removeprefix(continuing).replace("▁", " ") for index, token in vocabulary.items()}
        byte_ids = frozenset(index for index, token in vocabulary.items() if _BYTE.fullmatch(token))
        return cls(texts, byte_ids, unknown_id, _BYTE_FALLBACK if len(byte_ids) == 256 else _CHARACTERS)


def _unknown_id(model: dict) -> int:
    """Return the unknown token of a tokenizer.json's model; Unigram names the id, the others the token."""
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    vocabulary = model.get("vocab")
    return int(vocabulary.get(model.get("unk_token"), -1)) if isinstance(vocabulary, dict) else -1


def _has_byte_level(values: dict) -> bool:
    """Return True for a byte-level tokenizer.json, whose pre-tokenizers and decoders may be nested sequences."""

    def types(part: object) -> Iterator[str]:
        if isinstance(part, dict):
            yield str(part.get("type"))
            for nested in (*(part.get("pretokenizers") or ()), *(part.get("decoders") or ())):
                yield from types(nested)

    return "ByteLevel" in (*types(values.get("pre_tokenizer")), *types(values.get("decoder")))


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    A printable one stands for itself, those from U+0100 on for the others, in order (the table of GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def required_ids(
    tokenizer: Tokenizer,
    tokens: TokenTexts,
    vocab_size: int,
    eos_ids: Iterable[int],
    role_ids: Iterable[int],
    keep: Iterable[int] = (),
) -> dict[str, frozenset[int]]:
    """Reason → ids, each id under the first reason it has.

    ``eos_ids``: end-of-sequence ids of the checkpoint's configurations; ``role_ids``: their BOS and PAD;
    ``keep``: the user's own. Only ids of the tokenizer are kept (padding rows of the embedding are none), but for
    ``eos_ids``, which the engine waits for; none beyond ``vocab_size``.
    """
    known = tokens.texts.keys()
    found = {
        "end of sequence": {*eos_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])},
        "special and added": known & {*tokenizer.special_ids, *role_ids, tokens.unknown_id},
        "chat template": known & template_ids(tokenizer),
        "bytes and characters": known & _alphabet(tokens),
        "tags": {index for index, text in tokens.texts.items() if _TAG.fullmatch(text.strip())},
        "JSON and digits": {index for index, text in tokens.texts.items() if _is_json(text)},
        "asked for": known & set(keep),
    }
    taken: set[int] = set()
    reasons = {}
    for reason, ids in found.items():
        ids = {index for index in ids if 0 <= index < vocab_size} - taken
        taken |= ids
        reasons[reason] = frozenset(ids)
    return reasons


def _alphabet(tokens: TokenTexts) -> set[int]:
    """Return the ids with which any character can be written.

    All bytes, and with a byte fallback also the printable ASCII characters, which have tokens of their own there.
    Without bytes only a character's own token can write it, so each of those stays.
    """
    if tokens.kind == _BYTE_LEVEL:
        return set(tokens.byte_ids)
    singles = {index: text.removeprefix(" ") or text for index, text in tokens.texts.items()}
    singles = {index: text for index, text in singles.items() if len(text) == 1}
    if tokens.kind == _CHARACTERS:
        return set(singles)
    return set(tokens.byte_ids) | {index for index, text in singles.items() if text.isascii()}


def _is_json(text: str) -> bool:
    word = text.removeprefix(" ")
    return bool(_JSON.fullmatch(text)) or word in _JSON_WORDS or (len(word) == 1 and word.isascii() and word.isdigit())


def template_ids(tokenizer: Tokenizer) -> set[int]:
    """Return every id the chat template emits around contents: each role, with and without tools, thinking and the
    prompt for an answer. Calls that a template refuses are passed over."""
    if not tokenizer.has_chat_template:
        return set()
    ids: set[int] = set()
    for conversation in _conversations():
        for prompt in (True, False):
            for variables in ({}, {"tools": [_TOOL]}, {"enable_thinking": False}, {"enable_thinking": True}):
                with contextlib.suppress(InvalidRequestError):
                    text = tokenizer.apply_template(conversation, add_generation_prompt=prompt, **variables)
                    ids.update(tokenizer.encode(text, add_special_tokens=False).tolist())
    return ids


_TOOL = {
    "type": "function",
    "function": {
        "name": "0",
        "description": "0",
        "parameters": {"type": "object", "properties": {"0": {"type": "string"}}, "required": ["0"]},
    },
}


def _conversations() -> Iterator[list[dict]]:
    """Placeholders are single digits, which are kept anyway: nothing but the template's own tokens comes in."""

    def said(*roles: str) -> list[dict]:
        return [{"role": role, "content": "0"} for role in roles]

    call: Sequence[dict] = [{"id": "000000000", "type": "function", "function": {"name": "0", "arguments": {"0": "0"}}}]
    for roles in (
        ("user",),
        ("system", "user"),
        ("user", "assistant"),
        ("user", "assistant", "user"),
        ("system", "user", "assistant", "user"),
        ("system",),
        ("assistant",),
        ("tool",),
        ("developer", "user"),
        ("user", "assistant", "tool"),
    ):
        yield said(*roles)
    calling = {"role": "assistant", "content": "", "tool_calls": call}
    answer = {"role": "tool", "name": "0", "tool_call_id": "000000000", "content": "0"}
    yield [*said("user"), calling]
    yield [*said("user"), calling, answer]
    yield [*said("user"), calling, answer, *said("assistant")]
    yield [*said("user"), {"role": "assistant", "content": "0", "reasoning_content": "0"}]
