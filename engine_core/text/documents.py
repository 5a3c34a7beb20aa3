"""The user's texts, for everything that learns from them or is measured on them: read, and tokenized as the model
would read and write them.

A ``*.jsonl`` file has one object a line: a chat as ``messages`` (a list of role and content), or ``prompt`` and
``response``; or a ``text``. Any other file is plain text.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine_core.errors import BuildError, InvalidRequestError
from engine_core.text.tokenizer import Tokenizer, common_prefix_length

_MAX_PARAGRAPH = 1 << 16  # characters; a text without blank lines is cut at the next line end


@dataclass(frozen=True)
class Document:
    """One paragraph of a plain text, or one chat or text of a JSONL file, and where it stands."""

    place: str  # file:line
    text: str = ""
    messages: tuple[dict, ...] = ()

    def token_ids(self, tokenizer: Tokenizer) -> np.ndarray:
        """Return all of it as int32 [n], a chat in the model's template. Raises BuildError if that refuses it."""
        if not self.messages:
            return tokenizer.encode(self.text)
        return self._conversation(tokenizer, len(self.messages), False)

    def turns(self, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Return (what the model reads, what it then has to sample), int32 [n] and [m]: a pair for each answer of a
        chat.

        An answer ends with its stop token. A text is one answer to nothing but what the tokenizer puts before it.
        Raises BuildError if the chat template refuses the conversation.
        """
        if not self.messages:
            yield text_start(tokenizer), tokenizer.encode(self.text, add_special_tokens=False)
            return
        for index, message in enumerate(self.messages):
            if message["role"] == "assistant":
                # Templates refuse an empty conversation: an answer to nothing is all of what they make of it.
                prompt = self._conversation(tokenizer, index, True) if index else np.empty(0, dtype=np.int32)
                whole = self._conversation(tokenizer, index + 1, False)
                start = common_prefix_length(prompt, whole)
                yield whole[:start], _through_stop(whole[start:], tokenizer)

    def _conversation(self, tokenizer: Tokenizer, count: int, prompt: bool) -> np.ndarray:
        """The first ``count`` messages; ``prompt``: with what the template puts before an answer."""
        messages = [dict(message) for message in self.messages[:count]]
        if not tokenizer.has_chat_template:  # one message after the other
            parts = [tokenizer.encode(message["content"], add_special_tokens=False) for message in messages]
            return np.concatenate([text_start(tokenizer), *parts])
        try:
            text = tokenizer.apply_template(messages, add_generation_prompt=prompt)
        except InvalidRequestError as error:
            raise BuildError(f"{self.place}: {error}") from None
        return tokenizer.encode(text, add_special_tokens=False)


def text_start(tokenizer: Tokenizer) -> np.ndarray:
    """Return what the tokenizer puts before every text, int32 [n]: BOS, or nothing."""
    whole, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    places = range(len(whole) - len(bare) + 1)
    return whole[: next(i for i in places if np.array_equal(whole[i : i + len(bare)], bare))]


def _through_stop(answer: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Without the blanks that a template puts behind the stop token: no model gets to sample them."""
    special = np.flatnonzero(np.isin(answer, list(tokenizer.special_ids)))
    if not len(special) or tokenizer.decode(answer[special[-1] + 1 :]).strip():
        return answer
    return answer[: special[-1] + 1]


def read_documents(path: Path) -> Iterator[Document]:
    """Return the documents of a file: the lines of *.jsonl, the paragraphs of anything else. Raises BuildError."""
    path = Path(path)
    with _readable(path), open(path, encoding="utf-8") as lines:
        yield from (_chats if path.suffix == ".jsonl" else _paragraphs)(path, lines)


def read_text(path: Path) -> str:
    """Return the whole of a file. Raises BuildError."""
    with _readable(path):
        return path.read_text(encoding="utf-8")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BuildError(f"The text {path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise BuildError(f"The text {path} is not UTF-8 ({error.reason} at byte {error.start}).") from error


def token_sequences(path: Path, tokenizer: Tokenizer, longest: int) -> Iterator[np.ndarray]:
    """Return a file as int32 [n], n of 1 to ``longest``: the lines of *.jsonl one by one, a plain text as a whole, in
    pieces.

    Each piece of a plain text begins with what the tokenizer puts before a text. Raises BuildError.
    """
    if Path(path).suffix == ".jsonl":
        for document in read_documents(path):
            ids = document.token_ids(tokenizer)
            for start in range(0, len(ids), longest):
                yield ids[start : start + longest]
        return
    start = text_start(tokenizer)
    start = start if len(start) < longest else start[:0]
    rest = np.empty(0, dtype=np.int32)
    for document in read_documents(path):
        rest = np.concatenate([rest, tokenizer.encode(document.text, add_special_tokens=False)])
        while len(start) + len(rest) >= longest:
            cut = longest - len(start)
            yield np.concatenate([start, rest[:cut]])
            rest = rest[cut:]
    if len(rest):
        yield np.concatenate([start, rest])


def _paragraphs(path: Path, lines: Iterator[str]) -> Iterator[Document]:
    """Return the paragraphs, each with the blank lines behind it, which are tokens too."""
    paragraph: list[str] = []
    start, size, has_text = 1, 0, False
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
    except (ValueError, RecursionError) as error:
        raise BuildError(f"{place} is not JSON ({error}); a .jsonl file has one object a line.") from None
    found = value if isinstance(value, dict) else {}
    if isinstance(found.get("text"), str):
        return Document(place, text=found["text"])
    if isinstance(found.get("prompt"), str) and isinstance(found.get("response"), str):
        question = {"role": "user", "content": found["prompt"]}
        return Document(place, messages=(question, {"role": "assistant", "content": found["response"]}))
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
