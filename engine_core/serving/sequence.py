"""One request on its way through the engine: its prompt, its place, its growing answer and its times.

A sequence says what it wants from the next step and takes the token that comes of it. It knows nothing of the device.
"""

from __future__ import annotations

import dataclasses
import logging
import math
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
from engine_core.serving.energy import Share
from engine_core.serving.sessions import Turn
from engine_core.text.answer import AnswerReader, ExpectedAnswer
from engine_core.text.detokenizer import Decoder
from engine_core.vision.prompt import PlacedImage

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
    images: tuple[PlacedImage, ...] = ()
    # int32 [n], what the KV of the prompt is found by: its ids, where it has no images. See ``ImageKeys``.
    key: np.ndarray | None = None

    @property
    def kv_ids(self) -> np.ndarray:
        return self.token_ids if self.key is None else self.key

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
        self._on_done: Callable[[GenerationResult], None] | None = on_done
        # Its place, while it runs.
        self.slot: int | None = None
        self.cached_tokens = 0  # of the prompt, whose KV was there
        self._given_ids = prepared.token_ids  # int32 [n], what is fed in parts: the prompt, see ``start_anew``
        self._num_given = len(prepared.token_ids)
        self._num_given_sampled = 0  # of them, tokens of the answer
        self._num_valid = 0  # of them, those whose KV is there for sure
        self._num_fed = 0  # of them, those whose KV is there or on its way
        self._num_seen = 0  # of them, those up to which the features of images are there
        self.rope_switch = 0  # of its backend
        self._border: int | None = None
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
        self.energy: Share | None = None  # while it runs, where energy can be read
        self.energy_joules = math.nan
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
        return self._num_fed + max(0, self.num_sampled - self._num_given_sampled - 1)

    # --- steps ----------------------------------------------------------------------------------------

    def place(self, slot: int, cached_tokens: int, border: int | None = None) -> None:
        """States where it runs, and how much of its prompt is there.

        ``border``: tokens of the prompt that others share, after which a step has to end; None: steps end where they
        like, since the model's layers keep no states.
        """
        self.slot, self._border = slot, border
        self.cached_tokens = self._num_valid = self._num_fed = cached_tokens

    @property
    def kv_ids(self) -> np.ndarray:
        """Return what the KV of what is fed in parts is found by: see ``PreparedRequest.key`` and ``start_anew``."""
        answer = np.array(self.token_ids[: self._num_given_sampled], dtype=np.int32)
        return np.concatenate([self.prepared.kv_ids, answer]) if len(answer) else self.prepared.kv_ids

    @property
    def long_rope(self) -> bool:
        """True if its KV is that of a sequence longer than ``rope_switch``."""
        return 0 < self.rope_switch < self._num_given

    @property
    def left_of_rope(self) -> int | None:
        """Return how many more of its sampled tokens can be fed before all its KV is another; None: any number."""
        if not self.rope_switch or self.long_rope:
            return None
        return self.rope_switch - self._num_given - max(0, self.num_sampled - self._num_given_sampled - 1)

    @property
    def outgrows_rope(self) -> bool:
        """True if the next step needs other KV of all tokens before it: ``start_anew`` when all tokens are read."""
        if not self.rope_switch or self.long_rope or self.is_prefilling:
            return False
        length = self._num_given + self._num_queued - self._num_given_sampled  # with the token that the step feeds
        return self.rope_switch < length and self._num_queued < self.prepared.max_new_tokens

    def start_anew(self) -> None:
        """Take the prompt and the answer so far as what is to be fed, none of whose KV is there."""
        assert not self.unread, "a token is on its way"
        answer = np.array(self.token_ids, dtype=np.int32)
        self._given_ids = np.concatenate([self.prepared.token_ids, answer])
        self._num_given, self._num_given_sampled = len(self._given_ids), len(answer)
        self._num_valid = self._num_fed = self._num_seen = 0

    def resume(self, cached_tokens: int) -> None:
        """States how much of the KV is there after ``start_anew``."""
        self._num_valid = self._num_fed = cached_tokens

    @property
    def is_prefilling(self) -> bool:
        """True while some of its prompt has yet to be queued."""
        return self._num_fed < self._num_given

    @property
    def runs_ahead(self) -> bool:
        """True if the next step can be queued now: a JSON schema's mask needs the token before it, and so does one that
        starts anew."""
        is_ahead = self._num_queued > self.num_sampled
        return not (is_ahead and (self.prepared.constraint is not None or self.outgrows_rope))

    def next_step(self, max_tokens: int, *, encodes_apart: bool = False) -> SequenceStep | None:
        """Return the next step, with at most ``max_tokens`` of its prompt; None while all it may have is on its way.

        ``encodes_apart``: images are encoded in steps of their own before their tokens are fed.

        Raises InvalidSchemaError if its schema leaves no token.
        """
        if self._num_queued == self.prepared.max_new_tokens:
            return None
        assert self.slot is not None, "it has no slot yet"
        constraint, start = self.prepared.constraint, self._num_fed
        end = self._end_of_part(max_tokens)
        if encodes_apart and self.needs_features(max_tokens):
            tokens = self._given_ids[start:end]
            return SequenceStep(self.slot, tokens, start, samples=False, encodes=True)
        samples = end == self._num_given
        marks = self._border is not None and (samples or end == self._border)
        mask = constraint.mask() if constraint is not None and samples else None
        if start == end:
            return SequenceStep(self.slot, None, 0, mask)
        tokens = self._given_ids[start:end]
        return SequenceStep(self.slot, tokens, start, mask, samples, marks=marks, long_rope=self.long_rope)

    def _end_of_part(self, max_tokens: int) -> int:
        """Return the end of the part of its prompt that is fed next, of ``max_tokens`` at most."""
        end = min(self._num_fed + max_tokens, self._num_given)
        return self._border if self._border is not None and self._num_fed < self._border < end else end

    def needs_features(self, max_tokens: int) -> bool:
        """Return whether images are to be encoded before the next ``max_tokens`` of its prompt are fed."""
        start, end = self._num_fed, self._end_of_part(max_tokens)
        if start == end or end <= self._num_seen:
            return False
        places = (np.searchsorted(placed.positions, (start, end)) for placed in self.prepared.images)
        return any(first < last for first, last in places)

    def queued(self, step: SequenceStep, pending: PendingToken) -> None:
        """Notes that ``step`` is on its way."""
        self.unread.append((step, pending))
        if step.encodes:
            return
        self._num_fed += 0 if step.token_ids is None else len(step.token_ids)
        self._num_queued += step.most_tokens

    def read(self) -> tuple[int, ...]:
        """Return the tokens of its oldest unread step; none if it had none to sample, or was interrupted.

        Raises InvalidSamplingError if no token was left, EngineFaultError.
        """
        step, pending = self.unread.popleft()
        found = pending.result()
        if step.encodes:
            assert step.token_ids is not None
            self._num_seen = step.position + len(step.token_ids) if found == 0 else self._num_seen
            return ()
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
            self._num_valid = self._num_given
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
        if self.num_sampled == self._num_given_sampled and token is None and self._num_valid < self._num_given:
            return None
        assert token is not None, "the backend ended a sequence that nobody ended"
        return FinishReason.LENGTH if self.num_sampled >= self.prepared.max_new_tokens else None

    def live_ids(self) -> np.ndarray:
        """Return the ids, int32, whose KV is in its slot for sure: every sampled token but the last has been fed.

        Those of images are as in ``PreparedRequest.key``.
        """
        known = self.kv_ids[: self._num_valid]
        fed = self.token_ids[self._num_given_sampled : max(self._num_given_sampled, self.num_sampled - 1)]
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
            self.request_id,
            finish_reason=reason,
            prompt_tokens=num_tokens,
            image_tokens=sum(placed.num_tokens for placed in self.prepared.images),
            queue_time=waited,
            total_time=waited,
            energy_joules=self.energy_joules,
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
        on_done = self._on_done
        self._on_done = self._on_piece = None  # they hold whoever holds the sequence and, with it, its images
        assert on_done is not None, "it has been answered"
        _guarded(on_done, result)


def _guarded(callback: Callable, value: object) -> None:
    """A client's callback must not take the engine down."""
    try:
        callback(value)
    except BaseException:
        _log.exception("A callback raised")
