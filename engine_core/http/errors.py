"""The OpenAI error object and the HTTP status of every error a request can end with."""

from __future__ import annotations

from typing import NamedTuple

from engine_core import errors
from engine_core.http.fields import FieldError
from engine_core.request import FinishReason, GenerationResult


class HttpError(errors.RequestError):
    """An error of HTTP itself: no such page, no key, a body that is too large."""

    def __init__(self, status: int, message: str, code: str, *, closes: bool = False) -> None:
        """``closes``: the connection is of no further use."""
        super().__init__(message)
        self.status, self.code, self.closes = status, code, closes


class ModelError(FieldError):
    """The model a request asks for is not served."""

    def __init__(self, model: str, adapters: dict[str, str]) -> None:
        super().__init__("model", f"The model {model[:64]!r} is not served here; there is {', '.join(adapters)}.")


class Answer(NamedTuple):
    """An error as it is answered."""

    status: int
    body: dict
    headers: dict[str, str]


# Class → HTTP status and code; the nearest base class counts. Clients of OpenAI try 409, 429 and 5xx again.
_STATUS: dict[type[Exception], tuple[int, str]] = {
    errors.InvalidRequestError: (400, "invalid_request"),
    errors.EmptyPromptError: (400, "empty_prompt"),
    errors.InvalidTextError: (400, "invalid_text"),
    errors.InvalidSamplingError: (400, "invalid_sampling"),
    errors.InvalidSchemaError: (400, "invalid_schema"),
    errors.InvalidSessionError: (400, "invalid_session"),
    errors.InvalidImageError: (400, "invalid_image"),
    ModelError: (404, "model_not_found"),
    errors.PromptTooLongError: (400, "context_length_exceeded"),
    errors.QueueFullError: (429, "queue_full"),
    errors.SessionBusyError: (409, "session_busy"),
    errors.NotActiveError: (503, "not_active"),
    errors.EngineFaultError: (503, "engine_fault"),
}
_TYPES = {401: "authentication_error", 409: "conflict_error", 429: "rate_limit_error"}


def describe(error: Exception) -> Answer:
    """Return the answer to a request that ends with ``error``."""
    headers = {}
    if isinstance(error, HttpError):
        status, code = error.status, error.code
        if error.closes:
            headers["connection"] = "close"
    else:
        found = (_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS)
        status, code = next(found, (500, "internal_error"))
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = _encodable(error.param) if isinstance(error, FieldError) else None
    body = {"message": _encodable(errors.sentence_of(error)), "type": kind, "param": param, "code": code}
    return Answer(status, {"error": body}, headers)


def _encodable(text: str) -> str:
    """Return ``text`` with the lone surrogates that JSON can spell, and UTF-8 cannot, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def describe_ending(result: GenerationResult) -> Answer | None:
    """Return the error that ``result`` is for an HTTP client; None if it is an answer."""
    if result.error is not None:
        return describe(result.error)
    if result.finish_reason is FinishReason.CANCELLED:
        answer = describe(
            HttpError(503, "The request was cancelled at the robot, or the node was deactivated.", "cancelled")
        )
    elif result.finish_reason is FinishReason.PREEMPTED:
        answer = describe(HttpError(503, "A newer request took this request's place (busy_policy).", "preempted"))
    else:
        return None
    # Who cancelled it does not want it again; OpenAI's clients follow this header.
    return answer._replace(headers={"x-should-retry": "false"})
