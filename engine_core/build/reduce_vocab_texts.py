"""The user's texts for ``reduce_vocab``: read, tokenized as the model would read and write them, and counted.

A chat's answers are what the LM head has to write; all else of it is input. Of a plain text every token counts as
written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine_core.errors import BuildError, InvalidRequestError
from engine_core.tokenizer import Tokenizer, common_prefix_length

_MAX_PARAGRAPH = 1 << 16  # characters; a text without blank lines is cut at the next line end


@dataclass(frozen=True)
class Document:
    """One paragraph of a plain text or one chat, and where it stands."""

    place: str  # file:line
    text: str = ""
    messages: tuple[dict, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A tokenized document: ``inputs`` int32 [n]; ``answers`` int32 [m] each, as sampled, stop token included."""

    inputs: np.ndarray
    answers: tuple[np.ndarray, ...]


@dataclass
class Counts:
    """How often each id occurs, int64 [vocab_size]."""

    outputs: np.ndarray
    inputs: np.ndarray
    documents: int = 0

    @classmethod
    def zeros(cls, vocab_size: int) -> Counts:
        return cls(np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64))

    def add(self, sample: Sample, *, all_inputs: bool = False) -> None:
        """``all_inputs``: the answers are examples of what is read, not of what is written."""
        for answer in sample.answers:
            _tally(self.inputs if all_inputs else self.outputs, answer)
        _tally(self.inputs, sample.inputs)
        self.documents += 1


def _tally(counts: np.ndarray, ids: np.ndarray) -> None:
    inside = ids[ids < len(counts)]
    if len(inside):
        found = np.bincount(inside)
        counts[: len(found)] += found


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a file: the lines of *.jsonl, the paragraphs of anything else.

    A JSONL line has ``messages`` (a list of role and content), ``prompt`` and ``response``, or ``text``.
    Raises BuildError.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8") as lines:
            yield from (_chats if path.suffix == ".jsonl" else _paragraphs)(path, lines)
    except OSError as error:
        raise BuildError(f"The text {path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise BuildError(f"The text {path} is not UTF-8 ({error.reason} at byte {error.start}).") from error


def _paragraphs(path: Path, lines: Iterator[str]) -> Iterator[Document]:
    """Each with the blank lines behind it, which are tokens too."""
    paragraph, start, size, has_text = [], 1, 0, False
    for number, line in enumerate(lines, start=1):
        ended = size > _MAX_PARAGRAPH or (has_text and not paragraph[-1].strip())
        if ended and line.strip():
            yield Document(f"{path}:{start}", text="".join(paragraph))
            paragraph, start, size, has_text = [], number, 0, False
        paragraph.append(line)
        size += len(line)
        has_text = has_text or bool(line.strip())
    if has_text:
        yield Document(f"{path}:{start}", text="".join(paragraph))


def _chats(path: Path, lines: Iterator[str]) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _chat(f"{path}:{number}", line)


def _chat(place: str, line: str) -> Document:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise BuildError(f"{place} is not JSON ({error}); a .jsonl file has one object a line.") from None
    found = value if isinstance(value, dict) else {}
    if isinstance(found.get("text"), str):
        return Document(place, text=found["text"])
    if isinstance(found.get("prompt"), str) and isinstance(found.get("response"), str):
        messages = [{"role": "user", "content": found["prompt"]}, {"role": "assistant", "content": found["response"]}]
        return Document(place, messages=tuple(messages))
    messages = found.get("messages")
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        return Document(place, messages=tuple(dict(m, content=_content(m)) for m in messages))
    raise BuildError(
        f"{place} is no chat; expected messages (objects with role and content), prompt and response, or text."
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def _content(message: dict) -> str:
    """Text, also where it comes in parts; what is no text (an image) has no tokens here."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def tokenize(document: Document, tokenizer: Tokenizer) -> Sample:
    """Raises BuildError if the chat template refuses the document."""
    nothing = np.empty(0, dtype=np.int32)
    if not document.messages:
        return Sample(nothing, (tokenizer.encode(document.text, add_special_tokens=False),))
    messages = list(document.messages)
    written = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    read = [
        tokenizer.encode(message["content"], add_special_tokens=False)
        for index, message in enumerate(messages)
        if index not in written and message["content"]
    ]
    inputs = np.concatenate([nothing, *read])
    try:
        return Sample(inputs, tuple(_answer(messages[: index + 1], tokenizer) for index in written))
    except InvalidRequestError as error:
        raise BuildError(f"{document.place}: {error}") from None


def _answer(messages: list[dict], tokenizer: Tokenizer) -> np.ndarray:
    """The ids the model has to sample for the last message, with what ends it."""
    if not tokenizer.has_chat_template:
        return tokenizer.encode(messages[-1]["content"], add_special_tokens=False)

    def encode(conversation: list[dict], prompt: bool) -> np.ndarray:
        text = tokenizer.apply_template(conversation, add_generation_prompt=prompt)
        return tokenizer.encode(text, add_special_tokens=False)

    if len(messages) == 1:  # nothing to answer to: templates refuse an empty conversation
        return encode(messages, False)
    whole = encode(messages, False)
    return whole[common_prefix_length(encode(messages[:-1], True), whole) :]


def split(paths: Sequence[Path], held_out: Path | None, share: float) -> Iterator[tuple[Document, bool]]:
    """(document, whether it is held out): all of ``held_out``, or else ``share`` of the texts, evenly spread."""
    index = 0
    for path in paths:
        for document in read_documents(path):
            index += 1
            yield document, held_out is None and int(index * share) > int((index - 1) * share)
    if held_out is not None:
        for document in read_documents(held_out):
            yield document, True
