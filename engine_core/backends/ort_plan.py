"""What the ONNX Runtime backend decides before it loads: sizes, threads, chunk, and the memory plan that follows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine_core.config import EngineConfig
from engine_core.errors import BackendUnavailableError, ConfigurationError
from engine_core.manifest import Manifest
from engine_core.memory import MemoryItem, MemoryPlan, kv_cache_bytes
from engine_core.vocab import VOCAB_MAP_NAME, read_vocab_map

# Parameters below which a second thread costs more in hand-overs than it computes, see docs/cpu_backend.md.
_SINGLE_THREAD_PARAMETERS = 20_000_000
_CHUNK = 128  # tokens per prefill step: see docs/cpu_backend.md
_RUNTIME_BYTES = 40 << 20  # the library itself, its graph and its thread stacks
DATA_NAME = "model.onnx.data"
_NEEDS_GPU = {"fp8": "8.9", "nvfp4": "10.0"}  # the first generation whose tensor cores have the type


@dataclass(frozen=True)
class Layout:
    """Everything ``auto`` and 0 became."""

    max_context: int
    chunk: int
    threads: int
    vocab_size: int
    head_rows: int  # rows of the LM head in the graph
    vocab_map: np.ndarray | None  # int32 [rows]
    slice_logits: bool  # the head is whole, and the map was given at load
    prefix_slots: int
    prefix_tokens: int


def resolve(variant_dir: Path, manifest: Manifest, config: EngineConfig) -> Layout:
    """Raises ConfigurationError for what this backend cannot do, BackendUnavailableError for weights in a type the CPU
    lacks, EngineDirectoryError for a damaged vocab map."""
    if manifest.quantization in _NEEDS_GPU:
        raise BackendUnavailableError(
            f"{manifest.quantization} weights need an NVIDIA GPU of compute capability "
            f"{_NEEDS_GPU[manifest.quantization]} or newer, but the onnxruntime backend runs on the CPU; "
            "choose int8 or int4_awq."
        )
    if config.kv_cache_type not in ("auto", "fp32"):
        raise ConfigurationError(
            f"kv_cache_type is {config.kv_cache_type!r}, but the onnxruntime backend keeps its KV cache in fp32; "
            "choose auto or fp32."
        )
    if config.max_batch != 1:
        raise ConfigurationError(f"max_batch is {config.max_batch}, but the onnxruntime backend works on one sequence.")
    max_context = config.max_context or manifest.max_context
    if max_context > manifest.max_context:
        raise ConfigurationError(
            f"max_context is {max_context}, but the engine was built for {manifest.max_context}; "
            f"build it again with --max-context {max_context}."
        )
    vocab_map, slice_logits = _vocab_map(variant_dir, manifest, config)
    return Layout(
        max_context=max_context,
        chunk=min(config.prefill_chunk or _CHUNK, max_context),
        threads=config.num_threads or _default_threads(manifest.geometry.num_parameters),
        vocab_size=manifest.geometry.vocab_size,
        head_rows=manifest.reduced_vocab_size or manifest.geometry.vocab_size,
        vocab_map=vocab_map,
        slice_logits=slice_logits,
        prefix_slots=config.prompt_cache_entries,
        prefix_tokens=min(config.prompt_cache_tokens, max_context),
    )


def _vocab_map(variant_dir: Path, manifest: Manifest, config: EngineConfig) -> tuple[np.ndarray | None, bool]:
    built = manifest.reduced_vocab_size > 0
    if config.vocab_map == "none" and built:
        raise ConfigurationError(
            "vocab_map is 'none', but this engine's LM head holds only the rows of its vocab map; "
            "build a variant without one."
        )
    own = read_vocab_map(variant_dir / VOCAB_MAP_NAME, manifest.geometry.vocab_size) if built else None
    if config.vocab_map in ("auto", "none"):
        return own, False
    given = read_vocab_map(Path(config.vocab_map).expanduser(), manifest.geometry.vocab_size)
    if own is not None and not np.array_equal(own, given):
        raise ConfigurationError(
            f"vocab_map is {config.vocab_map}, but the engine's LM head was reduced with another map; choose auto."
        )
    return given, own is None


def _default_threads(num_parameters: int) -> int:
    return 1 if num_parameters < _SINGLE_THREAD_PARAMETERS else count_cores()


def count_cores() -> int:
    """Physical cores this process may use: a second hardware thread of a core adds no memory bandwidth."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.is_file() else str(cpu))
    return len(cores)


def plan_memory(layout: Layout, manifest: Manifest) -> MemoryPlan:
    """Every byte ``load`` takes, by purpose, and what the machine has free."""
    geometry = manifest.geometry
    cache = dict(num_layers=geometry.num_layers, num_kv_heads=geometry.num_kv_heads, head_dim=geometry.head_dim)
    rope_dims = manifest.options.get("rope_dims", [geometry.head_dim])
    prefix = kv_cache_bytes(**cache, max_context=layout.prefix_tokens, kv_cache_type="fp32") * layout.prefix_slots
    data = manifest.files[DATA_NAME].size if DATA_NAME in manifest.files else 0
    rope = sum(4 * dim for dim in rope_dims) * manifest.max_context
    rows = layout.head_rows
    return MemoryPlan(
        (
            MemoryItem("weights", max(0, data - rope) + manifest.options.get("packed_head_bytes", 0)),
            MemoryItem("kv_cache", kv_cache_bytes(**cache, max_context=layout.max_context, kv_cache_type="fp32")),
            MemoryItem("prefix_cache", prefix),
            MemoryItem("scratch", _scratch_bytes(layout, manifest)),
            MemoryItem("rope", rope),
            MemoryItem("io", 8 * layout.chunk + 4 * rows + 13 * rows),
            MemoryItem("runtime", _RUNTIME_BYTES),
        ),
        available=available_memory(),
        device="the CPU",
    )


def _scratch_bytes(layout: Layout, manifest: Manifest) -> int:
    """The intermediate tensors of the widest moment of a chunk: the MLP's, or attention's scores over the cache."""
    geometry = manifest.geometry
    tokens = layout.chunk
    mlp = 4 * tokens * (3 * geometry.hidden_size + 5 * geometry.intermediate_size)
    heads = geometry.num_heads + 2 * geometry.num_kv_heads
    attention = 4 * tokens * (2 * geometry.hidden_size + 3 * heads * geometry.head_dim)
    attention += 4 * tokens * geometry.num_heads * layout.max_context
    return max(mlp, attention)


def available_memory() -> int:
    """Bytes a process could take now: what the kernel calls available, or less inside a memory-limited cgroup."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))
