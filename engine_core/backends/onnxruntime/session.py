"""One ONNX Runtime session with all it reads and writes bound once: inputs, logits and the KV cache in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from engine_core.backends.onnxruntime.adapters import Site, add_branches, matrices, sites
from engine_core.backends.onnxruntime.files import DATA_NAME, graph_name
from engine_core.backends.onnxruntime.head import prune_head
from engine_core.backends.onnxruntime.heads import head_axes
from engine_core.backends.onnxruntime.loaded_graph import LoadedGraph
from engine_core.backends.onnxruntime.mapped_weights import copy_mapped, held_still
from engine_core.backends.onnxruntime.states import LayerStates
from engine_core.errors import BackendUnavailableError
from engine_core.formats.lora import LoraAdapter
from engine_core.models.spec import ModelSpec
from engine_core.vision.positions import mrope_axes

# Tokens of a step that verifies a draft. With 16, a runtime's GEMM rounds otherwise than with one.
MAX_DRAFT_ROWS = 8
DTYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}  # of the KV cache
# Before 1.27 the CPU's attention operator reads no int8 cache: 1.26 opens the graph and fails in the first step.
_FIRST_WITH_INT8_CACHE = (1, 27)
# Before, attention over a float cache makes the scores of all heads at once: chunk x context of them for each.
_FIRST_WITH_FLASH_ATTENTION = (1, 32)
_ERROR, _FATAL = 3, 4  # ONNX Runtime's log severities


class _SlotRuns:
    """The bound runs of one slot by one session: a step of one token, and a part of a prompt."""

    def __init__(self, session: ort.InferenceSession, decode: ort.IOBinding, prefill: ort.IOBinding, chunk: int):
        self.session = session
        self.decode = decode
        self.prefill = prefill
        self.bound_tokens = chunk  # of ``prefill``
        self.bound_images = 0  # tokens of images of ``prefill``


class OrtSession:
    """The model and the KV of ``num_slots`` sequences.

    ``kv_cache``: DTYPES[kv_cache_type] [layers with attention, 2 (K, V), slots, kv_heads, max_context, head_dim]. Past
    and present of a layer are bound to the same memory, so a step writes its own positions and copies nothing.
    ``packed``: the runtime makes copies of the weights in its kernels' own layout, which only quantized ones need.
    ``kept``: int32 [rows], rows of the full LM head that are kept; None: all of them.
    ``adapters``: LoRA adapters that ``use_adapter`` chooses from. ``own_graph``: sequences with one have a second
    session, with weights of its own, so that the others' graph has no branches.
    ``logits``: float32 [slots, rows], of each slot after its last step.
    ``draft_logits``: float32 [MAX_DRAFT_ROWS, rows], those of the last ``verify``; no rows unless ``verifies``, which
    asks for it. ``states``: those of other layers, with ``state_places`` in their pool; a run begins with that of its
    position. Not thread-safe, but for ``terminate``.
    """

    def __init__(
        self,
        variant_dir: Path,
        model: ModelSpec,
        rows: int,
        max_context: int,
        chunk: int,
        threads: int,
        kv_cache_type: str = "fp32",
        *,
        packed: bool = True,
        kept: np.ndarray | None = None,
        num_slots: int = 1,
        verifies: bool = False,
        adapters: Sequence[LoraAdapter] = (),
        own_graph: bool = False,
        state_places: int = 0,
    ):
        self.max_context = max_context
        self.chunk = chunk
        self.num_slots = num_slots
        self._heads: list[ort.OrtValue] = []  # rows that sessions read
        path, data = _model_path(variant_dir, kv_cache_type), variant_dir / DATA_NAME
        places = sites(model, adapters)
        with held_still(data) as fd:
            without = [] if own_graph else places
            self._session = adapted = self._open(path, session_options(threads, packed), kept, without)
            if own_graph and places:
                adapted = self._open(path, session_options(threads, packed), kept, places)
            copy_mapped(data, fd)
        self._matrices = {"": matrices(None, places)}  # by the adapter's name
        self._matrices |= {adapter.name: matrices(adapter, places) for adapter in adapters}
        inputs = {each.name: each for each in self._session.get_inputs()}
        self._has_rows = "rows" in inputs  # graphs of older builds give the last token's logits alone
        self._switches_rope = "rope_row" in inputs
        self._sees = "image_rows" in inputs
        self.verifies = verifies and self._has_rows
        self._kv_layers = model.kv_layers
        shape = (len(self._kv_layers), 2, num_slots, model.num_kv_heads, max_context, head_axes(model)[0].size)
        self.kv_cache = np.empty(shape, dtype=DTYPES[kv_cache_type])
        self.kv_cache.fill(0)  # takes the pages now rather than token by token
        self.states = LayerStates(model.states, num_slots, state_places)
        self.logits = np.zeros((num_slots, rows), dtype=np.float32)
        self.draft_logits = np.zeros((MAX_DRAFT_ROWS if self.verifies else 0, rows), dtype=np.float32)
        self._allocate_inputs(model)
        self._make_ropes(model, np.float16 if kv_cache_type == "fp16" else np.float32)
        self._bind_slots(adapted)
        # A graph with a fixed batch dimension takes one sequence at a time.
        takes_several = num_slots > 1 and not isinstance(inputs["input_ids"].shape[0], int)
        self._bind_batches(num_slots if takes_several else 1)

    def _allocate_inputs(self, model: ModelSpec) -> None:
        """Allocate what runs read beside the KV cache."""
        num_slots, chunk = self.num_slots, self.chunk
        self._last_positions = np.zeros(num_slots, dtype=np.int32)
        self._length = np.zeros((), dtype=np.int32)
        self._rope_rows = np.zeros(num_slots, dtype=np.int64)  # of each slot's position 0
        self._long_rope_row = model.rope_switch
        # (sequence, token) of each row of the logits: of a step of several slots, of a prompt, of drafts
        self._batch_rows = np.stack([np.arange(num_slots), np.zeros(num_slots, dtype=np.int64)], axis=1)
        self._last_row = np.zeros((1, 2), dtype=np.int64)
        self._draft_rows = np.zeros((MAX_DRAFT_ROWS, 2), dtype=np.int64)
        self._step_tokens = np.zeros((num_slots, 1), dtype=np.int64)
        self._draft_tokens = np.zeros((1, MAX_DRAFT_ROWS), dtype=np.int64)
        self._tokens = np.zeros(chunk, dtype=np.int64)
        # The tokens of images in a part of a prompt: (sequence, token) of each, and its features.
        self._image_rows = np.zeros((chunk if self._sees else 0, 2), dtype=np.int64)
        width = 0 if model.vision is None else model.vision.feature_size
        self.image_features = np.zeros((chunk if self._sees else 0, width), dtype=np.float32)

    def _make_ropes(self, model: ModelSpec, dtype: type) -> None:
        """Make the RoPE of each slot, by the place in its cache, where positions depend on the images before.

        Cos and sin, [2, max_context, half a head] of ``dtype``.
        """
        self._rope, self._slot_ropes = np.empty((2, 0, 0), dtype=np.float32), []
        if model.vision is None or not model.mrope:
            return
        self._rope = np.stack(model.ropes[0].table(self.max_context)).astype(dtype)
        self._slot_ropes = [self._rope.copy() for _ in range(self.num_slots)]
        self._axes = mrope_axes(model.vision, self._rope.shape[2])

    def _bind_slots(self, adapted: ort.InferenceSession) -> None:
        """Bind the runs of each slot alone; ``adapted``: the session of those that use an adapter."""
        slots = range(self.num_slots)
        self._plain = [self._bind_slot(self._session, slot) for slot in slots]
        self._adapted = self._plain if adapted is self._session else [self._bind_slot(adapted, slot) for slot in slots]
        self._runs = list(self._plain)  # of each slot, with the adapter that it uses
        self._used = [""] * self.num_slots
        self._decode_options = ort.RunOptions()
        self._prefill_options = [ort.RunOptions() for _ in slots]
        for each in self._prefill_options:
            each.log_severity_level = _FATAL  # being ended by ``terminate`` is no error worth a line
        drafts = slots if self.verifies else ()
        self._verify = [self._bind(self._session, self._draft_tokens, slot, self._draft_rows) for slot in drafts]

    def _bind_batches(self, most: int) -> None:
        """Bind the steps of up to ``most`` slots that lie side by side, without adapters."""
        self._batches: dict[tuple[int, int], ort.IOBinding] = {}  # by (first slot, number of slots)
        for count in range(2, most + 1):
            for slot in range(self.num_slots - count + 1):
                binding = self._bind(self._session, self._step_tokens[:count], slot, self._batch_rows[:count])
                self._batches[slot, count] = binding

    def _open(
        self, path: Path, options: ort.SessionOptions, kept: np.ndarray | None, places: Sequence[Site]
    ) -> ort.InferenceSession:
        """Load the graph, pruned to the rows ``kept`` of its head and with the branches of ``places``."""
        source: str | bytes = str(path)
        if kept is not None or places:
            loaded = LoadedGraph(path, "A vocab map given at load" if kept is not None else "A LoRA adapter")
            if kept is not None:
                self._heads += prune_head(loaded, kept, options)
            add_branches(loaded, places)
            source = loaded.serialized(options)
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def _bind_slot(self, session: ort.InferenceSession, slot: int) -> _SlotRuns:
        decode = self._bind(session, self._step_tokens[:1], slot, self._batch_rows[:1])
        prefill = self._bind(session, self._tokens[None], slot, self._last_row)
        return _SlotRuns(session, decode, prefill, self.chunk)

    def _bind(self, session: ort.InferenceSession, token_ids: np.ndarray, slot: int, rows: np.ndarray) -> ort.IOBinding:
        """``token_ids``: int64 [slots from ``slot`` on, tokens]. ``rows``: int64 [n, 2]."""
        count = len(token_ids)
        binding = session.io_binding()
        _bind_input(binding, "input_ids", token_ids)
        _bind_input(binding, "last_position", self._last_positions[:count])
        _bind_input(binding, "length", self._length)
        if self._has_rows:
            _bind_input(binding, "rows", rows)
        if self._switches_rope:
            _bind_input(binding, "rope_row", self._rope_rows[slot : slot + count])
        if self._sees:
            self._bind_images(binding, 0)
        if self._slot_ropes:  # several slots are only run together where none has images
            for name, table in zip(("rope_cos.0", "rope_sin.0"), self._slot_ropes[slot] if count == 1 else self._rope):
                _bind_input(binding, name, table)
        for of_layer, layer in enumerate(self._kv_layers):
            for index, kind in enumerate(("key", "value")):
                cache = self.kv_cache[of_layer, index, slot : slot + count]
                _bind_input(binding, f"past_{kind}.{layer}", cache)
                _bind_output(binding, f"present_{kind}.{layer}", cache)
        for name, states in self.states.now.items():  # a run reads what is before its tokens, then writes what follows
            _bind_input(binding, f"past_{name}", states[slot : slot + count])
            _bind_output(binding, f"present_{name}", states[slot : slot + count])
        logits = self.logits[slot : slot + count] if len(rows) == count else self.draft_logits[: len(rows)]
        _bind_output(binding, "logits", logits)
        inputs = {each.name for each in session.get_inputs()}
        for name, array in self._matrices[""].items():
            if name in inputs:
                _bind_input(binding, name, array)
        return binding

    def _bind_images(self, binding: ort.IOBinding, count: int) -> None:
        _bind_input(binding, "image_rows", self._image_rows[:count])
        _bind_input(binding, "image_features", self.image_features[:count])

    def set_positions(self, slot: int, positions: np.ndarray | None) -> None:
        """State the positions of a prompt, int64 [3, n], for a model with M-RoPE; what comes behind goes on one by one.

        None: they are those of text.
        """
        table = self._slot_ropes[slot]
        if positions is None:
            table[...] = self._rope
            return
        count = positions.shape[1]
        table[:, :count] = self._rope[:, positions[self._axes], np.arange(len(self._axes))[:, None]].swapaxes(1, 2)
        following = int(positions[:, -1].max()) + 1
        table[:, count:] = self._rope[:, following : following + table.shape[1] - count]

    def use_long_rope(self, slot: int, is_long: bool) -> None:
        """Make the steps of ``slot`` those of a sequence that is longer than the model's ``rope_switch``, or not."""
        self._rope_rows[slot] = self._long_rope_row if is_long else 0

    def use_adapter(self, slot: int, name: str) -> None:
        """Make the steps of ``slot`` those of the LoRA adapter ``name``; "" = of the model itself."""
        if name == self._used[slot]:
            return
        runs = self._adapted[slot] if name else self._plain[slot]
        if name or runs is self._adapted[slot]:
            for input_name, array in self._matrices[name].items():
                _bind_input(runs.decode, input_name, array)
                _bind_input(runs.prefill, input_name, array)
        self._runs[slot], self._used[slot] = runs, name

    def can_batch(self, count: int) -> bool:
        """Return whether a step can take ``count`` slots that lie side by side and use no adapter."""
        return count == 1 or (0, count) in self._batches

    def stop_batching(self) -> None:
        """Forget the steps of several slots; ``can_batch`` is false for all of them from now on."""
        self._batches.clear()

    def stop_verifying(self) -> None:
        """Forget the steps with drafts; ``verifies`` is false from now on."""
        self.verifies, self._verify = False, []
        self.draft_logits = self.draft_logits[:0].copy()

    def decode(self, token_id: int, position: int, slot: int = 0) -> None:
        """Feed one token at ``position``; its logits, float32 [head rows], are in ``logits[slot]`` afterwards."""
        self.decode_batch([token_id], [position], slot)

    def decode_batch(self, token_ids: Sequence[int], positions: Sequence[int], slot: int) -> None:
        """Feeds one token each to the slots from ``slot`` on. More than one need ``can_batch``, and no adapter."""
        count = len(token_ids)
        self._step_tokens[:count, 0] = token_ids
        self._last_positions[:count] = positions
        self._length[...] = max(positions) + 1
        runs = self._runs[slot]
        session, binding = (runs.session, runs.decode) if count == 1 else (self._session, self._batches[slot, count])
        for index in range(count if self.states else 0):
            self.states.begin(slot + index, positions[index])
        session.run_with_iobinding(binding, self._decode_options)
        for index in range(count if self.states else 0):
            self.states.end(slot + index, positions[index] + 1)

    def prefill(
        self, token_ids: np.ndarray, position: int, slot: int = 0, image_tokens: Sequence[int] | np.ndarray = ()
    ) -> None:
        """Feeds 1 to ``chunk`` tokens, integers [n], at ``position`` and on; the logits are those after the last.

        ``image_tokens``: the indices in ``token_ids`` of those that are tokens of images, whose features the first rows
        of ``image_features`` are.
        """
        count, runs = len(token_ids), self._runs[slot]
        self._last_row[0, 1] = count - 1
        self._tokens[:count] = token_ids
        if count != runs.bound_tokens:
            _bind_input(runs.prefill, "input_ids", self._tokens[None, :count])
            runs.bound_tokens = count
        if (num_images := len(image_tokens)) != runs.bound_images:
            self._bind_images(runs.prefill, num_images)
            runs.bound_images = num_images
        self._image_rows[:num_images, 1] = image_tokens
        self._last_positions[0] = position + count - 1
        self._length[...] = position + count
        if self.states:
            self.states.begin(slot, position)
        runs.session.run_with_iobinding(runs.prefill, self._prefill_options[slot])
        if self.states:
            self.states.end(slot, position + count)

    def verify(self, token_ids: Sequence[int], position: int, rows: Sequence[int], slot: int = 0) -> None:
        """Feeds tokens [n] at ``position`` and on; the logits after those whose indices are ``rows`` [m] are
        in ``draft_logits[:m]`` afterwards. n and m are at most MAX_DRAFT_ROWS; needs ``verifies``."""
        binding, count, wanted = self._verify[slot], len(token_ids), len(rows)
        self._draft_tokens[0, :count] = token_ids
        self._draft_rows[:wanted, 1] = rows
        _bind_input(binding, "input_ids", self._draft_tokens[:, :count])
        _bind_input(binding, "rows", self._draft_rows[:wanted])
        _bind_output(binding, "logits", self.draft_logits[:wanted])
        self._last_positions[0] = position + count - 1
        self._length[...] = position + count
        self._session.run_with_iobinding(binding, self._decode_options)

    def prefill_options(self, slot: int) -> ort.RunOptions:
        """Return the options that ``terminate`` sets, for other work of a prefill."""
        return self._prefill_options[slot]

    def terminate(self, slot: int, stop: bool) -> None:
        """True: a ``prefill`` of ``slot`` that runs or comes ends, with an exception, at its next node. From any
        thread."""
        self._prefill_options[slot].terminate = stop


