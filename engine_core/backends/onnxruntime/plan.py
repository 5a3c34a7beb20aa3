"""Decide for the ONNX Runtime backend before it loads: sizes, threads, chunk, and the memory plan that follows."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine_core.backends.kv_pool import pool_tokens, state_places
from engine_core.backends.onnxruntime.adapters import num_bytes, sites
from engine_core.backends.onnxruntime.capabilities import CAPABILITIES
from engine_core.backends.onnxruntime.files import DATA_NAME, ENCODER_DATA_NAME, held_types
from engine_core.backends.onnxruntime.heads import head_axes, turned_size
from engine_core.backends.onnxruntime.session import MAX_DRAFT_ROWS, has_flash_attention
from engine_core.backends.onnxruntime.states import COPIES, state_bytes
from engine_core.config import EngineConfig
from engine_core.errors import BackendUnavailableError, ConfigurationError
from engine_core.formats.lora import LoraAdapter, read_adapters
from engine_core.formats.manifest import Manifest, read_options
from engine_core.formats.vocab_map import configured_vocab_map
from engine_core.formats.weight_formats import weight_format
from engine_core.formats.weight_formats.integers import IntegerFormat
from engine_core.host_cpu import count_cores
from engine_core.host_memory import available_memory
from engine_core.memory import MemoryItem, MemoryPlan, kv_cache_bytes
from engine_core.models.spec import ModelSpec
from engine_core.vision.limits import ImageLimits, image_limits
from engine_core.vision.part_encoder import BLOCK_TOKENS, cache_blocks

_log = logging.getLogger(__name__)

# Parameters below which a second thread costs more in hand-overs than it computes, see docs/cpu_backend.md.
_SINGLE_THREAD_PARAMETERS = 20_000_000
_CHUNK = 128  # tokens per prefill step: see docs/cpu_backend.md
_CHUNK_BETWEEN = 32  # the same where other answers wait for it
# Bytes that loading adds to a process that has imported the library: code not touched before, the graph's objects.
_RUNTIME_BYTES = 25 << 19
_RUNTIME_LAYER_BYTES = 128 << 10
_EDITING_BYTES = 11 << 20  # the onnx package, with which a graph is edited at load
_ARENA_BYTES = 512 << 10  # small tensors of a step
_PICTURE_BYTES = 8 << 20  # of the library that scales pictures, and small tensors of the encoder
# Sequences without an adapter take a graph without branches where a second one is small. In a larger model the branches
# of rank 0 cost nothing that can be measured, see docs/cpu_backend.md.
_OWN_GRAPH_BYTES = 64 << 20


@dataclass(frozen=True)
class Layout:
    """Everything ``auto`` and 0 became."""

    max_context: int
    num_slots: int
    kv_cache_type: str
    chunk: int
    threads: int
    model: ModelSpec
    rope_switch: int  # tokens of a sequence beyond which it has another RoPE; 0: none has
    head_rows: int  # rows of the LM head that runs
    vocab_map: np.ndarray | None  # int32 [rows]
    prunes_head: bool  # the head is whole in the engine; ``vocab_map`` was given at load
    pool_tokens: int  # places of the KV pool
    state_places: int  # of the pool of states, for a model whose layers keep such
    draft_rows: int  # tokens of a step with a draft
    adapters: tuple[LoraAdapter, ...] = ()
    adapters_have_graph: bool = False  # a graph, and weights, of their own
    images: ImageLimits | None = None  # None: no encoder is loaded
    frame_bytes: int = 0  # for frames of topics, which the node keeps

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size


@dataclass(frozen=True)
class OrtOptions:
    """The builder's entries in the manifest's ``options``. Bytes are those of the data file and of its packing."""

    head_bits: int = 32  # of the LM head's values
    shares_head: bool = False  # the token lookup and the whole LM head use the same bytes
    released_bytes: int = 0  # of the file, not kept once they are packed
    packed_bytes: int = 0  # what the runtime packs the weights into
    packed_head_bytes: int = 0  # of packed_bytes, the LM head's
    # A sequence of more tokens has another RoPE, whose table is a second one; 0: there is one table.
    rope_switch: int = 0
    requantized: int = 0  # quantized matrices that were dequantized and rounded anew
    rounding_errors: dict[str, float] = field(default_factory=dict)  # of each of them, relative


def resolve(variant_dir: Path, manifest: Manifest, config: EngineConfig) -> Layout:
    """Raises ConfigurationError for what this backend cannot do, BackendUnavailableError for weights in a type the CPU
    lacks, EngineDirectoryError for a damaged vocab map, AdapterError."""
    if (reason := CAPABILITIES.refusal(None, manifest.quantization)) is not None:
        raise BackendUnavailableError(reason)
    if (reason := CAPABILITIES.options_refusal(config.max_batch, config.lora_adapters, config.speculation)) is not None:
        raise ConfigurationError(reason)
    if (reason := CAPABILITIES.draft_refusal(manifest.model, config.speculation)) is not None:
        raise ConfigurationError(reason)
    adapters = read_adapters(config.lora_adapters, manifest.model, config.lora_max_rank)
    max_context = config.max_context or manifest.max_context
    if max_context > manifest.max_context:
        raise ConfigurationError(
            f"max_context is {max_context}, but the engine was built for {manifest.max_context}; "
            f"build it again with --max-context {max_context}."
        )
    vocab_map, prunes_head = configured_vocab_map(variant_dir, manifest, config)
    kv_cache_type = _kv_cache_type(manifest, config)
    if config.speculation == "on" and kv_cache_type != "int8" and config.max_batch > 1:
        raise ConfigurationError(
            f"speculation is 'on' and kv_cache_type is {kv_cache_type!r}, with which drafts can change an answer's "
            f"rounding; with max_batch {config.max_batch} use the int8 KV cache, or set speculation to auto."
        )
    images = image_limits(manifest.model, config, max_context)
    token_bytes, of_states = _kv_bytes(manifest.model, kv_cache_type, 1), state_bytes(manifest.model.states)
    num_pooled = pool_tokens(config, max_context, token_bytes, of_states)
    return Layout(
        max_context=max_context,
        num_slots=config.max_batch,
        kv_cache_type=kv_cache_type,
        chunk=min(config.prefill_chunk or (_CHUNK if config.max_batch == 1 else _CHUNK_BETWEEN), max_context),
        threads=_num_threads(config.num_threads, manifest.model.num_parameters),
        model=manifest.model,
        rope_switch=read_options(manifest, OrtOptions).rope_switch,
        head_rows=manifest.model.vocab_size if vocab_map is None else len(vocab_map),
        vocab_map=vocab_map,
        prunes_head=prunes_head,
        pool_tokens=num_pooled,
        state_places=state_places(config, max_context, num_pooled) if of_states else 0,
        draft_rows=0 if of_states else _draft_rows(config, kv_cache_type),
        adapters=adapters,
        adapters_have_graph=bool(adapters) and _data_bytes(manifest) <= _OWN_GRAPH_BYTES,
        images=images,
        frame_bytes=0 if images is None else config.image_frames_memory << 20,
    )


def _draft_rows(config: EngineConfig, kv_cache_type: str) -> int:
    """Return the tokens of a step with a draft, 0 where there is none: see ``OnnxRuntimeBackend``."""
    is_on = config.speculation == "on" or (config.speculation == "auto" and kv_cache_type == "int8")
    return MAX_DRAFT_ROWS if is_on else 0


def _num_threads(asked: int, num_parameters: int) -> int:
    """Return the CPU threads to use: what was asked for, but no more than there are cores."""
    cores = len(os.sched_getaffinity(0))
    if asked > cores:
        _log.warning("num_threads is %d, but this machine has %d cores; using %d threads.", asked, cores, cores)
    return min(asked, cores) if asked else _default_threads(num_parameters)


def _kv_cache_type(manifest: Manifest, config: EngineConfig) -> str:
    kind = manifest.kv_cache_type if config.kv_cache_type == "auto" else config.kv_cache_type
    if (reason := CAPABILITIES.kv_cache_refusal(manifest.model, manifest.quantization, kind)) is not None:
        raise ConfigurationError(reason)
    held = held_types(manifest.files)
    if kind not in held:
        raise ConfigurationError(
            f"kv_cache_type is {kind!r}, but this engine was built for {', '.join(held)}; choose one of them, or build "
            f"it again with --kv-cache-type {kind}."
        )
    return kind


def _default_threads(num_parameters: int) -> int:
    return 1 if num_parameters < _SINGLE_THREAD_PARAMETERS else count_cores()


def plan_memory(layout: Layout, manifest: Manifest) -> MemoryPlan:
    """Return every byte ``load`` takes, by purpose, and what the machine has free."""
    model = manifest.model
    kv_cache = _kv_bytes(model, layout.kv_cache_type, layout.max_context, layout.num_slots, "channel")
    prefix = _kv_bytes(model, layout.kv_cache_type, layout.pool_tokens)
    states = state_bytes(model.states) * (layout.num_slots * COPIES + layout.state_places)
    data = _data_bytes(manifest)
    rope = _rope_values(manifest) * (2 if layout.kv_cache_type == "fp16" else 4)
    stored = stored_rope_bytes(manifest)  # those of the other type stay on the disk
    if model.mrope:  # a table for each slot, and one to fill it from
        rope = rope * layout.max_context // manifest.max_context * (1 + layout.num_slots)
    rows = layout.head_rows
    runtime = _RUNTIME_BYTES + _RUNTIME_LAYER_BYTES * model.num_layers
    runtime += _EDITING_BYTES if layout.prunes_head or layout.adapters else 0
    weights, scratch = max(0, data - stored + _packed_bytes(layout, manifest)), _scratch_bytes(layout, manifest)
    adapters = num_bytes(layout.adapters, sites(model, layout.adapters))
    if layout.adapters_have_graph:
        adapters += weights + rope + scratch + _RUNTIME_LAYER_BYTES * model.num_layers
    return MemoryPlan(
        (
            MemoryItem("weights", weights),
            MemoryItem("kv_cache", kv_cache),
            MemoryItem("prefix_cache", prefix),
            *([MemoryItem("states", states)] if states else []),
            *([MemoryItem("adapters", adapters)] if layout.adapters else []),
            *([MemoryItem("images", _image_bytes(layout, manifest))] if layout.images is not None else []),
            *([MemoryItem("frames", layout.frame_bytes)] if layout.frame_bytes else []),
            MemoryItem("scratch", scratch),
            MemoryItem("rope", rope),
            MemoryItem("io", 8 * layout.chunk + rows * (layout.num_slots * (4 + 13) + layout.draft_rows * 4)),
            MemoryItem("runtime", runtime),
        ),
        available=available_memory(),
        device="the CPU",
    )


def _kv_bytes(model: ModelSpec, kv_cache_type: str, tokens: int, num_slots: int = 1, int8_scales: str = "none") -> int:
    return kv_cache_bytes(
        num_layers=len(model.kv_layers),
        num_kv_heads=model.num_kv_heads,
        head_dim=head_axes(model)[0].size,
        max_context=tokens,
        max_batch=num_slots,
        kv_cache_type=kv_cache_type,
        int8_scales=int8_scales,
    )


def packs_weights(manifest: Manifest) -> bool:
    """Return whether the runtime keeps the weights in its kernels' own layout, as it does integers."""
    return isinstance(weight_format(manifest.quantization), IntegerFormat)


