"""The tokenizer of a GGUF file: a tokenizer.json and its settings from the metadata.

Two kinds are read: byte-level BPE (``gpt2``), whose pre-tokenizer the file names, and SentencePiece BPE (``llama``), of
which it has the pieces in the order of their merges. What the names stand for is in llama.cpp's llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine_core.errors import CheckpointError, UnsupportedModelError, first_line
from engine_core.models.fields import Fields

# Types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_PREFIX = "tokenizer.ggml."
_MAX_PIECE = 1024  # characters of a SentencePiece token; all places where it can be cut are looked at
_SPACE = "\u2581"
# Control tokens that end an answer, whatever the file names as its end: some name only the end of a text.
_ENDS = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<EOT>",
})  # fmt: skip


@dataclass(frozen=True)
class _PreTokenizer:
    """The rule by which a byte-level BPE cuts texts before its merges."""

    pattern: str = ""  # "": GPT-2's
    digits: bool = False  # each digit by itself, before that
    ignore_merges: bool = False  # a piece that is a token is that token, whatever the merges say
    begins: bool = False  # the beginning-of-sequence token is put before texts unless the file says otherwise
    nfc: bool = False  # texts are normalized


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PATH_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_PATH_REST}"
)
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_PATH_REST}"
_PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(),
    "phi-2": _PreTokenizer(),
    "smollm": _PreTokenizer(digits=True),
    "starcoder": _PreTokenizer(digits=True),
    "refact": _PreTokenizer(digits=True),
    "codeshell": _PreTokenizer(digits=True),
    "llama-bpe": _PreTokenizer(_LLAMA3, ignore_merges=True, begins=True),
    "llama3": _PreTokenizer(_LLAMA3, ignore_merges=True, begins=True),
    "llama-v3": _PreTokenizer(_LLAMA3, ignore_merges=True, begins=True),
    "smaug-bpe": _PreTokenizer(_LLAMA3),
    "dbrx": _PreTokenizer(_LLAMA3),
    "qwen2": _PreTokenizer(_QWEN2, nfc=True),
    "deepseek-r1-qwen": _PreTokenizer(_QWEN2),
    "megrez": _PreTokenizer(_QWEN2),
    "gpt-4o": _PreTokenizer(_GPT4O),
    "tekken": _PreTokenizer(_TEKKEN, ignore_merges=True, begins=True),
}


class GgufTokenizer:
    """``label``: how messages name the file. Raises CheckpointError or UnsupportedModelError for a vocabulary that is
    not read; one that is missing is ``is_there``."""

    def __init__(self, metadata: Mapping[str, Any], label: str) -> None:
        self._fields = Fields(metadata, label)
        self._metadata, self._label = metadata, label
        self.is_there = f"{_PREFIX}model" in metadata
        if not self.is_there:
            return
        self._kind = self._fields.text(f"{_PREFIX}model")
        if self._kind not in ("gpt2", "llama"):
            raise UnsupportedModelError(
                f"{label} has a tokenizer of the kind {self._kind[:60]!r}, which is not read; gpt2 (byte-level BPE) "
                "and llama (SentencePiece BPE) are."
            )
        self._tokens = self._texts("tokens")
        if not self._tokens:
            raise CheckpointError(f"{label} has no tokens.")
        self._types = self._token_types()

    # --- metadata ---------------------------------------------------------------------------------------

    def _texts(self, name: str) -> list[str]:
        found = self._fields.texts(f"{_PREFIX}{name}")
        if found is None:
            self._fields.refuse(f"{_PREFIX}{name}", "a list of strings")
        return found or []

    def _token_types(self) -> list[int]:
        values = self._metadata.get(f"{_PREFIX}token_type")
        if values is None:
            return [_NORMAL] * len(self._tokens)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu" or len(values) != len(self._tokens):
            self._fields.refuse(f"{_PREFIX}token_type", f"{len(self._tokens)} whole numbers")
        return values.tolist()

    def _special(self, name: str) -> int | None:
        """Return the id of a special token, or None."""
        key = f"{_PREFIX}{name}_token_id"
        if key not in self._fields:
            return None
        found = self._fields.count(key)
        return found if found < len(self._tokens) else None

    def end_ids(self) -> list[int]:
        """Return the ids that end an answer, ascending: those the file names, and control tokens known to."""
        if not self.is_there:
            return []
        found = {index for name in ("eos", "eot", "eom") if (index := self._special(name)) is not None}
        controls = (index for index, kind in enumerate(self._types) if kind == _CONTROL)
        return sorted(found | {index for index in controls if self._tokens[index] in _ENDS})

    # --- files ------------------------------------------------------------------------------------------

    def files(self) -> dict[str, str]:
        """Return the files of a checkpoint's tokenizer: name → text; none without a tokenizer."""
        if not self.is_there:
            return {}
        try:
            tokenizer = self._byte_level() if self._kind == "gpt2" else self._sentence_piece()
            self._add_tokens(tokenizer)
            self._add_ends(tokenizer)
            text = tokenizer.to_str()
        except (CheckpointError, UnsupportedModelError):
            raise
        except Exception as error:  # the library raises whatever its parsers raise
            raise CheckpointError(
                f"{self._label} has a tokenizer that cannot be built ({first_line(error)})."
            ) from None
        return {"tokenizer.json": text, "tokenizer_config.json": json.dumps(self._config(), ensure_ascii=False)}

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 30,
        }
        for ours, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            if (index := self._special(name)) is not None:
                config[f"{ours}_token"] = self._tokens[index]
        if "tokenizer.chat_template" in self._fields:
            config["chat_template"] = self._fields.text("tokenizer.chat_template")
        return config

    def _vocabulary(self) -> dict[str, int]:
        """Token → id, without the unused ones at the end, which fill up the embedding."""
        count = len(self._tokens)
        while count and self._types[count - 1] == _UNUSED:
            count -= 1
        found = {token: index for index, token in enumerate(self._tokens[:count])}
        if len(found) < count:
            seen: set[str] = set()
            twice = next(token for token in self._tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{self._label} has the token {twice[:60]!r} twice.")
        return found

    def _byte_level(self):
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

        name = self._fields.text(f"{_PREFIX}pre", "default")
        if name not in _PRE_TOKENIZERS:
            raise UnsupportedModelError(
                f"{self._label} has the pre-tokenizer {name[:60]!r}, which is not read; "
                f"{', '.join(sorted(_PRE_TOKENIZERS))} are."
            )
        kind = _PRE_TOKENIZERS[name]
        merges = [tuple(merge.split(" ")) for merge in self._texts("merges")]
        if odd := next((merge for merge in merges if len(merge) != 2), None):
            raise CheckpointError(f"{self._label} has a merge of {len(odd)} parts: {' '.join(odd)[:60]!r}.")
        model = models.BPE(vocab=self._vocabulary(), merges=merges, ignore_merges=kind.ignore_merges)
        tokenizer = Tokenizer(model)
        steps = [pre_tokenizers.Digits(individual_digits=True)] if kind.digits else []
        if kind.pattern:
            steps.append(pre_tokenizers.Split(Regex(kind.pattern), "isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not kind.pattern))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        if kind.nfc:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        return tokenizer

    def _sentence_piece(self):
        from tokenizers import Tokenizer, decoders, models, normalizers

        self._spell_spaces()
        vocabulary = self._vocabulary()
        has_bytes = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        unknown = self._special("unknown")
        model = models.BPE(
            vocab=vocabulary, merges=self._merges(vocabulary), fuse_unk=True, byte_fallback=has_bytes,
            unk_token=None if unknown is None else self._tokens[unknown],
        )  # fmt: skip
        tokenizer = Tokenizer(model)
        begins = self._fields.flag(f"{_PREFIX}add_space_prefix", True)
        steps = [normalizers.Prepend(_SPACE)] if begins else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
        restored = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(restored + ([decoders.Strip(" ", 1, 0)] if begins else []))
        return tokenizer

    def _spell_spaces(self) -> None:
        """Tokens of several spaces are pieces like others, which GGUF has with plain spaces."""
        for index, token in enumerate(self._tokens):
            if " " in token and self._types[index] == _USER_DEFINED and not token.strip(" "):
                self._tokens[index] = _SPACE * len(token)
                self._types[index] = _NORMAL

    def _merges(self, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
        """The merges that make each piece of two others, in the order of the pieces, which is that of training.

        No merge makes a control or byte token: no text is to be one.
        """
        plain = {token for token, index in vocabulary.items() if self._types[index] in (_NORMAL, _USER_DEFINED)}
        found = []
        for token in self._tokens[: len(vocabulary)]:
            if token not in plain or len(token) < 2:
                continue
            if len(token) > _MAX_PIECE:
                raise CheckpointError(f"{self._label} has a token of {len(token)} characters: {token[:20]!r}….")
            found += [
                (head, tail)
                for at in range(len(token) - 1, 0, -1)  # the longest head first
                if (head := token[:at]) in plain and (tail := token[at:]) in plain
            ]
        return found

    def _add_tokens(self, tokenizer) -> None:
        """Make control tokens special, and user-defined ones tokens wherever a text spells them."""
        from tokenizers import AddedToken

        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        added = [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(self._tokens, self._types)
            if token and token in vocabulary and (kind in (_CONTROL, _USER_DEFINED))
        ]
        unknown = self._special("unknown")
        if self._kind == "llama" and unknown is not None and self._types[unknown] == _UNKNOWN:
            added.append(AddedToken(self._tokens[unknown], normalized=False, special=True))
        tokenizer.add_tokens(added)

    def _add_ends(self, tokenizer) -> None:
        """Put the beginning and the end of a sequence around texts, where the model wants them."""
        from tokenizers import processors

        kind = _PRE_TOKENIZERS.get(str(self._metadata.get(f"{_PREFIX}pre")))
        by_default = kind.begins if self._kind == "gpt2" and kind is not None else self._kind == "llama"
        ends = []
        for name, default in (("bos", by_default), ("eos", False)):
            index = self._special(name)
            wanted = self._fields.flag(f"{_PREFIX}add_{name}_token", default)
            ends.append(self._tokens[index] if wanted and index is not None else "")
        bos, eos = ends
        if not bos and not eos:
            return

        def around(text: str, number: int) -> list[str]:
            # The grammar of a template has colons: tokens are given by their names in ``special_tokens``.
            return [*(["<bos>"] if bos else []), f"{text}:{number}", *(["<eos>"] if eos else [])]

        known = [("<bos>", bos), ("<eos>", eos)]
        template = processors.TemplateProcessing(
            single=" ".join(around("$A", 0)),
            pair=" ".join(around("$A", 0) + around("$B", 1)),
            special_tokens=[
                {"id": name, "ids": [self._tokens.index(token)], "tokens": [token]} for name, token in known if token
            ],
        )
        if self._kind == "gpt2":
            template = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        tokenizer.post_processor = template
