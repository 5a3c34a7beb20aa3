"""Requests, pieces and results: the input and output of the engine.

Plain frozen objects; nothing here touches a tensor or a thread.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import numbers
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine_core.errors import (
    EmptyPromptError,
    InvalidImageError,
    InvalidRequestError,
    InvalidSamplingError,
    InvalidSchemaError,
    InvalidSessionError,
    InvalidTextError,
    PromptTooLongError,
    RequestError,
)

if TYPE_CHECKING:
    from engine_core.vision.images import Image

ROLES = ("system", "user", "assistant", "tool")
# A conversation that does not fit is refused, or its oldest turns are left out.
CONTEXT_POLICIES = ("refuse", "drop_oldest")
_SESSION_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")  # it is the name of a file, too
THINKING_MODES = ("model", "off", "on")
TOOL_CHOICES = ("auto", "none", "required")  # or the name of a tool
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_SEED = 2**64 - 1
_MAX_INT32 = 2**31 - 1
GREEDY_BELOW = 1e-4  # a temperature below this is greedy: float32 could not tell it from 0
MAX_LOGIT_BIAS = 1e4  # larger biases are clamped; no model's logits come near it


@dataclass(frozen=True)
class Range:
    """The finite numbers from ``low`` to ``high``; an end that is open is not one of them."""

    low: float
    high: float
    low_is_open: bool = False
    high_is_open: bool = False
    takes_nan: bool = False  # NaN stands for a value of its own

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_is_open else value >= self.low
        below = value < self.high if self.high_is_open else value <= self.high
        return (above and below) or (self.takes_nan and value != value)  # a NaN is neither above nor below

    def __str__(self) -> str:
        if not (self.low_is_open or self.high_is_open):
            return f"from {self.low} to {self.high}"
        low = f"above {self.low}" if self.low_is_open else f"at least {self.low}"
        high = f"below {self.high}" if self.high_is_open else f"at most {self.high}"
        return f"{low} and {high}"


def _limit(most: int, what: str, error: type[RequestError] = InvalidRequestError) -> Any:
    """Return a field of ``RequestLimits``. ``what``: its row in docs/errors.md, ``error``: what is raised beyond it."""
    return field(default=most, metadata={"what": what, "error": error})


@dataclass(frozen=True)
class RequestLimits:
    """The sizes that the parts of one request may have. They are checked before any work is done with the parts.

    Sizes in bytes are those of UTF-8. docs/errors.md has a table that is made of these fields.
    """

    text_bytes: int = _limit(1 << 20, "text of the prompt, or of all messages together", PromptTooLongError)
    schema_bytes: int = _limit(
        1 << 18, "a JSON schema, a regular expression, a grammar, or all choices together", InvalidSchemaError
    )
    choices: int = _limit(1024, "choices")
    schema_name_chars: int = _limit(64, "characters of a schema's name")
    messages: int = _limit(1024, "messages")
    stop_strings: int = _limit(16, "stop strings")
    stop_chars: int = _limit(256, "characters of a stop string")
    logit_biases: int = _limit(1024, "logit biases")
    stop_token_ids: int = _limit(1024, "stop token ids")
    request_id_chars: int = _limit(256, "characters of a request id")
    adapter_chars: int = _limit(64, "characters of an adapter's name")
    tokens_listed: int = _limit(
        1 << 16, "tokens that `~/tokenize` lists (max_context, if that is more)", PromptTooLongError
    )
    priority: int = _limit(255, "priority")  # from 0
    tools: int = _limit(128, "tools")
    tool_bytes: int = _limit(1 << 18, "all tools together")
    tool_calls: int = _limit(128, "tool calls of a message")
    tool_call_id_chars: int = _limit(256, "characters of the id of a tool call")
    template_variable_bytes: int = _limit(1 << 14, "template variables")
    images: int = _limit(64, "images", InvalidImageError)
    image_pixels: int = _limit(1 << 25, "pixels of an image", InvalidImageError)  # one of 8K has 33,177,600
    # Scaling takes 48 bytes for each pixel of an edge.
    image_edge: int = _limit(1 << 16, "pixels of an image's edge", InvalidImageError)
    # Each scan takes a pass over all pixels, and encoders write 18 at most.
    image_scans: int = _limit(32, "scans of a JPEG file", InvalidImageError)
    image_parts: int = _limit(1 << 16, "segments of a JPEG file, chunks of a PNG file", InvalidImageError)
    image_bytes: int = _limit(1 << 28, "all images together, as they come", InvalidImageError)

    def check_count(self, name: str, count: int, limit: int) -> None:
        """Raises InvalidRequestError if ``count`` is above ``limit``."""
        if count > limit:
            raise InvalidRequestError(f"The request has {count} {name}, but at most {limit} are accepted.")

    def check_messages(self, count: int) -> None:
        self.check_count("messages", count, self.messages)

    def check_images(self, count: int, size: int) -> None:
        """Raises InvalidImageError for too many images, or too many bytes (``size``) of them."""
        if count > self.images:
            raise InvalidImageError(f"The request has {count} images, but at most {self.images} are accepted.")
        if size > self.image_bytes:
            raise InvalidImageError(
                f"The request has {size} bytes of images, but at most {self.image_bytes} are accepted; scale them down."
            )

    def check_image_size(self, width: int, height: int) -> None:
        """Raises InvalidImageError for an image with too many pixels, or with an edge (pixels) that is too long."""
        if width * height > self.image_pixels:
            raise InvalidImageError(
                f"An image is {width} × {height}, but at most {self.image_pixels} pixels are accepted; scale it down."
            )
        if max(width, height) > self.image_edge:
            raise InvalidImageError(
                f"An image is {width} × {height}, but an edge may have at most {self.image_edge} pixels."
            )


LIMITS = RequestLimits()


class FinishReason(enum.Enum):
    """The reason why generation ended. The wire constants are in ``edgellm_ros/msg/FinishReason``."""

    STOP = "stop"  # an end-of-sequence token, a stop string, or the JSON value is complete
    TOOL_CALLS = "tool_calls"  # as STOP, and the answer has calls of tools
    LENGTH = "length"  # max_new_tokens or max_context reached
    CANCELLED = "cancelled"  # cancelled by the client, by deactivate or by shutdown
    TIMEOUT = "timeout"  # the deadline passed
    PREEMPTED = "preempted"  # a newer request took its place (busy_policy: preempt)
    ERROR = "error"  # see the error code


@dataclass(frozen=True)
class Tool:
    """A function that the model may ask its client to call."""

    name: str  # 1 to 64 letters, digits, '_', '.' and '-'
    description: str = ""
    parameters: str = ""  # the JSON schema of the object of its arguments; "" = it has none

    @property
    def texts(self) -> tuple[str, ...]:
        return self.name, self.description, self.parameters


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for. ``arguments`` is the text of one JSON object."""

    id: str  # nine letters and digits where the engine has chosen it, as every chat template takes them
    name: str
    arguments: str

    @property
    def texts(self) -> tuple[str, ...]:
        return self.id, self.name, self.arguments


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation; ``role`` is one of ``ROLES``."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant
    tool_call_id: str = ""  # of a tool: the call that it answers, of an assistant's message before it
    name: str = ""  # of a tool; "" = that of the call
    reasoning: str = ""  # of an assistant: what it thought before it answered
    # Of a user: where in ``content``, in characters and ascending, its images stand; their pixels are the request's.
    images: tuple[int, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text of the message."""
        calls = (text for call in self.tool_calls for text in call.texts)
        return (self.content, self.reasoning, self.tool_call_id, self.name, *calls)


@dataclass(frozen=True)
class SamplingOption:
    """One numeric option of ``SamplingParams``, as its field declares it."""

    name: str
    kind: type[int] | type[float]
    default: float | None
    range: Range
    description: str


def _option(kind: type[int] | type[float], default: float | None, range: Range, description: str) -> Any:
    return field(
        default=default, metadata={"kind": kind, "default": default, "range": range, "description": description}
    )


@dataclass(frozen=True)
class SamplingParams:
    """The options by which the next token is chosen.

    Applied in this order, the one of ``transformers``: repetition penalty, logit bias, JSON constraint,
    temperature, top-k, top-p, min-p. ``validate`` checks all values; ``resolve`` gives what a backend's sampler gets.

    This is the one declaration of the numeric options: ``SAMPLING_OPTIONS``, which is made of these fields, is what
    checks them, reads them from messages and offers them on command lines. A new one is a field here, a step in
    ``engine_core/sampling.py`` and ``sample.cu``, and a field of ``msg/SamplingOptions.msg``.
    """

    temperature: float = _option(
        float, 0.0, Range(0.0, 100.0, takes_nan=True),
        "Randomness of the answer; 0 = greedy, NaN = as the model's generation_config.json says.",
    )  # fmt: skip
    top_p: float = _option(
        float, 1.0, Range(0.0, 1.0, low_is_open=True),
        "Sample among the likeliest tokens of this total probability; 1 = off.",
    )  # fmt: skip
    top_k: int = _option(int, 0, Range(0, _MAX_INT32), "Sample among this many likeliest tokens; 0 = off.")
    min_p: float = _option(
        float, 0.0, Range(0.0, 1.0, high_is_open=True),
        "Drop tokens below this share of the likeliest one's probability; 0 = off.",
    )  # fmt: skip
    repetition_penalty: float = _option(
        float, 1.0, Range(0.01, 100.0), "Divides the logits of tokens seen before; 1 = off."
    )
    seed: int | None = _option(int, None, Range(0, MAX_SEED), "Seed of the sampling; without one, a fresh one.")
    max_new_tokens: int = _option(int, 256, Range(1, _MAX_INT32), "Most tokens of an answer.")
    ignore_eos: bool = False  # go on past end-of-sequence tokens (for benchmarks)
    stop_token_ids: Collection[int] = ()  # further ids that end generation
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, amount added to its logit); see ``biases``

    def validate(self) -> None:
        """Raises InvalidSamplingError naming the option, its value and its range."""
        for option in SAMPLING_OPTIONS.values():
            value = getattr(self, option.name)
            is_unset = value is None and option.default is None
            if not is_unset and not (_is_number(value, option.kind) and value in option.range):
                kind = "a whole number " if option.kind is int and not _is_number(value, int) else ""
                raise InvalidSamplingError(f"{option.name} is {value!r}, but it must be {kind}{option.range}.")
        for token_id, bias in self.logit_bias:
            if not _is_number(bias, float) or math.isnan(bias) or bias == math.inf:
                raise InvalidSamplingError(f"The logit bias of token {token_id} is {bias!r}, but it must be a number.")
        for token_id in (*self.stop_token_ids, *(token_id for token_id, _ in self.logit_bias)):
            if not _is_number(token_id, int):
                raise InvalidSamplingError(f"The token id {token_id!r} is no whole number.")

    def with_model(self, own: Mapping[str, float]) -> SamplingParams:
        """Return these options, or where ``temperature`` is NaN the model's.

        ``own``: option → value of the model, which takes the place of the temperature and of every option that has its
        default. Without a temperature there, the answer is greedy.
        """
        if not math.isnan(self.temperature):
            return self
        taken: dict[str, Any] = {
            name: value for name, value in own.items() if getattr(self, name) == SAMPLING_OPTIONS[name].default
        }
        return dataclasses.replace(self, **{**taken, "temperature": own.get("temperature", 0.0)})

    def resolve(self, eos_token_ids: Collection[int] = ()) -> SamplingParams:
        """Return what every backend's sampler gets, so that all of them agree.

        There is one finite (or -inf) bias for each id, temperature 0 for all that is greedy, the seed is a value (a
        fresh random one where none was given), and ``stop_token_ids`` are all the ids after which the sequence has
        ended, a frozenset.
        """
        stop_ids = frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos_token_ids))
        return dataclasses.replace(
            self,
            temperature=0.0 if self.temperature < GREEDY_BELOW else self.temperature,
            seed=secrets.randbits(64) if self.seed is None else self.seed,
            logit_bias=self.biases(),
            stop_token_ids=stop_ids,
        )

    def biases(self) -> tuple[tuple[int, float], ...]:
        """Return one bias for each token id: the sum of its biases, clamped to +-MAX_LOGIT_BIAS.

        An id with a bias of minus infinity is excluded: its bias stays minus infinity whatever is added. No sum is NaN.
        """
        sums: dict[int, float] = {}
        for token_id, bias in self.logit_bias:
            sums[token_id] = sums.get(token_id, 0.0) + (bias if bias == -math.inf else max(-1e30, min(1e30, bias)))
        return tuple(
            (token_id, total if total == -math.inf else max(-MAX_LOGIT_BIAS, min(MAX_LOGIT_BIAS, total)))
            for token_id, total in sums.items()
        )


SAMPLING_OPTIONS: dict[str, SamplingOption] = {
    each.name: SamplingOption(each.name, **each.metadata)
    for each in dataclasses.fields(SamplingParams)
    if each.metadata
}


@dataclass(frozen=True)
class GenerationRequest:
    """One request. Exactly one of ``prompt`` (raw, no template) and ``messages`` is given."""

    request_id: str
    messages: tuple[ChatMessage, ...] = ()
    prompt: str = ""
    # In the order of their places in the messages. Without any place there, all come before the text of the last
    # user's message. In a raw prompt, each takes the place of one of the model's placeholders.
    images: tuple[Image, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()  # generation ends before the first of these; never part of the text
    # The form of the answer: one of these, or none of them for free text.
    json_schema: str = ""  # one JSON value of this schema
    schema_name: str = ""  # one JSON value of the engine's schema of this name
    regex: str = ""  # a text that this regular expression matches as a whole
    choices: tuple[str, ...] = ()  # one of these texts
    grammar: str = ""  # a text of this Lark grammar, in llguidance's syntax
    compact_json: bool = False  # JSON on one line, spelled as json.dumps does; False: one blank or line break anywhere
    max_string: int = 0  # characters of a string of the JSON that its schema does not bound; 0 = no limit
    # The conversation whose history comes before ``messages``, and to which they and the answer are added; "" = none.
    session: str = ""
    default_system: str = ""  # the system message of a session that begins without one; "" = none
    context_policy: str = "refuse"  # one of CONTEXT_POLICIES, for messages that do not fit into the context
    tools: tuple[Tool, ...] = ()  # what the model may call, with messages alone
    tool_choice: str = "auto"  # one of TOOL_CHOICES, or the name of the tool that is to be called
    parallel_tool_calls: bool = True  # an answer may have several calls
    template_variables: str = ""  # a JSON object of further variables for the chat template; "" = none
    thinking: str = "model"  # "model": as its template does, "off", "on"
    thinking_budget: int = 0  # tokens that a model may think before it answers; 0 = no limit
    adapter: str = ""  # name of a LoRA adapter of the engine's; "" = the model itself
    priority: int = 0  # the highest waiting goes first; equal ones in order of arrival
    timeout: float = 0.0  # seconds from arrival, preparation and waiting included; 0 or above 1e8 = none
    stream_interval: float = 0.0  # seconds; pieces are coalesced to at most one per interval, 0 = one per step
    # Special tokens spelled in the messages' contents become control tokens; by default they are plain text. A raw
    # prompt is always read with its special tokens: whoever sends one writes the template's part too.
    allow_special: bool = False

    def validate(self, limits: RequestLimits = LIMITS, num_unread: int = 0) -> None:
        """Checks all that needs no tokenizer; the sizes come first. ``num_unread``: images that are not read yet.

        Raises EmptyPromptError, InvalidRequestError, InvalidTextError, InvalidSamplingError or PromptTooLongError.
        """
        num_images = len(self.images) + num_unread
        self.check_sizes(limits)
        if self.prompt and self.messages:
            raise InvalidRequestError("The request has both a prompt and messages; give one of them.")
        if self.session:
            check_session_name(self.session)
        if self.context_policy not in CONTEXT_POLICIES:
            raise InvalidRequestError(
                f"The context policy is {self.context_policy[:64]!r}, expected one of {', '.join(CONTEXT_POLICIES)}."
            )
        if self.prompt and (self.session or self.context_policy != "refuse"):
            raise InvalidRequestError("A session and drop_oldest are for messages, but the request has a raw prompt.")
        if not self.messages and not self.prompt.strip():
            raise EmptyPromptError("The request has no messages and no prompt with text; there is nothing to answer.")
        self._check_messages(num_images)
        self._check_images(num_images)
        self._check_tools()
        texts = (self.request_id, self.adapter, self.prompt, self.template_variables, *self._forms(), *self.stop)
        tool_texts = (text for tool in self.tools for text in tool.texts)
        for text in (*texts, *(text for message in self.messages for text in message.texts), *tool_texts):
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
        self._check_form()
        if not (_is_number(self.timeout, float) and math.isfinite(self.timeout) and self.timeout >= 0):
            raise InvalidRequestError(f"The deadline is {self.timeout} s, but it must be 0 (none) or more seconds.")
        if not (_is_number(self.stream_interval, float) and self.stream_interval >= 0):
            raise InvalidRequestError(
                f"The stream interval is {self.stream_interval} s, but it must be 0 (each step) or more seconds."
            )
        self.sampling.validate()

    @property
    def is_json(self) -> bool:
        """The answer is a JSON value, where it is no call of a tool."""
        return bool(self.json_schema or self.schema_name)

    @property
    def has_form(self) -> bool:
        """The answer is held to a form: it is no free text."""
        return self.is_json or bool(self.regex or self.choices or self.grammar)

    def _forms(self) -> tuple[str, ...]:
        return (self.json_schema, self.schema_name, self.regex, self.grammar, *self.choices)

    def _check_form(self) -> None:
        forms = {
            "a JSON schema": self.json_schema,
            "the name of a schema": self.schema_name,
            "a regular expression": self.regex,
            "choices": self.choices,
            "a grammar": self.grammar,
        }
        given = [name for name, form in forms.items() if form]
        if len(given) > 1:
            raise InvalidRequestError(f"The request has {given[0]} and {given[1]}; an answer has one form, give one.")
        if any(not choice for choice in self.choices):
            raise InvalidSchemaError("A choice is empty; leave it out.")
        if self.max_string and not 0 < self.max_string <= _MAX_INT32:
            raise InvalidRequestError(f"max_string is {self.max_string}, but it must be from 0 to {_MAX_INT32}.")
        if (self.compact_json or self.max_string) and not self.is_json:
            raise InvalidRequestError("compact_json and max_string are for JSON, but the request has no JSON schema.")
        if self.stop and given:
            raise InvalidSamplingError(
                f"The request has stop strings and {given[0]}, whose answer they would cut; leave one of them out."
            )
        if self.tools and self.tool_choice != "none" and given and not self.is_json:
            raise InvalidRequestError(
                f"The request has tools and {given[0]}, from which a call cannot be told; leave one of them out."
            )

    def _check_messages(self, num_images: int) -> None:
        for message in self.messages:
            if message.role not in ROLES:
                raise InvalidRequestError(
                    f"The role {message.role[:64]!r} is unknown; a message is from one of {', '.join(ROLES)}."
                )
        said = (m.content.strip() or m.tool_calls for m in self.messages if m.role != "system")
        if self.messages and not num_images and not any(said):
            raise EmptyPromptError("All messages, system messages aside, are empty; there is nothing to answer.")
        for message in self.messages:
            if (message.tool_calls or message.reasoning) and message.role != "assistant":
                raise InvalidRequestError(
                    f"A message of the role {message.role} has tool calls or reasoning, which only an assistant has."
                )
            known: set[str] = set()  # of this message: agents that number their calls begin anew in the next one
            for call in message.tool_calls:
                check_tool_name(call.name)
                parse_arguments(call)
                if call.id and call.id in known:
                    raise InvalidRequestError(f"Two tool calls of a message have the id {call.id[:64]!r}.")
                known.add(call.id)
            if message.tool_call_id and message.role != "tool":
                raise InvalidRequestError(
                    f"A message of the role {message.role} has a tool_call_id, which only a tool's message has."
                )

    def _check_images(self, num_images: int) -> None:
        for message in self.messages:
            if message.images and message.role != "user":
                raise InvalidImageError(
                    f"A message of the role {message.role} has images, which only a user's message can have."
                )
            if any(place < last for last, place in zip((0, *message.images), (*message.images, len(message.content)))):
                raise InvalidImageError(
                    f"The images of a message stand at {list(message.images)[:16]}, but places ascend from 0 to the "
                    f"{len(message.content)} characters of its text."
                )
        num_places = sum(len(message.images) for message in self.messages)
        if num_places and num_places != num_images:
            raise InvalidImageError(
                f"The messages have places for {num_places} images, but the request has {num_images}."
            )
        if num_images and self.messages and not any(message.role == "user" for message in self.messages):
            raise InvalidImageError("The request has images, but no user's message for them.")

    def with_placed_images(self) -> GenerationRequest:
        """Return the request with a place in the messages for every image; ``validate`` has passed it."""
        if not self.images or not self.messages or any(message.images for message in self.messages):
            return self
        last = max(index for index, message in enumerate(self.messages) if message.role == "user")
        message = dataclasses.replace(self.messages[last], images=(0,) * len(self.images))
        return self.replace(messages=(*self.messages[:last], message, *self.messages[last + 1 :]))

    def with_messages(self, messages: tuple[ChatMessage, ...]) -> GenerationRequest:
        """Return the request with the last of its messages, and of its images those that have a place there."""
        count = sum(len(message.images) for message in messages)
        return self.replace(messages=messages, images=self.images[len(self.images) - count :])

    def check_answered_calls(self) -> None:
        """Raises InvalidRequestError for a tool's message that answers no call.

        ``messages`` have to be the whole conversation.
        """
        known: set[str] = set()
        for message in self.messages:
            known.update(call.id for call in message.tool_calls)
            if message.tool_call_id and message.tool_call_id not in known:
                raise InvalidRequestError(
                    f"The tool_call_id {message.tool_call_id[:64]!r} is that of no tool call in the messages before it."
                )

    def _check_tools(self) -> None:
        for tool in self.tools:
            check_tool_name(tool.name)
        names = [tool.name for tool in self.tools]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise InvalidRequestError(f"Two tools have the name {twice!r}.")
        if self.tool_choice not in (*TOOL_CHOICES, *names):
            raise InvalidRequestError(
                f"The tool choice is {self.tool_choice[:64]!r}, but it must be one of {', '.join(TOOL_CHOICES)} or the "
                "name of a tool of the request."
            )
        if not self.tools and self.tool_choice not in ("auto", "none"):
            raise InvalidRequestError(f"The tool choice is {self.tool_choice!r}, but the request has no tools.")
        if self.thinking not in THINKING_MODES:
            raise InvalidRequestError(
                f"thinking is {self.thinking[:64]!r}, but it must be one of {', '.join(THINKING_MODES)}."
            )
        if not 0 <= self.thinking_budget <= _MAX_INT32:
            raise InvalidRequestError(
                f"The thinking budget is {self.thinking_budget} tokens, but it must be from 0 to {_MAX_INT32}."
            )
        needs_template = self.tools or self.template_variables or self.thinking != "model" or self.thinking_budget
        if self.prompt and needs_template:
            raise InvalidRequestError(
                "The request has a raw prompt, but tools, thinking and template variables need messages, to which the "
                "chat template is applied."
            )
        self.parse_template_variables()

    def parse_template_variables(self) -> dict[str, Any]:
        """Return the variables for the chat template by name. Raises InvalidRequestError."""
        return _parse_object(self.template_variables, "template variables")

    def check_sizes(self, limits: RequestLimits = LIMITS) -> None:
        """Raises InvalidRequestError or PromptTooLongError if a part of the request is larger than ``limits`` allow."""
        limits.check_messages(len(self.messages))
        limits.check_count("tools", len(self.tools), limits.tools)
        places = max((len(message.images) for message in self.messages), default=0)
        limits.check_images(max(len(self.images), places), sum(image.pixels.nbytes for image in self.images))
        limits.check_count(
            "tool calls in a message", max((len(m.tool_calls) for m in self.messages), default=0), limits.tool_calls
        )
        ids = [m.tool_call_id for m in self.messages] + [call.id for m in self.messages for call in m.tool_calls]
        limits.check_count(
            "characters in the id of a tool call", max(map(len, ids), default=0), limits.tool_call_id_chars
        )
        for image in self.images:
            limits.check_image_size(image.width, image.height)
        limits.check_count("stop strings", len(self.stop), limits.stop_strings)
        limits.check_count("logit biases", len(self.sampling.logit_bias), limits.logit_biases)
        limits.check_count("stop token ids", len(self.sampling.stop_token_ids), limits.stop_token_ids)
        limits.check_count("characters in its id", len(self.request_id), limits.request_id_chars)
        limits.check_count("characters in its adapter's name", len(self.adapter), limits.adapter_chars)
        limits.check_count("characters in its schema's name", len(self.schema_name), limits.schema_name_chars)
        limits.check_count("choices", len(self.choices), limits.choices)
        limits.check_count("characters in a stop string", max(map(len, self.stop), default=0), limits.stop_chars)
        if not 0 <= self.priority <= limits.priority:
            raise InvalidRequestError(f"The priority is {self.priority}, but it must be from 0 to {limits.priority}.")
        texts = tuple(text for message in self.messages for text in message.texts)
        size = _num_bytes((self.prompt, *texts), limits.text_bytes)
        if size > limits.text_bytes:
            raise PromptTooLongError(
                f"The request has at least {size} bytes of text, but at most {limits.text_bytes} are accepted; "
                "send a shorter prompt."
            )
        for what, found, limit in (
            ("text in its tools", tuple(text for tool in self.tools for text in tool.texts), limits.tool_bytes),
            ("template variables", (self.template_variables,), limits.template_variable_bytes),
        ):
            if (size := _num_bytes(found, limit)) > limit:
                raise InvalidRequestError(
                    f"The request has at least {size} bytes of {what}, but at most {limit} are accepted."
                )
        for what, found in (
            ("The JSON schema has", (self.json_schema,)),
            ("The regular expression has", (self.regex,)),
            ("The grammar has", (self.grammar,)),
            ("The choices have", self.choices),
        ):
            if (size := _num_bytes(found, limits.schema_bytes)) > limits.schema_bytes:
                raise InvalidSchemaError(
                    f"{what} at least {size} bytes, but at most {limits.schema_bytes} are accepted."
                )

    @property
    def num_template_chars(self) -> int:
        """The characters of all texts to which the chat template is applied."""
        messages = sum(len(text) for message in self.messages for text in message.texts)
        return messages + sum(len(text) for tool in self.tools for text in tool.texts)

    @property
    def num_chars(self) -> int:
        """The characters of all its texts."""
        forms = sum(map(len, self._forms()))
        return len(self.prompt) + self.num_template_chars + forms + len(self.template_variables)

    def replace(self, **changes) -> GenerationRequest:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class RequestDefaults:
    """The values a request gets for what it leaves open."""

    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    system_prompt: str = ""  # put before messages without a system message
    request_timeout: float = 0.0  # s; 0 = none
    stream_interval: float = 0.0  # s

    def with_system(self, messages: tuple[ChatMessage, ...], session: str = "") -> tuple[ChatMessage, ...]:
        """Return ``messages`` with the system prompt, if they are a conversation without one; a session has its own."""
        if not messages or not self.system_prompt or session or any(m.role == "system" for m in messages):
            return messages
        return (ChatMessage("system", self.system_prompt), *messages)

    def with_stop(self, request: GenerationRequest) -> GenerationRequest:
        """Return ``request`` with the stop strings, if it has none of its own and is free text."""
        return request if request.stop or request.has_form else request.replace(stop=self.stop)


def check_session_name(name: str) -> None:
    """Raises InvalidSessionError."""
    if _SESSION_NAME.fullmatch(name) is None:
        raise InvalidSessionError(
            f"The session's name is {name[:64]!r}, expected 1 to 64 letters, digits, '.', '_' and '-'."
        )


MAX_NESTING = 64  # objects and arrays inside each other, of JSON that a client sends


def nesting(value: object) -> int:
    """Return how many objects and arrays lie inside each other, without recursion."""
    deepest, level = 0, [value] if isinstance(value, (dict, list)) else []
    while level:
        deepest += 1
        inner: list[object] = []
        for item in level:
            inner.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        level = [item for item in inner if isinstance(item, (dict, list))]
    return deepest


def check_tool_name(name: str) -> None:
    """Raises InvalidRequestError."""
    if _TOOL_NAME.fullmatch(name) is None:
        raise InvalidRequestError(
            f"A tool has the name {name[:64]!r}, but it must have 1 to 64 letters, digits, '_', '.' and '-'."
        )


def parse_arguments(call: ToolCall) -> dict[str, Any]:
    """Return the arguments of a call; an empty text is that of none. Raises InvalidRequestError."""
    return _parse_object(call.arguments, f"arguments of a call of {call.name!r} in the messages")


def _parse_object(text: str, what: str) -> dict[str, Any]:
    """Return a JSON object that a client sent; "" is an empty one. Raises InvalidRequestError, naming ``what``."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or nesting(found) > MAX_NESTING:
        raise InvalidRequestError(
            f"The {what} are no JSON object of at most {MAX_NESTING} levels of objects and arrays."
        )
    return found


def _is_number(value: object, kind: type[int] | type[float]) -> bool:
    """Return whether ``value``, also one of numpy, is a number that an option of ``kind`` takes."""
    return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)


