"""Text to ids and back: the Hugging Face tokenizer and chat template of an engine directory.

Thread-safe: encoding and templating are pure. ``transformers`` reads the files and ``template`` renders; ids come
from the ``tokenizers`` library underneath, without the state that ``transformers`` keeps for padding.

Special tokens that a message's content spells are plain text: nobody can forge a turn. They are split by a mark that
is in no text before the template is rendered, and what is between the marks is tokenized piece by piece.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine_core.errors import EngineDirectoryError, InvalidRequestError, first_line
from engine_core.request import ChatMessage
from engine_core.text.template import ChatTemplate

_CACHED_SYSTEM_PROMPTS = 32
_MAX_TOKEN_ID = (1 << 24) - 1  # ``tokenizers`` makes tables of the largest id, and aborts above 2**31
_LONG_NUMBER = re.compile(rb":\s*-?\d{8,}")
_MARKS = range(0xE000, 0xF900)  # private use
_SYSTEM_PROBE = "edgellm system probe"

_compiled_template = lru_cache(maxsize=8)(ChatTemplate)


class Tokenizer:
    """Raises EngineDirectoryError if ``directory`` has no usable tokenizer.json."""

    def __init__(self, directory: Path) -> None:
        # It would advise installing PyTorch, which nothing here needs.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import PreTrainedTokenizerFast

        if not (directory / "tokenizer.json").is_file():
            raise EngineDirectoryError(f"{directory} has no tokenizer.json; build the engine again.")
        _check_token_ids(directory / "tokenizer.json")
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
        self._find_controls()
        self.folds_system = self.has_chat_template and self._refuses_system()

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

        A template without system messages gets their text before the next user message.
        Raises InvalidRequestError if there is no template or it refuses the conversation.
        """
        if self.folds_system:
            messages = _fold_system(messages)
        return self.apply_template([{"role": message.role, "content": message.content} for message in messages])

    def apply_template(self, conversation: list[dict], *, add_generation_prompt: bool = True, **variables) -> str:
        """Do so with messages as the template knows them, tool calls included; ``variables``: what else it reads."""
        if not self.has_chat_template:
            raise InvalidRequestError("This model has no chat template; send a raw prompt instead of messages.")
        try:
            source = self._hf.get_chat_template(None, variables.get("tools"))
            defaults = {"tools": None, "documents": None, **self._hf.special_tokens_map}
            return _compiled_template(source).render(
                messages=conversation, add_generation_prompt=add_generation_prompt, **{**defaults, **variables}
            )
        except Exception as error:  # templates call raise_exception, and fail in ways of their own
            reason = first_line(error)[:300]
            raise InvalidRequestError(f"The model's chat template refuses this conversation: {reason}.") from error

    def encode_messages(self, messages: Sequence[ChatMessage], *, allow_special: bool = False) -> np.ndarray:
        """The templated conversation as int32 [n]. Raises InvalidRequestError as ``render`` does.

        Special tokens spelled in contents are plain text, or with ``allow_special`` control tokens.
        """
        mark = ""
        if not allow_special:
            messages, mark = self._marked(messages)
        text = self.render(messages)
        if not mark:
            return self.encode(text, add_special_tokens=False)
        parts = [self.encode(part, add_special_tokens=False) for part in text.split(mark) if part]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def _find_controls(self) -> None:
        """Notes the control tokens: the special ones, and added ones that the chat template writes (its role tags).

        The latter stay tokens in an assistant's message: what a model wrote (<think>) can be sent back to it.
        """
        added = self.fast.get_added_tokens_decoder()
        template = self._hf.chat_template
        source = template if isinstance(template, str) else json.dumps(template or "", ensure_ascii=False)
        special = {token.content for token in added.values() if token.special and len(token.content) > 1}
        written = {t.content for t in added.values() if len(t.content) > 1 and t.content in source}
        self._special = _any_of(special)
        self._control = _any_of(special | written)
        # These are found in the normalized text, so their spellings cannot be listed.
        self._normalized_ids = frozenset(
            index for index, t in added.items() if t.normalized and (t.special or t.content in written)
        )

    def _marked(self, messages: Sequence[ChatMessage]) -> tuple[Sequence[ChatMessage], str]:
        """Return the messages with a mark inside each control token they spell, and the mark; "" if they spell none."""
        cuts = [self._cuts(message) for message in messages]
        if not any(cuts):
            return messages, ""
        contents = "".join(message.content for message in messages)
        used = set(contents)
        mark = next((chr(code) for code in _MARKS if chr(code) not in used), "")
        if not mark:
            raise InvalidRequestError("The messages use every private-use character; leave some of them out.")
        marked = []
        for message, places in zip(messages, cuts):
            ends = [*sorted(places), len(message.content)]
            parts = [message.content[start:end] for start, end in zip([0, *ends], ends)]
            marked.append(ChatMessage(message.role, mark.join(parts)))
        return marked, mark

    def _cuts(self, message: ChatMessage) -> set[int]:
        """Return where ``message`` is cut: behind the first character of each control token, overlapping ones too."""
        pattern = self._special if message.role == "assistant" else self._control
        cuts = {match.start() + 1 for match in pattern.finditer(message.content)} if pattern is not None else set()
        if self._normalized_ids:
            found = self.fast.encode(message.content, add_special_tokens=False)
            for token_id, (start, end) in zip(found.ids, found.offsets):
                if token_id in self._normalized_ids and end - start > 1:
                    cuts.add(start + 1)
        return cuts

    def _refuses_system(self) -> bool:
        """Return whether the template refuses or leaves out system messages but takes a user's."""
        user = {"role": "user", "content": "a"}
        try:
            self.apply_template([user])
        except InvalidRequestError:
            return False
        try:
            return _SYSTEM_PROBE not in self.apply_template([{"role": "system", "content": _SYSTEM_PROBE}, user])
        except InvalidRequestError:
            return True

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

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        """The text of each id on its own, special tokens by name; U+FFFD where it is a part of a character."""
        return [self.fast.decode([int(token_id)], skip_special_tokens=False) for token_id in ids]


