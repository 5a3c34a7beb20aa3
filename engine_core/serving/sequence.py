"""One request on its way through the engine: its prompt, its place, its growing answer and its times.

A sequence says what it wants from the next step and takes the token that comes of it. It knows nothing of the device.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engine_core.backends import PendingToken, SequenceStep
from engine_core.request import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    Piece,
    SamplingParams,
    SpeculationCounts,
    ToolCall,
)
from engine_core.serving.cancellation import CancelToken
from engine_core.serving.constraint import AnswerConstraint
from engine_core.serving.conversation import Turn
from engine_core.text.answer import AnswerReader, ExpectedAnswer
from engine_core.text.detokenizer import Decoder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRequest:
    """A request that has been checked and tokenized."""

    request: GenerationRequest
    token_ids: np.ndarray  # int32 [n], the whole prompt
    prefix_ids: np.ndarray  # int32 [m], its system prompt's part, worth keeping; often empty
    sampling: SamplingParams  # resolved
    max_new_tokens: int
    constraint: AnswerConstraint | None
    expected: ExpectedAnswer = field(default_factory=ExpectedAnswer)
    num_dropped: int = 0  # oldest turns that are not in the prompt
    turn: Turn | None = None  # of its session

    @classmethod
    def unread(cls, request: GenerationRequest) -> PreparedRequest:
        """Return ``request`` as one whose deadline passed before it was tokenized; it can only be answered."""
        nothing = np.empty(0, dtype=np.int32)
        return cls(request, nothing, nothing, request.sampling, 0, None)


class Sequence:
    """The state of one prepared request, from its arrival to its answer.

    ``on_piece`` gets the pieces of the text, then ``on_done`` the result, once. They are called by whoever drives the
    engine or ends the sequence, and what they raise is logged.
    """

    def __init__(
        self,
        prepared: PreparedRequest,
        tokenizer: Decoder,
        *,
        on_piece: Callable[[Piece], None] | None,
        on_done: Callable[[GenerationResult], None],
        arrival: float | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        """``arrival``: time.monotonic() when the request came; None: now."""
        self.prepared = prepared
        self.cancel = CancelToken() if cancel is None else cancel
        self._on_piece = on_piece
        self._on_done = on_done
        # Its place, while it runs.
        self.slot: int | None = None
        self.cached_tokens = 0  # of the prompt, whose KV was there
        self._num_prompt = len(prepared.token_ids)
        self._num_valid = 0  # tokens of the prompt whose KV is there for sure
        self._num_fed = 0  # tokens of the prompt whose KV is there or on its way
        self.unread: deque[tuple[SequenceStep, PendingToken]] = deque()  # what is queued and has not been read
        self._num_queued = 0  # tokens sampled or on their way
        self.ending: FinishReason | Exception | None = None  # why it is over
        # Its answer.
        self.token_ids: list[int] = []  # without the end-of-sequence token
        self.num_sampled = 0
        self.speculation = SpeculationCounts()
        self._reader = AnswerReader(tokenizer, prepared.expected, prepared.request.stop)
        self._reasoning: list[str] = []
        self._text: list[str] = []
        self._tool_calls: list[ToolCall] = []
        self._pending_ids: list[int] = []
        self._num_pieces = 0
        # s, time.monotonic
        self.arrival = time.monotonic() if arrival is None else arrival
        self.start = 0.0  # of the work
        self._first_token = 0.0
        self._last_token = 0.0
        self._next_piece = 0.0  # no piece before this time

    @property
    def request_id(self) -> str:
        return self.prepared.request.request_id

    @property
    def adapter(self) -> str:
        """The name of its LoRA adapter; "" = none."""
        return self.prepared.request.adapter

    @property
    def priority(self) -> int:
        return self.prepared.request.priority

    @property
    def deadline(self) -> float | None:
        """time.monotonic() when it has to end; None = never."""
        timeout = self.prepared.request.timeout
        return self.arrival + timeout if timeout > 0 else None

    @property
    def wait(self) -> float:
        """Seconds from its arrival to the start of the work, or until now."""
        return (self.start or time.monotonic()) - self.arrival

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose KV is in its slot, or on its way there."""
        return self._num_fed + max(0, self.num_sampled - 1)

    # --- steps ----------------------------------------------------------------------------------------

    def place(self, slot: int, cached_tokens: int) -> None:
        """States where it runs, and how much of its prompt is there."""
        self.slot = slot
        self.cached_tokens = self._num_valid = self._num_fed = cached_tokens

    @property
    def is_prefilling(self) -> bool:
        """True while some of its prompt has yet to be queued."""
        return self._num_fed < self._num_prompt

    @property
    def runs_ahead(self) -> bool:
        """True if the next step can be queued now: a JSON schema's mask needs the token before it."""
        return self.prepared.constraint is None or self._num_queued == self.num_sampled

    def next_step(self, max_tokens: int) -> SequenceStep | None:
        """Return the next step, with at most ``max_tokens`` of its prompt; None while all it may have is on its way.

        Raises InvalidSchemaError if its schema leaves no token.
        """
        if self._num_queued == self.prepared.max_new_tokens:
            return None
        assert self.slot is not None, "it has no slot yet"
        constraint, start = self.prepared.constraint, self._num_fed
        end = min(start + max_tokens, self._num_prompt)
        samples = end == self._num_prompt
        mask = constraint.mask() if constraint is not None and samples else None
        if start == end:
            return SequenceStep(self.slot, None, 0, mask)
        return SequenceStep(self.slot, self.prepared.token_ids[start:end], start, mask, samples)

    def queued(self, step: SequenceStep, pending: PendingToken) -> None:
        """Notes that ``step`` is on its way."""
        self.unread.append((step, pending))
        self._num_fed += 0 if step.token_ids is None else len(step.token_ids)
        self._num_queued += step.most_tokens

    def read(self) -> tuple[int, ...]:
        """Return the tokens of its oldest unread step; none if it had none to sample, or was interrupted.

        Raises InvalidSamplingError if no token was left, EngineFaultError.
        """
        step, pending = self.unread.popleft()
        found = pending.result()
        tokens = found if isinstance(found, tuple) else () if found is None else (found,)
        if step.token_ids is not None and self.cancel.reason is None:
            self._num_valid = step.position + len(step.token_ids)
        if step.draft is not None:
            self._num_queued -= step.most_tokens - len(tokens)
        return tokens

    def accept(self, token: int | None) -> FinishReason | None:
        """Takes a token that ``read`` returned into the answer, None if it had none; returns why the answer ends with
        it, or None.

        Raises InvalidSchemaError, and EngineFaultError for a token that its schema's mask did not have.
        """
        if token is not None:
            self._num_valid = self._num_prompt
            self._note_time()
            if token in self.prepared.sampling.stop_token_ids:
                return FinishReason.STOP
            self.token_ids.append(token)
            self._pending_ids.append(token)
            self._reader.feed(token)
            if (constraint := self.prepared.constraint) is not None:
                constraint.accept(token)
                if constraint.complete:
                    return FinishReason.STOP
            if self._reader.stopped:
                return FinishReason.STOP
        if self.cancel.reason is not None:
            return self.cancel.reason
        if self.num_sampled == 0 and token is None and self._num_valid < self._num_prompt:
            return None
        assert token is not None, "the backend ended a sequence that nobody ended"
        return FinishReason.LENGTH if self.num_sampled >= self.prepared.max_new_tokens else None

    def live_ids(self) -> np.ndarray:
        """Return the ids, int32, whose KV is in its slot for sure: every sampled token but the last has been fed."""
        known = self.prepared.token_ids[: self._num_valid]
        fed = self.token_ids[: max(0, self.num_sampled - 1)]
        return np.concatenate([known, np.array(fed, dtype=np.int32)])

    def _note_time(self) -> None:
        self._last_token = time.monotonic()
        self.num_sampled += 1
        if self.num_sampled == 1:
            self._first_token = self._last_token

    # --- what its client gets -------------------------------------------------------------------------

    def emit(self) -> None:
        """Hands out what is to be shown now: nothing without text or before the streaming interval is over."""
        if self._reader.has_parts and self._last_token >= self._next_piece:
            self._next_piece = self._last_token + self.prepared.request.stream_interval
            self._emit_piece()

    def finish(self) -> None:
        """Hands out the rest of the text and the result, by ``ending``."""
        assert self.ending is not None
        if isinstance(self.ending, Exception):
            self.fail(self.ending)
            return
        self._reader.finish(cut=self.ending is not FinishReason.STOP)
        if self._reader.has_parts or self._pending_ids:
            self._emit_piece()
        if self.ending is FinishReason.STOP and self._tool_calls:
            self.ending = FinishReason.TOOL_CALLS
        decode_time = self._last_token - self._first_token
        self._done(
            dataclasses.replace(
                self._unstarted(self.ending),
                text="".join(self._text),
                reasoning="".join(self._reasoning),
                tool_calls=tuple(self._tool_calls),
                token_ids=tuple(self.token_ids),
                cached_tokens=self.cached_tokens,
                generated_tokens=self.num_sampled,
                reasoning_tokens=self._reader.num_reasoning_tokens,
                speculation=self.speculation,
                queue_time=self.start - self.arrival,
                time_to_first_token=self._first_token - self.arrival if self.num_sampled else 0.0,
                tokens_per_second=(self.num_sampled - 1) / decode_time if decode_time > 0 else 0.0,
            )
        )

    def fail(self, error: Exception) -> None:
        """Hands out a result with ``error``."""
        self._done(dataclasses.replace(self._unstarted(FinishReason.ERROR), error=error))

    def drop(self, reason: FinishReason) -> None:
        """Hands out the result of a sequence that was never started."""
        self._done(self._unstarted(reason))

    def _unstarted(self, reason: FinishReason) -> GenerationResult:
        waited = time.monotonic() - self.arrival
        num_tokens = len(self.prepared.token_ids)
        return GenerationResult(
            self.request_id, finish_reason=reason, prompt_tokens=num_tokens, queue_time=waited, total_time=waited
        )

    def _emit_piece(self) -> None:
        parts = self._reader.take()
        piece = Piece(self._num_pieces, parts.text, tuple(self._pending_ids), parts.reasoning, parts.calls)
        self._text.append(parts.text)
        self._reasoning.append(parts.reasoning)
        self._tool_calls += parts.calls
        self._num_pieces += 1
        self._pending_ids.clear()
        if self._on_piece is not None:
            _guarded(self._on_piece, piece)

    def _done(self, result: GenerationResult) -> None:
        result = dataclasses.replace(result, dropped_turns=self.prepared.num_dropped)
        if self.prepared.turn is not None:
            result = self.prepared.turn.end(result)
        _guarded(self._on_done, result)


def _guarded(callback: Callable, value: object) -> None:
    """A client's callback must not take the engine down."""
    try:
        callback(value)
    except BaseException:
        _log.exception("A callback raised")
