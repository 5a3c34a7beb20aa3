"""Between the interfaces and the core: requests, results, and the one table from exception to error code."""

from __future__ import annotations

import dataclasses
import uuid
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from std_msgs.msg import Header

from edgellm_ros import msg
from edgellm_ros.msg import ErrorCode
from edgellm_ros.parameters import Settings
from edgellm_ros.sampling_options import OPTION_TYPES
from engine_core import errors
from engine_core.errors import InvalidSamplingError
from engine_core.memory import MemoryPlan
from engine_core.message_types import MessageTypeError
from engine_core.request import (
    LIMITS,
    ChatMessage,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    SamplingParams,
    SpeculationCounts,
    Tool,
    ToolCall,
)

# Class → code. The nearest base class counts; what is not in the table is a defect of ours.
_ERROR_CODES: dict[type[Exception], int] = {
    errors.InvalidRequestError: ErrorCode.INVALID_REQUEST,
    MessageTypeError: ErrorCode.INVALID_REQUEST,
    errors.EmptyPromptError: ErrorCode.EMPTY_PROMPT,
    errors.InvalidTextError: ErrorCode.INVALID_TEXT,
    errors.InvalidSamplingError: ErrorCode.INVALID_SAMPLING,
    errors.InvalidSchemaError: ErrorCode.INVALID_SCHEMA,
    errors.InvalidSessionError: ErrorCode.INVALID_SESSION,
    errors.InvalidImageError: ErrorCode.INVALID_IMAGE,
    errors.PromptTooLongError: ErrorCode.PROMPT_TOO_LONG,
    errors.NotActiveError: ErrorCode.NOT_ACTIVE,
    errors.QueueFullError: ErrorCode.QUEUE_FULL,
    errors.SessionBusyError: ErrorCode.SESSION_BUSY,
    errors.NoFrameError: ErrorCode.NO_FRAME,
    errors.ConfigurationError: ErrorCode.CONFIGURATION,
    errors.CheckpointError: ErrorCode.CONFIGURATION,  # at run time, of a vocab map named by a parameter
    errors.EngineDirectoryError: ErrorCode.ENGINE_DIRECTORY,
    errors.IntegrityError: ErrorCode.INTEGRITY,
    errors.SchemaVersionError: ErrorCode.SCHEMA_VERSION,
    errors.UnsupportedModelError: ErrorCode.UNSUPPORTED_MODEL,
    errors.BackendUnavailableError: ErrorCode.BACKEND_UNAVAILABLE,
    errors.InsufficientMemoryError: ErrorCode.INSUFFICIENT_MEMORY,
    errors.EngineFaultError: ErrorCode.ENGINE_FAULT,
}

_FINISH_REASONS = {
    FinishReason.STOP: msg.FinishReason.STOP,
    FinishReason.LENGTH: msg.FinishReason.LENGTH,
    FinishReason.CANCELLED: msg.FinishReason.CANCELLED,
    FinishReason.TIMEOUT: msg.FinishReason.TIMEOUT,
    FinishReason.PREEMPTED: msg.FinishReason.PREEMPTED,
    FinishReason.TOOL_CALLS: msg.FinishReason.TOOL_CALLS,
    FinishReason.ERROR: msg.FinishReason.ERROR,
}

_METRICS = tuple(msg.GenerationMetrics.get_fields_and_field_types())


def error_code(error: Exception | None) -> int:
    """Return the constant of ``ErrorCode`` for ``error``; NONE for None, INTERNAL for what nobody foresaw."""
    if error is None:
        return ErrorCode.NONE
    for cls in type(error).__mro__:
        if cls in _ERROR_CODES:
            return _ERROR_CODES[cls]
    return ErrorCode.INTERNAL


def error_message(error: Exception | None) -> str:
    """Return one sentence for a person; "" where there is no error."""
    return "" if error is None else errors.sentence_of(error)


def wire_text(text: str) -> str:
    """Return ``text`` with each NUL, at which a ROS string ends, replaced by its picture, U+2400."""
    return text.replace("\0", "\u2400") if "\0" in text else text


def finish_reason(reason: FinishReason) -> int:
    return _FINISH_REASONS[reason]


def to_messages(messages: Any) -> tuple[ChatMessage, ...]:
    LIMITS.check_messages(len(messages))
    return tuple(
        ChatMessage(
            message.role,
            message.content,
            tool_calls=tuple(ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls),
            tool_call_id=message.tool_call_id,
            name=message.name,
            reasoning=message.reasoning,
            images=tuple(message.image_offsets),
        )
        for message in messages
    )


