"""The host's side of a GPU backend: requests, chunks, sampling parameters, tokens that are read late, saved prefixes.

One stream, in order. A step's last kernel samples; the token feeds the next step on the device and reaches the host
through pinned memory, marked by an event, so no step waits for the host. How a chunk and a step are computed is the
backend's matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine_core.backends import PendingToken, SequenceStep
from engine_core.cuda.driver import Device, DeviceArray, Event, PinnedArray, Stream
from engine_core.cuda.kernels.sampling import FAULT_EMPTY, FAULT_NAN, PARAMS, RING, STATE
from engine_core.errors import EngineFaultError, InvalidSamplingError
from engine_core.memory import MemoryPlan
from engine_core.request import SAMPLING_OPTIONS, SamplingParams

if TYPE_CHECKING:
    from engine_core.backends.cuda.layout import CudaSpec
    from engine_core.backends.tensorrt.layout import TrtSpec


class _Pending:
    """The token of step ``step`` of one request."""

    def __init__(self, backend: DeviceBackend, step: int) -> None:
        self._backend = backend
        self._step = step
        self._done = False
        self._token: int | None = None

    def result(self) -> int | None:
        if not self._done:
            self._done = True
            self._token = self._backend._read(self._step)
        return self._token


class _NoToken:
    """Of a step that was not queued, because the sequence had ended, or that did not sample and is over."""

    def result(self) -> None:
        return None


@dataclass(frozen=True)
class SequenceLimits:
    """What the host's side has to know of a model and its arrays."""

    max_context: int
    vocab_size: int
    head_rows: int  # rows of the LM head
    chunk: int  # tokens of a prefill step
    prefix_slots: int
    prefix_tokens: int
    cache_rows: int  # K and V of every layer and KV head
    cache_item_bytes: int  # of one position of a row
    scale_item_bytes: int = 0  # the same of ``kv_scales`` and ``prefix_scales``; 0 where the cache has none

    @classmethod
    def of(
        cls, spec: CudaSpec | TrtSpec, num_kv_heads: int, cache_item_bytes: int, scale_item_bytes: int = 0
    ) -> SequenceLimits:
        return cls(
            max_context=spec.max_context,
            vocab_size=spec.vocab_size,
            head_rows=spec.head_rows,
            chunk=spec.chunk,
            prefix_slots=spec.prefix_slots,
            prefix_tokens=spec.prefix_tokens,
            cache_rows=spec.num_layers * 2 * num_kv_heads,
            cache_item_bytes=cache_item_bytes,
            scale_item_bytes=scale_item_bytes,
        )


