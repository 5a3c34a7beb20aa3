"""Text to ids and back: the Hugging Face tokenizer and chat template of an engine directory.

Thread-safe: encoding and templating are pure. ``transformers`` renders the template (in its sandbox); ids come
from the ``tokenizers`` library underneath, without the state that ``transformers`` keeps for padding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine_core.errors import EngineDirectoryError, InvalidRequestError
from engine_core.request import ChatMessage

_CACHED_SYSTEM_PROMPTS = 32


class Tokenizer:
    """Raises EngineDirectoryError if ``directory`` has no usable tokenizer.json."""

    def __init__(self, directory: Path) -> None:
        # It would advise installing PyTorch, which nothing here needs.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import PreTrainedTokenizerFast

        if not (directory / "tokenizer.json").is_file():
            raise EngineDirectoryError(f"{directory} has no tokenizer.json; build the engine again.")
        try:
            self._hf = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # the library raises whatever its parsers raise
            raise EngineDirectoryError(f"The tokenizer in {directory} cannot be loaded ({error}).") from error
        self.fast = self._hf.backend_tokenizer
        self.fast.no_padding()
        self.fast.no_truncation()
        self.vocab_size = self.fast.get_vocab_size(with_added_tokens=True)
        # No text of n characters can have fewer than n / max_token_chars tokens.
        self.max_token_chars = max(len(token) for token in self.fast.get_vocab(with_added_tokens=True))
        self._system_prefix = lru_cache(maxsize=_CACHED_SYSTEM_PROMPTS)(self._find_system_prefix)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    @property
    def eos_token_id(self) -> int | None:
        return self._hf.eos_token_id

    @property
    def special_ids(self) -> frozenset[int]:
        """Every added token and every token with a role: BOS, EOS, PAD, UNK and the like."""
        return frozenset(self.fast.get_added_tokens_decoder()) | frozenset(self._hf.all_special_ids)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> np.ndarray:
        """``text`` as int32 [n]; with ``add_special_tokens`` the model's BOS and the like are put around it."""
        return np.array(self.fast.encode(text, add_special_tokens=add_special_tokens).ids, dtype=np.int32)

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The conversation in the model's chat template, ready for the answer.

        Raises InvalidRequestError if there is no template or it refuses the conversation.
        """
        return self.apply_template([{"role": message.role, "content": message.content} for message in messages])

    def apply_template(self, conversation: list[dict], *, add_generation_prompt: bool = True, **variables) -> str:
        """The same of messages as the template knows them, tool calls included; ``variables``: what else it reads."""
        if not self.has_chat_template:
            raise InvalidRequestError("This model has no chat template; send a raw prompt instead of messages.")
        try:
            return self._hf.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:  # templates call raise_exception, and fail in ways of their own
            raise InvalidRequestError(f"The model's chat template refuses this conversation: {error}") from error

    def encode_messages(self, messages: Sequence[ChatMessage]) -> np.ndarray:
        """The templated conversation as int32 [n]. Raises InvalidRequestError as ``render`` does."""
        return self.encode(self.render(messages), add_special_tokens=False)

    def system_prefix(self, system_prompt: str) -> np.ndarray:
        """The ids, int32 [n], that every conversation with this system prompt starts with.

        Found by comparing conversations on token ids, so that no token across the boundary is cut. Empty when the
        template takes no system prompt.
        """
        return self._system_prefix(system_prompt)

    def _find_system_prefix(self, system_prompt: str) -> np.ndarray:
        try:
            first, second = (
                self.encode_messages((ChatMessage("system", system_prompt), ChatMessage("user", user)))
                for user in ("a", "0 b")
            )
        except InvalidRequestError:
            return np.empty(0, dtype=np.int32)
        prefix = first[: common_prefix_length(first, second)].copy()
        prefix.flags.writeable = False
        return prefix

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens."""
        return self.fast.decode(list(ids), skip_special_tokens=True)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each id on its own, special tokens by name; U+FFFD where it is a part of a character."""
        return [self.fast.decode([int(token_id)], skip_special_tokens=False) for token_id in ids]


def common_prefix_length(first: np.ndarray, second: np.ndarray) -> int:
    """How many leading elements two int arrays share."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
