"""The CUDA backend: our own kernels on an NVIDIA GPU, compiled for it when the engine is opened.

One stream, in order. A decode step is one CUDA graph whose last kernel samples; the token feeds the next step on the
device and reaches the host through pinned memory, marked by an event, so no step waits for the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine_core.backends import TokenSampling
from engine_core.backends.cuda_layout import RUNTIME_BYTES, CudaSpec, bytes_by_purpose, weight_arrays, work_arrays
from engine_core.backends.cuda_model import CudaModel, WeightSource
from engine_core.config import EngineConfig
from engine_core.device import Arena, Device, DeviceArray, Event, PinnedArray, Stream
from engine_core.errors import EngineDirectoryError, EngineFaultError, InvalidSamplingError
from engine_core.graphs import GraphKey, GraphRunner
from engine_core.kernels import Kernels
from engine_core.kernels.sampling import FAULT_EMPTY, FAULT_NAN, PARAMS, RING, STATE
from engine_core.manifest import Manifest
from engine_core.memory import MemoryItem, MemoryPlan
from engine_core.safetensors_file import SafetensorsFile
from engine_core.vocab import own_vocab_map

WEIGHTS_NAME = "weights.safetensors"
ROPE_NAME = "rope"  # float32 [the manifest's max_context, head_dim / 2, 2]


class _Pending:
    """The token of step ``step`` of one request."""

    def __init__(self, backend: CudaBackend, step: int) -> None:
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
    """Of a step that was not queued: the sequence had ended."""

    def result(self) -> None:
        return None


class CudaBackend:
    """See ``engine_core.backends.Backend``."""

    name = "cuda"

    @classmethod
    def plan(cls, variant_dir: Path, manifest: Manifest, config: EngineConfig) -> MemoryPlan:
        spec = CudaSpec.create(manifest, config)
        device = Device()
        try:
            totals = bytes_by_purpose(weight_arrays(spec), work_arrays(spec, device.num_sms))
            totals["runtime"] = RUNTIME_BYTES
            free, _ = device.memory_info()
            return MemoryPlan(tuple(MemoryItem(name, count) for name, count in totals.items()), free, device.name)
        finally:
            device.close()

    @classmethod
    def load(cls, variant_dir: Path, manifest: Manifest, config: EngineConfig) -> CudaBackend:
        spec = CudaSpec.create(manifest, config)
        file = _open_weights(variant_dir, spec)
        vocab_map = None
        if spec.head_rows != spec.vocab_size:
            vocab_map = own_vocab_map(variant_dir, spec.vocab_size)
        device = Device()
        try:
            return cls(
                device,
                spec,
                lambda name, array: device.upload(array, file.raw(name)),
                file.raw(ROPE_NAME)[: spec.max_context],
                vocab_map=vocab_map,
                use_cuda_graph=config.use_cuda_graph,
            )
        except BaseException:
            device.close()
            raise

    def __init__(
        self,
        device: Device,
        spec: CudaSpec,
        source: WeightSource,
        rope: np.ndarray,
        *,
        vocab_map: np.ndarray | None = None,
        use_cuda_graph: bool = True,
    ) -> None:
        """Allocate, load, capture, warm up. Owns ``device`` once it returns; leaves nothing behind when it raises.

        ``rope``: float32 [max_context, head_dim / 2, 2], cos and sin.
        """
        self._device = device
        self._spec = spec
        self.max_context = spec.max_context
        self.vocab_size = spec.vocab_size
        self.reduced_vocab_size = spec.head_rows
        with contextlib.ExitStack() as undo:
            self._allocate(undo)
            self._model.fill(source, rope)
            if vocab_map is not None:
                device.upload(self._model.work["vocab_map"], vocab_map.astype(np.int32))
                device.synchronize()
            self._row_of = _rows_by_id(vocab_map, spec.vocab_size)
            self._reset()
            self._capture(undo, use_cuda_graph)
            self._warm_up()
            self._resources = undo.pop_all()

    def _allocate(self, undo: contextlib.ExitStack) -> None:
        device, spec = self._device, self._spec

        def own(resource):
            undo.callback(resource.close)
            return resource

        arrays = [*weight_arrays(spec).values(), *work_arrays(spec, device.num_sms).values()]
        self._stream = own(Stream(device))
        arena = own(Arena(device, sum(array.nbytes for array in arrays)))
        kernels = own(Kernels(device, spec.dtype))
        self._model = own(CudaModel(device, self._stream, arena, kernels, spec))
        words = -(-spec.vocab_size // 32)
        self._tokens = own(PinnedArray(device, (RING,), "int32"))
        self._prompt = [own(PinnedArray(device, (spec.chunk,), "int32")) for _ in range(2)]
        self._chunk_done = [own(Event(device)) for _ in range(2)]
        self._masks = own(PinnedArray(device, (RING, words), "uint32"))
        self._params = own(PinnedArray(device, (RING, PARAMS.itemsize), "uint8"))
        self._positions = own(PinnedArray(device, (RING,), "int32"))
        self._seen = own(PinnedArray(device, (-(-spec.head_rows // 32) * 4,), "uint8"))
        self._bias = own(PinnedArray(device, (spec.head_rows,), "float32"))
        self._events = [own(Event(device)) for _ in range(RING)]

    def _reset(self) -> None:
        self._step = 0  # tokens sampled, or being sampled, since begin
        self._position = 0  # of the token that is fed next
        self._stop_ids: frozenset[int] = frozenset()
        self._ended = False
        self._interrupted = False
        self._num_uploads = 0
        self._has_mask = False

    def _capture(self, undo: contextlib.ExitStack, enabled: bool) -> None:
        work = self._model.work
        address = self._tokens.device_address
        self._decode_key = GraphKey(1, work["state"].address, work["logits"].address)
        self._graphs = GraphRunner(self._stream, enabled)
        undo.callback(self._graphs.close)
        self._set_params(TokenSampling(0.0, 1.0, 0, 0.0, 1.0, 0, (), frozenset()))
        self._graphs.add(self._decode_key, self._model.decode_launches(address))
        self._sample_last = self._model.sampling_launches(address)
        self._model.prepare_prefill()

    def _warm_up(self) -> None:
        """Runs every size of prefill product once, so that no cuBLAS kernel is loaded during a request."""
        count = min(self._spec.chunk, self.max_context)
        while count > 0:
            self._model.prefill_chunk(count, 0)
            count -= 64
        self._graphs.run(self._decode_key)
        self._stream.wait()

    # --- the protocol ---------------------------------------------------------------------------------

    def begin(self, sampling: TokenSampling, history: np.ndarray) -> None:
        self._device.make_current()
        self._stream.wait()
        self._reset()
        self._stop_ids = sampling.stop_ids
        self._set_params(sampling)
        work = self._model.work
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
                row = token_id if self._row_of is None or token_id >= self.vocab_size else int(self._row_of[token_id])
                if 0 <= row < self._spec.head_rows:
                    self._bias.host[row] += np.float32(bias)
            self._stream.upload(work["bias"], self._bias)

    def prefill(self, token_ids: np.ndarray, position: int, mask: np.ndarray | None = None) -> _Pending | _NoToken:
        if not self._forward(token_ids, position):
            return _NoToken()
        # The sampler moves the position on by one.
        slot = self._num_uploads % RING
        self._positions.host[slot] = self._position - 1
        field = DeviceArray(self._model.work["state"].address + STATE.fields["position"][1], (1,), "int32")
        self._stream.upload(field, self._positions, 4 * slot)
        self._use_mask(mask)
        return self._sampled(self._run_sampler)

    def extend(self, token_ids: np.ndarray, position: int) -> None:
        self._device.make_current()
        self._interrupted = False
        self._forward(token_ids, position)
        self._stream.wait()

    def decode(self, mask: np.ndarray | None = None) -> _Pending | _NoToken:
        if self._ended or self._interrupted or self._position >= self.max_context:
            return _NoToken()
        self._use_mask(mask)
        self._position += 1
        return self._sampled(lambda: self._graphs.run(self._decode_key))

    def interrupt(self) -> None:
        self._interrupted = True

    def save_prefix(self, slot: int, length: int) -> None:
        self._copy_prefix(slot, length, save=True)

    def load_prefix(self, slot: int, length: int) -> None:
        self._copy_prefix(slot, length, save=False)

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

    def _forward(self, token_ids: np.ndarray, position: int) -> bool:
        """Queues the prompt in chunks, at most two ahead of the device; False if it was interrupted."""
        chunk = self._spec.chunk
        for index, start in enumerate(range(0, len(token_ids), chunk)):
            part = token_ids[start : start + chunk]
            slot = index % 2
            if index >= 2:
                self._chunk_done[slot].wait()
            if self._interrupted:
                self._stream.wait()
                return False
            self._prompt[slot].host[: len(part)] = part
            tokens = self._model.work["tokens"]
            self._stream.upload(DeviceArray(tokens.address, (len(part),), "int32"), self._prompt[slot])
            self._model.prefill_chunk(len(part), position + start)
            self._chunk_done[slot].record(self._stream)
        self._position = position + len(token_ids)
        return True

    def _run_sampler(self) -> None:
        for launch in self._sample_last:
            launch(self._stream)

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

    def _set_params(self, sampling: TokenSampling) -> None:
        values = np.zeros((), dtype=PARAMS)
        values["top_p"], values["seed"] = sampling.top_p, sampling.seed
        values["temperature"], values["min_p"] = sampling.temperature, sampling.min_p
        values["penalty"] = sampling.repetition_penalty
        values["top_k"] = min(sampling.top_k, self._spec.head_rows)
        values["has_bias"] = bool(sampling.logit_bias)
        self._values = values
        self._upload_params()

    def _upload_params(self) -> None:
        slot = self._num_uploads % RING
        self._num_uploads += 1
        self._params.host[slot] = np.frombuffer(self._values.tobytes(), dtype=np.uint8)
        self._stream.upload(self._model.work["params"], self._params, slot * PARAMS.itemsize)

    def _use_mask(self, mask: np.ndarray | None) -> None:
        if mask is not None:
            slot = self._step % RING
            if self._step >= RING:
                self._events[slot].wait()  # its last copy has been read
            self._masks.host[slot] = mask
            self._stream.upload(self._model.work["mask"], self._masks, slot * self._masks.host.shape[1] * 4)
        if self._has_mask != (mask is not None):
            self._has_mask = mask is not None
            self._values["has_mask"] = self._has_mask
            self._upload_params()

    def _copy_prefix(self, slot: int, length: int, save: bool) -> None:
        """Copies the first ``length`` rows of every layer's and head's K and V."""
        self._device.make_current()
        spec, work = self._spec, self._model.work
        assert 0 <= slot < spec.prefix_slots and 0 < length <= spec.prefix_tokens
        row = spec.attention.head_dim * 2
        cache = (work["kv_cache"].address, spec.max_context * row)
        prefix = (work["prefixes"].at(slot).address, spec.prefix_tokens * row)
        target, source = (prefix, cache) if save else (cache, prefix)
        rows = spec.num_layers * 2 * spec.attention.num_kv_heads
        self._stream.copy_rows(*target, *source, length * row, rows)


def _open_weights(variant_dir: Path, spec: CudaSpec) -> SafetensorsFile:
    """The weights, checked to be what the kernels read. Raises EngineDirectoryError or CheckpointError."""
    file = SafetensorsFile(variant_dir / WEIGHTS_NAME)
    stored = {"fp16": "F16", "bf16": "BF16", "uint8": "U8"}
    expected = {name: (stored[array.dtype], array.shape) for name, array in weight_arrays(spec).items()}
    for name, (dtype, shape) in expected.items():
        found = (file.dtype(name), file.shape(name)) if name in file.names() else None
        if found != (dtype, shape):
            raise EngineDirectoryError(
                f"{name} of {file.path} is {found or 'missing'}, expected {(dtype, shape)}; build the engine again."
            )
    covered = file.shape(ROPE_NAME)[0] if ROPE_NAME in file.names() else 0
    if covered < spec.max_context:
        raise EngineDirectoryError(
            f"The RoPE table of {file.path} covers {covered} positions, but max_context is {spec.max_context}; "
            "configure less or build the engine for more."
        )
    return file


def _rows_by_id(vocab_map: np.ndarray | None, vocab_size: int) -> np.ndarray | None:
    """int32 [vocab_size]: the LM head's row of each id, -1 = none; None if rows are ids."""
    if vocab_map is None:
        return None
    rows = np.full(vocab_size, -1, dtype=np.int32)
    rows[vocab_map] = np.arange(len(vocab_map), dtype=np.int32)
    return rows