class DeviceBackend:
    """The part of ``engine_core.backends.Backend`` that GPU backends share.

    A subclass calls ``_allocate_host``, then ``_reset``, sets ``_row_of`` and ``_resources``, and has the three hooks.
    ``_work`` holds the device arrays: kv_cache, prefixes, state, params, seen, bias, mask; kv_scales and prefix_scales
    (last dimension: positions of a row) where the cache has scales.
    """

    num_slots = 1
    sampler_options = frozenset(SAMPLING_OPTIONS) & frozenset(PARAMS.names)

    _device: Device | None
    _stream: Stream
    _limits: SequenceLimits
    _work: dict[str, DeviceArray]
    _row_of: np.ndarray | None  # see ``rows_by_id``
    _resources: contextlib.ExitStack

    # --- hooks ----------------------------------------------------------------------------------------

    def _queue_chunk(self, slot: int, token_ids: np.ndarray, position: int) -> None:
        """Queues the forward pass of at most ``chunk`` tokens. Pinned buffers of ``slot`` (0 or 1) are free to use."""
        raise NotImplementedError

    def _run_sampler(self) -> None:
        """Queues sampling from what the last chunk left, and what makes the next decode step find the token."""
        raise NotImplementedError

    def _run_decode(self) -> None:
        """Queues one step, from the last sampled token to the next one."""
        raise NotImplementedError

    # --- memory ---------------------------------------------------------------------------------------

    def _allocate_host(self, own: Callable[[Any], Any], device: Device, limits: SequenceLimits) -> None:
        """Pinned memory and events; ``own`` takes each to be closed."""
        self._limits = limits
        words = -(-limits.vocab_size // 32)
        self._tokens = own(PinnedArray(device, (RING,), "int32"))
        self._chunk_done = [own(Event(device)) for _ in range(2)]
        self._masks = own(PinnedArray(device, (RING, words), "uint32"))
        self._params = own(PinnedArray(device, (RING, PARAMS.itemsize), "uint8"))
        self._positions = own(PinnedArray(device, (RING,), "int32"))
        self._seen = own(PinnedArray(device, (-(-limits.head_rows // 32) * 4,), "uint8"))
        self._bias = own(PinnedArray(device, (limits.head_rows,), "float32"))
        self._events = [own(Event(device)) for _ in range(RING)]

    def _reset(self) -> None:
        self._step = 0  # tokens sampled, or being sampled, since begin
        self._position = 0  # of the token that is fed next
        self._stop_ids: frozenset[int] = frozenset()
        self._ended = False
        self._interrupted = False
        self._num_uploads = 0
        self._has_mask = False

    # --- the protocol ---------------------------------------------------------------------------------

    def begin(self, slot: int, sampling: SamplingParams, history: np.ndarray) -> None:
        assert slot == 0
        self._device.make_current()
        self._stream.wait()
        self._reset()
        self._stop_ids = sampling.stop_token_ids
        self._set_params(sampling)
        work = self._work
        self._stream.zero(work["state"])
        if sampling.repetition_penalty != 1.0:
            flags = np.zeros(self._seen.host.size * 8, dtype=bool)
            rows = self._row_of[history] if self._row_of is not None else history
            flags[rows[rows >= 0]] = True
            self._seen.host[:] = np.packbits(flags, bitorder="little")
            self._stream.upload(work["seen"], self._seen)
        if sampling.logit_bias:
            self._bias.host[:] = 0
            for token_id, bias in sampling.logit_bias:
                is_row = self._row_of is None or token_id >= self._limits.vocab_size
                row = token_id if is_row else int(self._row_of[token_id])
                if 0 <= row < self._limits.head_rows:
                    self._bias.host[row] += np.float32(bias)
            self._stream.upload(work["bias"], self._bias)

    def step(self, steps: Sequence[SequenceStep]) -> list[PendingToken]:
        (step,) = steps
        return [self._decode(step.mask) if step.token_ids is None else self._prefill(step)]

    def interrupt(self, slot: int) -> None:
        self._interrupted = True

    def save_prefix(self, slot: int, entry: int, length: int) -> None:
        self._copy_prefix(entry, length, save=True)

    def load_prefix(self, slot: int, entry: int, length: int) -> None:
        self._copy_prefix(entry, length, save=False)

    def close(self) -> None:
        resources, self._resources = self._resources, contextlib.ExitStack()
        device, self._device = self._device, None
        if device is None:
            return
        device.make_current()
        with contextlib.suppress(EngineFaultError):  # of a step that failed before
            self._stream.wait()
        resources.close()
        device.close()

    # --- steps ----------------------------------------------------------------------------------------

    def _prefill(self, step: SequenceStep) -> PendingToken:
        if not self._forward(step.token_ids, step.position):
            return _NoToken()
        if not step.samples:
            self._stream.wait()
            return _NoToken()
        # The sampler moves the position on by one.
        upload = self._num_uploads % RING
        self._positions.host[upload] = self._position - 1
        field = DeviceArray(self._work["state"].address + STATE.fields["position"][1], (1,), "int32")
        self._stream.upload(field, self._positions, 4 * upload)
        self._use_mask(step.mask)
        return self._sampled(self._run_sampler)

    def _decode(self, mask: np.ndarray | None) -> PendingToken:
        if self._ended or self._interrupted or self._position >= self._limits.max_context:
            return _NoToken()
        self._use_mask(mask)
        self._position += 1
        return self._sampled(self._run_decode)

    def _forward(self, token_ids: np.ndarray, position: int) -> bool:
        """Queues the prompt in chunks, at most two ahead of the device; False if it was interrupted."""
        chunk = self._limits.chunk
        for index, start in enumerate(range(0, len(token_ids), chunk)):
            part = token_ids[start : start + chunk]
            slot = index % 2
            if index >= 2:
                self._chunk_done[slot].wait()
            if self._interrupted:
                self._stream.wait()
                return False
            self._queue_chunk(slot, part, position + start)
            self._chunk_done[slot].record(self._stream)
        self._position = position + len(token_ids)
        return True

    def _sampled(self, run: Callable[[], None]) -> _Pending:
        """Queues what samples the next token and marks its end."""
        step = self._step
        run()
        self._events[step % RING].record(self._stream)
        self._step += 1
        return _Pending(self, step)

    def _read(self, step: int) -> int | None:
        assert step > self._step - RING, "a pending token was read too late"
        self._events[step % RING].wait()
        if self._ended or self._interrupted:
            return None
        token = int(self._tokens.host[step % RING])
        self._ended = token < 0 or token in self._stop_ids
        if token == FAULT_NAN:
            raise EngineFaultError("The model's logits are NaN; the weights or the engine are damaged.")
        if token == FAULT_EMPTY:
            raise InvalidSamplingError(
                "No token is left to sample: the logit bias, the JSON schema and the vocabulary exclude each other."
            )
        return token

    def _set_params(self, sampling: SamplingParams) -> None:
        values = np.zeros((), dtype=PARAMS)
        for name in self.sampler_options:
            values[name] = getattr(sampling, name)
        values["top_k"] = min(sampling.top_k, self._limits.head_rows)
        values["has_bias"] = bool(sampling.logit_bias)
        self._values = values
        self._upload_params()

    def _upload_params(self) -> None:
        slot = self._num_uploads % RING
        self._num_uploads += 1
        self._params.host[slot] = np.frombuffer(self._values.tobytes(), dtype=np.uint8)
        self._stream.upload(self._work["params"], self._params, slot * PARAMS.itemsize)

    def _use_mask(self, mask: np.ndarray | None) -> None:
        if mask is not None:
            slot = self._step % RING
            if self._step >= RING:
                self._events[slot].wait()  # its last copy has been read
            self._masks.host[slot] = mask
            self._stream.upload(self._work["mask"], self._masks, slot * self._masks.host.shape[1] * 4)
        if self._has_mask != (mask is not None):
            self._has_mask = mask is not None
            self._values["has_mask"] = self._has_mask
            self._upload_params()

    def _copy_prefix(self, entry: int, length: int, save: bool) -> None:
        """Copies the first ``length`` rows of every layer's and head's K and V."""
        self._device.make_current()
        limits, work = self._limits, self._work
        assert 0 <= entry < limits.prefix_slots and 0 < length <= limits.prefix_tokens
        item = limits.cache_item_bytes
        cache, prefix = limits.max_context * item, limits.prefix_tokens * item
        self._copy_rows(save, length * item, "kv_cache", cache, "prefixes", entry, prefix)
        if item := limits.scale_item_bytes:
            cache, prefix = (work[name].shape[-1] * item for name in ("kv_scales", "prefix_scales"))
            self._copy_rows(save, length * item, "kv_scales", cache, "prefix_scales", entry, prefix)

    def _copy_rows(
        self, save: bool, width: int, cache: str, cache_pitch: int, prefixes: str, entry: int, prefix_pitch: int
    ) -> None:
        """Copies the first ``width`` bytes of every row, ``pitch`` bytes apart, to (``save``) or from an entry."""
        live = (self._work[cache].address, cache_pitch)
        kept = (self._work[prefixes].at(entry).address, prefix_pitch)
        target, source = (kept, live) if save else (live, kept)
        self._stream.copy_rows(*target, *source, width, self._limits.cache_rows)


def plan_here(totals: Callable[[Device], dict[str, int]]) -> MemoryPlan:
    """The plan for this machine's GPU of what ``totals`` says for it, bytes by purpose."""
    device = Device()
    try:
        return MemoryPlan.of(totals(device), device.memory_info()[0], device.name)
    finally:
        device.close()


def rows_by_id(vocab_map: np.ndarray | None, vocab_size: int) -> np.ndarray | None:
    """int32 [vocab_size]: the LM head's row of each id, -1 = none; None if rows are ids."""
    if vocab_map is None:
        return None
    rows = np.full(vocab_size, -1, dtype=np.int32)
    rows[vocab_map] = np.arange(len(vocab_map), dtype=np.int32)
    return rows
