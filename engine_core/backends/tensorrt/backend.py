"""The TensorRT backend: a plan built for this GPU, with our own cache append and sampler around it.

Two contexts, prefill and decode, share one scratch allocation: they are on one stream. A decode step is the engine, the
two kernels of the sampler and the one that appends every layer's keys and values and hands the token to the next step;
all four are one CUDA graph. Nothing of a step depends on the host but its launch.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine_core.backends.gpu_backend import DeviceBackend, SequenceLimits, plan_here, rows_by_id
from engine_core.backends.tensorrt.api import TensorRT
from engine_core.backends.tensorrt.engine import TrtContext, TrtEngine
from engine_core.backends.tensorrt.gemm_backend import GemmBackend
from engine_core.backends.tensorrt.layout import (
    DECODE,
    PLAN_NAME,
    PREFILL,
    TrtOptions,
    TrtSpec,
    cache_names,
    cache_output_names,
    input_shapes,
    past_for,
    pool_arrays,
    work_arrays,
)
from engine_core.backends.tensorrt.machine import check_machine
from engine_core.backends.tensorrt.plan import engine_bytes_on, is_gemm_engine
from engine_core.config import EngineConfig
from engine_core.cuda.driver import ITEM_BYTES, Arena, Device, DeviceArray, Launch, PinnedArray, Stream
from engine_core.cuda.graphs import GraphKey, GraphRunner
from engine_core.cuda.kernels import Kernels
from engine_core.cuda.kernels.kv_append import AppendShape, NextStep, kv_append, kv_append_blocks
from engine_core.cuda.kernels.sampling import ARRAYS, sample
from engine_core.errors import EngineDirectoryError, EngineFaultError
from engine_core.formats.manifest import Manifest, read_options
from engine_core.formats.vocab_map import own_vocab_map
from engine_core.memory import MemoryPlan
from engine_core.progress import Progress, untold
from engine_core.request import SamplingParams

if TYPE_CHECKING:
    from engine_core.vision.prompt import PlacedImage


class TensorRTBackend(DeviceBackend):
    """See ``engine_core.backends.Backend``."""

    name = "tensorrt"

    @classmethod
    def plan(cls, variant_dir: Path, manifest: Manifest, config: EngineConfig) -> MemoryPlan:
        return plan_here(lambda device: engine_bytes_on(variant_dir, manifest, config, device))

    @classmethod
    def check_here(cls, manifest: Manifest) -> None:
        """Raises BackendUnavailableError or EngineDirectoryError unless this machine's TensorRT and GPU can run it."""
        api, device = TensorRT(), Device()
        try:
            check_machine(manifest, api, device)
        finally:
            device.close()

    @classmethod
    def load(
        cls,
        variant_dir: Path,
        manifest: Manifest,
        config: EngineConfig,
        api: TensorRT | None = None,
        *,
        progress: Progress = untold,
    ) -> TensorRTBackend | GemmBackend:
        """See ``Backend.load``. ``api``: a stand-in for tests."""
        if is_gemm_engine(manifest):
            return GemmBackend.load(variant_dir, manifest, config, api, progress=progress)
        spec = TrtSpec.create(manifest, config)
        api = api or TensorRT()
        vocab_map = None
        if spec.head_rows != spec.vocab_size:
            vocab_map = own_vocab_map(variant_dir, spec.vocab_size)
        device = Device()
        try:
            check_machine(manifest, api, device)
            return cls(
                device,
                api,
                variant_dir / PLAN_NAME,
                spec.on(device),
                read_options(manifest, TrtOptions).scratch_bytes,
                vocab_map=vocab_map,
                use_cuda_graph=config.use_cuda_graph,
            )
        except BaseException:
            device.close()
            raise

    def __init__(
        self,
        device: Device,
        api: TensorRT,
        plan: Path,
        spec: TrtSpec,
        scratch_bytes: int,
        *,
        vocab_map: np.ndarray | None = None,
        use_cuda_graph: bool = True,
    ) -> None:
        """Allocate, load, capture, warm up. Owns ``device`` once it returns; leaves nothing behind when it raises.

        ``scratch_bytes``: what the memory plan has for the contexts.
        """
        self._device = device
        self._spec = spec
        self._damaged = False  # a NaN may be in the cache, where a mask does not stop it
        self.max_context = spec.max_context
        self.prefill_chunk = spec.chunk
        self.vocab_size = spec.vocab_size
        self.reduced_vocab_size = spec.head_rows
        with contextlib.ExitStack() as undo:
            engine = self._load_engine(undo, api, plan, scratch_bytes)
            self._allocate(undo, scratch_bytes)
            self._fill(vocab_map)
            self._row_of = rows_by_id(vocab_map, spec.vocab_size)
            self.kept_ids = vocab_map
            self._prepare(undo, engine)
            self._capture(undo, use_cuda_graph)
            self._warm_up()
            self._resources = undo.pop_all()

    # --- configure ------------------------------------------------------------------------------------

    def _load_engine(self, undo: contextlib.ExitStack, api: TensorRT, plan: Path, scratch_bytes: int) -> TrtEngine:
        engine = TrtEngine(api, plan)
        undo.callback(engine.close)
        if engine.scratch_bytes > scratch_bytes:
            raise EngineDirectoryError(
                f"The plan needs {engine.scratch_bytes} bytes of scratch, but its manifest says {scratch_bytes}; "
                "build the engine again."
            )
        spec = self._spec
        expected = {"token_ids", "positions", "last_token", "logits", "write_index" if spec.native else "past_index"}
        for i in range(spec.num_layers):
            expected |= {*cache_names(i), *cache_output_names(spec, i)}
        engine.check_tensors(expected)
        return engine

    def _allocate(self, undo: contextlib.ExitStack, scratch_bytes: int) -> None:
        device, spec = self._device, self._spec

        def own(resource):
            undo.callback(resource.close)
            return resource

        arrays = work_arrays(spec, scratch_bytes)
        self._stream = own(Stream(device))
        arena = own(Arena(device, sum(array.nbytes for array in arrays.values())))
        self._work = {name: arena.take(array.shape, array.dtype) for name, array in arrays.items()}
        self._kernels = own(Kernels(device, "fp16"))  # none of those used here reads 16-bit values
        item_bytes = spec.head_dim * ITEM_BYTES[spec.dtype]
        pool = pool_arrays(spec) if spec.pool_on_host else None
        self._allocate_host(own, device, SequenceLimits.of(spec, spec.num_kv_heads, item_bytes), pool)
        self._prompt = [own(PinnedArray(device, (spec.chunk,), "int32")) for _ in range(2)]
        self._chunk_positions = [own(PinnedArray(device, (spec.chunk,), "int32")) for _ in range(2)]
        self._chunk_last = [own(PinnedArray(device, (1,), "int32")) for _ in range(2)]
        self._chunk_index = [own(PinnedArray(device, (1,), "uint64")) for _ in range(2)]

    def _fill(self, vocab_map: np.ndarray | None) -> None:
        """Zeros where a step reads before one has written: what a mask hides still has to be finite."""
        work, device = self._work, self._device
        cleared = ["kv_cache", "state", "seen", "bias", "step_token", "step_position", "step_last_token"]
        for name in cleared + (["step_write_index"] if self._spec.native else []):
            self._stream.zero(work[name])
        if not self._spec.native:
            device.upload(work["past_index"], np.arange(self._spec.max_context, dtype=np.int32))
        if vocab_map is not None:
            device.upload(work["vocab_map"], vocab_map.astype(np.int32))
        device.synchronize()

    def _prepare(self, undo: contextlib.ExitStack, engine: TrtEngine) -> None:
        """Make the two contexts with all they read and write, and the launches around them."""
        spec, work = self._spec, self._work

        def context(profile: int, inputs: tuple[str, str, str, str], tokens: int) -> TrtContext:
            made = engine.context(profile, work["engine"], self._stream)
            undo.callback(made.close)
            made.bind(self._bindings(*inputs))
            made.set_shapes(input_shapes(spec, tokens, spec.max_context))
            return made

        self._prefill_engine = context(
            PREFILL, ("token_ids", "positions", "last_token", "write_index"), min(spec.chunk, spec.max_context)
        )
        self._decode_engine = context(DECODE, ("step_token", "step_position", "step_last_token", "step_write_index"), 1)
        self._set_params(0, SamplingParams(seed=0))
        arrays, host_tokens = {name: work[name] for name in ARRAYS}, self._tokens.device_address
        self._sampling = sample(self._kernels, **arrays, vocab_map=work.get("vocab_map"), host_tokens=host_tokens)
        self._append_count = ctypes.c_int(spec.chunk)
        self._append_chunk = self._append(work["positions"], self._append_count, None)
        self._append_step = self._append(None, ctypes.c_int(1), work["state"])
        self._hand_over = self._append(None, ctypes.c_int(0), work["state"])

    def _bindings(self, token_ids: str, positions: str, last_token: str, write_index: str) -> dict[str, DeviceArray]:
        spec, work = self._spec, self._work
        arrays = {"token_ids": work[token_ids], "positions": work[positions], "last_token": work[last_token]}
        arrays["logits"] = work["logits"]
        if spec.native:
            arrays["write_index"] = work[write_index]
        else:
            arrays["past_index"] = work["past_index"]
        for i in range(spec.num_layers):
            for kind, (past, output) in enumerate(zip(cache_names(i), cache_output_names(spec, i))):
                arrays[past] = work["kv_cache"].at(i, kind)
                arrays[output] = arrays[past] if spec.native else work["fresh"].at(2 * i + kind)
        return arrays

    def _append(self, start: DeviceArray | None, count: ctypes.c_int, state: DeviceArray | None) -> Launch:
        spec, work = self._spec, self._work
        shape = AppendShape(
            0 if spec.native else spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.max_context, spec.fresh_stride
        )
        self._append_shape = shape
        following = NextStep(work["step_token"], work["step_position"], work.get("step_write_index"))
        return kv_append(self._kernels, shape, work.get("fresh"), work["kv_cache"], start, count, state, following)

    def _capture(self, undo: contextlib.ExitStack, enabled: bool) -> None:
        work = self._work
        self._decode_key = GraphKey(1, work["step_token"].address, work["logits"].address, kv_bucket=self.max_context)
        self._graphs = GraphRunner(self._stream, enabled)
        undo.callback(self._graphs.close)
        self._graphs.add(self._decode_key, (self._decode_engine, *self._sampling, self._append_step))

    def _warm_up(self) -> None:
        """Runs the largest chunk at the start and beyond it, so that what TensorRT loads late is loaded now."""
        tokens = np.zeros(min(self._spec.chunk, self.max_context // 2), dtype=np.int32)
        for buffer, position in enumerate((0, len(tokens))):
            self._queue_chunk(buffer, 0, tokens, position)
        self._run_sampler(0)
        self._run_decode([0])
        self._stream.wait()
        self._stream.zero(self._work["kv_cache"])
        self._stream.wait()

    # --- hooks of DeviceBackend -------------------------------------------------------------------------

    def _queue_chunk(self, buffer: int, slot: int, token_ids: np.ndarray, position: int) -> None:
        count, work, stream = len(token_ids), self._work, self._stream
        self._prompt[buffer].host[:count] = token_ids
        self._chunk_positions[buffer].host[:count] = np.arange(position, position + count, dtype=np.int32)
        self._chunk_last[buffer].host[0] = count - 1
        for name, pinned, length in (
            ("token_ids", self._prompt[buffer], count),
            ("positions", self._chunk_positions[buffer], count),
            ("last_token", self._chunk_last[buffer], 1),
        ):
            stream.upload(DeviceArray(work[name].address, (length,), "int32"), pinned)
        if self._spec.native:
            self._chunk_index[buffer].host[0] = position
            stream.upload(work["write_index"], self._chunk_index[buffer])
        self._prefill_engine.set_shapes(input_shapes(self._spec, count, past_for(self._spec, position)))
        self._prefill_engine(stream)
        self._append_count.value = count
        self._append_chunk.set_grid(kv_append_blocks(self._append_shape, count))
        if not self._spec.native:
            self._append_chunk(stream)

    def _run_sampler(self, slot: int) -> None:
        for launch in (*self._sampling, self._hand_over):
            launch(self._stream)

    def _run_decode(self, slots: list[int]) -> None:
        self._graphs.run(self._decode_key)

    # --- faults ---------------------------------------------------------------------------------------

    def begin(
        self,
        slot: int,
        sampling: SamplingParams,
        history: np.ndarray,
        adapter: str = "",
        images: Sequence[PlacedImage] = (),
    ) -> None:
        super().begin(slot, sampling, history, adapter, images)
        if self._damaged:
            self._damaged = False
            self._stream.zero(self._work["kv_cache"])

    def _read(self, number: int, step: int) -> int | None:
        try:
            return super()._read(number, step)
        except EngineFaultError:
            self._damaged = True
            raise
