"""The CUDA backend: our own kernels on an NVIDIA GPU, compiled for it when the engine is opened.

One stream, in order. A decode step is one CUDA graph, of the next larger of a few batch sizes, whose last kernel
samples; the token feeds the next step on the device and reaches the host through pinned memory, marked by an event, so
no step waits for the host. A chunk of a prompt is one CUDA graph, too, of the next larger of a few sizes: its place and
length are in device memory.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from engine_core.backends import PendingToken, SequenceStep
from engine_core.backends.cuda.batch_model import BatchModel, RowsModel
from engine_core.backends.cuda.drafts import DraftSteps
from engine_core.backends.cuda.encoder import DeviceEncoder, EncoderModel
from engine_core.backends.cuda.encoder_layout import DTYPE
from engine_core.backends.cuda.layout import (
    PROMPT_HEADER,
    ArraySpec,
    CudaSpec,
    host_bytes,
    planned_bytes,
    pool_arrays,
    prefill_rows,
    rows_of_chunk,
    weight_arrays,
    work_arrays,
)
from engine_core.backends.cuda.model import CudaModel
from engine_core.backends.cuda.states import Place, RingStates
from engine_core.backends.cuda.weights import CudaWeights, Resolved, resolve
from engine_core.backends.gpu_backend import DeviceBackend, SequenceLimits, plan_here, rows_by_id
from engine_core.backends.gpu_model import DeviceModel, WeightSource, Work
from engine_core.config import EngineConfig
from engine_core.cuda.driver import ITEM_BYTES, Arena, Device, DeviceArray, PinnedArray, Stream
from engine_core.cuda.graphs import GraphKey, GraphRunner
from engine_core.cuda.kernels import Kernels
from engine_core.cuda.kernels.sampling import RING
from engine_core.cuda.kernels.tuning import EventTimer
from engine_core.errors import EngineFaultError
from engine_core.formats.manifest import Manifest
from engine_core.memory import MemoryPlan
from engine_core.progress import Progress, untold
from engine_core.request import SamplingParams
from engine_core.sampling import NAN_LOGITS

if TYPE_CHECKING:
    from engine_core.vision.prompt import PlacedImage

MAX_GRAPH_ROWS = 512  # of a chunk in a graph: a larger one's launches are queued long before the GPU is done
_UPLOADING = 0.7  # of the progress of loading; the rest are kernels, graphs and the warm-up
Loaded = TypeVar("Loaded", bound="CudaBackend")  # Self is not in Python 3.10


class CudaBackend(DeviceBackend):
    """See ``engine_core.backends.Backend``."""

    name = "cuda"

    @classmethod
    def check_here(cls, manifest: Manifest) -> None:
        """Nothing binds an engine to one machine."""

    @classmethod
    def plan(cls, variant_dir: Path, manifest: Manifest, config: EngineConfig) -> MemoryPlan:
        spec = resolve(variant_dir, manifest, config).spec
        return plan_here(lambda device: (planned_bytes(spec.on(device), device.num_sms), host_bytes(spec.on(device))))

    @classmethod
    def load(
        cls, variant_dir: Path, manifest: Manifest, config: EngineConfig, *, progress: Progress = untold
    ) -> CudaBackend:
        return cls._load(variant_dir, resolve(variant_dir, manifest, config), config, progress=progress)

    @classmethod
    def _load(
        cls: type[Loaded],
        variant_dir: Path,
        resolved: Resolved,
        config: EngineConfig,
        check: Callable[[Device], None] = lambda device: None,
        *,
        progress: Progress,
        **kwargs: Any,
    ) -> Loaded:
        """``check`` may refuse the device, ``kwargs`` are a subclass's own."""
        weights = CudaWeights(variant_dir, resolved)
        total, done = sum(array.nbytes for array in weight_arrays(resolved.spec).values()), 0
        device = Device()

        def upload(name: str, array: DeviceArray) -> None:
            nonlocal done
            device.upload(array, weights.read(name))
            done += array.nbytes
            progress(min(1.0, done / total) * _UPLOADING)

        try:
            check(device)
            return cls(
                device,
                resolved.spec.on(device),
                upload,
                weights.rope(),
                vocab_map=resolved.vocab_map,
                use_cuda_graph=config.use_cuda_graph,
                tune_kernels=config.tune_kernels,
                **kwargs,
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
        tune_kernels: bool = False,
    ) -> None:
        """Allocate, load, tune, capture, warm up. Owns ``device`` once it returns.

        Leaves nothing behind when it raises. ``tune_kernels``: see ``EngineConfig``.
        ``rope``: float32, CudaSpec.rope_shape, cos and sin.
        """
        self._device = device
        self._spec = spec
        self.num_slots = spec.max_batch
        self.max_context = spec.max_context
        self.prefill_chunk = spec.chunk
        self.vocab_size = spec.vocab_size
        self.reduced_vocab_size = spec.head_rows
        self.rope_switch = spec.rope_switch
        with contextlib.ExitStack() as undo:
            self._allocate(undo)
            self._model.fill(source, rope)
            if vocab_map is not None:
                device.upload(self._model.work["vocab_map"], vocab_map.astype(np.int32))
            self._row_of = rows_by_id(vocab_map, spec.vocab_size)
            self.kept_ids = vocab_map
            if tune_kernels:
                self._model.tune(self._tokens.device_address)
            self._capture(undo, use_cuda_graph)
            self._resources = undo.pop_all()

    def _allocate(self, undo: contextlib.ExitStack) -> None:
        device, spec = self._device, self._spec

        def own(resource):
            undo.callback(resource.close)
            return resource

        arrays = [*weight_arrays(spec).values(), *self._work_arrays().values()]
        self._stream = own(Stream(device))
        arena = own(Arena(device, sum(array.nbytes for array in arrays)))
        kernels = own(Kernels(device, spec.dtype))
        self._model = own(self._make_model(arena, kernels))
        self._work = self._model.work
        self._allocate_host(
            own,
            device,
            SequenceLimits.of(
                spec,
                spec.attention.num_kv_heads,
                cache_item_bytes=spec.attention.head_dim * ITEM_BYTES[self._work["kv_cache"].dtype],
                scale_item_bytes=2 if spec.attention.kv_scaled else 0,
            ),
            pool_arrays(spec) if spec.pool_on_host else None,
        )
        self.has_states, self.state_places = bool(spec.state_shape), spec.state_places
        self._rings = RingStates(spec.max_batch, self._copy_states)
        self._prompt = [own(PinnedArray(device, (PROMPT_HEADER + spec.chunk,), "int32")) for _ in range(2)]
        if spec.encoder is not None:
            self._make_encoder(own, kernels)
        self._drafts = None
        if spec.drafts:
            self._drafts = DraftSteps(own, device, self._stream, self._work, spec.max_batch)
            self.max_draft = self._drafts.max_draft
            self.exact_drafts = spec.max_batch > 1  # whose steps have the kernels of a draft's
        self._slot_adapters = own(PinnedArray(device, (spec.max_batch,), "int32"))  # their numbers, -1 = none
        self._slot_adapters.host[:] = -1
        self._rope_choices = own(PinnedArray(device, (2,), "int32"))  # first rows: of short sequences, of long ones
        self._rope_choices.host[:] = 0, spec.rope_switch
        self._has_long_rope = [False] * spec.max_batch
        self._adapter_numbers = {"": -1, **{adapter.name: i for i, adapter in enumerate(spec.adapters)}}
        self._rows = own(PinnedArray(device, (RING, spec.max_batch), "int32"))  # the slots of a step, -1 = none
        self._row_marks = [0] * RING  # of the end of the step before which they were copied
        self._num_rows = 0
        self._rows_there: list[int] = []  # the slots on the device

    def _make_encoder(self, own: Callable[[Any], Any], kernels: Kernels) -> None:
        device, spec, model = self._device, self._spec, self._model
        assert isinstance(model, CudaModel) and spec.encoder is not None
        self._encoder_kernels = kernels if kernels.dtype == DTYPE else own(Kernels(device, DTYPE))
        encoder = EncoderModel(self._encoder_kernels, model.blas, spec.encoder, model.weights, model.work)
        self.encoder = DeviceEncoder(own, device, self._stream, encoder, model.work, spec)

    def _work_arrays(self) -> dict[str, ArraySpec]:
        return work_arrays(self._spec, self._device.num_sms)

    def _make_model(self, arena: Arena, kernels: Kernels) -> DeviceModel:
        kind = BatchModel if self._spec.max_batch > 1 else RowsModel if self._spec.drafts else CudaModel
        return kind(self._device, self._stream, arena, kernels, self._spec)

    def _capture(self, undo: contextlib.ExitStack, enabled: bool) -> None:
        model = self._model
        address = self._tokens.device_address
        self._graphs = GraphRunner(self._stream, enabled)
        undo.callback(self._graphs.close)
        for slot in range(self.num_slots):
            self._set_params(slot, SamplingParams(seed=0))
        model.compile_ahead(address)
        if isinstance(model, BatchModel):
            self._sample_last = [model.prompt_launches(slot, address) for slot in range(self.num_slots)]
        else:
            self._sample_last = [model.sampling_launches(address)]

        def step(size: int, adapted: bool) -> list[Work]:
            if isinstance(model, BatchModel):
                return model.batch_launches(size, address, adapted=adapted)
            return model.decode_launches(address, adapted=adapted)

        kinds = (False, True) if self._spec.adapters else (False,)
        for adapted, size in itertools.product(kinds, self._spec.batch_sizes):
            self._graphs.add(self._decode_key(size, adapted), step(size, adapted))
        self._model.prepare_prefill()

        def prefill(_stream: Stream, rows: int, adapted: bool, num_layers: int | None = None) -> None:
            model.prefill_chunk(rows, adapted=adapted, num_layers=num_layers)

        for adapted, rows in itertools.product(kinds, prefill_rows(self._spec.chunk)):
            self._upload_chunk(0, 0, np.zeros(min(rows, self.max_context), dtype=np.int32), 0)
            launch, is_short = partial(prefill, rows=rows, adapted=adapted), rows <= MAX_GRAPH_ROWS
            trial = None if is_short else [partial(launch, num_layers=self._spec.num_kinds_layers)]
            capture = self._model.captures_prefill and is_short
            self._graphs.add(self._prefill_key(rows, adapted), [launch], capture, trial)

        if isinstance(self.encoder, DeviceEncoder):
            self.encoder.capture(self._encoder_kernels, self._graphs)

        if self._drafts is not None and isinstance(model, RowsModel):
            place = lambda size, position: self._upload_chunk(0, 0, np.zeros(size, dtype=np.int32), position)  # noqa: E731
            self._drafts.capture(self._graphs, model, place)
            timed = EventTimer(self._stream)
            self._decode_seconds = {size: timed(step(size, False)) for size in self._spec.batch_sizes}
            self.step_seconds = self._decode_seconds[self._spec.batch_sizes[0]]
            self._stream.zero(self._work["state"])
            self._stream.wait()

    def _decode_key(self, size: int, adapted: bool) -> GraphKey:
        return GraphKey(size, self._work["state"].address, self._work["logits"].address, adapted)

    def _prefill_key(self, rows: int, adapted: bool) -> GraphKey:
        return GraphKey(1, self._work["prompt"].address, self._work["hidden"].address, adapted, rows=rows)

    def begin(
        self,
        slot: int,
        sampling: SamplingParams,
        history: np.ndarray,
        adapter: str = "",
        images: Sequence[PlacedImage] = (),
    ) -> None:
        super().begin(slot, sampling, history, adapter, images)
        number = self._adapter_numbers[adapter]
        if number == self._slot_adapters.host[slot]:
            return
        self._slot_adapters.host[slot] = number  # its last copy has been read: see DeviceBackend.begin
        address = self._work["slot_adapters"].address + 4 * slot
        self._stream.upload(DeviceArray(address, (1,), "int32"), self._slot_adapters, 4 * slot)
        self._begun[slot].record(self._stream)

    def step_cost(self, rows: Sequence[int]) -> float:
        """Sequences without a draft share a step; each draft has one of its own, which is waited for."""
        assert self._drafts is not None
        single = rows.count(1)
        seconds = self._drafts.seconds([count for count in rows if count > 1])
        if single:
            seconds += self._decode_seconds[next(size for size in self._spec.batch_sizes if single <= size)]
        return seconds / self.step_seconds

    def log_probabilities(self, token_ids: np.ndarray, first: int) -> np.ndarray:
        """Prefill, and the LM head of a decode step on every row. Its kernels are compiled by the first call."""
        self.begin(0, SamplingParams(seed=0), token_ids)
        self._slots[0].ended = True  # no sequence that a step could go on with
        self._stream.wait()  # the pinned buffers are free
        self._choose_rope(0, 0 < self.rope_switch < len(token_ids))
        scores, targets = self._model.scores(), token_ids if self._row_of is None else self._row_of[token_ids]
        found = []
        for start in range(0, len(token_ids) - 1, self.prefill_chunk):
            part = token_ids[start : min(start + self.prefill_chunk, len(token_ids) - 1)]
            self._move_ring(0, start, len(part))
            self._upload_chunk(0, 0, part, start)
            self._model.prefill_chunk(rows_of_chunk(len(part), self.prefill_chunk), keep=False)
            asked = range(max(0, first - 1 - start), len(part))
            for row in asked:
                scores(self._stream, row, int(targets[start + row + 1]))
            found.append(self._device.download(scores.output)[asked.start : asked.stop])
        logs = np.concatenate(found).astype(np.float64)
        if np.isnan(logs).any():
            raise EngineFaultError(NAN_LOGITS)
        return logs

    def state_positions(self, slot: int, *, marked: bool = False) -> list[int]:
        return self._rings.positions(slot, marked=marked)

    def save_state(self, slot: int, position: int, place: int) -> None:
        self._device.make_current()
        self._rings.save(slot, position, place)

    def load_state(self, slot: int, position: int, place: int) -> None:
        self._device.make_current()
        self._rings.load(slot, position, place)

    def _move_ring(self, slot: int, position: int, count: int) -> None:
        """Have the ring of ``position`` before the step that is queued next, which takes it on by ``count``."""
        if self.has_states:
            self._rings.begin(slot, position)
            self._rings.end(slot, position + count)

    def _copy_states(self, target: Place, source: Place) -> None:
        """Queue the copy of all layers' rings of a sequence; see ``RingStates``."""
        size = self._spec.state_bytes

        def address(place: Place) -> int:
            name, *index = place
            if name == "state_pool":
                return self._pool_address(name) + index[0] * size
            return self._work[name].at(*index).address

        self._stream.copy_rows(address(target), size, address(source), size, size, 1)

    # --- hooks of DeviceBackend -------------------------------------------------------------------------

    def _prefill(self, step: SequenceStep) -> PendingToken:
        self._choose_rope(step.slot, step.long_rope)
        pending = super()._prefill(step)
        assert step.token_ids is not None
        if step.marks and self.has_states and self._rings.is_at(step.slot, step.position + len(step.token_ids)):
            self._rings.mark(step.slot)  # else it was interrupted
        return pending

    def _choose_rope(self, slot: int, is_long: bool) -> None:
        if self._has_long_rope[slot] != is_long and self.rope_switch:
            self._has_long_rope[slot] = is_long
            row = DeviceArray(self._work["rope_rows"].address + 4 * slot, (1,), "int32")
            self._upload(row, self._rope_choices, int(is_long))

    def _queue_chunk(self, buffer: int, slot: int, token_ids: np.ndarray, position: int) -> None:
        self._move_ring(slot, position, len(token_ids))
        self._upload_chunk(buffer, slot, token_ids, position)
        adapted = self._slot_adapters.host[slot] >= 0
        self._graphs.run(self._prefill_key(rows_of_chunk(len(token_ids), self._spec.chunk), bool(adapted)))

    def _upload_chunk(self, buffer: int, slot: int, token_ids: np.ndarray, position: int) -> None:
        host, length = self._prompt[buffer].host, PROMPT_HEADER + len(token_ids)
        assert 1 <= len(token_ids) <= self._spec.chunk and position + len(token_ids) <= self.max_context
        host[:PROMPT_HEADER] = position, len(token_ids), slot, self._slot_adapters.host[slot]
        host[PROMPT_HEADER:length] = token_ids
        self._stream.upload(DeviceArray(self._work["prompt"].address, (length,), "int32"), self._prompt[buffer])

    def _run_sampler(self, slot: int) -> None:
        for launch in self._sample_last[slot]:
            launch(self._stream)

    def _run_decode(self, slots: list[int]) -> None:
        for slot in slots:
            self._move_ring(slot, self._slots[slot].position - 1, 1)
        if self.num_slots > 1 and slots != self._rows_there:
            self._upload_rows(slots)
        adapted = bool((self._slot_adapters.host[slots] >= 0).any())
        self._graphs.run(self._decode_key(next(size for size in self._spec.batch_sizes if max(slots) < size), adapted))

    def _queue_draft(self, buffer: int, number: int, step: SequenceStep) -> None:
        assert self._drafts is not None and step.draft is not None
        slot = self._slots[number]
        fed = np.concatenate([[slot.token], step.draft.token_ids])
        self._upload_chunk(buffer, number, fed, slot.position)
        self._drafts.queue(number, step, slot.step, slot.position, slot.values)

    def _draft_tokens(self, number: int) -> list[int]:
        assert self._drafts is not None
        return self._drafts.tokens(number)

    def _upload_rows(self, slots: list[int]) -> None:
        """Queues what says which rows of a step have a sequence."""
        place = self._num_rows % RING
        if self._num_rows >= RING:
            self._wait(self._row_marks[place])  # its last copy has been read
        rows = self._rows.host[place]
        rows[:] = -1
        rows[slots] = slots
        self._upload(self._work["slots"], self._rows, place)
        self._row_marks[place] = self._num_marks
        self._num_rows += 1
        self._rows_there = slots
