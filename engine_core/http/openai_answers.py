"""From pieces and results to the JSON of OpenAI's API, whole or as server-sent events."""

from __future__ import annotations

import json
import time
from typing import Any

from engine_core.http.openai_requests import Asked
from engine_core.request import FinishReason, GenerationResult, Piece, ToolCall

DONE = b"data: [DONE]\n\n"
_FINISH_REASONS = {
    FinishReason.STOP: "stop", FinishReason.TOOL_CALLS: "tool_calls",
    FinishReason.LENGTH: "length", FinishReason.TIMEOUT: "length",
}  # fmt: skip


def event(value: dict) -> bytes:
    """Return ``value`` as a server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(result: GenerationResult) -> dict:
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.generated_tokens,
        "total_tokens": result.prompt_tokens + result.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": result.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": result.reasoning_tokens},
    }


def figures(result: GenerationResult) -> dict:
    """Return what the node says of an answer beside OpenAI's fields, under the key ``edgellm``; times in s."""
    return {
        "finish_reason": result.finish_reason.value,
        "queue_time": result.queue_time,
        "time_to_first_token": result.time_to_first_token,
        "tokens_per_second": result.tokens_per_second,
        "total_time": result.total_time,
        "dropped_turns": result.dropped_turns,
        "session_turns": result.session_turns,
    }


class TextAnswer:
    """The answer of /v1/completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, asked: Asked, fingerprint: str) -> None:
        """``fingerprint``: of the engine; the same one gives the same text for the same seed."""
        self._include_usage = asked.include_usage
        self._head = {
            "id": asked.request.request_id, "object": self.kind, "created": int(time.time()), "model": asked.model,
            "system_fingerprint": fingerprint,
        }  # fmt: skip

    def whole(self, result: GenerationResult) -> dict:
        choice = self._choice(result) | {"index": 0, "logprobs": None}
        choice["finish_reason"] = _FINISH_REASONS[result.finish_reason]
        return self._head | {"choices": [choice], "usage": usage(result), "edgellm": figures(result)}

    def piece(self, piece: Piece) -> bytes:
        """Return the events of a piece of the answer."""
        return b"".join(self._chunk(delta) for delta in self._deltas(piece))

    def end(self, result: GenerationResult) -> bytes:
        """Return the last events of the answer."""
        more = {"edgellm": figures(result)}
        last = self._chunk(self._last_delta(), _FINISH_REASONS[result.finish_reason], more)
        if self._include_usage:
            last += event(self._head | {"object": self.chunk_kind, "choices": [], "usage": usage(result)})
        return last + DONE

    def _chunk(self, delta: dict, finish_reason: str | None = None, more: dict | None = None) -> bytes:
        choice = {"index": 0, **delta, "logprobs": None, "finish_reason": finish_reason}
        chunk: dict[str, Any] = self._head | {"object": self.chunk_kind, "choices": [choice]} | (more or {})
        if self._include_usage:
            chunk["usage"] = None
        return event(chunk)

    def _choice(self, result: GenerationResult) -> dict:
        return {"text": result.text}

    def _deltas(self, piece: Piece) -> list[dict]:
        return [{"text": piece.text}] if piece.text else []

    def _last_delta(self) -> dict:
        return {"text": ""}


class ChatAnswer(TextAnswer):
    """The answer of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, asked: Asked, fingerprint: str) -> None:
        super().__init__(asked, fingerprint)
        self._role: dict = {"role": "assistant"}  # in the first chunk
        self._num_calls = 0  # that have been sent

    def _choice(self, result: GenerationResult) -> dict:
        message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
        if result.reasoning:
            message["reasoning_content"] = result.reasoning
        if result.tool_calls:
            message["content"] = result.text or None
            message["tool_calls"] = [_call(call) for call in result.tool_calls]
        return {"message": message}

    def _deltas(self, piece: Piece) -> list[dict]:
        deltas: list[dict] = []
        if piece.reasoning:
            deltas.append(self._delta({"reasoning_content": piece.reasoning}))
        if piece.text:
            deltas.append(self._delta({"content": piece.text}))
        for call in piece.tool_calls:  # one chunk for each: they come whole
            deltas.append(self._delta({"tool_calls": [{"index": self._num_calls} | _call(call)]}))
            self._num_calls += 1
        return deltas

    def _last_delta(self) -> dict:
        return self._delta({})

    def _delta(self, delta: dict) -> dict:
        role, self._role = self._role, {}
        return {"delta": role | delta}


def _call(call: ToolCall) -> dict:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
