"""The host's side of a GPU backend: sequences, chunks, sampling parameters, tokens that are read late, saved prefixes.

One stream, in order. A step's last kernel samples; the token feeds the next step on the device and reaches the host
through pinned memory, marked by an event, so no step waits for the host. How a chunk and a step are computed is the
backend's matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine_core.backends import Draft, PendingToken, SequenceStep
from engine_core.cuda.driver import Device, DeviceArray, Event, PinnedArray, Stream
from engine_core.cuda.kernels.sampling import FAULT_EMPTY, FAULT_NAN, PARAMS, RING, STATE
from engine_core.errors import EngineFaultError, InvalidSamplingError
from engine_core.host_memory import available_memory
from engine_core.memory import MemoryPlan
from engine_core.request import SAMPLING_OPTIONS, SamplingParams
from engine_core.sampling import NAN_LOGITS, NO_TOKEN_LEFT
from engine_core.vision.part_encoder import PartEncoder, images_within

if TYPE_CHECKING:
    from engine_core.backends.cuda.layout import ArraySpec, CudaSpec
    from engine_core.backends.tensorrt.layout import TrtSpec
    from engine_core.vision.prompt import PlacedImage


class _Slot:
    """The sequence in one slot of the KV cache, since ``begin``. ``interrupted`` may be set from any thread."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.step = 0  # tokens sampled, or being sampled
        self.position = 0  # of the token that is fed next
        self.stop_ids: Collection[int] = frozenset()
        self.images: Sequence[PlacedImage] = ()  # of its prompt
        self.ended = False
        self.interrupted = False
        self.num_uploads = 0
        self.token = 0  # the last that was read
        self.is_ahead = False  # of the device, whose token, position and step are those before a draft
        self.has_mask = False
        self.values = np.zeros((), dtype=PARAMS)
        self.marks = [0] * RING  # of the end of each step


class _Pending:
    """The token of step ``step`` of the sequence in ``slot``."""

    def __init__(self, backend: DeviceBackend, slot: int, step: int) -> None:
        self._backend = backend
        self._slot = slot
        self._step = step
        self._done = False
        self._token: int | None = None

    def result(self) -> int | None:
        if not self._done:
            self._done = True
            self._token = self._backend._read(self._slot, self._step)
        return self._token


class _PendingDraft:
    """The tokens of a step that checks ``draft`` for the sequence in ``slot``; ``mark`` is its end."""

    def __init__(self, backend: DeviceBackend, slot: int, draft: Draft, mark: int) -> None:
        self._backend = backend
        self._slot = slot
        self._draft = draft
        self._mark = mark
        self._done = False
        self._tokens: tuple[int, ...] | None = None

    def result(self) -> tuple[int, ...] | None:
        if not self._done:
            self._done = True
            self._tokens = self._backend._read_draft(self._slot, self._draft, self._mark)
        return self._tokens


class _Fed:
    """A part of a prompt whose end is ``mark``, and that samples nothing; or a piece of the work on its images."""

    def __init__(self, backend: DeviceBackend, mark: int, left: int | None = None) -> None:
        """``left``: of images, the pieces that are known to be left."""
        self._backend = backend
        self._mark = mark
        self._left = left

    def result(self) -> int | None:
        self._backend._wait(self._mark)
        return self._left


class _NoToken:
    """A step that was not queued, because the sequence had ended."""

    def result(self) -> None:
        return None


@dataclass(frozen=True)
class SequenceLimits:
    """The facts that the host needs of a model and its arrays."""

    max_context: int
    vocab_size: int
    head_rows: int  # rows of the LM head
    chunk: int  # tokens of a prefill step
    pool_tokens: int  # places of the KV pool
    cache_rows: int  # K and V of every layer and KV head
    cache_item_bytes: int  # of one position of a row
    scale_item_bytes: int = 0  # the same of ``kv_scales`` and ``pool_scales``; 0 where the cache has none

    @classmethod
    def of(
        cls, spec: CudaSpec | TrtSpec, num_kv_heads: int, cache_item_bytes: int, scale_item_bytes: int = 0
    ) -> SequenceLimits:
        return cls(
            max_context=spec.max_context,
            vocab_size=spec.vocab_size,
            head_rows=spec.head_rows,
            chunk=spec.chunk,
            pool_tokens=spec.pool_tokens,
            cache_rows=spec.num_kv_layers * 2 * num_kv_heads,
            cache_item_bytes=cache_item_bytes,
            scale_item_bytes=scale_item_bytes,
        )


