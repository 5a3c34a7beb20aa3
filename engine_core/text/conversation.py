"""Messages and tools as a chat template knows them, and the mark that keeps control tokens out of their texts.

Special tokens that a text of the request spells are plain text: nobody can forge a turn or a tool's answer. They are
split by a mark that is in no text before the template is rendered, and what is between the marks is tokenized piece by
piece.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from engine_core.errors import InvalidRequestError
from engine_core.request import ChatMessage, Tool, parse_arguments

_MARKS = range(0xE000, 0xF900)  # private use
_NO_PARAMETERS = '{"type": "object", "properties": {}}'
# The names under which templates read what an assistant thought before it answered.
_READS_REASONING = re.compile(r"""(?:\.|\[['"])(reasoning_content|reasoning|thinking)\b""")

# Of a template that writes an empty content beside calls as an answer of its own.
_ASKS_FOR_NONE = re.compile(r"""(?<!\w)content(?:'\]|"\])? is not none""")

Conversation = list[dict[str, Any]]
Cuts = Callable[[str, bool], set[int]]  # (text, whether a model wrote it) → where it is to be split


def to_conversation(messages: Sequence[ChatMessage], source: str, videos: Collection[int] = ()) -> Conversation:
    """Return the messages as the template whose text is ``source`` reads them.

    ``videos``: which of the places of images in the messages, counted through, are those of videos (``with_videos``).

    A tool's message gets the name of the function, from the call that it answers: the last one before it with its id.
    Raises InvalidRequestError for a call whose arguments are no JSON object.
    """
    nothing = None if _ASKS_FOR_NONE.search(source) else ""  # others fail where a content is no text
    kinds = ("video" if place in videos else "image" for place in itertools.count())
    names: dict[str, str] = {}
    conversation = []
    for message in messages:
        names.update((call.id, call.name) for call in message.tool_calls)
        conversation.append(_to_template(message, names, nothing, source, kinds))
    return conversation


def _to_template(
    message: ChatMessage, names: dict[str, str], nothing: str | None, source: str, kinds: Iterator[str]
) -> dict[str, Any]:
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        values["content"] = _parts(message, kinds)
    if message.tool_calls:
        values["content"] = message.content or nothing
        values["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": parse_arguments(call)},
            }
            for call in message.tool_calls
        ]
    if message.reasoning and (found := _READS_REASONING.search(source)):
        values[found.group(1)] = message.reasoning
    if message.tool_call_id:
        values["tool_call_id"] = message.tool_call_id
    if name := message.name or (names.get(message.tool_call_id, "") if message.role == "tool" else ""):
        values["name"] = name
    return values


def _parts(message: ChatMessage, kinds: Iterator[str]) -> list[dict[str, str]]:
    """Return the content of a message with images: texts and images in their order. ``kinds``: of the images."""
    parts: list[dict[str, str]] = []
    start = 0
    for place in message.images:
        parts += text_parts(message.content[start:place]) if place > start else []
        parts.append({"type": next(kinds)})
        start = place
    return parts + (text_parts(message.content[start:]) if start < len(message.content) else [])


def with_videos(conversation: Conversation, placeholder: str) -> Conversation:
    """Return the conversation with ``placeholder`` as a text in the place of each video: the text of a video, which
    takes the placeholder's place, has all markers."""
    return [
        {**turn, "content": [text_parts(placeholder)[0] if part == {"type": "video"} else part for part in content]}
        if isinstance(content := turn["content"], list)
        else turn
        for turn in conversation
    ]


def text_parts(text: str) -> list[dict[str, str]]:
    """Return the content of a message of text alone, for templates that read lists."""
    return [{"type": "text", "text": text}]


def to_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return the tools as templates read them. Their parameters have to be JSON."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(tool.parameters or _NO_PARAMETERS),
            },
        }
        for tool in tools
    ]


# --- marks --------------------------------------------------------------------------------------------


def marked(parts: list[tuple[Any, bool]], cuts: Cuts) -> tuple[list[Any], str]:
    """Return the values with a mark inside each control token that one of their texts spells, and the mark.

    The mark is "" if they spell none. ``parts``: JSON values, and whether a model wrote them. Raises
    InvalidRequestError if there is no character left for a mark.
    """
    texts = [(text, own) for value, own in parts for text in _texts(value)]
    places = {(text, own): found for text, own in dict.fromkeys(texts) if (found := cuts(text, own))}
    if not places:
        return [value for value, _ in parts], ""
    used = set("".join(text for text, _ in texts))
    mark = next((chr(code) for code in _MARKS if chr(code) not in used), "")
    if not mark:
        raise InvalidRequestError("The messages use every private-use character; leave some of them out.")
    return [_split(value, own, places, mark) for value, own in parts], mark


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


def _split(value: Any, own: bool, places: dict[tuple[str, bool], set[int]], mark: str) -> Any:
    if isinstance(value, str):
        ends = [*sorted(places.get((value, own), ())), len(value)]
        return mark.join(value[start:end] for start, end in zip([0, *ends], ends))
    if isinstance(value, dict):
        return {_split(key, own, places, mark): _split(inner, own, places, mark) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(inner, own, places, mark) for inner in value]
    return value
