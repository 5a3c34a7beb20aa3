"""What goes into the engine and what comes out: requests, pieces and results.

Plain frozen objects; nothing here touches a tensor or a thread.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from dataclasses import dataclass, field

from engine_core.errors import EmptyPromptError, InvalidRequestError, InvalidSamplingError, InvalidTextError

ROLES = ("system", "user", "assistant", "tool")
MAX_SEED = 2**64 - 1
MAX_LOGIT_BIAS = 1e4  # larger amounts, -inf among them, count as this: certain or impossible, and finite in float32
MIN_TEMPERATURE = 1e-4  # below it sampling is greedy: scores divided by less overflow float32


@dataclass(frozen=True)
class RequestLimits:
    """What one request may hold, checked before any work is done for it."""

    text_bytes: int = 1 << 20  # UTF-8 bytes of all texts together: prompt, messages, stop strings
    messages: int = 1024
    stop_strings: int = 16
    stop_string_chars: int = 256
    token_ids: int = 1024  # entries of the logit bias, and of the stop token ids
    request_id_chars: int = 256


LIMITS = RequestLimits()
MAX_TIMEOUT = 10 * 365 * 86400.0  # s; a later deadline counts as this


class FinishReason(enum.Enum):
    """Why generation ended. The wire constants are in ``edgellm_ros/msg/FinishReason``."""

    STOP = "stop"  # an end-of-sequence token, a stop string, or the JSON value is complete
    LENGTH = "length"  # max_new_tokens or max_context reached
    CANCELLED = "cancelled"  # cancelled by the client, by deactivate or by shutdown
    TIMEOUT = "timeout"  # the deadline passed
    PREEMPTED = "preempted"  # a newer request took its place (busy_policy: preempt)
    ERROR = "error"  # see the error code


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation; ``role`` is one of ``ROLES``."""

    role: str
    content: str


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Applied in this order, the one of ``transformers``: repetition penalty, logit bias, JSON constraint,
    temperature, top-k, top-p, min-p. ``temperature`` 0 is greedy. All values are checked by ``validate``.
    """

    temperature: float = 0.0  # >= 0; 0 = greedy
    top_p: float = 1.0  # (0, 1]; 1 = off
    top_k: int = 0  # >= 0; 0 = off
    min_p: float = 0.0  # [0, 1); 0 = off
    repetition_penalty: float = 1.0  # > 0; 1 = off
    seed: int | None = None  # 0 .. 2**64 - 1; None = a fresh random seed
    max_new_tokens: int = 256  # >= 1
    ignore_eos: bool = False  # go on past end-of-sequence tokens (for benchmarks)
    stop_token_ids: tuple[int, ...] = ()  # further ids that end generation
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, amount added to its logit)

    def validate(self) -> None:
        """Raises InvalidSamplingError naming the option, its value and its range."""

        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise InvalidSamplingError(f"{name} is {getattr(self, name)!r}, but it must be {expected}.")

        check("temperature", math.isfinite(self.temperature) and 0 <= self.temperature <= 100, "from 0 to 100")
        check("top_p", math.isfinite(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1")
        check("top_k", self.top_k >= 0, "0 (off) or more")
        check("min_p", math.isfinite(self.min_p) and 0 <= self.min_p < 1, "at least 0 and below 1")
        check(
            "repetition_penalty",
            math.isfinite(self.repetition_penalty) and 0 < self.repetition_penalty <= 100,
            "above 0 and at most 100",
        )
        check("seed", self.seed is None or 0 <= self.seed <= MAX_SEED, "from 0 to 2**64 - 1")
        check("max_new_tokens", self.max_new_tokens >= 1, "1 or more")
        for token_id, bias in self.logit_bias:
            if math.isnan(bias) or bias == math.inf:
                raise InvalidSamplingError(f"The logit bias of token {token_id} is {bias}, but it must be a number.")

    def total_logit_bias(self) -> tuple[tuple[int, float], ...]:
        """Return (token id, amount) once for each id: its amounts added up, from -MAX_LOGIT_BIAS to MAX_LOGIT_BIAS."""

        def clamp(value: float) -> float:
            return max(-MAX_LOGIT_BIAS, min(MAX_LOGIT_BIAS, value))

        total: dict[int, float] = {}
        for token_id, bias in self.logit_bias:
            total[token_id] = total.get(token_id, 0.0) + clamp(bias)
        return tuple((token_id, clamp(bias)) for token_id, bias in total.items())


@dataclass(frozen=True)
class GenerationRequest:
    """One request. Exactly one of ``prompt`` (raw, no template) and ``messages`` is given."""

    request_id: str
    messages: tuple[ChatMessage, ...] = ()
    prompt: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()  # generation ends before the first of these; never part of the text
    json_schema: str = ""  # "" = free text; otherwise the answer is one JSON value of this schema
    priority: int = 0  # the highest waiting goes first; equal ones in order of arrival
    timeout: float = 0.0  # seconds from arrival, waiting included; 0 = none
    stream_interval: float = 0.0  # seconds; pieces are coalesced to at most one per interval, 0 = one per token

    def validate(self) -> None:
        """Checks all that needs no tokenizer.

        Raises EmptyPromptError, InvalidRequestError, InvalidTextError or InvalidSamplingError.
        """
        self._check_limits()
        if self.prompt and self.messages:
            raise InvalidRequestError("The request has both a prompt and messages; give one of them.")
        if not self.messages and not self.prompt.strip():
            raise EmptyPromptError("The request has neither a prompt nor messages; there is nothing to answer.")
        for message in self.messages:
            if message.role not in ROLES:
                raise InvalidRequestError(
                    f"The role {message.role!r} is unknown; a message is from one of {', '.join(ROLES)}."
                )
        if self.messages and not any(m.content.strip() for m in self.messages if m.role != "system"):
            raise EmptyPromptError("All messages are empty; there is nothing to answer.")
        for text in (self.prompt, self.json_schema, *self.stop, *(m.content for m in self.messages)):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InvalidTextError(
                    f"A text of the request is not valid UTF-8 (at character {error.start}); send UTF-8."
                ) from None
            if "\ufffd" in text:  # what rclpy turns bytes into that are not UTF-8
                raise InvalidTextError(
                    f"A text of the request holds U+FFFD at character {text.index(chr(0xFFFD))}, the mark of bytes "
                    "that were not valid UTF-8; send UTF-8."
                )
        if any(not text for text in self.stop):
            raise InvalidSamplingError("A stop string is empty; leave it out instead.")
        if self.stop and self.json_schema:
            raise InvalidSamplingError(
                "The request has stop strings and a JSON schema, whose value they would cut; leave one of them out."
            )
        if not (math.isfinite(self.timeout) and self.timeout >= 0):
            raise InvalidRequestError(f"The deadline is {self.timeout} s, but it must be 0 (none) or more seconds.")
        self.sampling.validate()

    def _check_limits(self) -> None:
        """Raise InvalidRequestError for what is too large, InvalidSamplingError if it is a sampling option."""

        def check(what: str, found: int, limit: int, error: type[InvalidRequestError] = InvalidRequestError) -> None:
            if found > limit:
                raise error(f"The request has {found} {what}, but at most {limit} are accepted.")

        check("characters in its request id", len(self.request_id), LIMITS.request_id_chars)
        check("messages", len(self.messages), LIMITS.messages)
        check("stop strings", len(self.stop), LIMITS.stop_strings, InvalidSamplingError)
        check("entries of the logit bias", len(self.sampling.logit_bias), LIMITS.token_ids, InvalidSamplingError)
        check("stop token ids", len(self.sampling.stop_token_ids), LIMITS.token_ids, InvalidSamplingError)
        longest = max(map(len, self.stop), default=0)
        check("characters in a stop string", longest, LIMITS.stop_string_chars, InvalidSamplingError)
        texts = (self.prompt, *self.stop, *(m.content for m in self.messages), *(m.role for m in self.messages))
        check("characters of text", sum(map(len, texts)), LIMITS.text_bytes)  # before anything is encoded
        num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        check("bytes of text", num_bytes, LIMITS.text_bytes)

    def replace(self, **changes) -> GenerationRequest:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it is streamed. The texts of all pieces, joined, are the result's text."""

    sequence: int  # 0, 1, 2, … within the request
    text: str  # whole characters only; may be empty when only ids arrived
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class GenerationResult:
    """The whole answer with its figures; also what a cancelled or failed request ends with."""

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()  # full-vocabulary ids, without the end-of-sequence token
    finish_reason: FinishReason = FinishReason.STOP
    error: Exception | None = None  # with FinishReason.ERROR
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens whose KV was reused
    generated_tokens: int = 0  # sampled tokens, the end-of-sequence token included
    queue_time: float = 0.0  # s, from arrival to the start of the work
    time_to_first_token: float = 0.0  # s, from arrival to the first token on the host; 0 if there was none
    tokens_per_second: float = 0.0  # decode rate after the first token; 0 with fewer than two tokens
    total_time: float = 0.0  # s, from arrival to the end
