"""What the ONNX Runtime backend builds and runs: on the CPU, in the runtime's fused operators."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from engine_core.backends.capabilities import Capabilities, Trait, needed_gpu

if TYPE_CHECKING:
    from engine_core.backends.machine import Machine, Missing
    from engine_core.models.spec import ModelSpec

_KV_CACHE_TYPES = ("fp32", "fp16", "int8")
_OLDEST = (1, 20)  # of ONNX Runtime
_BUILT_ONLY = {
    kind: f"{kind} weights need an NVIDIA GPU of compute capability {needed_gpu(kind)} or newer, but the onnxruntime "
    "backend runs on the CPU; choose int8 or int4_awq."
    for kind in ("fp8", "nvfp4")
}


def _kv_cache_types_of(spec: ModelSpec | None, weight_format: str, max_context: int) -> tuple[str, ...]:
    """A graph with DequantizeLinear has a cache in float32 alone."""
    return ("fp32",) if weight_format in _BUILT_ONLY else _KV_CACHE_TYPES


def _missing(machine: Machine) -> Missing | None:
    from engine_core.backends.machine import Missing

    version, oldest = machine.packages["onnxruntime"], ".".join(map(str, _OLDEST))
    if not version:
        return Missing("onnxruntime is not installed", f"pip install 'onnxruntime>={oldest}'")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _OLDEST:
        return Missing(f"onnxruntime is {version}, {oldest} is needed", f"pip install -U 'onnxruntime>={oldest}'")
    return None


CAPABILITIES = Capabilities(
    backend="onnxruntime",
    on_gpu=False,
    weight_formats=("fp32", "int8", "int4", "int4_awq"),
    default_format="int8",
    kv_cache_types=_KV_CACHE_TYPES,
    longest_default=4096,
    built_only=_BUILT_ONLY,
    traits=(
        # GroupQueryAttention's condition.
        Trait("a head size that is not a multiple of 16", lambda spec, _: spec.head_dim % 16 > 0),
    ),
    kv_cache_types_of=_kv_cache_types_of,
    group_sizes=(16, 32, 64, 128, 256),
    declined_options={
        "max_prefill": "--max-prefill is fixed in an engine for tensorrt only; elsewhere set prefill_chunk.",
        "dialect": "--dialect is a matter of tensorrt only; leave it out.",
    },
    packages=("onnxruntime",),
    missing=_missing,
)