def _data_bytes(manifest: Manifest) -> int:
    return manifest.files[DATA_NAME].size if DATA_NAME in manifest.files else 0


def _rope_values(manifest: Manifest) -> int:
    """Return how many numbers the tables of cos and sin have together."""
    positions = read_options(manifest, OrtOptions).rope_switch + manifest.max_context
    return sum(turned_size(rope.dim) for rope in manifest.model.ropes) * positions


def stored_rope_bytes(manifest: Manifest) -> int:
    """Return the bytes of the tables in the data file: in float32, and in fp16 for the cache of that type."""
    if manifest.model.mrope:
        return 0
    return _rope_values(manifest) * (6 if "fp16" in held_types(manifest.files) else 4)


def head_row_bytes(manifest: Manifest) -> tuple[int, int]:
    """Return (bytes of a row of the LM head in the data file, those of them that are its scales)."""
    hidden, bits = manifest.model.hidden_size, read_options(manifest, OrtOptions).head_bits
    scales = 4 * -(-hidden // manifest.group_size) if bits < 16 else 0
    return hidden * bits // 8 + scales, scales


def _packed_bytes(layout: Layout, manifest: Manifest) -> int:
    """Return the bytes of weights beside the data file; negative where more of the file is not loaded than is packed.

    Values that the runtime packs leave the mapped file for its own memory; what is shared with the lookup stays too.
    """
    options = read_options(manifest, OrtOptions)
    packed = options.packed_bytes - options.released_bytes
    return packed + (_pruned_head_bytes(layout, manifest) if layout.prunes_head else 0)


def _pruned_head_bytes(layout: Layout, manifest: Manifest) -> int:
    """Return the bytes that pruning a head at load adds: the kept rows twice, as they are and packed."""
    model, options = manifest.model, read_options(manifest, OrtOptions)
    row, scales = head_row_bytes(manifest)
    whole = options.packed_head_bytes
    mapped = 0 if options.shares_head else model.vocab_size * (scales or row)
    buffer = (model.vocab_size - layout.head_rows) * scales  # the largest of the model: see exporter.Packing
    return layout.head_rows * (row + whole // model.vocab_size) - whole - mapped - buffer


def _image_bytes(layout: Layout, manifest: Manifest) -> int:
    """Return what images take: the encoder's weights and scratch, the features that are kept, pixels on their way."""
    assert layout.images is not None
    spec = layout.images.spec
    record = manifest.files.get(ENCODER_DATA_NAME)
    weights = record.size if record is not None else 0
    kept = cache_blocks(spec, layout.images.max_images) * BLOCK_TOKENS
    features = 4 * spec.feature_size * (kept + spec.part_tokens(spec.most_tokens) + layout.chunk)
    # The arena of a run, whose regions double: the MLP of all patches, its activation, Q, K and V, and the residual;
    # and the hidden states between two layers, which are in turns read and written.
    values = 4 * spec.intermediate_size + 14 * spec.hidden_size
    if packs_weights(manifest):  # and what a product rounds of it
        values += 2 * spec.intermediate_size
    scratch = 4 * spec.most_patches * values + _PICTURE_BYTES
    runtime = _RUNTIME_LAYER_BYTES * spec.num_layers
    return weights + features + scratch + spec.pixel_bytes + runtime


def _scratch_bytes(layout: Layout, manifest: Manifest) -> int:
    """Return the bytes of the runtime's arena that a chunk fills, fitted to what it takes (docs/cpu_backend.md).

    The MLP's tensors are the widest moment. Quantized weights round its input beside it; attention over an fp16 cache,
    and in older runtimes over an fp32 one, has the scores of all heads, twice.
    """
    model = manifest.model
    hidden, intermediate = model.hidden_size, model.intermediate_size
    values = 6 * hidden + 6 * intermediate  # float32, for each token
    extra = _ARENA_BYTES
    if packs_weights(manifest):
        values += hidden + intermediate
        extra += 2 * _ARENA_BYTES
    if layout.kv_cache_type == "fp16" or (layout.kv_cache_type == "fp32" and not has_flash_attention()):
        scores = 2 * model.num_heads * layout.max_context
        values = max(values, 6 * hidden + 4 * intermediate + scores)
    return 4 * layout.chunk * values + extra
