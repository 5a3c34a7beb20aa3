"""The CPU backend: ONNX Runtime, one linear KV cache bound in place, and a compute thread that plays the device stream.

Steps are queued and return at once; the thread runs the model and samples, so that the step after never waits for the
caller. Weights, cache, KV pool, logits and scratch are all taken by ``load``.
"""

from __future__ import annotations

import _thread
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import onnxruntime as ort

from engine_core.backends import Draft, SequenceStep
from engine_core.backends.onnxruntime.encoder import Encoder, encoder_options
from engine_core.backends.onnxruntime.plan import Layout, packs_weights, plan_memory, resolve
from engine_core.backends.onnxruntime.session import MAX_DRAFT_ROWS, OrtSession, check_runtime
from engine_core.config import EngineConfig
from engine_core.errors import BackendUnavailableError, EdgeLLMError, EngineFaultError, InvalidSamplingError
from engine_core.formats.manifest import Manifest
from engine_core.memory import MemoryPlan
from engine_core.progress import Progress, portion, untold
from engine_core.request import SAMPLING_OPTIONS, SamplingParams
from engine_core.sampling import NAN_LOGITS, Sampler
from engine_core.vision.part_encoder import images_within
from engine_core.vision.positions import mrope_positions
from engine_core.vision.prompt import PlacedImage

_log = logging.getLogger(__name__)

_SESSION = 0.6  # of the progress of loading: ONNX Runtime's session; the rest is the warm-up
# What steps with drafts cost is measured with so many tokens in the cache, so often, and for so long at most.
_COST_CONTEXT, _COST_TURNS, _COST_SECONDS = 256, 5, 2.0
_USUAL_COSTS = (1.0, 1.1, 1.25, 1.4, 1.65, 1.9, 2.15, 2.4)  # the same where they are not measured


_Result = int | tuple[int, ...] | None  # see ``PendingToken``


class _Pending:
    """The result of one queued job."""

    __slots__ = ("_done", "_error", "_value")

    def __init__(self) -> None:
        self._done = _thread.allocate_lock()
        self._done.acquire()
        self._value: _Result = None
        self._error: EdgeLLMError | None = None

    def set(self, value: _Result, error: EdgeLLMError | None = None) -> None:
        self._value, self._error = value, error
        self._done.release()

    def result(self) -> _Result:
        with self._done:
            if self._error is not None:
                raise self._error
            return self._value


class _Slot:
    """The state of one sequence. It belongs to the compute thread; ``interrupted`` may be set from any."""

    def __init__(self, layout: Layout) -> None:
        self.sampler = Sampler(layout.vocab_size, layout.vocab_map)
        self.stop_ids: Collection[int] = frozenset()
        self.ended = True
        self.interrupted = False
        self.adapter = ""
        self.length = 0  # tokens in the cache
        self.last = 0  # the token sampled last
        self.images: Sequence[PlacedImage] = ()  # of its prompt


_Work = tuple[SequenceStep, _Pending]  # a step of a sequence and what it gives