def to_message(message: ChatMessage) -> msg.ChatMessage:
    return msg.ChatMessage(
        role=message.role,
        content=wire_text(message.content),
        tool_calls=to_tool_calls(message.tool_calls),
        tool_call_id=message.tool_call_id,
        name=message.name,
        reasoning=wire_text(message.reasoning),
        image_offsets=list(message.images),
    )


def to_tool_calls(calls: Iterable[ToolCall]) -> list[msg.ToolCall]:
    return [msg.ToolCall(id=call.id, name=call.name, arguments=wire_text(call.arguments)) for call in calls]


def to_request(message: msg.GenerationRequest, settings: Settings) -> GenerationRequest:
    """Return the core's request of a message, without images; what it leaves open comes from ``settings``.

    Raises InvalidRequestError for too many parts, InvalidSamplingError if the logit bias has no value for each id.
    """
    LIMITS.check_count("choices", len(message.choices), LIMITS.choices)
    request = GenerationRequest(
        request_id=message.request_id or uuid.uuid4().hex,
        messages=settings.with_system(to_messages(message.messages), message.session),
        prompt=message.prompt,
        sampling=_to_sampling(message.sampling, settings.sampling),
        stop=tuple(message.stop),
        json_schema=message.json_schema,
        schema_name=message.schema_name,
        regex=message.regex,
        choices=tuple(message.choices),
        grammar=message.grammar,
        compact_json=message.compact_json,
        max_string=message.max_string,
        session=message.session,
        default_system=settings.system_prompt,
        context_policy=message.context_policy or "refuse",
        tools=_to_tools(message.tools),
        tool_choice=message.tool_choice or "auto",
        parallel_tool_calls=message.parallel_tool_calls[0] if len(message.parallel_tool_calls) else True,
        template_variables=message.template_variables,
        thinking=message.thinking or "model",
        thinking_budget=message.thinking_budget,
        adapter=message.adapter,
        priority=message.priority,
        timeout=message.deadline if message.deadline != 0 else settings.request_timeout,
        stream_interval=settings.stream_interval,
        allow_special=message.allow_special,
    )
    return settings.with_stop(request)


def _to_tools(tools: Any) -> tuple[Tool, ...]:
    LIMITS.check_count("tools", len(tools), LIMITS.tools)
    return tuple(Tool(tool.name, tool.description, tool.parameters) for tool in tools)


def _to_sampling(options: msg.SamplingOptions, defaults: SamplingParams) -> SamplingParams:
    given = {name: getattr(options, name)[0] for name in OPTION_TYPES if len(getattr(options, name))}
    ids, values = options.logit_bias_token_ids, options.logit_bias_values
    LIMITS.check_count("logit biases", max(len(ids), len(values)), LIMITS.logit_biases)
    LIMITS.check_count("stop token ids", len(options.stop_token_ids), LIMITS.stop_token_ids)
    if len(ids) != len(values):
        raise InvalidSamplingError(
            f"logit_bias_token_ids has {len(ids)} entries and logit_bias_values has {len(values)}; give one value "
            "for each id."
        )
    return dataclasses.replace(
        defaults,
        ignore_eos=options.ignore_eos,
        stop_token_ids=tuple(options.stop_token_ids),
        logit_bias=tuple(zip(ids, values)),
        **given,
    )


def to_result(result: GenerationResult, image_headers: Sequence[Header] = ()) -> msg.GenerationResult:
    return msg.GenerationResult(
        request_id=result.request_id,
        text=wire_text(result.text),
        reasoning=wire_text(result.reasoning),
        tool_calls=to_tool_calls(result.tool_calls),
        token_ids=array("i", result.token_ids),
        finish_reason=finish_reason(result.finish_reason),
        error_code=error_code(result.error),
        error_message=error_message(result.error),
        dropped_turns=result.dropped_turns,
        session_turns=result.session_turns,
        image_headers=list(image_headers),
        metrics=_to_metrics(result),
    )


def to_stats(result: GenerationResult) -> msg.GenerationStats:
    """Return the message of ``result`` without the node's totals and the time."""
    return msg.GenerationStats(
        request_id=result.request_id,
        finish_reason=finish_reason(result.finish_reason),
        error_code=error_code(result.error),
        metrics=_to_metrics(result),
    )


def _to_metrics(result: GenerationResult) -> msg.GenerationMetrics:
    values = {name: getattr(result, name) for name in _METRICS}
    values["speculation"] = to_speculation(result.speculation)
    return msg.GenerationMetrics(**values)


def to_speculation(counts: SpeculationCounts) -> msg.SpeculationCounts:
    return msg.SpeculationCounts(**dataclasses.asdict(counts))


def to_memory_plan(plan: MemoryPlan) -> msg.MemoryPlan:
    items = [msg.MemoryItem(name=item.name, bytes=item.bytes) for item in plan.items]
    return msg.MemoryPlan(items=items, total=plan.total, available=plan.available)
