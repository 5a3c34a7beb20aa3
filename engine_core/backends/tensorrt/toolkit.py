"""The TensorRT backend's part of ``build``, ``plan`` and ``bench``: see ``engine_core.backends.toolkit``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from engine_core.backends.cuda import toolkit as cuda
from engine_core.backends.tensorrt import plan
from engine_core.backends.tensorrt.capabilities import CAPABILITIES, gemm_refusal
from engine_core.backends.tensorrt.layout import DEFAULT_MAX_PREFILL, TrtOptions, TrtSpec
from engine_core.backends.toolkit import BuildRequest, KernelCheck, Size, manifest_before_build
from engine_core.config import EngineConfig
from engine_core.formats.manifest import Manifest
from engine_core.memory import MemoryPlan
from engine_core.models.spec import ModelSpec
from engine_core.progress import Progress, untold


def build(request: BuildRequest, report: Callable[[str], None], progress: Progress = untold) -> Manifest:
    from engine_core.backends.tensorrt import build as builder

    return builder.build_tensorrt(
        request.checkpoint,
        request.engine_dir,
        quantization=request.weight_format,
        max_context=request.max_context,
        max_prefill=request.max_prefill,
        exporter=request.exporter,
        vocab_map=request.vocab_map,
        kv_cache_type=request.kv_cache_type,
        model_name=request.model_name,
        report=report,
        progress=progress,
    )


def plan_for(spec: ModelSpec, weight_format: str, size: Size, num_sms: int) -> dict[str, int]:
    """Return an estimate: the scratch of a TensorRT plan is known only when it is built."""
    if gemm_refusal(spec, weight_format, size.max_context) is None:
        return plan.estimated_gemm_bytes(cuda.spec_for(spec, weight_format, size), num_sms or 1)
    manifest = manifest_for(spec, weight_format, size)
    return plan.estimated_plan_bytes(spec, TrtSpec.create(manifest, EngineConfig(Path())))


def manifest_for(spec: ModelSpec, weight_format: str, size: Size) -> Manifest:
    return manifest_before_build(
        *(CAPABILITIES, spec, weight_format, size),
        kv_cache_type=weight_format,
        reduced_vocab_size=size.head_rows,
        options=asdict(TrtOptions(weight_format, "plain", DEFAULT_MAX_PREFILL)),
    )


def engine_bytes(variant_dir: Path, manifest: Manifest, config: EngineConfig, num_sms: int) -> dict[str, int]:
    return plan.engine_bytes(variant_dir, manifest, config, num_sms or 1)


def step_bytes(manifest: Manifest, memory: MemoryPlan, config: EngineConfig, head_rows: int) -> int:
    """Return the bytes of all weights: a TensorRT plan does not tell the token lookup's apart."""
    return memory.item("weights")


def num_threads(variant_dir: Path, manifest: Manifest, config: EngineConfig) -> int:
    return 0


def check_kernels(report: Callable[[str], None]) -> list[KernelCheck]:
    return []
