"""Answer ``build``, ``plan`` and ``bench`` for the CUDA backend; see ``engine_core.backends.toolkit``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from engine_core.backends.cuda import build as builder
from engine_core.backends.cuda.capabilities import CAPABILITIES
from engine_core.backends.cuda.layout import CudaOptions, CudaSpec, planned_bytes, weight_arrays
from engine_core.backends.cuda.weights import resolve
from engine_core.backends.toolkit import BuildRequest, KernelCheck, Size, manifest_before_build
from engine_core.config import EngineConfig
from engine_core.cuda.kernels.linear_packed import stored_group
from engine_core.formats import weight_formats as formats
from engine_core.formats.manifest import Manifest
from engine_core.memory import MemoryPlan
from engine_core.models.spec import ModelSpec
from engine_core.progress import Progress, untold


def build(request: BuildRequest, report: Callable[[str], None], progress: Progress = untold) -> Manifest:
    return builder.build_cuda(
        request.checkpoint,
        request.engine_dir,
        quantization=request.weight_format,
        max_context=request.max_context,
        vocab_map=request.vocab_map,
        kv_cache_type=request.kv_cache_type,
        model_name=request.model_name,
        group_size=request.group_size,
        progress=progress,
    )


def plan_for(spec: ModelSpec, weight_format: str, size: Size, num_sms: int) -> dict[str, int]:
    return planned_bytes(spec_for(spec, weight_format, size), num_sms or 1)


def spec_for(spec: ModelSpec, weight_format: str, size: Size) -> CudaSpec:
    """Return the model as the engine that ``build`` would make runs it."""
    return CudaSpec.create(manifest_for(spec, weight_format, size), EngineConfig(Path(), max_batch=size.max_batch))


def manifest_for(spec: ModelSpec, weight_format: str, size: Size) -> Manifest:
    return manifest_before_build(
        *(CAPABILITIES, spec, weight_format, size),
        reduced_vocab_size=size.head_rows,
        group_size=stored_group(formats.weight_format(weight_format)),
        options=dataclasses.asdict(CudaOptions("fp16", rope_switch=spec.rope_switch_within(size.max_context))),
    )


def engine_bytes(variant_dir: Path, manifest: Manifest, config: EngineConfig, num_sms: int) -> dict[str, int]:
    return planned_bytes(resolve(variant_dir, manifest, config).spec, num_sms or 1)


def step_bytes(manifest: Manifest, plan: MemoryPlan, config: EngineConfig, head_rows: int) -> int:
    """Return the bytes of all weights but those that are only looked up, those of experts that a token has not, and
    those of an encoder."""
    spec = dataclasses.replace(CudaSpec.create(manifest, config), head_rows=head_rows, images=None)
    arrays, model = weight_arrays(spec), spec.model
    read = sum(array.nbytes for name, array in arrays.items() if name != "embed" or not spec.has_head)
    if not model.idle_experts:
        return read
    of_experts = sum(array.nbytes for name, array in arrays.items() if name.endswith((".gate_up", ".down")))
    return read - of_experts // model.num_experts * model.idle_experts


def num_threads(variant_dir: Path, manifest: Manifest, config: EngineConfig) -> int:
    return 0


def check_kernels(report: Callable[[str], None]) -> list[KernelCheck]:
    from engine_core.backends.cuda import self_check

    return self_check.check_kernels(report)