def _num_bytes(texts: tuple[str, ...], limit: int) -> int:
    """Return the UTF-8 bytes of ``texts``, or their characters if these alone are more than ``limit``."""
    num_chars = sum(map(len, texts))
    return num_chars if num_chars > limit else sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it is streamed. The texts of all pieces, joined, are the result's text.

    So are the reasoning and the tool calls. In every answer reasoning comes first, then text, then calls.
    """

    sequence: int  # 0, 1, 2, … within the request
    text: str  # whole characters only; may be empty when only ids arrived
    token_ids: tuple[int, ...]  # of all that the model wrote, markers included
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()  # each call once, when it is whole


@dataclass(frozen=True)
class SpeculationCounts:
    """Counts of the steps that fed more than one token: see ``serving/speculation.py``."""

    steps: int = 0  # that had a draft
    drafted: int = 0  # tokens guessed by lookup
    accepted: int = 0  # of them, kept
    forced: int = 0  # tokens that a schema forced and that were fed without a step of their own

    def __add__(self, other: SpeculationCounts) -> SpeculationCounts:
        return SpeculationCounts(
            *(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )


@dataclass(frozen=True)
class GenerationResult:
    """The whole answer with its figures; also what a cancelled or failed request ends with."""

    request_id: str
    text: str = ""  # without reasoning and tool calls
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()  # whole ones only
    token_ids: tuple[int, ...] = ()  # full-vocabulary ids, without the end-of-sequence token
    finish_reason: FinishReason = FinishReason.STOP
    error: Exception | None = None  # with FinishReason.ERROR
    prompt_tokens: int = 0
    image_tokens: int = 0  # of the prompt's tokens, those of images
    cached_tokens: int = 0  # prompt tokens whose KV was reused
    dropped_turns: int = 0  # oldest turns that were left out of the prompt (drop_oldest)
    session_turns: int = 0  # turns of the session with this answer; 0 if it was added to none
    generated_tokens: int = 0  # sampled tokens, the end-of-sequence token included
    reasoning_tokens: int = 0  # of them, those before the answer
    speculation: SpeculationCounts = SpeculationCounts()
    queue_time: float = 0.0  # s, from arrival to the start of the work
    time_to_first_token: float = 0.0  # s, from arrival to the first token on the host; 0 if there was none
    tokens_per_second: float = 0.0  # decode rate after the first token; 0 with fewer than two tokens
    total_time: float = 0.0  # s, from arrival to the end
    energy_joules: float = math.nan  # J, the request's share; see serving/energy.py. NaN where it cannot be read
