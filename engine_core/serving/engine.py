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
from engine_core.config import GPU_BACKENDS, EngineConfig
from engine_core.errors import (
    BackendUnavailableError,
    EmptyPromptError,
    EngineFaultError,
    InvalidImageError,
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
from engine_core.paths import expand_user
from engine_core.planning.selection import advice, choose
from engine_core.progress import Progress, portion, untold
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
from engine_core.serving.energy import EnergyAccount, open_account
from engine_core.serving.image_keys import ImageKeys
from engine_core.serving.named_schemas import NamedSchemas
from engine_core.serving.scheduler import Scheduler
from engine_core.serving.sequence import PreparedRequest, Sequence
from engine_core.serving.session_pool import KVKind, SessionPool
from engine_core.serving.sessions import Messages, SessionInfo, Sessions, fit_turns
from engine_core.serving.speculation import Speculation
from engine_core.text.tokenizer import Tokenizer
from engine_core.vision.limits import image_limits

__all__ = ["CancelToken", "Engine", "PreparedRequest"]

_log = logging.getLogger(__name__)

_LONG_SYSTEM_PROMPT = (
    "The system prompt has at least %d tokens, but max_context is %d, the answer included: every request with it is "
    "refused; set a shorter one."
)
_CHECKING = 0.3  # of the progress of opening: the hashes; the rest is the backend's


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
        energy: EnergyAccount | None = None,
    ) -> None:
        """``model_sampling``: what a temperature of NaN stands for, see ``SamplingParams.with_model``; ``energy``: of
        the device, which the engine closes; None where it cannot be read."""
        self.config = config
        self.manifest = manifest
        self.plan = plan
        self.load_time = load_time
        self.tokenizer = tokenizer
        self.backend_name = manifest.backend
        self.backend_reason = backend_reason  # why this variant and no other, for people
        self.model_sampling = dict(model_sampling or {})
        self.energy = energy
        self.max_context = backend.max_context
        self.vocab_size = manifest.model.vocab_size
        self.reduced_vocab_size = backend.reduced_vocab_size
        self.device: str = plan.device
        self.adapters = tuple(adapter_paths(config.lora_adapters))  # the names that a request may ask for
        self._eos_ids = frozenset(manifest.eos_token_ids)
        self._backend: Backend | None = backend
        self.schemas = NamedSchemas()  # that requests may name
        self._constraints = ConstraintFactory(tokenizer, self.vocab_size, manifest.eos_token_ids, backend.kept_ids)
        self.images = image_limits(manifest.model, config, backend.max_context)  # None: it takes no images
        vision = None if self.images is None else self.images.spec
        self.answers = Answers(tokenizer, self._constraints, backend.kept_ids, vision)
        self._image_keys = ImageKeys()
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
        self._encodes_apart = backend.num_slots > 1
        self._seeing: Sequence | None = None  # whose image is being encoded: another one would begin its tile anew

    @classmethod
    def open(
        cls, config: EngineConfig, report: Callable[[str], None] = _log.info, progress: Progress = untold
    ) -> Engine:
        """Choose, plan, check, allocate, load, capture, warm up; ``report`` is told why and the plan, before all
        else, and the notes of the manifest. ``progress`` is told how far this is, in the calling thread.

        Raises ConfigurationError, EngineDirectoryError, BackendUnavailableError, InsufficientMemoryError or
        EngineFaultError; nothing stays allocated then.
        """
        start = time.monotonic()
        choice = choose(config, portion(progress, 0.0, _CHECKING))
        report(choice.reason)
        variant_dir, manifest, config, plan = choice.directory, choice.manifest, choice.config, choice.plan
        report(f"Memory plan of {manifest.model_name} ({manifest.quantization}, {manifest.backend}):\n{plan.table()}")
        plan.check(advice(config, plan))
        for note in manifest.notes:
            report(note)
        vision = manifest.model.vision
        tokenizer = Tokenizer(variant_dir, None if vision is None else vision.image_token_id)
        own = model_sampling(variant_dir)
        if tokenizer.folds_system:
            report("The chat template has no system messages; they are put before the first user message.")
        with contextlib.ExitStack() as undo:
            backend = choice.backend.load(variant_dir, manifest, config, progress=portion(progress, _CHECKING, 1.0))
            undo.callback(backend.close)
            energy = open_account(on_gpu=manifest.backend in GPU_BACKENDS)
            if energy is not None:
                undo.callback(energy.close)
            load_time = time.monotonic() - start
            engine = cls(config, manifest, backend, tokenizer, plan, load_time, choice.reason, own, energy)
            undo.pop_all()
            undo.callback(engine.close)
            engine.read_schemas(report)
            undo.pop_all()
        progress(1.0)
        return engine

    def read_schemas(self, report: Callable[[str], None]) -> None:
        """Read and compile the schemas of ``schema_dir``; ``report`` is told of those that cannot be used.

        Raises ConfigurationError if there is no such directory.
        """
        if directory := self.config.schema_dir:
            self.schemas = NamedSchemas.read(expand_user(directory), self._constraints, report)

    def close(self) -> None:
        """Gives everything back; may be called twice."""
        backend, self._backend = self._backend, None
        self._constraints.close()
        if self.energy is not None:
            self.energy.close()
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
            if request.schema_name:
                request = request.replace(schema_name="", json_schema=self.schemas[request.schema_name])
            request = request.with_placed_images()
            turn = None
            if request.session:
                turn = self.sessions.begin(request.session, request.messages, request.default_system, request.images)
                undo.callback(turn.leave)
                request = request.replace(messages=turn.messages, images=turn.images)
            prepared = self._prepare(request, end)
            if turn is not None:
                turn.messages, turn.images = prepared.request.messages, prepared.request.images
                prepared = dataclasses.replace(prepared, turn=turn)
            undo.pop_all()
            return prepared

    def _prepare(self, request: GenerationRequest, end: float) -> PreparedRequest:
        """``end``: time.monotonic() of its deadline, if it has one."""
        request = request.replace(sampling=request.sampling.with_model(self.model_sampling))
        self._check_sampling(request.sampling)
        if request.has_form or request.tools:
            self._check_stop_ids(request.sampling)
        self._check_adapter(request.adapter)
        self.answers.check(request)
        if request.images:
            self.require_vision()
        request.check_answered_calls()
        num_dropped = 0
        if request.context_policy == "drop_oldest":
            messages, num_dropped = self._fitted(request)
            request = request.with_messages(messages)
        if request.session or num_dropped:
            request.validate()  # with the history
        if num_dropped:
            try:
                request.check_answered_calls()
            except InvalidRequestError:
                raise PromptTooLongError(
                    "The tool call that a message of the last turn answers no longer fits into the context with it; "
                    "ask anew."
                ) from None
        self._check_num_images(len(request.images))
        num_chars = len(request.prompt) + request.num_template_chars
        at_least = num_chars // self.tokenizer.max_token_chars
        if at_least >= self.max_context:  # too long to be worth the memory of tokenizing it
            raise self._too_long(f"at least {at_least}")
        prompt = self.answers.prompt(request)
        token_ids = prompt.token_ids
        if len(token_ids) >= self.max_context:
            raise self._too_long(str(len(token_ids)))
        self._check_prompt(token_ids)
        images = self.answers.placed_images(request, prompt)
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
            images=images,
            key=self._image_keys.key(token_ids, images) if images else None,
        )

    def _fitted(self, request: GenerationRequest) -> tuple[Messages, int]:
        """Return the messages without the oldest turns, if they leave the answer too little of the context, and the
        number of turns that are left out."""

        def num_tokens(messages: Messages) -> int | None:
            part = request.with_messages(messages)
            if self.images is not None and len(part.images) > self.images.max_images:
                return None
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
        if request.schema_name:
            request = request.replace(schema_name="", json_schema=self.schemas.get(request.schema_name))
        return self._constraints.knows(request)

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        return self.tokenizer.token_texts(ids)

    # --- the work: one thread -----------------------------------------------------------------------

    def warm_system_prompt(self, text: str) -> int:
        """Compute the KV of a system prompt and keep it; return its length in tokens (0: nothing to keep).

        A slot has to be free. Warns of a prompt with which every request is refused.
        """
        if (least := len(text) // self.tokenizer.max_token_chars) >= self.max_context:
            _log.warning(_LONG_SYSTEM_PROMPT, least, self.max_context)
            return 0
        with refusing_panics("tokenizing the system prompt of"):
            prefix = self.tokenizer.system_prefix(text) if text else np.empty(0, dtype=np.int32)
        if len(prefix) >= self.max_context:
            _log.warning(_LONG_SYSTEM_PROMPT, len(prefix), self.max_context)
            return 0
        if len(prefix) and (largest := int(prefix.max())) >= self.vocab_size:
            _log.warning(
                "The system prompt holds the token with id %d, but the model has ids from 0 to %d: every request with "
                "it is refused; leave it out.", largest, self.vocab_size - 1,
            )  # fmt: skip
            return 0
        prefix = prefix[: min(self.max_context - 1, self.config.prompt_cache_tokens)]
        if not len(prefix) or not self.config.prompt_cache_entries:
            return 0
        backend = self._backend_or_raise()
        is_long = 0 < backend.rope_switch < len(prefix)
        slot, cached = self.pool.place(prefix, self.scheduler.free_slots, KVKind(long_rope=is_long))
        backend.begin(slot, SamplingParams(seed=0), prefix)
        steps = [SequenceStep(slot, prefix[cached:], cached, samples=False, marks=True, long_rope=is_long)]
        (pending,) = backend.step(steps)
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
        sequence.energy = self.energy.begin() if self.energy is not None else None
        backend, prepared = self._backend_or_raise(), sequence.prepared
        sequence.rope_switch = backend.rope_switch
        slot, cached = self._place(sequence, self.scheduler.free_slots)
        border = None
        if backend.has_states:
            border = min(len(prepared.prefix_ids), self.config.prompt_cache_tokens)
        sequence.place(slot, cached, border)
        backend.begin(slot, prepared.sampling, prepared.token_ids, sequence.adapter, prepared.images)
        self.speculation.begin(sequence)
        sequence.cancel.attach(partial(backend.interrupt, slot))

    def _place(self, sequence: Sequence, slots: list[int]) -> tuple[int, int]:
        """Have as much of a sequence's KV as is known in one of ``slots``; return that one, and how many tokens."""
        ids, kind = sequence.kv_ids, KVKind(sequence.adapter, sequence.long_rope)
        if self.config.reproducible and sequence.prepared.request.sampling.seed is not None:
            return self.pool.place_fresh(slots, ids, kind), 0
        return self.pool.place(ids, slots, kind)

    def _queue(self, sequences: list[Sequence]) -> None:
        """Queue the next step of those that have not ended: all that decode, one with a part of its prompt, and one
        whose images are encoded."""
        for sequence in sequences:
            if sequence.ending is None and sequence.outgrows_rope and sequence.slot is not None:
                sequence.start_anew()
                sequence.resume(self._place(sequence, [sequence.slot])[1])
        prefilled = self._to_prefill(sequences)
        owners, steps = [], []
        for sequence in sequences:
            if sequence.ending is not None:
                continue
            if sequence.is_prefilling and sequence not in prefilled:
                sequence.ending = None if sequence.unread else sequence.cancel.reason
                continue
            try:
                step = sequence.next_step(self._max_prefill, encodes_apart=self._encodes_apart)
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

    def _to_prefill(self, sequences: list[Sequence]) -> list[Sequence]:
        """Return the sequence whose prompt is fed next, and the one whose images are encoded, those of the highest
        priority; either may be missing. So a text does not wait for the images of a prompt that came before it."""
        waiting = [sequence for sequence in sequences if sequence.is_prefilling and sequence.ending is None]
        if not self._encodes_apart:
            return [max(waiting, key=lambda each: each.priority)] if waiting else []
        seeing = [sequence for sequence in waiting if sequence.needs_features(self._max_prefill)]
        feeding = [sequence for sequence in waiting if sequence not in seeing]
        self._seeing = max(seeing, key=lambda each: (each.priority, each is self._seeing), default=None)
        first = max(feeding, key=lambda each: each.priority, default=None)
        return [sequence for sequence in (first, self._seeing) if sequence is not None]

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
        self._seeing = None if self._seeing is sequence else self._seeing
        if self.energy is not None and sequence.energy is not None:
            sequence.energy_joules = self.energy.end(sequence.energy)
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

    def require_vision(self) -> None:
        """Raises InvalidImageError if no request can have images."""
        if self.images is None:
            raise InvalidImageError(
                f"The request has images, but {self.manifest.model_name} takes no images; load a vision-language model."
                if self.manifest.model.vision is None
                else "The request has images, but max_images is 0 in this engine; configure a larger one."
            )

    def check_images(self, request: GenerationRequest, num_images: int) -> None:
        """Raises InvalidImageError if ``request`` cannot have ``num_images``, which have not been read yet."""
        self.require_vision()
        least = num_images
        if request.session or request.context_policy == "drop_oldest":  # earlier turns may be left out or known
            last = max((index for index, each in enumerate(request.messages) if each.role == "user"), default=0)
            if any(each.images for each in request.messages):
                least = sum(len(each.images) for each in request.messages[last:])
        self._check_num_images(least)

    def _check_num_images(self, count: int) -> None:
        if self.images is not None and count > self.images.max_images:
            raise InvalidImageError(
                f"The prompt has {count} images, those of earlier turns included, but this engine takes at most "
                f"{self.images.max_images} (max_images)."
            )

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

    def _check_stop_ids(self, sampling: SamplingParams) -> None:
        """Raises InvalidSamplingError for a stop token id that is text, which a form or a call may need."""
        special = self.tokenizer.special_ids if sampling.stop_token_ids else frozenset()
        if text := sorted(set(sampling.stop_token_ids) - special - self._eos_ids):
            raise InvalidSamplingError(
                f"The stop token id {text[0]} is text, and would cut an answer that is held to a form or calls tools; "
                "leave one of them out."
            )


def _blame(sequence: Sequence, error: BaseException) -> None:
    """End ``sequence`` with ``error``; only a fault of the engine, and an interrupt from outside, are raised again."""
    if isinstance(error, EngineFaultError):
        raise error
    try:
        with refusing_panics("answering"):
            raise error
    except Exception as refused:
        sequence.ending = refused