class DeviceBackend:
    """The part of ``engine_core.backends.Backend`` that GPU backends share.

    A subclass calls ``_allocate_host``, sets ``_row_of`` and ``_resources``, and has the hooks. ``_work`` holds
    the device arrays: kv_cache, pool, state, params, seen, bias, mask; kv_scales and pool_scales (last dimension:
    positions of a row) where the cache has scales. With several slots all of them but the pool's have a slot's in each
    item of their first dimension. The pool's arrays may be in pinned memory instead: ``_host_pool``.
    """

    num_slots = 1
    rope_switch = 0
    max_draft = 0
    exact_drafts = False
    has_states, state_places = False, 0
    step_seconds = 0.0
    encoder: PartEncoder | None = None  # of images
    undrafted_options = frozenset({"repetition_penalty", "logit_bias"})
    sampler_options = frozenset(SAMPLING_OPTIONS) & frozenset(PARAMS.names)

    _device: Device
    _stream: Stream
    _limits: SequenceLimits
    _work: dict[str, DeviceArray]
    _host_pool: dict[str, PinnedArray]
    _row_of: np.ndarray | None  # see ``rows_by_id``
    _resources: contextlib.ExitStack
    _closed = False

    # --- hooks ----------------------------------------------------------------------------------------

    def _queue_chunk(self, buffer: int, slot: int, token_ids: np.ndarray, position: int) -> None:
        """Queues the forward pass of at most ``chunk`` tokens. The pinned buffers ``buffer``, 0 or 1, are free.

        A token ``vocab_size`` + i stands for row i of the features of images."""
        raise NotImplementedError

    def _run_sampler(self, slot: int) -> None:
        """Queues sampling from what the last chunk left, and what makes the next decode step find the token."""
        raise NotImplementedError

    def _run_decode(self, slots: list[int]) -> None:
        """Queues one step of these sequences, from the last sampled tokens to the next ones."""
        raise NotImplementedError

    def _queue_draft(self, buffer: int, number: int, step: SequenceStep) -> None:
        """Queues the forward pass of the last token and a draft, and sampling after each. Only with ``max_draft``."""
        raise NotImplementedError

    def _draft_tokens(self, number: int) -> list[int]:
        """Returns what the last such step of a slot has sampled after each token."""
        raise NotImplementedError

    # --- memory ---------------------------------------------------------------------------------------

    def _allocate_host(
        self,
        own: Callable[[Any], Any],
        device: Device,
        limits: SequenceLimits,
        pool: Mapping[str, ArraySpec] | None = None,
    ) -> None:
        """Pinned memory and events; ``own`` takes each to be closed.

        ``pool``: the arrays of the KV pool, if they are to be in pinned memory.
        """
        self._limits = limits
        self.pool_tokens = limits.pool_tokens
        self._host_pool = {
            name: own(PinnedArray(device, (array.nbytes,), "uint8")) for name, array in (pool or {}).items()
        }
        n, words = self.num_slots, -(-limits.vocab_size // 32)
        self._slots = [_Slot() for _ in range(n)]
        self._tokens = own(PinnedArray(device, (n, RING), "int32"))
        self._chunk_done = [own(Event(device)) for _ in range(2)]
        self._num_chunks = 0
        self._masks = own(PinnedArray(device, (n, RING, words), "uint32"))
        self._params = own(PinnedArray(device, (n, RING, PARAMS.itemsize), "uint8"))
        self._positions = own(PinnedArray(device, (n, RING), "int32"))
        self._states = own(PinnedArray(device, (n, RING, STATE.itemsize), "uint8"))
        self._seen = own(PinnedArray(device, (n, -(-limits.head_rows // 32) * 4), "uint8"))
        self._bias = own(PinnedArray(device, (n, limits.head_rows), "float32"))
        self._begun = [own(Event(device)) for _ in range(n)]
        self._events = [own(Event(device)) for _ in range(3 * RING)]  # a step of the engine has three ends at most
        self._num_marks = 0

    def _of(self, name: str, slot: int) -> DeviceArray:
        """The part of an array of ``_work`` that belongs to ``slot``."""
        array = self._work[name]
        return array if self.num_slots == 1 else array.at(slot)

    def _upload(self, array: DeviceArray, pinned: PinnedArray, *index: int) -> None:
        """Queues a copy of ``pinned.host[index]`` to ``array``."""
        host = pinned.host
        offset = sum(i * stride for i, stride in zip(index, host.strides))
        self._stream.upload(array, pinned, offset)

    def _mark(self) -> int:
        """Marks the end of what has been queued so far."""
        self._events[self._num_marks % len(self._events)].record(self._stream)
        self._num_marks += 1
        return self._num_marks - 1

    def _wait(self, mark: int) -> None:
        """Waits until what was queued before ``mark`` is done; a later mark may have taken its event."""
        self._events[mark % len(self._events)].wait()

    # --- the protocol ---------------------------------------------------------------------------------

    def begin(
        self,
        slot: int,
        sampling: SamplingParams,
        history: np.ndarray,
        adapter: str = "",
        images: Sequence[PlacedImage] = (),
    ) -> None:
        assert not images or self.encoder is not None, "the engine has no encoder"
        self._device.make_current()
        state = self._slots[slot]
        if self.num_slots == 1:
            self._stream.wait()
        else:  # others go on
            self._begun[slot].wait()
            self._wait(max(state.marks))
        state.reset()
        state.stop_ids = sampling.stop_token_ids
        state.images = images
        self._set_params(slot, sampling)
        self._stream.zero(self._of("state", slot))
        if sampling.repetition_penalty != 1.0:
            flags = np.zeros(self._seen.host.shape[1] * 8, dtype=bool)
            rows = self._row_of[history] if self._row_of is not None else history
            flags[rows[rows >= 0]] = True
            self._seen.host[slot] = np.packbits(flags, bitorder="little")
            self._upload(self._of("seen", slot), self._seen, slot)
        if sampling.logit_bias:
            self._bias.host[slot] = 0
            for token_id, bias in sampling.logit_bias:
                row = token_id
                if self._row_of is not None and token_id < self._limits.vocab_size:
                    row = int(self._row_of[token_id])
                if 0 <= row < self._limits.head_rows:
                    self._bias.host[slot, row] += np.float32(bias)
            self._upload(self._of("bias", slot), self._bias, slot)
        self._begun[slot].record(self._stream)

    def step(self, steps: Sequence[SequenceStep]) -> list[PendingToken]:
        decoding = [step for step in steps if step.token_ids is None and step.draft is None]
        found = self._decode(decoding)
        for step in steps:
            if step.token_ids is not None:
                found[step.slot] = self._encode(step) if step.encodes else self._prefill(step)
            elif step.draft is not None:
                found[step.slot] = self._check_draft(step, step.draft)
        return [found[step.slot] for step in steps]

    def interrupt(self, slot: int) -> None:
        self._slots[slot].interrupted = True

    def save_kv(self, slot: int, position: int, place: int, count: int) -> None:
        self._copy_kv(slot, position, place, count, save=True)

    def load_kv(self, slot: int, position: int, place: int, count: int) -> None:
        self._copy_kv(slot, position, place, count, save=False)

    def close(self) -> None:
        resources, self._resources = self._resources, contextlib.ExitStack()
        if self._closed:
            return
        self._closed = True
        self._device.make_current()
        with contextlib.suppress(EngineFaultError):  # of a step that failed before
            self._stream.wait()
        resources.close()
        self._device.close()

    # --- steps ----------------------------------------------------------------------------------------

    def _prefill(self, step: SequenceStep) -> PendingToken:
        if not self._forward(step.slot, step.token_ids, step.position):
            return _NoToken()
        if not step.samples:
            return _Fed(self, self._mark())
        slot = self._slots[step.slot]
        if slot.is_ahead:  # of a sequence whose KV is computed anew after a draft
            self._upload_state(step.slot)
        # The sampler moves the position on by one.
        upload = slot.num_uploads % RING
        self._positions.host[step.slot, upload] = slot.position - 1
        address = self._of("state", step.slot).address + STATE.fields["position"][1]
        self._upload(DeviceArray(address, (1,), "int32"), self._positions, step.slot, upload)
        self._use_mask(step.slot, step.mask)
        self._run_sampler(step.slot)
        return self._sampled([step.slot])[step.slot]

    def _encode(self, step: SequenceStep) -> PendingToken:
        """Queues one piece of the work on the features that a part of a prompt needs."""
        assert self.encoder is not None and step.token_ids is not None
        slot = self._slots[step.slot]
        if slot.ended or slot.interrupted:
            return _NoToken()
        images = list(images_within(slot.images, step.position, len(step.token_ids)))
        for each in images:
            if not self.encoder.encode(*each):
                break
        is_done = all(self.encoder.has(*each) for each in images)
        return _Fed(self, self._mark(), 0 if is_done else 1)

    def _decode(self, steps: list[SequenceStep]) -> dict[int, PendingToken]:
        """Queues one step of those that go on; returns what each gives, by slot."""
        found: dict[int, PendingToken] = {step.slot: _NoToken() for step in steps}
        going = []
        for step in steps:
            slot = self._slots[step.slot]
            if not slot.ended and not slot.interrupted and slot.position < self._limits.max_context:
                if slot.is_ahead:
                    self._upload_state(step.slot)
                self._use_mask(step.slot, step.mask)
                slot.position += 1
                going.append(step.slot)
        if going:
            self._run_decode(going)
            found |= self._sampled(going)
        return found

    def _check_draft(self, step: SequenceStep, draft: Draft) -> PendingToken:
        """Queues a step with a draft, whose tokens have to be read before the sequence's next step."""
        slot = self._slots[step.slot]
        if slot.ended or slot.interrupted:
            return _NoToken()
        assert slot.position + len(draft.token_ids) < self._limits.max_context
        buffer = self._num_chunks % 2
        self._chunk_done[buffer].wait()
        self._queue_draft(buffer, step.slot, step)
        self._chunk_done[buffer].record(self._stream)
        self._num_chunks += 1
        mark = slot.marks[slot.step % RING] = self._mark()
        return _PendingDraft(self, step.slot, draft, mark)

    def _read_draft(self, number: int, draft: Draft, mark: int) -> tuple[int, ...] | None:
        """Returns what was sampled, up to the first token that is not the draft's next one."""
        slot = self._slots[number]
        self._wait(mark)
        if slot.interrupted:
            return None
        tokens: list[int] = []
        for index, sampled in enumerate(self._draft_tokens(number)):
            is_forced = index < len(draft.forced) and bool(draft.forced[index])
            tokens.append(int(draft.token_ids[index]) if is_forced else sampled)
            self._end_at(slot, tokens[-1])
            if slot.ended or index == len(draft.token_ids) or tokens[-1] != draft.token_ids[index]:
                break
        slot.position += len(tokens)
        slot.step += len(tokens)
        slot.is_ahead = True
        return tuple(tokens)

    def _forward(self, slot: int, token_ids: np.ndarray, position: int) -> bool:
        """Queues the prompt in chunks, at most two ahead of the device; False if it was interrupted."""
        chunk, state = self._limits.chunk, self._slots[slot]
        for start in range(0, len(token_ids), chunk):
            part = token_ids[start : start + chunk]
            buffer = self._num_chunks % 2
            self._chunk_done[buffer].wait()
            seen = None if state.interrupted else self._with_features(state, part, position + start)
            if seen is None:
                self._stream.wait()
                return False
            self._queue_chunk(buffer, slot, seen, position + start)
            self._chunk_done[buffer].record(self._stream)
            self._num_chunks += 1
        state.position = position + len(token_ids)
        return True

    def _with_features(self, slot: _Slot, token_ids: np.ndarray, position: int) -> np.ndarray | None:
        """Returns the tokens with those of images as ``_queue_chunk`` takes them, once all work on these is queued.

        None: the sequence was interrupted meanwhile.
        """
        found = token_ids
        for placed, start, stop in images_within(slot.images, position, len(token_ids)):
            assert self.encoder is not None
            found = token_ids.copy() if found is token_ids else found
            while not self.encoder.encode(placed, start, stop):
                if slot.interrupted:
                    return None
            for first, last, rows in self.encoder.rows(placed, start, stop):
                found[placed.positions[first:last] - position] = self._limits.vocab_size + rows
        return found

    def _sampled(self, slots: list[int]) -> dict[int, PendingToken]:
        """Marks the end of a step that sampled the next tokens of ``slots``."""
        mark = self._mark()
        found: dict[int, PendingToken] = {}
        for number in slots:
            slot = self._slots[number]
            slot.marks[slot.step % RING] = mark
            found[number] = _Pending(self, number, slot.step)
            slot.step += 1
        return found

    def _read(self, number: int, step: int) -> int | None:
        slot = self._slots[number]
        assert step > slot.step - RING, "a pending token was read too late"
        self._wait(slot.marks[step % RING])
        if slot.ended or slot.interrupted:
            return None
        token = int(self._tokens.host[number, step % RING])
        self._end_at(slot, token)
        return token

    def _end_at(self, slot: _Slot, token: int) -> None:
        """Takes note of a token that was read. Raises EngineFaultError or InvalidSamplingError if it is none."""
        slot.token = token
        slot.ended = token < 0 or token in slot.stop_ids
        if token == FAULT_NAN:
            raise EngineFaultError(NAN_LOGITS)
        if token == FAULT_EMPTY:
            raise InvalidSamplingError(NO_TOKEN_LEFT)

    def _set_params(self, slot: int, sampling: SamplingParams) -> None:
        values = self._slots[slot].values
        for name in self.sampler_options:
            values[name] = getattr(sampling, name)
        values["top_k"] = min(sampling.top_k, self._limits.head_rows)
        values["has_bias"] = bool(sampling.logit_bias)
        self._upload_params(slot)

    def _upload_params(self, number: int) -> None:
        slot = self._slots[number]
        place = slot.num_uploads % RING
        slot.num_uploads += 1
        self._params.host[number, place] = np.frombuffer(slot.values.tobytes(), dtype=np.uint8)
        self._upload(self._of("params", number), self._params, number, place)

    def _upload_state(self, number: int) -> None:
        """Queues what a draft's step has changed of a sequence: its last token, position and step."""
        slot = self._slots[number]
        state = np.zeros((), dtype=STATE)
        state["token"], state["position"], state["step"] = slot.token, slot.position, slot.step
        place = slot.num_uploads % RING
        slot.num_uploads += 1
        self._states.host[number, place] = np.frombuffer(state.tobytes(), dtype=np.uint8)
        self._upload(self._of("state", number), self._states, number, place)
        slot.is_ahead = False

    def _use_mask(self, number: int, mask: np.ndarray | None) -> None:
        slot = self._slots[number]
        if mask is not None:
            place = slot.step % RING
            if slot.step >= RING:
                self._wait(slot.marks[place])  # its last copy has been read
            self._masks.host[number, place] = mask
            self._upload(self._of("mask", number), self._masks, number, place)
        if slot.has_mask != (mask is not None):
            slot.has_mask = mask is not None
            slot.values["has_mask"] = slot.has_mask
            self._upload_params(number)

    def _copy_kv(self, slot: int, position: int, place: int, count: int, save: bool) -> None:
        """Queues the copies of ``count`` positions of every layer's and head's K and V."""
        self._device.make_current()
        limits = self._limits
        assert 0 <= position < position + count <= limits.max_context
        assert 0 <= place < place + count <= limits.pool_tokens
        arrays = [("kv_cache", "pool", limits.max_context, limits.cache_item_bytes)]
        if limits.scale_item_bytes:
            arrays.append(("kv_scales", "pool_scales", self._work["kv_scales"].shape[-1], limits.scale_item_bytes))
        for cache, pool, length, item in arrays:
            live = (self._of(cache, slot).address + position * item, length * item)
            kept = (self._pool_address(pool) + place * item, limits.pool_tokens * item)
            target, source = (kept, live) if save else (live, kept)
            self._stream.copy_rows(*target, *source, count * item, limits.cache_rows)

    def _pool_address(self, name: str) -> int:
        host = self._host_pool.get(name)
        return self._work[name].address if host is None else host.device_address


def plan_here(totals: Callable[[Device], tuple[dict[str, int], dict[str, int]]]) -> MemoryPlan:
    """Return the plan for this machine's GPU of what ``totals`` says for it: bytes by purpose, on the GPU and on the
    host."""
    device = Device()
    try:
        on_device, on_host = totals(device)
        free_on_host = available_memory() if on_host else 0
        return MemoryPlan.of(on_device, device.memory_info()[0], device.name, on_host, free_on_host)
    finally:
        device.close()


def rows_by_id(vocab_map: np.ndarray | None, vocab_size: int) -> np.ndarray | None:
    """Return int32 [vocab_size]: the LM head's row of each id, -1 = none; None if rows are ids."""
    if vocab_map is None:
        return None
    rows = np.full(vocab_size, -1, dtype=np.int32)
    rows[vocab_map] = np.arange(len(vocab_map), dtype=np.int32)
    return rows