class OnnxRuntimeBackend:
    """Implements ``engine_core.backends.Backend`` on the CPU.

    Sequences whose slots lie side by side decode in one run of the graph: four took 0.35 to 0.39 of the time of four
    runs with int8 weights, 0.52 to 0.63 with int4 weights (Llama of hidden size 1024, 1 and 2 threads, one process).
    Such a run is used only where it gives every sequence, bit for bit, the logits it gets alone, so that no text
    depends on who else is there; ``load`` tries it. Quantized weights pass. float32 weights do not, because the runtime
    sums one row in another order than several: their sequences decode one after another, which costs nothing for two
    and a factor of 2 for four.

    A step with a draft is a run of one sequence. With quantized weights and an int8 cache each of its tokens gets, bit
    for bit, what a step of its own gives: ``load`` tries it, and measures what such steps cost. Over a float cache the
    runtime multiplies one row in another order than several, which changes a token now and then.
    """

    name = "onnxruntime"
    sampler_options = frozenset(SAMPLING_OPTIONS)
    undrafted_options: frozenset[str] = frozenset()

    def __init__(self, session: OrtSession, layout: Layout, encoder: Encoder | None = None) -> None:
        self.num_slots = layout.num_slots
        self.max_context = session.max_context
        self.rope_switch = layout.rope_switch if layout.rope_switch < session.max_context else 0
        self.prefill_chunk = session.chunk
        self.vocab_size = layout.vocab_size
        self.reduced_vocab_size = layout.head_rows
        self.kept_ids = layout.vocab_map
        self._session = session  # until ``close``
        self.encoder = encoder  # of images; until ``close``
        self._has_mrope = bool(layout.model.mrope)
        self._closed = False
        self._adapters = [adapter.name for adapter in layout.adapters]
        self._slots = [_Slot(layout) for _ in range(layout.num_slots)]
        self.max_draft = 0
        self.exact_drafts = False
        self.step_seconds = 0.0
        self._costs = [1.0]  # of a step of 0, 1, … drafted tokens
        layers, kinds, _, heads, _, head_dim = session.kv_cache.shape
        self.pool_tokens = layout.pool_tokens
        self.has_states, self.state_places = bool(session.states), layout.state_places
        self._pool = np.empty((layers, kinds, heads, layout.pool_tokens, head_dim), session.kv_cache.dtype)
        self._pool.fill(0)  # takes the pages now
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="onnxruntime-stream", daemon=True)
        self._thread.start()

    @classmethod
    def check_here(cls, manifest: Manifest) -> None:
        """Nothing binds an engine to one machine."""

    @classmethod
    def plan(cls, variant_dir: Path, manifest: Manifest, config: EngineConfig) -> MemoryPlan:
        """Raises ConfigurationError for what this backend cannot do."""
        return plan_memory(resolve(variant_dir, manifest, config), manifest)

    @classmethod
    def load(
        cls, variant_dir: Path, manifest: Manifest, config: EngineConfig, *, progress: Progress = untold
    ) -> OnnxRuntimeBackend:
        """Loads, allocates and runs the largest step once, so that all scratch memory is taken.

        Raises ConfigurationError, BackendUnavailableError, InsufficientMemoryError, EngineDirectoryError or
        EngineFaultError.
        """
        layout = resolve(variant_dir, manifest, config)
        check_runtime(layout.kv_cache_type)
        plan_memory(layout, manifest).check()
        try:
            session = OrtSession(
                variant_dir,
                manifest.model,
                rows=layout.head_rows,
                max_context=layout.max_context,
                chunk=layout.chunk,
                threads=layout.threads,
                kv_cache_type=layout.kv_cache_type,
                packed=packs_weights(manifest),
                kept=layout.vocab_map if layout.prunes_head else None,
                num_slots=layout.num_slots,
                verifies=layout.draft_rows > 0,
                adapters=layout.adapters,
                own_graph=layout.adapters_have_graph,
                state_places=layout.state_places,
            )
            encoder = None
            if layout.images is not None:
                options = encoder_options(layout.threads, is_int8=packs_weights(manifest))
                encoder = Encoder(variant_dir, layout.images.spec, layout.images.max_images, options)
        except EdgeLLMError:
            raise
        except Exception as error:  # the runtime's exceptions share no base class
            raise BackendUnavailableError(
                f"ONNX Runtime {ort.__version__} cannot load {variant_dir} ({_first_line(error)}); "
                "update onnxruntime or build the engine again."
            ) from error
        backend = cls(session, layout, encoder)
        progress(_SESSION)
        try:
            backend._call(backend._warm_up, config.speculation, portion(progress, _SESSION, 1.0))
        except BaseException:
            backend.close()
            raise
        return backend

    # --- the protocol: any call queues a job --------------------------------------------------------

    def begin(
        self,
        slot: int,
        sampling: SamplingParams,
        history: np.ndarray,
        adapter: str = "",
        images: Sequence[PlacedImage] = (),
    ) -> None:
        self._set_interrupted(slot, False)
        self._call(self._begin, slot, sampling, history, adapter, images)

    def step(self, steps: Sequence[SequenceStep]) -> list[_Pending]:
        assert not self._closed, "the backend is closed"
        work = [(_copy(step), _Pending()) for step in steps]
        self._jobs.put(partial(self._step, work))
        return [pending for _, pending in work]

    def step_cost(self, rows: Sequence[int]) -> float:
        single, cost = rows.count(1), sum(self._costs[count - 1] for count in rows if count > 1)
        if single and not self._session.can_batch(single):
            return cost + single
        return cost + (self._costs[min(single, len(self._costs)) - 1] if single else 0.0)

    def log_probabilities(self, token_ids: np.ndarray, first: int) -> np.ndarray:
        """Prefill up to ``first``, then decode steps as in an answer."""
        self._set_interrupted(0, False)
        return self._call(self._score, token_ids.copy(), first)

    def interrupt(self, slot: int) -> None:
        self._set_interrupted(slot, True)

    def save_kv(self, slot: int, position: int, place: int, count: int) -> None:
        cached, kept = self._ranges(slot, position, place, count)
        self._jobs.put(partial(np.copyto, kept, cached))

    def load_kv(self, slot: int, position: int, place: int, count: int) -> None:
        cached, kept = self._ranges(slot, position, place, count)
        self._jobs.put(partial(np.copyto, cached, kept))

    def state_positions(self, slot: int, *, marked: bool = False) -> list[int]:
        return self._session.states.positions(slot, marked=marked)

    def save_state(self, slot: int, position: int, place: int) -> None:
        self._jobs.put(partial(self._session.states.save, slot, position, place))

    def load_state(self, slot: int, position: int, place: int) -> None:
        self._jobs.put(partial(self._session.states.load, slot, position, place))

    def _ranges(self, slot: int, position: int, place: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return views of the same shape: of the KV cache, and of the pool."""
        assert not self._closed, "the backend is closed"
        assert min(position, place) >= 0 and position + count <= self.max_context and place + count <= self.pool_tokens
        cached = self._session.kv_cache[:, :, slot, :, position : position + count]
        return cached, self._pool[:, :, :, place : place + count]

    def close(self) -> None:
        if self._closed:
            return
        for slot in range(self.num_slots):
            self._set_interrupted(slot, True)
        self._jobs.put(None)
        self._thread.join()
        self._closed = True
        del self._session
        if self.encoder is not None:
            self.encoder.close()
        self.encoder = None
        self._pool = np.empty(0, dtype=np.float32)

    # --- the compute thread -------------------------------------------------------------------------

    def _call(self, job: Callable, *arguments: Any) -> Any:
        """Have the compute thread call ``job``; return or raise what comes of it."""
        assert not self._closed, "the backend is closed"
        pending = _Pending()

        def work() -> None:
            try:
                result = job(*arguments)
            except BaseException as error:
                _fail(error, [pending])
            else:
                pending.set(result)

        self._jobs.put(work)
        return pending.result()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # nothing is kept alive while waiting

    def _begin(
        self,
        index: int,
        sampling: SamplingParams,
        history: np.ndarray,
        adapter: str,
        images: Sequence[PlacedImage],
    ) -> None:
        slot = self._slots[index]
        assert not images or self.encoder is not None, "the engine has no encoder"
        if self._has_mrope and (slot.images or images):
            assert self.encoder is not None
            positions = mrope_positions(self.encoder.spec, images, len(history)) if images else None
            self._session.set_positions(index, positions)
        slot.images = images
        self._session.use_adapter(index, adapter)
        slot.adapter = adapter
        slot.sampler.begin(sampling, history)
        slot.stop_ids = sampling.stop_token_ids
        slot.ended = False

    def _step(self, work: list[_Work]) -> None:
        """Decode before prefilling: the clients of decoding sequences read a token while a prompt is worked on."""
        decoding = [item for item in work if item[0].token_ids is None and self._can_decode(item)]
        single = [item for item in decoding if item[0].draft is None]
        for group in [single] if len(single) == 1 else self._groups(single):
            self._decode(group)
        for step, pending in decoding:
            if step.draft is not None:
                self._finish_step(partial(self._verify, step.draft), step, pending)
        for step, pending in work:
            if step.token_ids is not None:
                self._finish_step(self._encode if step.encodes else self._prefill, step, pending)

    def _can_decode(self, item: _Work) -> bool:
        slot, pending = self._slots[item[0].slot], item[1]
        if slot.interrupted or slot.ended:
            pending.set(None)
            return False
        try:
            draft = item[0].draft
            self._check_room(slot.length + 1 + (0 if draft is None else len(draft.token_ids)))
        except EngineFaultError as error:
            _fail(error, [pending], [slot])
            return False
        return True

    def _groups(self, work: list[_Work]) -> Iterator[list[_Work]]:
        """Yield the items that can be run at once: slots side by side, none of which has to be run alone."""
        group: list[_Work] = []
        for item in sorted(work, key=lambda item: item[0].slot):
            is_next = bool(group) and item[0].slot == group[-1][0].slot + 1
            is_next = is_next and not any(self._is_apart(each[0].slot) for each in (item, group[-1]))
            if group and not (is_next and self._session.can_batch(len(group) + 1)):
                yield group
                group = []
            group.append(item)
        if group:
            yield group

    def _is_apart(self, index: int) -> bool:
        """Return whether a slot cannot be run together with others: it has an adapter, or a RoPE of its own."""
        slot = self._slots[index]
        return bool(slot.adapter) or (self._has_mrope and bool(slot.images))

    def _decode(self, group: list[_Work]) -> None:
        slots = [self._slots[step.slot] for step, _ in group]
        try:
            first = group[0][0].slot
            self._session.decode_batch([slot.last for slot in slots], [slot.length for slot in slots], first)
        except BaseException as error:
            _fail(error, [pending for _, pending in group], slots)
            return
        for slot in slots:
            slot.length += 1
        for step, pending in group:
            self._finish_step(self._sample, step, pending)

    def _verify(self, draft: Draft, step: SequenceStep) -> tuple[int, ...]:
        """Feed the last token and a draft; return the tokens that steps of their own would have sampled."""
        slot, session, ids = self._slots[step.slot], self._session, draft.token_ids.tolist()
        sampled = [i for i in range(len(ids)) if not draft.forced[i]] + [len(ids)]  # what they are sampled after
        session.verify([slot.last, *ids], slot.length, sampled, step.slot)
        logits = iter(session.draft_logits)
        found: list[int] = []
        for i in range(len(ids) + 1):
            if i < len(ids) and draft.forced[i]:
                token = ids[i]
                slot.sampler.advance(token)
            else:
                mask = step.mask if i == 0 else None if draft.masks is None else draft.masks[i - 1]
                try:
                    token = slot.sampler.sample(next(logits), mask)
                except InvalidSamplingError:
                    if not found:
                        raise
                    break  # the next step raises it: those before are part of the answer
            found.append(token)
            slot.ended = token in slot.stop_ids
            if slot.ended or i == len(ids) or token != ids[i]:
                break
        slot.length += len(found)
        slot.last = found[-1]
        return tuple(found)

    def _finish_step(self, work: Callable[[SequenceStep], _Result], step: SequenceStep, pending: _Pending) -> None:
        """Give ``pending`` what ``work`` returns or raises."""
        try:
            token = work(step)
        except BaseException as error:
            _fail(error, [pending], [self._slots[step.slot]])
        else:
            pending.set(token)

    def _prefill(self, step: SequenceStep) -> int | None:
        slot = self._slots[step.slot]
        if slot.ended:
            return None
        self._session.use_long_rope(step.slot, step.long_rope)
        if not self._feed(step.slot, step.token_ids, step.position):
            return None
        if step.marks and self.has_states:
            self._session.states.mark(step.slot)
        return self._sample(step) if step.samples else None

    def _encode(self, step: SequenceStep) -> int | None:
        """Do one piece of the work on the features that a part of a prompt needs; return the pieces left, at least."""
        assert self.encoder is not None and step.token_ids is not None
        slot, options = self._slots[step.slot], self._session.prefill_options(step.slot)
        if slot.ended or slot.interrupted:
            return None
        try:
            for placed, start, stop in images_within(slot.images, step.position, len(step.token_ids)):
                if not self.encoder.encode(placed, start, stop, options):
                    return 1
        except Exception:
            if slot.interrupted:  # ended by ``terminate``, between two of its nodes
                return None
            raise
        return 0

    def _feed(self, index: int, token_ids: np.ndarray, position: int) -> bool:
        """Writes the KV of ``token_ids`` chunk by chunk; False: interrupted."""
        self._check_room(position + len(token_ids))
        slot, chunk = self._slots[index], self._session.chunk
        for start in range(0, len(token_ids), chunk):
            try:
                if slot.interrupted:
                    return False
                tokens = token_ids[start : start + chunk]
                image_tokens = self._take_images(index, position + start, len(tokens))
                self._session.prefill(tokens, position + start, index, image_tokens)
            except Exception:
                if slot.interrupted:  # ended by ``terminate``, between two of its nodes
                    return False
                raise
        slot.length = position + len(token_ids)
        return True

    def _take_images(self, index: int, position: int, count: int) -> np.ndarray:
        """Have the features of the tokens of images among the next ``count`` ready in the session; return their
        indices, int32 [n]."""
        found, places = 0, []
        for placed, start, stop in images_within(self._slots[index].images, position, count):
            assert self.encoder is not None
            out = self._session.image_features[found : found + stop - start]
            self.encoder.take(placed, start, stop, out, self._session.prefill_options(index))
            places.append(placed.positions[start:stop] - position)
            found += stop - start
        return np.concatenate(places) if places else np.empty(0, dtype=np.int32)

    def _score(self, token_ids: np.ndarray, first: int) -> np.ndarray:
        self._slots[0].ended = True  # no sequence that a step could go on with
        if self._has_mrope:
            self._session.set_positions(0, None)
        self._slots[0].images = ()
        self._session.use_adapter(0, "")
        self._check_room(len(token_ids))
        self._session.use_long_rope(0, 0 < self.rope_switch < len(token_ids))
        self._feed(0, token_ids[:first], 0)
        found = np.empty(len(token_ids) - first)
        for index, token_id in enumerate(token_ids[first:].tolist()):
            found[index] = self._slots[0].sampler.log_probability(self._session.logits[0], token_id)
            if index + 1 < len(found):
                self._session.decode(token_id, first + index)
        if np.isnan(found).any():
            raise EngineFaultError(NAN_LOGITS)
        return found

    def _sample(self, step: SequenceStep) -> int:
        slot = self._slots[step.slot]
        slot.last = token = slot.sampler.sample(self._session.logits[step.slot], step.mask)
        if token in slot.stop_ids:
            slot.ended = True
        return token

    def _warm_up(self, speculation: str, progress: Progress) -> None:
        session = self._session
        if self.encoder is not None:
            self.encoder.warm_up()
        for slot in range(self.num_slots):
            progress(slot / self.num_slots)
            for adapter in (*self._adapters, ""):
                session.use_adapter(slot, adapter)
                session.states.reset(slot, session.max_context - session.chunk)
                session.prefill(np.zeros(session.chunk, dtype=np.int64), session.max_context - session.chunk, slot)
                session.states.reset(slot, session.max_context - 1)
                session.decode(0, session.max_context - 1, slot)
        if session.can_batch(2) and not self._rows_are_independent():
            session.stop_batching()
        if session.verifies:
            self.exact_drafts = session.kv_cache.dtype == np.int8 and self._drafts_are_exact()
            if self.exact_drafts:
                self._measure_costs()
            else:  # drafts must not depend on what is measured
                self._costs = list(_USUAL_COSTS)
            if self.exact_drafts or (speculation == "on" and self.num_slots == 1 and self.max_context > MAX_DRAFT_ROWS):
                self.max_draft = MAX_DRAFT_ROWS - 1
            else:
                session.stop_verifying()
        session.kv_cache.fill(0)
        for slot in range(self.num_slots):
            session.states.reset(slot)

    def _drafts_are_exact(self) -> bool:
        """Tell whether a step of several tokens leaves the same KV and logits, bit for bit, as steps of one each."""
        session, random = self._session, np.random.default_rng(1)
        last = session.max_context - MAX_DRAFT_ROWS
        if last < 1:
            return False
        rows_at = {position: range(2, MAX_DRAFT_ROWS + 1) for position in (1, min(100, last))}
        rows_at.setdefault(last, range(MAX_DRAFT_ROWS, MAX_DRAFT_ROWS + 1))
        prompt = random.integers(0, self.vocab_size, session.chunk)
        for start in range(0, session.max_context, session.chunk):
            session.prefill(prompt[: session.max_context - start], start)
        for position, sizes in rows_at.items():
            tokens = random.integers(0, self.vocab_size, MAX_DRAFT_ROWS).tolist()
            alone = np.empty_like(session.draft_logits)
            for i, token in enumerate(tokens):
                session.decode(token, position + i)
                alone[i] = session.logits[0]
            written = session.kv_cache[:, :, 0, :, position : position + MAX_DRAFT_ROWS]
            kv = written.copy()
            for rows in sizes:
                written[...] = 0
                session.verify(tokens[:rows], position, range(rows))
                is_same = np.array_equal(written[..., :rows, :], kv[..., :rows, :])
                if not is_same or not np.array_equal(session.draft_logits[:rows], alone[:rows]):
                    return False
        return True

    def _measure_costs(self) -> None:
        """Time steps of 1, 2, 4 and 8 tokens in turns; those between are interpolated."""
        session = self._session
        sizes = (1, 2, 4, MAX_DRAFT_ROWS)
        position = min(_COST_CONTEXT, session.max_context - MAX_DRAFT_ROWS)
        times = np.full(len(sizes), np.inf)
        tokens = [0] * MAX_DRAFT_ROWS
        end = time.monotonic() + _COST_SECONDS
        for turn in range(_COST_TURNS):
            if turn and time.monotonic() > end:
                break
            for i, size in enumerate(sizes):
                start = time.perf_counter()
                session.verify(tokens[:size], position, range(size))
                times[i] = min(times[i], time.perf_counter() - start)
        times = np.minimum.accumulate(times[::-1])[::-1]  # what takes longer than a larger step was held up
        self._costs = np.interp(range(1, MAX_DRAFT_ROWS + 1), sizes, times / times[0]).tolist()
        self.step_seconds = float(times[0])

    def _rows_are_independent(self) -> bool:
        """Tell whether each slot gets the same logits, bit for bit, in a run of several as in a run of its own."""
        session, random = self._session, np.random.default_rng(0)
        positions = [min(1 + 5 * slot, session.max_context - 1) for slot in range(self.num_slots)]
        prompts = random.integers(0, self.vocab_size, (self.num_slots, session.max_context))
        tokens = [int(prompt[position]) for prompt, position in zip(prompts, positions)]
        for slot, (prompt, position) in enumerate(zip(prompts, positions)):
            for start in range(0, position, session.chunk):
                session.prefill(prompt[start : min(start + session.chunk, position)], start, slot)
        for slot in range(self.num_slots):
            session.decode(tokens[slot], positions[slot], slot)
        alone = session.logits.copy()
        for count in range(2, self.num_slots + 1):
            session.logits.fill(0)
            session.decode_batch(tokens[:count], positions[:count], 0)
            if not np.array_equal(session.logits[:count], alone[:count]):
                return False
        return True

    # --- helpers ------------------------------------------------------------------------------------

    def _set_interrupted(self, slot: int, value: bool) -> None:
        self._slots[slot].interrupted = value
        if not self._closed:
            self._session.terminate(slot, value)

    def _check_room(self, length: int) -> None:
        if length > self.max_context:
            raise EngineFaultError(f"A step would fill {length} positions, but the KV cache has {self.max_context}.")


def _fail(error: BaseException, pending: Sequence[_Pending], slots: Sequence[_Slot] = ()) -> None:
    """Make ``error`` the result of all ``pending``; the sequences of ``slots`` have ended."""
    if not isinstance(error, EdgeLLMError):  # the runtime's exceptions share no base class; panics are no Exception
        _log.debug("The compute thread failed", exc_info=error)
        error = EngineFaultError(f"ONNX Runtime failed in a step: {_first_line(error)}")
    for slot in slots:
        slot.ended = True
    for each in pending:
        each.set(None, error)


def _copy(step: SequenceStep) -> SequenceStep:
    """Return ``step`` with arrays of its own: the caller may change what it handed over."""
    token_ids = None if step.token_ids is None else step.token_ids.copy()
    draft = step.draft
    if draft is not None:
        draft = Draft(*(None if array is None else array.copy() for array in draft))
    return step._replace(token_ids=token_ids, mask=None if step.mask is None else step.mask.copy(), draft=draft)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
