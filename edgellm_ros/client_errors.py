"""Exceptions of the Python client, each with the wire code that stands for it."""

from __future__ import annotations

from edgellm_ros.msg import ErrorCode, GenerationResult


class LLMError(Exception):
    """The reason for no answer, in one sentence. ``code``: a constant of ``ErrorCode``; 0 where no node gave one."""

    def __init__(self, message: str, code: int = ErrorCode.NONE) -> None:
        super().__init__(message)
        self.code = code


class UnavailableError(LLMError):
    """No node offers the action, or it has gone."""


class InvalidRequestError(LLMError):
    """The request is at fault; sent again unchanged it fails again."""


class PromptTooLongError(InvalidRequestError):
    """The conversation does not fit into the node's max_context."""


class InvalidSessionError(InvalidRequestError):
    """There is no session of this name, or there is one already, or the name, the file or their number is at fault."""


class InvalidImageError(InvalidRequestError):
    """An image cannot be decoded, there are too many, or the model does not see."""


class NoFrameError(LLMError):
    """A topic of image_topics has no frame that is new enough; the same request may succeed later."""


class NotActiveError(LLMError):
    """The node is not active; the same request may succeed later."""


class QueueFullError(LLMError):
    """The node has no place for another request; the same request may succeed later."""


class SessionBusyError(LLMError):
    """The session is answering another request; this one may be sent after it."""


class EngineError(LLMError):
    """The engine failed, or its configuration is at fault."""


class NoMessageError(LLMError):
    """The answer to ``ask_for`` is not a whole message. ``result``: what there was."""

    def __init__(self, message: str, result: GenerationResult) -> None:
        super().__init__(message)
        self.result = result


def error_of(code: int, message: str) -> LLMError:
    """Return the exception of a constant of ``ErrorCode``."""
    exact = {
        ErrorCode.PROMPT_TOO_LONG: PromptTooLongError,
        ErrorCode.INVALID_SESSION: InvalidSessionError,
        ErrorCode.INVALID_IMAGE: InvalidImageError,
        ErrorCode.NO_FRAME: NoFrameError,
        ErrorCode.NOT_ACTIVE: NotActiveError,
        ErrorCode.QUEUE_FULL: QueueFullError,
        ErrorCode.SESSION_BUSY: SessionBusyError,
    }
    if code in exact:
        return exact[code](message, code)
    return (InvalidRequestError if code < ErrorCode.NOT_ACTIVE else EngineError)(message, code)
