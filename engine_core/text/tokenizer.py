"""Text to ids and back: the Hugging Face tokenizer and chat template of an engine directory.

Thread-safe: encoding and templating are pure. ``transformers`` reads the files and ``template`` renders; ids come
from the ``tokenizers`` library underneath, without the state that ``transformers`` keeps for padding.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from engine_core.errors import (
    EngineDirectoryError,
    InvalidImageError,
    InvalidRequestError,
    InvalidTextError,
    first_line,
)
from engine_core.models.fields import has_lone_surrogate
from engine_core.request import ChatMessage, Tool
from engine_core.text.call_formats import TOOL_VARIABLES, AnswerFormat
from engine_core.text.conversation import Conversation, marked, text_parts, to_conversation, to_tools, with_videos
from engine_core.text.template import ChatTemplate

_CACHED_SYSTEM_PROMPTS = 32
_MAX_TOKEN_ID = (1 << 24) - 1  # ``tokenizers`` makes tables of the largest id, and aborts above 2**31
_LONG = 4096  # characters of a text that takes about a millisecond
_LONG_NUMBER = re.compile(rb":\s*-?\d{8,}")
_SYSTEM_PROBE = "edgellm system probe"
_CONTENT_PROBE = "edgellm content probe"
_OLD_TEMPLATE = "chat_template.json"  # of a processor, where the tokenizer has no template
# What a template is given by this module and by what renders it, and so nobody else.
_OWN_VARIABLES = frozenset(
    {"messages", "documents", "add_generation_prompt", "raise_exception", "strftime_now", *TOOL_VARIABLES}
)

_compiled_template = lru_cache(maxsize=8)(ChatTemplate)


class Reasoning(enum.Enum):
    """The reasoning that an answer to a prompt may have before its text."""

    NEVER = "never"  # the model does not reason, or the prompt has passed it over
    MAYBE = "maybe"  # reasoning, if the model begins it
    BEGUN = "begun"  # reasoning: the prompt has begun it


@dataclass(frozen=True)
class Prompt:
    """Token ids that the model reads, and the reasoning with which it goes on."""

    token_ids: np.ndarray  # int32 [n]
    reasoning: Reasoning = Reasoning.NEVER


class Tokenizer:
    """Raises EngineDirectoryError if ``directory`` has no usable tokenizer.json.

    ``image_token_id``: the token that stands for an image, of a model that sees.
    """

    def __init__(self, directory: Path, image_token_id: int | None = None) -> None:
        # It would advise installing PyTorch, which nothing here needs.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import PreTrainedTokenizerFast

        if not (directory / "tokenizer.json").is_file():
            raise EngineDirectoryError(
                f"{directory} has no tokenizer.json; build the engine again, from a checkpoint with one."
            )
        _check_token_ids(directory / "tokenizer.json")
        try:
            self._hf = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # the library raises whatever its parsers raise
            reason = first_line(error)
            raise EngineDirectoryError(f"The tokenizer in {directory} cannot be loaded ({reason}).") from error
        if not self._hf.chat_template:
            self._hf.chat_template = _old_template(directory)
        _check_templates(directory, self._hf.chat_template)
        self.fast = self._hf.backend_tokenizer
        self.fast.no_padding()
        self.fast.no_truncation()
        self.vocab_size = self.fast.get_vocab_size(with_added_tokens=True)
        # No text of n characters can have fewer than n / max_token_chars tokens.
        self.max_token_chars = max(len(token) for token in self.fast.get_vocab(with_added_tokens=True))
        self._system_prefix = lru_cache(maxsize=_CACHED_SYSTEM_PROMPTS)(self._find_system_prefix)
        self.image_token = "" if image_token_id is None else self.fast.id_to_token(image_token_id) or ""
        self._find_controls()
        self._takes_parts = self.has_chat_template and self._reads_lists_alone()
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
        """Return ``text`` as int32 [n]; with ``add_special_tokens`` the model's BOS and the like are put around it.

        Raises InvalidTextError if it has half a surrogate pair.
        """
        _check_text(text)
        if len(text) < _LONG:
            encoded = self.fast.encode(text, add_special_tokens=add_special_tokens)
        else:  # a mebibyte takes a second: batches alone let Python's other threads run meanwhile
            (encoded,) = self.fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return np.array(encoded.ids, dtype=np.int32)

    @cached_property
    def answer_format(self) -> AnswerFormat:
        """Parts that answers of this model may have beside text."""
        return AnswerFormat.of(self)

    def added_tokens(self) -> dict[str, int]:
        """Return the tokens that are found in a text as they are, before it is tokenized, and their ids."""
        return {token.content: index for index, token in self.fast.get_added_tokens_decoder().items()}

    def template_source(self, *, with_tools: bool) -> str:
        """Return the text of the chat template; some models have one of its own for tools."""
        return self._hf.get_chat_template(None, [{}] if with_tools else None)

    def template_variables(self, *, with_tools: bool) -> frozenset[str]:
        """Return the names of the variables that the chat template reads."""
        try:
            return _compiled_template(self.template_source(with_tools=with_tools)).variables
        except Exception:  # no template; every request will be refused with the reason
            return frozenset()

    def render(self, messages: Sequence[ChatMessage], *, tools: Sequence[Tool] = (), **variables: Any) -> str:
        """Return the conversation in the model's chat template, ready for the answer; ``variables``: what else it
        reads.

        A template without system messages gets their text before the next user message.
        Raises InvalidRequestError if there is no template or it refuses the conversation.
        """
        source = self.template_source(with_tools=bool(tools)) if self.has_chat_template else ""
        conversation = to_conversation(self._folded(messages), source)
        return self.apply_template(conversation, **self._tool_variables(to_tools(tools)), **variables)

    def apply_template(self, conversation: Conversation, *, add_generation_prompt: bool = True, **variables) -> str:
        """Render messages in the form that the template reads, tool calls included.

        ``variables``: further ones of the template. Raises InvalidRequestError.
        """
        if not self.has_chat_template:
            raise InvalidRequestError("This model has no chat template; send a raw prompt instead of messages.")
        try:
            source = self._hf.get_chat_template(None, variables.get("tools"))
            defaults = {"tools": None, "documents": None, **self._hf.special_tokens_map}
            return _compiled_template(source).render(
                messages=self._in_parts(conversation),
                add_generation_prompt=add_generation_prompt,
                **{**defaults, **variables},
            )
        except Exception as error:  # templates call raise_exception, and fail in ways of their own
            reason = first_line(error)[:300]
            raise InvalidRequestError(f"The model's chat template refuses this conversation: {reason}.") from error

    def _in_parts(self, conversation: Conversation) -> Conversation:
        """Return the conversation with each content as a list of parts, if the template reads no other."""
        if not self._takes_parts:
            return conversation
        return [
            {**turn, "content": text_parts(turn["content"])} if isinstance(turn.get("content"), str) else turn
            for turn in conversation
        ]

    def _reads_lists_alone(self) -> bool:
        """Return whether the template leaves out a content that is a text, but not one that is a list of parts."""
        self._takes_parts = False
        found = []
        for content in (_CONTENT_PROBE, text_parts(_CONTENT_PROBE)):
            try:
                found.append(_CONTENT_PROBE in self.apply_template([{"role": "user", "content": content}]))
            except InvalidRequestError:
                found.append(False)
        return found == [False, True]

    def encode_messages(self, messages: Sequence[ChatMessage], *, allow_special: bool = False) -> np.ndarray:
        """Return the templated conversation as int32 [n]. Raises InvalidRequestError as ``render`` does."""
        return self.prompt(messages, allow_special=allow_special).token_ids

    def prompt(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Tool] = (),
        variables: dict[str, Any] | None = None,
        thinking: str = "model",
        allow_special: bool = False,
        image_texts: Sequence[str] = (),
        videos: Collection[int] = (),
    ) -> Prompt:
        """Return the templated conversation. Raises InvalidRequestError as ``render`` does.

        Special tokens spelled in the texts of messages, tools and ``variables`` are plain text, or with
        ``allow_special`` control tokens; the placeholder of images is plain text in any case. ``thinking``: one of
        THINKING_MODES. ``image_texts``: what stands for each image of the messages. ``videos``: the indices of those
        that are videos.
        """
        variables = self._checked_variables(variables or {}, thinking, bool(tools))
        messages = self._folded(messages)
        source = self.template_source(with_tools=bool(tools)) if self.has_chat_template else ""
        conversation, definitions, mark = to_conversation(messages, source, videos), to_tools(tools), ""
        if not allow_special or self.image_token:
            parts = [(turn, turn["role"] == "assistant") for turn in conversation]
            parts += [(definition, False) for definition in definitions]
            cuts = self._image_cuts if allow_special else self._cuts
            (*values, variables), mark = marked([*parts, (variables, False)], cuts)
            conversation, definitions = values[: len(conversation)], values[len(conversation) :]
        conversation = with_videos(conversation, self.image_token) if videos else conversation
        text = self.apply_template(conversation, **self._tool_variables(definitions), **variables)
        text, reasoning = self._with_thinking(text, thinking)
        text = self.with_images(text, image_texts)
        if not mark:
            return Prompt(self.encode(text, add_special_tokens=False), reasoning)
        escaped = json.dumps(mark)[1:-1]  # where a template writes JSON in ASCII
        pieces = text.replace(escaped, mark).split(mark)
        ids = [self.encode(piece, add_special_tokens=False) for piece in pieces if piece]
        return Prompt(np.concatenate(ids) if ids else np.empty(0, dtype=np.int32), reasoning)

    def token_text(self, token_id: int) -> str:
        """Return how a token is spelled in a text, "" if there is none of this id."""
        return self.fast.id_to_token(token_id) or ""

    def with_images(self, text: str, image_texts: Sequence[str]) -> str:
        """Return ``text`` with those of images in the place of the placeholders. Raises InvalidImageError if it has
        more or fewer of them."""
        if not self.image_token:
            assert not image_texts, "the model has no placeholder"
            return text
        first, *rest = text.split(self.image_token)
        if len(rest) != len(image_texts):
            raise InvalidImageError(
                f"The prompt has {len(rest)} placeholders {self.image_token!r} for {len(image_texts)} images."
            )
        return "".join([first, *(part for pair in zip(image_texts, rest) for part in pair)])

    def _folded(self, messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
        return _fold_system(messages) if self.folds_system else messages

    def _tool_variables(self, definitions: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the variables under which the template reads the tools."""
        if not definitions:
            return {}
        read = self.template_variables(with_tools=True)
        return {name: definitions for name in TOOL_VARIABLES if name in read or name == "tools"}

    def _checked_variables(self, variables: dict[str, Any], thinking: str, with_tools: bool) -> dict[str, Any]:
        """Return all variables of a request. Raises InvalidRequestError for one that the template does not read."""
        found = self.answer_format
        known = self.template_variables(with_tools=with_tools) - _OWN_VARIABLES - self._hf.special_tokens_map.keys()
        if unknown := sorted(variables.keys() - known):
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise InvalidRequestError(f"The chat template has no variable {unknown[0][:64]!r}; {has}.")
        if thinking == "on" and not found.thinks:
            raise InvalidRequestError("This model does not reason before it answers; leave thinking out.")
        if thinking != "model" and found.thinking_variable in known:
            return {**variables, found.thinking_variable: thinking == "on"}
        return variables

    def _with_thinking(self, text: str, thinking: str) -> tuple[str, Reasoning]:
        """Return a rendered prompt with the reasoning begun or passed over, as asked, and how it goes on.

        What the template has done by itself is left as it is.
        """
        form = self.answer_format.reasoning
        if form is None:
            return text, Reasoning.NEVER
        end = text.rstrip()
        is_open = end.endswith((form.begin.text + form.label).rstrip())
        is_passed = end.endswith(form.end.text)
        if thinking == "on" and not is_open and not is_passed:
            return f"{text}{form.begin.text}{form.label or chr(10)}", Reasoning.BEGUN
        if thinking == "off" and not is_passed and (is_open or not self.answer_format.thinking_variable):
            begin = "" if is_open else form.begin.text + form.label
            return f"{text}{begin}\n\n{form.end.text}\n\n", Reasoning.NEVER
        if is_passed or thinking == "off":
            return text, Reasoning.NEVER
        return text, Reasoning.BEGUN if is_open else Reasoning.MAYBE

    def _find_controls(self) -> None:
        """Notes the control tokens: the special ones, and added ones that the chat template writes (its role tags).

        The latter stay tokens in an assistant's message: what a model wrote (<think>) can be sent back to it.
        """
        added = self.fast.get_added_tokens_decoder()
        template = self._hf.chat_template
        source = template if isinstance(template, str) else json.dumps(template or "", ensure_ascii=False)
        special = {token.content for token in added.values() if token.special and len(token.content) > 1}
        written = {t.content for t in added.values() if len(t.content) > 1 and t.content in source}
        images = {self.image_token} - {""}
        self._special = _any_of(special | images)
        self._control = _any_of(special | written | images)
        self._placeholder = _any_of(images)
        # These are found in the normalized text, so their spellings cannot be listed.
        self._normalized_ids = frozenset(
            index for index, t in added.items() if t.normalized and (t.special or t.content in written)
        )

    def _cuts(self, text: str, own: bool) -> set[int]:
        """Return where ``text`` is cut: behind the first character of each control token, overlapping ones too.

        ``own``: the model wrote it.
        """
        pattern = self._special if own else self._control
        cuts = {match.start() + 1 for match in pattern.finditer(text)} if pattern is not None else set()
        if self._normalized_ids:
            _check_text(text)
            found = self.fast.encode(text, add_special_tokens=False)
            for token_id, (start, end) in zip(found.ids, found.offsets):
                if token_id in self._normalized_ids and end - start > 1:
                    cuts.add(start + 1)
        return cuts

    def _image_cuts(self, text: str, own: bool) -> set[int]:
        """Return where ``text`` is cut so that it has no placeholder of an image."""
        assert self._placeholder is not None
        return {match.start() + 1 for match in self._placeholder.finditer(text)}

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

    def system_prefix(
        self, system_prompt: str, tools: tuple[Tool, ...] = (), variables: str = "", thinking: str = "model"
    ) -> np.ndarray:
        """Return the ids, int32 [n], that every conversation with this system prompt and these tools starts with.

        ``variables``: JSON, of the chat template. Found by comparing conversations on token ids, so that no token
        across the boundary is cut. Empty when the template takes no system prompt.
        """
        return self._system_prefix(system_prompt, tools, variables, thinking)

    def _find_system_prefix(
        self, system_prompt: str, tools: tuple[Tool, ...], variables: str, thinking: str
    ) -> np.ndarray:
        system = (ChatMessage("system", system_prompt),) if system_prompt else ()
        values = json.loads(variables or "{}")
        try:
            first, second = (
                self.prompt((*system, ChatMessage("user", user)), tools=tools, variables=values, thinking=thinking)
                for user in ("a", "0 b")
            )
        except InvalidRequestError:
            return np.empty(0, dtype=np.int32)
        prefix = first.token_ids[: common_prefix_length(first.token_ids, second.token_ids)].copy()
        prefix.flags.writeable = False
        return prefix

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens."""
        return self.fast.decode(list(ids), skip_special_tokens=True)

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        """Return the text of each id on its own, special tokens by name; U+FFFD where it is a part of a character."""
        return [self.fast.decode([int(token_id)], skip_special_tokens=False) for token_id in ids]


def _check_text(text: str) -> None:
    """Raises InvalidTextError for half a surrogate pair, which JSON inside a request can spell."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidTextError(
            f"A text of the request spells half a surrogate pair, U+{ord(text[error.start]):04X}; send whole "
            "characters."
        ) from None


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
            before = "".join(f"{text}\n\n" for text in waiting)
            places = tuple(len(before) + place for place in message.images)
            folded.append(dataclasses.replace(message, content=before + message.content, images=places))
            waiting = []
        else:
            folded.append(message)
    return [*folded, *([ChatMessage("user", "\n\n".join(waiting))] if waiting else [])]


