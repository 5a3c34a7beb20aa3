"""The engine: a model that is loaded once and then answers, one request after another.

    engine = Engine.open(EngineConfig(engine_dir="…"))
    prepared = engine.prepare(GenerationRequest("1", messages=(ChatMessage("user", "Hello"),)))
    for piece in engine.generate(prepared, CancelToken()):
        print(piece.text, end="")

``prepare`` may be called from any thread; everything else belongs to one thread at a time (see ``worker``).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine_core.backends import Backend, PendingToken, TokenSampling
from engine_core.config import EngineConfig
from engine_core.errors import (
    BackendUnavailableError,
    EmptyPromptError,
    InvalidSamplingError,
    InvalidTextError,
    PromptTooLongError,
    refusing_panics,
)
from engine_core.formats.manifest import Manifest
from engine_core.memory import MemoryPlan
from engine_core.planning.selection import advice, choose
from engine_core.request import ChatMessage, FinishReason, GenerationRequest, GenerationResult, Piece
from engine_core.serving.cancellation import CancelToken
from engine_core.serving.constraint import ConstraintFactory, JsonConstraint
from engine_core.serving.prefix_cache import PrefixCache
from engine_core.text.detokenizer import Detokenizer, StopStrings
from engine_core.text.tokenizer import Tokenizer, common_prefix_length

__all__ = ["CancelToken", "Engine", "PreparedRequest"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRequest:
    """A request that has been checked and tokenized."""

    request: GenerationRequest
    token_ids: np.ndarray  # int32 [n], the whole prompt
    prefix_ids: np.ndarray  # int32 [m], its system prompt's part, worth keeping; often empty
    sampling: TokenSampling
    max_new_tokens: int
    constraint: JsonConstraint | None

    @classmethod
    def unread(cls, request: GenerationRequest) -> PreparedRequest:
        """Return ``request`` as one whose deadline passed before it was tokenized; it can only be answered."""
        nothing = np.empty(0, dtype=np.int32)
        return cls(request, nothing, nothing, TokenSampling.of(request.sampling, frozenset()), 0, None)


@dataclass
class _Answer:
    """The growing answer of one request: ids, text and times."""

    prepared: PreparedRequest
    arrival: float  # s, time.monotonic
    start: float
    detokenizer: Detokenizer
    stop: StopStrings
    cached_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    num_sampled: int = 0
    text: list[str] = field(default_factory=list)
    first_token: float = 0.0
    last_token: float = 0.0
    next_piece: float = 0.0  # no piece before this time
    num_pieces: int = 0
    pending_text: str = ""
    pending_ids: list[int] = field(default_factory=list)

    def arrived(self) -> None:
        """Notes the time of a sampled token."""
        self.last_token = time.monotonic()
        self.num_sampled += 1
        if self.num_sampled == 1:
            self.first_token = self.last_token

    def add(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.pending_ids.append(token_id)
        self.pending_text += self.stop.feed(self.detokenizer.feed(token_id))

    def piece(self) -> Piece | None:
        """What is to be shown now: nothing without text or before the streaming interval is over."""
        if not self.pending_text or self.last_token < self.next_piece:
            return None
        self.next_piece = self.last_token + self.prepared.request.stream_interval
        return self._take_piece()

    def last_piece(self) -> Piece | None:
        """What is left at the end."""
        self.pending_text += self.stop.feed(self.detokenizer.flush()) + self.stop.flush()
        return self._take_piece() if self.pending_text or self.pending_ids else None

    def _take_piece(self) -> Piece:
        piece = Piece(self.num_pieces, self.pending_text, tuple(self.pending_ids))
        self.text.append(self.pending_text)
        self.num_pieces += 1
        self.pending_text = ""
        self.pending_ids.clear()
        return piece

    def result(self, reason: FinishReason) -> GenerationResult:
        end = time.monotonic()
        decode_time = self.last_token - self.first_token
        return GenerationResult(
            request_id=self.prepared.request.request_id,
            text="".join(self.text),
            token_ids=tuple(self.token_ids),
            finish_reason=reason,
            prompt_tokens=len(self.prepared.token_ids),
            cached_tokens=self.cached_tokens,
            generated_tokens=self.num_sampled,
            queue_time=self.start - self.arrival,
            time_to_first_token=self.first_token - self.arrival if self.num_sampled else 0.0,
            tokens_per_second=(self.num_sampled - 1) / decode_time if decode_time > 0 else 0.0,
            total_time=end - self.arrival,
        )


class Engine:
    """One loaded engine. Make it with ``open``; give everything back with ``close``."""

    def __init__(
        self,
        config: EngineConfig,
        manifest: Manifest,
        backend: Backend,
        tokenizer: Tokenizer,
        plan: MemoryPlan,
        load_time: float,
        backend_reason: str = "",
    ) -> None:
        self.config = config
        self.manifest = manifest
        self.plan = plan
        self.load_time = load_time
        self.tokenizer = tokenizer
        self.backend_name = manifest.backend
        self.backend_reason = backend_reason  # why this variant and no other, for people
        self.max_context = backend.max_context
        self.vocab_size = manifest.geometry.vocab_size
        self.reduced_vocab_size = backend.reduced_vocab_size
        self.device: str = plan.device
        self._eos_ids = frozenset(manifest.eos_token_ids)
        self._backend: Backend | None = backend
        kept = getattr(backend, "kept_ids", None)
        self._constraints = ConstraintFactory(tokenizer, self.vocab_size, manifest.eos_token_ids, kept)
        self._prefixes = PrefixCache(backend, config.prompt_cache_entries, config.prompt_cache_tokens)

    @classmethod
    def open(cls, config: EngineConfig, report: Callable[[str], None] = _log.info) -> Engine:
        """Choose, plan, check, allocate, load, capture, warm up; ``report`` is told why and the plan, before all else.

        Raises ConfigurationError, EngineDirectoryError, BackendUnavailableError, InsufficientMemoryError or
        EngineFaultError; nothing stays allocated then.
        """
        start = time.monotonic()
        choice = choose(config)
        report(choice.reason)
        variant_dir, manifest, config, plan = choice.directory, choice.manifest, choice.config, choice.plan
        report(f"Memory plan of {manifest.model_name} ({manifest.quantization}, {manifest.backend}):\n{plan.table()}")
        plan.check(advice(config, plan))
        tokenizer = Tokenizer(variant_dir)
        if tokenizer.folds_system:
            report("The chat template has no system messages; they are put before the first user message.")
        with contextlib.ExitStack() as undo:
            backend = choice.backend.load(variant_dir, manifest, config)
            undo.callback(backend.close)
            engine = cls(config, manifest, backend, tokenizer, plan, time.monotonic() - start, choice.reason)
            undo.pop_all()
        return engine

    def close(self) -> None:
        """Gives everything back; may be called twice."""
        backend, self._backend = self._backend, None
        self._constraints.close()
        if backend is not None:
            backend.close()

    # --- before the work: any thread ----------------------------------------------------------------

    def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Checks and tokenizes. Raises RequestError: what the request is refused with.

        DeadlinePassedError among them, if the request's deadline ends the compiling of its schema.
        """
        with refusing_panics("preparing"):
            return self._prepare(request)

    def _prepare(self, request: GenerationRequest) -> PreparedRequest:
        end = time.monotonic() + request.timeout
        request.validate()
        self._check_ids(request)
        num_chars = len(request.prompt) + sum(len(message.content) for message in request.messages)
        at_least = num_chars // self.tokenizer.max_token_chars
        if at_least >= self.max_context:  # too long to be worth the memory of tokenizing it
            raise self._too_long(f"at least {at_least}")
        prefix_ids = np.empty(0, dtype=np.int32)
        if request.messages:
            token_ids = self.tokenizer.encode_messages(request.messages, allow_special=request.allow_special)
            if request.messages[0].role == "system":
                prefix_ids = self.tokenizer.system_prefix(request.messages[0].content)
                prefix_ids = prefix_ids[: common_prefix_length(prefix_ids, token_ids)]
        else:
            token_ids = self.tokenizer.encode(request.prompt)
        if len(token_ids) >= self.max_context:
            raise self._too_long(str(len(token_ids)))
        self._check_prompt(token_ids)
        left = max(0.05, end - time.monotonic()) if request.timeout else None
        constraint = self._constraints.compile(request.json_schema, left) if request.json_schema else None
        sampling = request.sampling
        stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._eos_ids)
        return PreparedRequest(
            request=request,
            token_ids=token_ids,
            prefix_ids=prefix_ids,
            sampling=TokenSampling.of(sampling, stop_ids),
            max_new_tokens=min(sampling.max_new_tokens, self.max_context - len(token_ids)),
            constraint=constraint,
        )

    def tokenize(self, text: str = "", messages: Sequence[ChatMessage] = ()) -> list[int]:
        """Return the ids the model would read. Raises RequestError, within the limits of a request."""
        request = GenerationRequest("", messages=tuple(messages), prompt=text)
        request.validate()
        with refusing_panics("tokenizing"):
            ids = self.tokenizer.encode_messages(messages) if messages else self.tokenizer.encode(text)
        return ids.tolist()

    def knows_schema(self, schema: str) -> bool:
        """Return whether ``schema`` has been compiled before, so that preparing a request with it takes no time."""
        return self._constraints.knows(schema)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        return self.tokenizer.token_texts(ids)

    # --- the work: one thread -----------------------------------------------------------------------

    def warm_system_prompt(self, text: str) -> int:
        """Computes the KV of a system prompt and keeps it; returns its length in tokens (0: nothing to keep)."""
        with refusing_panics("tokenizing the system prompt of"):
            prefix = self.tokenizer.system_prefix(text) if text else np.empty(0, dtype=np.int32)
        if len(prefix) and int(prefix.max()) >= self.vocab_size:
            return 0  # requests with it are refused
        prefix = prefix[: min(self.max_context - 1, self.config.prompt_cache_tokens)]
        if not len(prefix) or not self.config.prompt_cache_entries:
            return 0
        cached = self._prefixes.restore(prefix)
        self._backend_or_raise().extend(prefix[cached:], cached)
        self._prefixes.set_live(prefix)
        self._prefixes.keep(prefix)
        return len(prefix)

    def log_probabilities(self, token_ids: np.ndarray, first: int) -> np.ndarray:
        """float64 [n - first]: the natural logarithm of the probability of each token of ``token_ids``, int32 [n], from
        index ``first`` (1 or more) on, given all before it; -inf for one outside the reduced vocabulary.

        Raises BackendUnavailableError if the backend gives none out, EngineFaultError.
        """
        backend = self._backend_or_raise()
        score = getattr(backend, "log_probabilities", None)
        if score is None:
            raise BackendUnavailableError(
                f"Perplexity needs the logits of every step, which the {self.backend_name} backend keeps on its "
                "device; measure a variant built for onnxruntime."
            )
        assert 1 <= first < len(token_ids) <= self.max_context
        self._prefixes.set_live(token_ids[:0])
        return score(token_ids, first)

    def generate(
        self, prepared: PreparedRequest, cancel: CancelToken, arrival: float | None = None
    ) -> Generator[Piece, None, GenerationResult]:
        """Prefill, decode, sample, emit. Yields the pieces, returns the result (``yield from`` or StopIteration.value).

        ``arrival``: time.monotonic() when the request came, for its figures. The next step is always on its way
        before the last token is looked at, except under a JSON constraint, whose mask needs that token.
        Raises EngineFaultError when the engine fails; it has to be closed then.
        """
        backend = self._backend_or_raise()
        answer = self._start(prepared, arrival)
        constraint = prepared.constraint
        reason: FinishReason | None = None
        pending = ahead = None
        try:
            backend.begin(prepared.sampling, prepared.token_ids)
            cancel.attach(backend.interrupt)
            pending = self._prefill(answer, constraint)
            while reason is None:
                runs_ahead = constraint is None and answer.num_sampled + 1 < prepared.max_new_tokens
                ahead = backend.decode() if runs_ahead else None
                current, pending = pending, None
                reason = self._consume(answer, current.result(), cancel, constraint)
                if answer.num_sampled == 1:
                    self._prefixes.keep(prepared.prefix_ids)
                if reason is None:
                    if constraint is not None:
                        ahead = backend.decode(constraint.mask())
                    pending, ahead = ahead, None
                    if (piece := answer.piece()) is not None:
                        yield piece
        finally:
            cancel.detach()
            self._settle(answer, [pending, ahead])
        if (piece := answer.last_piece()) is not None:
            yield piece
        return answer.result(reason)

    def _start(self, prepared: PreparedRequest, arrival: float | None) -> _Answer:
        now = time.monotonic()
        answer = _Answer(
            prepared=prepared,
            arrival=now if arrival is None else arrival,
            start=now,
            detokenizer=Detokenizer(self.tokenizer),
            stop=StopStrings(prepared.request.stop),
        )
        if self.config.reproducible and prepared.request.sampling.seed is not None:
            self._prefixes.set_live(prepared.token_ids[:0])
        else:
            answer.cached_tokens = self._prefixes.restore(prepared.token_ids)
        return answer

    def _prefill(self, answer: _Answer, constraint: JsonConstraint | None) -> PendingToken:
        mask = None if constraint is None else constraint.mask()
        prompt = answer.prepared.token_ids[answer.cached_tokens :]
        return self._backend_or_raise().prefill(prompt, answer.cached_tokens, mask)

    def _consume(
        self, answer: _Answer, token: int | None, cancel: CancelToken, constraint: JsonConstraint | None
    ) -> FinishReason | None:
        """Takes one sampled token into the answer; returns why the answer ends with it, or None."""
        if token is not None:
            answer.arrived()
            if token in answer.prepared.sampling.stop_ids:
                return FinishReason.STOP
            answer.add(token)
            if constraint is not None:
                constraint.accept(token)
                if constraint.complete:
                    return FinishReason.STOP
            if answer.stop.found:
                return FinishReason.STOP
        if cancel.reason is not None:
            return cancel.reason
        assert token is not None, "the backend ended a sequence that nobody ended"
        return FinishReason.LENGTH if answer.num_sampled >= answer.prepared.max_new_tokens else None

    def _settle(self, answer: _Answer, unread: list[PendingToken | None]) -> None:
        """Ends what is still under way, so that the next request finds the backend idle, and notes the live KV.

        Every sampled token but the last has been fed back for sure.
        """
        in_flight = [pending for pending in unread if pending is not None]
        if in_flight:
            self._backend_or_raise().interrupt()
        for pending in in_flight:
            pending.result()
        known = answer.prepared.token_ids[: None if answer.num_sampled else answer.cached_tokens]
        fed = answer.token_ids[: max(0, answer.num_sampled - 1)]
        self._prefixes.set_live(np.concatenate([known, np.array(fed, dtype=np.int32)]))

    # --- helpers --------------------------------------------------------------------------------------

    def _backend_or_raise(self) -> Backend:
        assert self._backend is not None, "the engine is closed"
        return self._backend

    def _too_long(self, num_tokens: str) -> PromptTooLongError:
        return PromptTooLongError(
            f"The prompt has {num_tokens} tokens, but max_context is {self.max_context}, the answer included; "
            "send a shorter prompt or configure a larger max_context."
        )

    def _check_prompt(self, token_ids: np.ndarray) -> None:
        largest = int(token_ids.max(initial=-1))
        if largest >= self.vocab_size:
            (text,) = self.tokenizer.token_texts([largest])
            raise InvalidTextError(
                f"The prompt holds the token {text!r} with id {largest}, but the model has ids from 0 to "
                f"{self.vocab_size - 1}; leave it out."
            )
        if not len(token_ids):
            raise EmptyPromptError("The prompt has no tokens; there is nothing to answer.")

    def _check_ids(self, request: GenerationRequest) -> None:
        ids = (*request.sampling.stop_token_ids, *(token_id for token_id, _ in request.sampling.logit_bias))
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidSamplingError(
                    f"Token id {token_id} is not in the vocabulary, which has ids from 0 to {self.vocab_size - 1}."
                )