def check_runtime(kv_cache_type: str) -> None:
    """Raises BackendUnavailableError if the ONNX Runtime that is installed has no such KV cache."""
    if kv_cache_type == "int8" and _version() < _FIRST_WITH_INT8_CACHE:
        first = ".".join(map(str, _FIRST_WITH_INT8_CACHE))
        raise BackendUnavailableError(
            f"ONNX Runtime {ort.__version__} has no int8 KV cache on the CPU, {first} is the first with one; update "
            "onnxruntime (Python 3.11 or newer), or set kv_cache_type to fp16 or fp32."
        )


def has_flash_attention() -> bool:
    return _version() >= _FIRST_WITH_FLASH_ATTENTION


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in ort.__version__.split(".")[:2])


def _model_path(variant_dir: Path, kv_cache_type: str) -> Path:
    old = variant_dir / graph_name(kv_cache_type, window_before_1_24=True)
    return old if _version() < (1, 24) and old.is_file() else variant_dir / graph_name(kv_cache_type)


def session_options(threads: int, packed: bool = True) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _ERROR
    options.enable_mem_pattern = False  # it takes a block anew for every length of a chunk
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _bind_input(binding: ort.IOBinding, name: str, array: np.ndarray) -> None:
    assert array.flags.c_contiguous
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_output(binding: ort.IOBinding, name: str, array: np.ndarray) -> None:
    assert array.flags.c_contiguous
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