def common_prefix_length(first: np.ndarray, second: np.ndarray) -> int:
    """Return the number of leading elements that two int arrays share."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def _fold_system(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return the messages with the text of system messages before that of the next user message."""
    folded: list[ChatMessage] = []
    waiting: list[str] = []
    for message in messages:
        if message.role == "system":
            waiting.append(message.content)
        elif message.role == "user" and waiting:
            folded.append(ChatMessage("user", "\n\n".join([*waiting, message.content])))
            waiting = []
        else:
            folded.append(message)
    return [*folded, *([ChatMessage("user", "\n\n".join(waiting))] if waiting else [])]


def _any_of(words: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that matches, empty, wherever one of ``words`` begins; a trie, so that thousands cost little."""
    trie: dict = {}
    for word in words:
        node = trie
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}
    return re.compile(f"(?={_trie_pattern(trie)})") if trie else None


def _trie_pattern(node: dict) -> str:
    if "" in node:  # a shorter word is enough
        return ""
    branches = [re.escape(character) + _trie_pattern(below) for character, below in node.items()]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def _check_token_ids(path: Path) -> None:
    """Raises EngineDirectoryError for ids on which the ``tokenizers`` library would end the process."""
    raw = path.read_bytes()
    if _LONG_NUMBER.search(raw) is None:
        return
    try:
        values = json.loads(raw)
        model = values.get("model") or {}
        vocabulary = model.get("vocab") or {}
        ids = [token.get("id") for token in values.get("added_tokens") or []]
        ids += list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise EngineDirectoryError(f"{path} is no tokenizer ({first_line(error)}); build the engine again.") from None
    for token_id in ids:
        if isinstance(token_id, int) and not 0 <= token_id <= _MAX_TOKEN_ID:
            raise EngineDirectoryError(
                f"{path} has the token id {token_id}, but ids are from 0 to {_MAX_TOKEN_ID}; the file is damaged."
            )
