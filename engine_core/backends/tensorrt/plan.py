"""The bytes a TensorRT engine takes, by purpose: of one that is built, and of one that is not built yet."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from engine_core.backends.cuda.layout import CudaSpec, bytes_by_purpose, weight_arrays
from engine_core.backends.cuda.layout import pool_arrays as cuda_pool_arrays
from engine_core.backends.cuda.weights import Resolved, resolve
from engine_core.backends.tensorrt.gemm_layout import gemm_work_arrays, with_chunk
from engine_core.backends.tensorrt.layout import PLAN_NAME, TrtOptions, TrtSpec, pool_arrays, work_arrays
from engine_core.config import EngineConfig
from engine_core.cuda.driver import ITEM_BYTES, Device
from engine_core.errors import EngineDirectoryError
from engine_core.formats.manifest import Manifest, read_options
from engine_core.models.spec import ModelSpec

# Allowances for TensorRT's and CUDA's own modules and graphs; the context itself is taken before the plan is made. That
# of the exporter ``gemm`` was measured (test/gpu/test_memory_plan.py).
_RUNTIME_BYTES = 512 << 20
_GEMM_RUNTIME_BYTES = 12 << 20


def is_gemm_engine(manifest: Manifest) -> bool:
    """Tell whether ``gemm_exporter`` wrote the engine: its manifest's ``exporter`` is "gemm"."""
    return read_options(manifest, TrtOptions).exporter == "gemm"


def resolve_gemm(variant_dir: Path, manifest: Manifest, config: EngineConfig) -> Resolved:
    """Return an engine of the exporter ``gemm`` as ``config`` asks for it.

    Raises ConfigurationError or EngineDirectoryError.
    """
    resolved = resolve(variant_dir, manifest, config)
    stored, spec = (with_chunk(each, manifest, config) for each in (resolved.stored, resolved.spec))
    return dataclasses.replace(resolved, stored=stored, spec=spec)


def engine_bytes(variant_dir: Path, manifest: Manifest, config: EngineConfig, num_sms: int) -> dict[str, int]:
    """Return what ``load`` takes on a GPU with so many multiprocessors.

    Raises ConfigurationError or EngineDirectoryError.
    """
    return _bytes_of(variant_dir, manifest, _spec_of(variant_dir, manifest, config), num_sms)


def engine_bytes_on(
    variant_dir: Path, manifest: Manifest, config: EngineConfig, device: Device
) -> tuple[dict[str, int], dict[str, int]]:
    """Return what ``load`` takes on ``device``, and of the host's memory beside it. Raises as ``engine_bytes`` does."""
    spec = _spec_of(variant_dir, manifest, config).on(device)
    arrays = cuda_pool_arrays(spec) if isinstance(spec, CudaSpec) else pool_arrays(spec)
    on_host = bytes_by_purpose(arrays) if spec.pool_on_host else {}
    return _bytes_of(variant_dir, manifest, spec, device.num_sms), on_host


def _spec_of(variant_dir: Path, manifest: Manifest, config: EngineConfig) -> CudaSpec | TrtSpec:
    if is_gemm_engine(manifest):
        return resolve_gemm(variant_dir, manifest, config).spec
    return TrtSpec.create(manifest, config)


def _bytes_of(variant_dir: Path, manifest: Manifest, spec: CudaSpec | TrtSpec, num_sms: int) -> dict[str, int]:
    scratch = read_options(manifest, TrtOptions).scratch_bytes
    if isinstance(spec, CudaSpec):
        return _gemm_bytes(spec, num_sms, scratch)
    path = variant_dir / PLAN_NAME
    try:
        weights = path.stat().st_size
    except OSError as error:
        raise EngineDirectoryError(f"{path} cannot be read ({error}); build the engine again.") from error
    return {"weights": weights, **bytes_by_purpose(work_arrays(spec, scratch)), "runtime": _RUNTIME_BYTES}


def estimated_gemm_bytes(spec: CudaSpec, num_sms: int) -> dict[str, int]:
    """Return about what an engine of the exporter ``gemm`` would take.

    Only the builder knows the scratch of its plans; taken is what the MLP's tensors between its GEMMs need.
    """
    return _gemm_bytes(spec, num_sms, spec.chunk * 3 * spec.intermediate * ITEM_BYTES[spec.dtype])


def estimated_plan_bytes(model: ModelSpec, spec: TrtSpec) -> dict[str, int]:
    """Return about what an engine of one plan would take.

    Only the builder knows the scratch of its plan; taken is what the widest moment of a layer needs: the MLP, or the
    scores of all heads in float32, before and after their softmax.
    """
    item = ITEM_BYTES[spec.dtype]
    mlp = spec.chunk * (4 * model.hidden_size * 2 + 3 * model.intermediate_size) * item
    scores = 2 * 4 * model.num_heads * spec.chunk * (spec.max_context + spec.chunk)
    own_head = 0 if model.tied and spec.head_rows == spec.vocab_size else spec.head_rows * model.hidden_size
    stored_head = 0 if model.tied else model.vocab_size * model.hidden_size
    weights = (model.num_parameters - stored_head + own_head) * item
    work = bytes_by_purpose(work_arrays(spec, max(mlp, scores)))
    return {"weights": weights, **work, "runtime": _RUNTIME_BYTES}


def _gemm_bytes(spec: CudaSpec, num_sms: int, scratch: int) -> dict[str, int]:
    work = gemm_work_arrays(spec, num_sms, scratch)
    return bytes_by_purpose(weight_arrays(spec), work) | {"runtime": _GEMM_RUNTIME_BYTES}
