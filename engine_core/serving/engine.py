"""The engine: a model that is loaded once and then answers, as many requests at a time as its KV cache has slots.

    engine = Engine.open(EngineConfig(engine_dir="…"))
    prepared = engine.prepare(GenerationRequest("1", messages=(ChatMessage("user", "Hello"),)))
    for piece in engine.generate(prepared, CancelToken()):
        print(piece.text, end="")

``prepare`` may be called from any thread; everything else belongs to one thread at a time. ``generate`` is for one
request in that thread; ``worker`` has a thread that serves many clients, through ``scheduler`` and ``step``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import cached_property, partial

import numpy as np

from engine_core.backends import Backend, SequenceStep
from engine_core.backends.capabilities import capabilities_of
from engine_core.config import EngineConfig
from engine_core.errors import (
    BackendUnavailableError,
    EmptyPromptError,
    EngineFaultError,
    InvalidRequestError,
    InvalidSamplingError,
    InvalidTextError,
    PromptTooLongError,
    RequestError,
    refusing_panics,
)
from engine_core.formats.companions import model_sampling
from engine_core.formats.lora import adapter_paths
from engine_core.formats.manifest import Manifest
from engine_core.memory import MemoryPlan
from engine_core.planning.selection import advice, choose
from engine_core.request import (
    LIMITS,
    SAMPLING_OPTIONS,
    ChatMessage,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    Piece,
    SamplingParams,
)
from engine_core.serving.answers import Answers
from engine_core.serving.cancellation import CancelToken
from engine_core.serving.constraint import ConstraintFactory
from engine_core.serving.conversation import Messages, SessionInfo, Sessions, fit_turns
from engine_core.serving.scheduler import Scheduler
from engine_core.serving.sequence import PreparedRequest, Sequence
from engine_core.serving.session_pool import SessionPool
from engine_core.serving.speculation import Speculation
from engine_core.text.tokenizer import Tokenizer

__all__ = ["CancelToken", "Engine", "PreparedRequest"]

_log = logging.getLogger(__name__)


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
        model_sampling: Mapping[str, float] | None = None,
    ) -> None:
        """``model_sampling``: what a temperature of NaN stands for, see ``SamplingParams.with_model``."""
        self.config = config
        self.manifest = manifest
        self.plan = plan
        self.load_time = load_time
        self.tokenizer = tokenizer
        self.backend_name = manifest.backend
        self.backend_reason = backend_reason  # why this variant and no other, for people
        self.model_sampling = dict(model_sampling or {})
        self.max_context = backend.max_context
        self.vocab_size = manifest.model.vocab_size
        self.reduced_vocab_size = backend.reduced_vocab_size
        self.device: str = plan.device
        self.adapters = tuple(adapter_paths(config.lora_adapters))  # the names that a request may ask for
        self._eos_ids = frozenset(manifest.eos_token_ids)
        self._backend: Backend | None = backend
        self._constraints = ConstraintFactory(tokenizer, self.vocab_size, manifest.eos_token_ids, backend.kept_ids)
        self.answers = Answers(tokenizer, self._constraints, backend.kept_ids)
        self.pool = SessionPool(
            backend,
            num_prompts=config.prompt_cache_entries,
            prompt_tokens=config.prompt_cache_tokens,
            keeps_conversations=config.session_memory > 0,
        )
        self.sessions = Sessions(config.max_sessions)
        self.scheduler = Scheduler(backend.num_slots)
        self.speculation = Speculation(backend, self._constraints.mask_seconds)
        # Of one prompt in a step: other answers wait no longer for their next token.
        self._max_prefill = backend.prefill_chunk if backend.num_slots > 1 else backend.max_context

    @classmethod
    def open(cls, config: EngineConfig, report: Callable[[str], None] = _log.info) -> Engine:
        """Choose, plan, check, allocate, load, capture, warm up; ``report`` is told why and the plan, before all
        else, and the notes of the manifest.

        Raises ConfigurationError, EngineDirectoryError, BackendUnavailableError, InsufficientMemoryError or
        EngineFaultError; nothing stays allocated then.
        """
        start = time.monotonic()
        choice = choose(config)
        report(choice.reason)
        variant_dir, manifest, config, plan = choice.directory, choice.manifest, choice.config, choice.plan
        report(f"Memory plan of {manifest.model_name} ({manifest.quantization}, {manifest.backend}):\n{plan.table()}")
        plan.check(advice(config, plan))
        for note in manifest.notes:
            report(note)
        tokenizer = Tokenizer(variant_dir)
        own = model_sampling(variant_dir)
        if tokenizer.folds_system:
            report("The chat template has no system messages; they are put before the first user message.")
        with contextlib.ExitStack() as undo:
            backend = choice.backend.load(variant_dir, manifest, config)
            undo.callback(backend.close)
            engine = cls(config, manifest, backend, tokenizer, plan, time.monotonic() - start, choice.reason, own)
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

        DeadlinePassedError among them, if the request's deadline ends the compiling of its schema. A session is
        busy until the ``Sequence`` of the result has ended, or ``turn.leave`` is called, or the result is dropped.
        """
        with refusing_panics("preparing"), contextlib.ExitStack() as undo:
            end = time.monotonic() + request.timeout
            request.validate()
            turn = None
            if request.session:
                turn = self.sessions.begin(request.session, request.messages, request.default_system)
                undo.callback(turn.leave)
                request = request.replace(messages=turn.messages)
            prepared = self._prepare(request, end)
            if turn is not None:
                turn.messages = prepared.request.messages
                prepared = dataclasses.replace(prepared, turn=turn)
            undo.pop_all()
            return prepared

    def _prepare(self, request: GenerationRequest, end: float) -> PreparedRequest:
        """``end``: time.monotonic() of its deadline, if it has one."""
        request = request.replace(sampling=request.sampling.with_model(self.model_sampling))
        self._check_sampling(request.sampling)
        self._check_adapter(request.adapter)
        self.answers.check(request)
        num_dropped = 0
        if request.context_policy == "drop_oldest":
            messages, num_dropped = self._fitted(request)
            request = request.replace(messages=messages)
        if request.session or num_dropped:
            request.validate()  # with the history
        request.check_answered_calls()
        num_chars = len(request.prompt) + request.num_template_chars
        at_least = num_chars // self.tokenizer.max_token_chars
        if at_least >= self.max_context:  # too long to be worth the memory of tokenizing it
            raise self._too_long(f"at least {at_least}")
        prompt = self.answers.prompt(request)
        token_ids = prompt.token_ids
        if len(token_ids) >= self.max_context:
            raise self._too_long(str(len(token_ids)))
        self._check_prompt(token_ids)
        left = max(0.05, end - time.monotonic()) if request.timeout else None
        expected = self.answers.expected(request, prompt)
        constraint = self.answers.constraint(request, prompt, expected, left)
        sampling = request.sampling
        if constraint is not None:
            constraint.exclude(token_id for token_id, bias in sampling.biases() if bias == -math.inf)
        return PreparedRequest(
            request=request,
            token_ids=token_ids,
            prefix_ids=self.answers.shared_prefix(request, prompt),
            sampling=sampling.resolve(self._eos_ids),
            max_new_tokens=min(sampling.max_new_tokens, self.max_context - len(token_ids)),
            constraint=constraint,
            num_dropped=num_dropped,
            expected=expected,
        )

    def _fitted(self, request: GenerationRequest) -> tuple[Messages, int]:
        """Return the messages without the oldest turns, if they leave the answer too little of the context, and the
        number of turns that are left out."""

        def num_tokens(messages: Messages) -> int | None:
            part = request.replace(messages=messages)
            num_chars = part.num_template_chars
            is_large = num_chars > LIMITS.text_bytes or len(messages) > LIMITS.messages
            if is_large or num_chars // self.tokenizer.max_token_chars >= self.max_context:
                return None
            return len(self.answers.prompt(part).token_ids)

        limit = self.max_context - min(request.sampling.max_new_tokens, self.max_context // 4)
        return fit_turns(request.messages, num_tokens, limit, limit * 3 // 4)

    def reset_session(self, name: str) -> SessionInfo:
        """Forget a session and its KV; return what it was. Raises InvalidSessionError if there is none of this name."""
        info = self.sessions.reset(name)
        self.pool.forget(name)
        return info

    def reset_sessions(self) -> list[SessionInfo]:
        """Forget all sessions and their KV; return what they were."""
        infos = [*self.sessions.reset_all()]
        for info in infos:
            self.pool.forget(info.name)
        return infos

    @cached_property
    def hash(self) -> str:
        """The SHA-256, in hexadecimal, of the manifest: of the model, its variant and its files."""
        return hashlib.sha256(self.manifest.to_json().encode()).hexdigest()

    def tokenize(self, text: str = "", messages: Iterable[ChatMessage] = ()) -> list[int]:
        """Return the ids the model would read. Raises RequestError, within the limits of a request."""
        request = GenerationRequest("", messages=tuple(messages), prompt=text)
        request.validate()
        with refusing_panics("tokenizing"):
            by_template = self.tokenizer.encode_messages
            ids = by_template(request.messages) if request.messages else self.tokenizer.encode(text)
        if len(ids) > (limit := max(LIMITS.tokens_listed, self.max_context)):
            raise PromptTooLongError(
                f"The text has {len(ids)} tokens, but at most {limit} are listed; send a part of it."
            )
        return ids.tolist()

    def knows(self, request: GenerationRequest) -> bool:
        """Return whether the schema and the tools of ``request`` have been compiled, so that preparing it takes no
        time."""
        return self._constraints.knows(request)

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        return self.tokenizer.token_texts(ids)

    # --- the work: one thread -----------------------------------------------------------------------

    def warm_system_prompt(self, text: str) -> int:
        """Computes the KV of a system prompt and keeps it; returns its length in tokens (0: nothing to keep).

        A slot has to be free.
        """
        if len(text) // self.tokenizer.max_token_chars >= self.max_context:
            return 0  # requests with it are refused
        with refusing_panics("tokenizing the system prompt of"):
            prefix = self.tokenizer.system_prefix(text) if text else np.empty(0, dtype=np.int32)
        if len(prefix) and int(prefix.max()) >= self.vocab_size:
            return 0  # requests with it are refused
        prefix = prefix[: min(self.max_context - 1, self.config.prompt_cache_tokens)]
        if not len(prefix) or not self.config.prompt_cache_entries:
            return 0
        backend = self._backend_or_raise()
        slot, cached = self.pool.place(prefix, self.scheduler.free_slots)
        backend.begin(slot, SamplingParams(seed=0), prefix)
        (pending,) = backend.step([SequenceStep(slot, prefix[cached:], cached, samples=False)])
        pending.result()
        self.pool.set_live(slot, prefix)
        self.pool.keep_prompt(slot, prefix)
        return len(prefix)

    def log_probabilities(self, token_ids: np.ndarray, first: int) -> np.ndarray:
        """Return float64 [n - first]: the natural logarithm of the probability of each token of ``token_ids``, int32
        [n], from index ``first`` (1 or more) on, given all before it; -inf for one outside the reduced vocabulary.

        Raises BackendUnavailableError if the backend gives none out, EngineFaultError.
        """
        backend = self._backend_or_raise()
        if (reason := capabilities_of(self.backend_name).perplexity_refusal()) is not None:
            raise BackendUnavailableError(reason)
        assert 1 <= first < len(token_ids) <= self.max_context
        assert not self.scheduler.has_work
        self.pool.place_fresh([0])
        return backend.log_probabilities(token_ids, first)

    def answer(
        self,
        request: GenerationRequest,
        on_piece: Callable[[Piece], object] = lambda piece: None,
        cancel: CancelToken | None = None,
    ) -> GenerationResult:
        """Prepare and answer one request; ``on_piece`` gets each piece. Raises what ``prepare`` and ``generate`` do."""
        pieces = self.generate(self.prepare(request), cancel or CancelToken())
        while True:
            try:
                on_piece(next(pieces))
            except StopIteration as end:
                return end.value

    def generate(
        self, prepared: PreparedRequest, cancel: CancelToken, arrival: float | None = None
    ) -> Generator[Piece, None, GenerationResult]:
        """Answer one request: yields the pieces, returns the result (``yield from`` or StopIteration.value).

        ``arrival``: time.monotonic() when the request came, for its figures. Raises the RequestError the request ends
        with, and EngineFaultError when the engine fails; it has to be closed then.
        """
        pieces: deque[Piece] = deque()
        results: list[GenerationResult] = []
        sequence = Sequence(
            prepared, self.tokenizer, on_piece=pieces.append, on_done=results.append, arrival=arrival, cancel=cancel
        )
        self.scheduler.add(sequence)
        try:
            while not results:
                self.step()
                while pieces:
                    yield pieces.popleft()
        finally:
            if not results and not self.scheduler.withdraw(sequence):  # left early, or the engine has failed
                sequence.ending = FinishReason.CANCELLED
                self._finish(sequence)
            elif not results and prepared.turn is not None:
                prepared.turn.leave()
        (result,) = results
        if result.error is not None:
            raise result.error
        return result

    def step(self) -> None:
        """Run one step of every sequence that holds a slot; those that wait take the free slots first.

        The next step is on its way before the tokens of the one before are read, except where a JSON schema's mask
        needs them. What a request is at fault for ends its sequence. Raises EngineFaultError when the engine fails.
        """
        while (newcomer := self.scheduler.start_next()) is not None:
            self._start(newcomer)
        running = self.scheduler.running
        unread = [sequence for sequence in running if sequence.unread]
        runs_ahead = all([sequence.runs_ahead for sequence in running]) and not self.speculation.waits(running)
        if runs_ahead:
            self._queue(running)
        for sequence in unread:
            self._read(sequence)
        if not runs_ahead:
            self._queue(running)
        for sequence in running:
            if sequence.ending is None:
                sequence.emit()
            else:
                self._finish(sequence)

    def _start(self, sequence: Sequence) -> None:
        """Give a newcomer its slot, with as much of its prompt's KV as is known."""
        sequence.start = time.monotonic()
        sequence.ending = sequence.cancel.reason
        if sequence.ending is not None:
            return
        backend, prepared, free = self._backend_or_raise(), sequence.prepared, self.scheduler.free_slots
        if self.config.reproducible and prepared.request.sampling.seed is not None:
            slot, cached = self.pool.place_fresh(free, prepared.token_ids, sequence.adapter), 0
        else:
            slot, cached = self.pool.place(prepared.token_ids, free, sequence.adapter)
        sequence.place(slot, cached)
        backend.begin(slot, prepared.sampling, prepared.token_ids, sequence.adapter)
        self.speculation.begin(sequence)
        sequence.cancel.attach(partial(backend.interrupt, slot))

    def _queue(self, sequences: list[Sequence]) -> None:
        """Queue the next step of those that have not ended: all that decode, and one with a part of its prompt."""
        first = _first_to_prefill(sequences)
        owners, steps = [], []
        for sequence in sequences:
            if sequence.ending is not None:
                continue
            if sequence is not first and sequence.is_prefilling:
                sequence.ending = None if sequence.unread else sequence.cancel.reason
                continue
            try:
                step = sequence.next_step(self._max_prefill)
            except BaseException as error:
                _blame(sequence, error)
                continue
            if step is not None:
                owners.append(sequence)
                steps.append(step)
        if steps:
            self.speculation.add_drafts(owners, steps)
            for sequence, step, pending in zip(owners, steps, self._backend_or_raise().step(steps)):
                sequence.queued(step, pending)

    def _read(self, sequence: Sequence) -> None:
        """Read what a sequence's oldest step has sampled into its answer."""
        step, is_first = sequence.unread[0][0], sequence.num_sampled == 0
        try:
            tokens = sequence.read()
        except RequestError as error:
            sequence.ending = error
            return
        self.speculation.read(sequence, step, tokens)
        try:
            for token in tokens or (None,):
                sequence.ending = sequence.accept(token)
                if sequence.ending is not None:
                    break
        except BaseException as error:
            _blame(sequence, error)
        if is_first and sequence.num_sampled and sequence.slot is not None:
            self.pool.keep_prompt(sequence.slot, sequence.prepared.prefix_ids)

    def _finish(self, sequence: Sequence) -> None:
        """End what is still under way for a sequence, free its slot and hand out its result."""
        sequence.cancel.detach()
        if sequence.slot is not None:
            if sequence.unread:
                self._backend_or_raise().interrupt(sequence.slot)
            while sequence.unread:
                with contextlib.suppress(RequestError):
                    sequence.read()
            self.pool.set_live(sequence.slot, sequence.live_ids())
            sequence.speculation = self.speculation.end(sequence)
        self.scheduler.remove(sequence)
        sequence.finish()
        if sequence.slot is not None:  # nobody waits for this copy
            turn = sequence.prepared.turn
            session = turn.name if turn is not None and turn.is_kept else ""
            self.pool.keep_conversation(sequence.slot, len(sequence.prepared.token_ids), session)
            if session and session not in self.sessions:  # it was reset since its answer was there
                self.pool.forget(session)

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

    def _check_adapter(self, name: str) -> None:
        if name and name not in self.adapters:
            known = f"it has {', '.join(self.adapters)}" if self.adapters else "it has none (lora_adapters)"
            raise InvalidRequestError(f"The adapter {name!r} is not loaded in this engine; {known}.")

    def _check_sampling(self, sampling: SamplingParams) -> None:
        sampler_options = self._backend_or_raise().sampler_options
        for option in SAMPLING_OPTIONS.values():
            is_set = getattr(sampling, option.name) != option.default
            if is_set and option.name not in sampler_options and option.name != "max_new_tokens":
                raise InvalidSamplingError(f"The sampler of the {self.backend_name} backend has no {option.name}.")
        for token_id in (*sampling.stop_token_ids, *(token_id for token_id, _ in sampling.logit_bias)):
            if not 0 <= token_id < self.vocab_size:
                raise InvalidSamplingError(
                    f"Token id {token_id} is not in the vocabulary, which has ids from 0 to {self.vocab_size - 1}."
                )


def _first_to_prefill(sequences: list[Sequence]) -> Sequence | None:
    """Return the one of the highest priority whose prompt is not all queued; None if there is none."""
    prefilling = [sequence for sequence in sequences if sequence.is_prefilling and sequence.ending is None]
    return max(prefilling, key=lambda sequence: sequence.priority) if prefilling else None


def _blame(sequence: Sequence, error: BaseException) -> None:
    """End ``sequence`` with ``error``; only a fault of the engine, and an interrupt from outside, are raised again."""
    if isinstance(error, EngineFaultError):
        raise error
    try:
        with refusing_panics("answering"):
            raise error
    except Exception as refused:
        sequence.ending = refused
