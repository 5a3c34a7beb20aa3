"""Every error the inference core raises on purpose.

One exception is one wire code: the table that maps these classes to the constants of
``edgellm_ros/msg/ErrorCode`` stands in ``edgellm_ros/conversions.py``. A message says what was found,
what was expected and what to do, in one sentence.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

# Control characters, line separators and lone surrogates: a file or a request can have them in names that are quoted.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class EdgeLLMError(Exception):
    """Base of all errors of the inference core. Its text is one line: what would break it is escaped."""

    def __str__(self) -> str:
        return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), super().__str__())


# --- what configure and build can meet ------------------------------------------------------------


class ConfigurationError(EdgeLLMError):
    """A configuration value that no engine could honour (unknown key, out of range, contradictory)."""


class AdapterError(ConfigurationError):
    """A LoRA adapter is missing, damaged, of another model, or of a kind that is not run."""


class EngineDirectoryError(EdgeLLMError):
    """The engine directory is missing, incomplete, damaged, or not made for this version."""


class IntegrityError(EngineDirectoryError):
    """A file of the engine directory does not have the size or SHA-256 its manifest records."""


class SignatureError(IntegrityError):
    """The manifest of an engine directory is not signed by a trusted key."""


class SchemaVersionError(EngineDirectoryError):
    """The manifest was written by a newer version of this package."""


class UnsupportedModelError(EdgeLLMError):
    """The checkpoint's architecture, RoPE scaling or another trait is not implemented."""


class CheckpointError(EdgeLLMError):
    """The checkpoint directory lacks a file or a tensor, or a tensor has an unexpected shape."""


class BuildError(EdgeLLMError):
    """A build or a measurement cannot use its texts or write its files; nothing half-written is left behind."""


class DownloadError(BuildError):
    """A model is not in the hub that was asked, or cannot be fetched from there whole."""


class BackendUnavailableError(EdgeLLMError):
    """The backend asked for is unknown, not installed, or cannot run this engine on this machine."""


class InsufficientMemoryError(EdgeLLMError):
    """The memory plan does not fit; the message carries the numbers and what would make it fit."""


# --- what a request can meet ----------------------------------------------------------------------


class RequestError(EdgeLLMError):
    """Base of all errors that concern one request and leave the engine as it was."""


class InvalidRequestError(RequestError):
    """The request contradicts itself or the interface: both or neither of prompt and messages, unknown role."""


class EmptyPromptError(InvalidRequestError):
    """There is nothing to answer."""


class InvalidTextError(InvalidRequestError):
    """A text of the request is not valid Unicode (its bytes were not UTF-8)."""


class InvalidSamplingError(InvalidRequestError):
    """A sampling option is NaN, infinite or outside its range."""


class InvalidSessionError(InvalidRequestError):
    """A session's name is not allowed, unknown or taken, there are too many, or the file of one is at fault."""


class InvalidSchemaError(InvalidRequestError):
    """The form of an answer (JSON schema, regular expression, choices, grammar) or a tool's parameters do not parse, or
    use what is not supported."""


class InvalidImageError(InvalidRequestError):
    """An image cannot be decoded, or the model cannot see it: encoding, size, number, a model without a
    vision encoder."""


class PromptTooLongError(RequestError):
    """The prompt does not fit into max_context; the message has both numbers."""


class DeadlinePassedError(RequestError):
    """The request's deadline passed before it was prepared; it ends as one whose deadline passes in the queue."""

    def __init__(self, message: str = "The request's deadline passed while it was being prepared.") -> None:
        super().__init__(message)


class QueueFullError(RequestError):
    """The node is busy and its policy or its queue admits no further request."""


class SessionBusyError(RequestError):
    """Another request of the session waits or runs."""


class NoFrameError(RequestError):
    """A camera's topic has no frame yet, too few of them, or none that is new enough."""


class NotActiveError(RequestError):
    """The engine is not accepting requests (inactive, shutting down, or stopped by a fault)."""


class EngineFaultError(EdgeLLMError):
    """The engine itself failed while it ran; it has to be configured again."""


def as_exception(error: BaseException) -> Exception:
    """Return ``error``, or an EngineFaultError for what is no Exception: a Rust panic, an exit in a thread."""
    if isinstance(error, Exception):
        return error
    fault = EngineFaultError(f"A thread was ended by {type(error).__name__}: {first_line(error)}.")
    fault.__cause__ = error
    return fault


_LONGEST_SENTENCE = 1000  # characters: a request can spell names of a megabyte, which sentences quote


def sentence_of(error: Exception) -> str:
    """Return one sentence for whoever sent a request, of 1,000 characters at most.

    It names the class where the error is not one of ours.
    """
    is_ours = isinstance(error, EdgeLLMError)
    text = str(error) if is_ours else f"Internal error ({type(error).__name__}: {error}); please report it."
    return text if len(text) <= _LONGEST_SENTENCE else f"{text[: _LONGEST_SENTENCE - 1]}…"


def first_line(error: BaseException) -> str:
    """Return the first line of the error's text, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def refusing_panics(doing: str) -> Iterator[None]:
    """Turns a Rust panic of tokenizers or llguidance, which is a BaseException, into an InvalidRequestError."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InvalidRequestError(f"A library failed when {doing} this request ({first_line(error)[:200]}).") from error
