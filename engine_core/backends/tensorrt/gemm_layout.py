"""The arrays of an engine of the exporter ``gemm``: three plans, the CUDA backend's arrays, one scratch.

TensorRT multiplies; norms, RoPE, attention, the LM head and sampling are the CUDA backend's kernels on its KV cache.
"""

from __future__ import annotations

import dataclasses

from engine_core.backends.cuda.layout import ArraySpec, CudaSpec, matrix_shapes, round_rows, work_arrays
from engine_core.backends.tensorrt.layout import TrtOptions, check_chunk
from engine_core.config import EngineConfig
from engine_core.formats.manifest import Manifest, read_options

# What a layer multiplies, in order: a plan each. With which of the layer's weights, by their names in the plan.
GEMM_PLANS = {"qkv": ("qkv", "qkv_bias"), "o": ("o",), "mlp": ("gate_up", "down")}
# The CUDA backend's own, for cuBLAS and between gate-up and down.
_UNUSED = ("blas", "gate_up", "activated")


def plan_name(name: str) -> str:
    return f"{name}.plan"


def weight_shapes(spec: CudaSpec) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the weights of each of GEMM_PLANS: plan → weight → shape."""
    shapes: dict[str, tuple[int, ...]] = dict(matrix_shapes(spec))
    if "qkv" in spec.biases_of(0):
        shapes["qkv_bias"] = (spec.attention.qkv_width,)
    return {name: {key: shapes[key] for key in weights if key in shapes} for name, weights in GEMM_PLANS.items()}


def with_chunk(spec: CudaSpec, manifest: Manifest, config: EngineConfig) -> CudaSpec:
    """Return ``spec`` with the chunk of prefill the plans allow. Raises ConfigurationError or EngineDirectoryError."""
    max_prefill = read_options(manifest, TrtOptions).max_prefill
    check_chunk(config, max_prefill)
    chunk = round_rows(min(config.prefill_chunk or max_prefill, spec.max_context))
    return dataclasses.replace(spec, chunk=chunk, chooses_chunk=False)


def gemm_work_arrays(spec: CudaSpec, num_sms: int, scratch_bytes: int) -> dict[str, ArraySpec]:
    """Return every array that is not a weight, by name. ``scratch_bytes``: the most that any of the plans needs."""
    arrays = {name: array for name, array in work_arrays(spec, num_sms).items() if name not in _UNUSED}
    arrays["engine"] = ArraySpec("scratch", (max(1, scratch_bytes),), "uint8")
    arrays["delta"] = ArraySpec(
        "scratch", (spec.chunk, spec.hidden), spec.dtype
    )  # what a plan's output adds to ``hidden``
    return arrays
