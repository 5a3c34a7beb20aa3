"""The tokens of a model as the grammar library may use them, and masks of tokens by what they write."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine_core.serving.json_schema import MAX_DIGITS

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from engine_core.text.tokenizer import Tokenizer

_LEADING_DIGITS = re.compile(rb"[0-9.]*")
_EXPONENT = re.compile(rb"[0-9.]*[eE]")
# A number that begins inside the token, outside every string, and has an exponent or too many digits.
_UNBOUNDED = re.compile(rb'[^"]*(?:[0-9.][eE]|[0-9.]{%d})' % (MAX_DIGITS + 2))
# Between two members of an object, a whole key.
_WHOLE_KEY = re.compile(rb'[\s,]*"((?:[^"\\]|\\.)*)"', re.DOTALL)


class TokenTable:
    """The bytes of every token as the grammar may use them: none for special tokens and for those that are not kept.

    Implements what ``llguidance.TokenizerWrapper`` asks for. A text that the grammar forces is spelled as the model's
    own tokenizer does where that gives these very bytes, and otherwise by the longest tokens that fit: normalizers,
    special tokens and a reduced vocabulary cannot change it. What no token writes becomes the id ``unspelled``, a token
    without text: the library takes a text that lacks some of its bytes for whole.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: list[int], kept_ids: np.ndarray | None) -> None:
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer as FastTokenizer

        text = tokenizer.fast.to_str()
        base = LLTokenizer(text, eos_token=eos or None)
        special = {i for i in tokenizer.special_ids if i < vocab_size}
        special |= {i for i in range(min(vocab_size, base.vocab_size)) if base.is_special_token(i)}
        allowed = np.ones(vocab_size, dtype=bool)
        if kept_ids is not None:
            allowed[:] = False
            allowed[kept_ids] = True
        name_of = {i: name for name, i in tokenizer.fast.get_vocab(with_added_tokens=True).items()}
        # Ids without a token, at the end and between: the library gives them a made-up text.
        allowed[[i for i in range(vocab_size) if i not in name_of]] = False
        self._eos = [i for i in eos if i < vocab_size]
        self.eos_token_id = self._eos[0] if self._eos else max(0, vocab_size - 1)
        self.bos_token_id = None
        self.special_token_ids = sorted(special)
        self._bytes = [base.decode_bytes([i]) if allowed[i] and i not in special else b"" for i in range(vocab_size)]
        self.tokens = [
            name_of.get(i, f"<{i}>").encode() if i in special else value for i, value in enumerate(self._bytes)
        ]
        self._vocab_size = vocab_size
        self._fast = FastTokenizer.from_str(text)
        self._fast.no_padding()
        self._fast.no_truncation()
        self._fast.encode_special_tokens = True
        self._by_bytes = {value: i for i, value in reversed(list(enumerate(self._bytes))) if value}
        silent = [i for i, value in enumerate(self._bytes) if not value and i not in special]
        self.unspelled = next(iter([*silent, *sorted(special - set(self._eos))]), self.eos_token_id)
        self._longest = max(map(len, self._by_bytes), default=1)
        self._lead = np.zeros(vocab_size, dtype=np.int32)  # digits a token begins with
        self._exponent = np.zeros(vocab_size, dtype=bool)  # it goes on with an exponent
        for i, value in enumerate(self._bytes):
            if value[:1] and value[:1] in b"0123456789.eE":
                self._lead[i] = len(_LEADING_DIGITS.findall(value)[0].replace(b".", b""))
                self._exponent[i] = _EXPONENT.match(value) is not None
        self._longer: dict[int, np.ndarray] = {}
        self._sorted, self._sorted_ids = [], []  # by what they write
        for value, i in sorted((value, i) for i, value in enumerate(self._bytes) if b'"' in value):
            self._sorted.append(value)
            self._sorted_ids.append(i)
        self._keys: dict[bytes, list[int]] = {}  # of tokens that hold a whole key
        for value, i in zip(self._sorted, self._sorted_ids):
            if match := _WHOLE_KEY.match(value):
                self._keys.setdefault(match.group(1), []).append(i)
        # uint32 mask: tokens that write text, and those that end an answer
        self.textual = self._mask_of_ids([*(i for i, value in enumerate(self._bytes) if value), *self._eos])
        # uint32 mask: tokens in which a number begins that is too long already, or has an exponent
        self.unbounded = self._mask_of(np.array([_UNBOUNDED.match(value) is not None for value in self._bytes]))

    def ll_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(self), n_vocab=self._vocab_size, eos_token=self._eos or None)

    def bytes_of(self, token_id: int) -> bytes:
        return self._bytes[token_id]

    def longer_than(self, digits: int) -> np.ndarray:
        """Return the mask, uint32, of the tokens that begin with more digits, or go on with an exponent."""
        if digits not in self._longer:
            self._longer[digits] = self._mask_of((self._lead > digits) | self._exponent)
        return self._longer[digits]

    def beginning_with(self, text: bytes) -> np.ndarray | None:
        """Return the mask, uint32, of the tokens that begin with ``text``; None if there are none.

        ``text`` has a quotation mark.
        """
        start = bisect.bisect_left(self._sorted, text)
        end = bisect.bisect_left(self._sorted, text[:-1] + bytes((text[-1] + 1,)), start)
        return self._mask_of_ids(self._sorted_ids[start:end]) if end > start else None

    def beginning_with_key(self, key: bytes) -> np.ndarray | None:
        """Return the mask, uint32, of the tokens that open a string outside of one and write the whole ``key``."""
        ids = self._keys.get(key)
        return None if ids is None else self._mask_of_ids(ids)

    def _mask_of_ids(self, ids: Sequence[int]) -> np.ndarray:
        chosen = np.array(ids, dtype=np.int64)
        mask = np.zeros((self._vocab_size + 31) // 32, dtype=np.uint32)
        np.bitwise_or.at(mask, chosen // 32, np.uint32(1) << (chosen % 32).astype(np.uint32))
        return mask

    def _mask_of(self, chosen: np.ndarray) -> np.ndarray:
        bits = np.zeros((self._vocab_size + 31) // 32 * 32, dtype=np.uint8)
        bits[: self._vocab_size] = chosen
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def __call__(self, text: bytes | str) -> list[int]:
        """Return the ids that spell ``text`` byte for byte."""
        raw = text.encode() if isinstance(text, str) else bytes(text)
        try:
            ids = self._fast.encode(raw.decode("utf-8"), add_special_tokens=False).ids
        except UnicodeDecodeError:
            ids = []
        if ids and all(i < self._vocab_size for i in ids) and b"".join(self._bytes[i] for i in ids) == raw:
            return ids
        ids, start = [], 0
        while start < len(raw):
            for end in range(min(len(raw), start + self._longest), start, -1):
                if (token_id := self._by_bytes.get(raw[start:end])) is not None:
                    ids.append(token_id)
                    start = end
                    break
            else:
                return [*ids, self.unspelled]  # no token has this byte
        return ids
