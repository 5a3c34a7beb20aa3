"""The ONNX Runtime backend's part of ``build``, ``plan`` and ``bench``: see ``engine_core.backends.toolkit``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from engine_core.backends.onnxruntime import build as builder
from engine_core.backends.onnxruntime.capabilities import CAPABILITIES
from engine_core.backends.onnxruntime.exporter import Packing, Precision
from engine_core.backends.onnxruntime.files import DATA_NAME, ENCODER_DATA_NAME, graph_name
from engine_core.backends.onnxruntime.plan import OrtOptions, head_row_bytes, plan_memory, resolve, stored_rope_bytes
from engine_core.backends.onnxruntime.size import count_data, count_encoder
from engine_core.backends.toolkit import BuildRequest, KernelCheck, Size, manifest_before_build
from engine_core.config import EngineConfig
from engine_core.formats import weight_formats as formats
from engine_core.formats.manifest import FileRecord, Manifest, read_options
from engine_core.memory import MemoryPlan
from engine_core.models.shapes import SpecTensors
from engine_core.models.spec import ModelSpec
from engine_core.progress import Progress, untold


def build(request: BuildRequest, report: Callable[[str], None], progress: Progress = untold) -> Manifest:
    return builder.build_engine(
        request.checkpoint,
        request.engine_dir,
        quantization=request.weight_format,
        max_context=request.max_context,
        vocab_map=request.vocab_map,
        model_name=request.model_name,
        kv_cache_type=request.kv_cache_type,
        calibration=request.calibration,
        group_size=request.group_size,
        head_bits=request.head_bits,
        report=report,
        progress=progress,
    )


def plan_for(spec: ModelSpec, weight_format: str, size: Size, num_sms: int) -> dict[str, int]:
    """Return the plan of an engine with the manifest that ``build`` would write."""
    manifest = manifest_for(spec, weight_format, size)
    layout = resolve(Path(), manifest, EngineConfig(Path(), max_batch=size.max_batch))
    return _items(plan_memory(dataclasses.replace(layout, head_rows=size.head_rows or spec.vocab_size), manifest))


def manifest_for(spec: ModelSpec, weight_format: str, size: Size) -> Manifest:
    """Return the manifest that ``build`` would write, as far as a plan reads it."""
    precision = builder.precision_of(weight_format)
    rows = size.head_rows or spec.vocab_size
    data, packing = _count_data(spec, weight_format, size.max_context, rows)
    encoder = _count_encoder(spec, precision)
    shares_head = spec.tied and rows == spec.vocab_size
    switch = spec.rope_switch_within(size.max_context)
    options = builder.engine_options(precision, packing, shares_head=shares_head, rope_switch=switch)
    graphs = {graph_name(kind): FileRecord(0, "") for kind in CAPABILITIES.kv_cache_types}
    return manifest_before_build(
        *(CAPABILITIES, spec, weight_format, size),
        group_size=precision.group_size,
        options=dataclasses.asdict(options),
        files={DATA_NAME: FileRecord(data, ""), ENCODER_DATA_NAME: FileRecord(encoder, "")} | graphs,
    )


@lru_cache(maxsize=64)
def _count_data(spec: ModelSpec, weight_format: str, max_context: int, head_rows: int) -> tuple[int, Packing]:
    wanted = formats.weight_format(weight_format)
    tensors = SpecTensors(spec, wanted if wanted.needs_calibration else None)  # those values come with the checkpoint
    return count_data(tensors, spec, builder.precision_of(weight_format), max_context, head_rows)


@lru_cache(maxsize=64)
def _count_encoder(spec: ModelSpec, precision: Precision) -> int:
    return count_encoder(SpecTensors(spec), spec, precision)


def engine_bytes(variant_dir: Path, manifest: Manifest, config: EngineConfig, num_sms: int) -> dict[str, int]:
    return _items(plan_memory(resolve(variant_dir, manifest, config), manifest))


def _items(plan: MemoryPlan) -> dict[str, int]:
    return {item.name: item.bytes for item in plan.items}


def step_bytes(manifest: Manifest, plan: MemoryPlan, config: EngineConfig, head_rows: int) -> int:
    """Return the layers' bytes of the data file and those of ``head_rows`` rows of the head.

    The layers' are without the experts that a token is not given.
    """
    row, _ = head_row_bytes(manifest)
    vocab_size = manifest.model.vocab_size
    tables = vocab_size  # rows of the file's tables: the lookup's, and the head's where it has its own
    if not read_options(manifest, OrtOptions).shares_head:
        tables += manifest.reduced_vocab_size or vocab_size
    layers = manifest.files[DATA_NAME].size - stored_rope_bytes(manifest) - tables * row
    return layers - _idle_bytes(manifest) + head_rows * row


def _idle_bytes(manifest: Manifest) -> int:
    """Return the bytes of the experts that a token is not given."""
    model, bits = manifest.model, formats.weight_format(manifest.quantization).bits
    if not model.idle_experts:
        return 0
    of_experts = 0
    for rows, columns in (model.layer_matrices[name] for name in ("gate_up", "down")):
        scales = 4 * -(-columns // manifest.group_size) if bits < 16 else 0
        of_experts += rows * (columns * bits // 8 + scales)
    return model.num_layers * of_experts // model.num_experts * model.idle_experts


def num_threads(variant_dir: Path, manifest: Manifest, config: EngineConfig) -> int:
    return resolve(variant_dir, manifest, config).threads


def check_kernels(report: Callable[[str], None]) -> list[KernelCheck]:
    return []