def _old_template(directory: Path) -> str | None:
    """Return the chat template that a processor keeps beside the tokenizer, or None."""
    try:
        found = json.loads((directory / _OLD_TEMPLATE).read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def _check_templates(directory: Path, found: object) -> None:
    """Raises EngineDirectoryError if ``found`` is neither a chat template nor several by name with a default."""
    if not found:
        return
    templates = found if isinstance(found, dict) else {"default": found}
    if "default" not in templates or not all(isinstance(text, str) for text in templates.values()):
        raise EngineDirectoryError(
            f"The chat template in {directory} is neither a text nor several texts with one named 'default'; correct "
            "it in tokenizer_config.json, or put it into chat_template.jinja."
        )
    if any(has_lone_surrogate(str(text)) for text in templates.values()):
        raise EngineDirectoryError(
            f"The chat template in {directory} has half a surrogate pair, such as \\ud800; write whole characters."
        )


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
        raise EngineDirectoryError(f"{path} is no tokenizer ({first_line(error)}).") from None
    for token_id in ids:
        if isinstance(token_id, int) and not 0 <= token_id <= _MAX_TOKEN_ID:
            raise EngineDirectoryError(
                f"{path} has the token id {token_id}, but ids are from 0 to {_MAX_TOKEN_ID}; the file is damaged."
            )
