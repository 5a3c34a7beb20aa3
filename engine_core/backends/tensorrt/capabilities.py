"""The models and formats that the TensorRT backend builds and runs.

fp16 models that the CUDA backend's kernels run are written by the exporter ``gemm``, which has their KV caches;
every other model, and fp32, gets one plan for the whole decoder, whose cache has the type of the weights.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from engine_core.backends.capabilities import CONVOLUTIONS, SCALED_QUERIES, VISION_ENCODER, Capabilities, Trait
from engine_core.backends.cuda.capabilities import CAPABILITIES as CUDA

if TYPE_CHECKING:
    from engine_core.backends.machine import Machine, Missing
    from engine_core.formats.weight_formats.base import WeightFormat
    from engine_core.models.spec import ModelSpec


def _has_window(spec: ModelSpec, max_context: int) -> bool:
    return any(0 < layer.window < max_context for layer in spec.layers)


def _has_other_biases(spec: ModelSpec, max_context: int) -> bool:
    return any(linear.biases for x in spec.layers for linear in (x.output, x.gate_up, x.down))


# What the exporter gemm has no word for; such a model gets one plan for the whole decoder.
_GEMM_TRAITS = (
    CONVOLUTIONS,
    Trait("norms with an offset", lambda spec, _: spec.norm_offset != 0),
    Trait("the activation {spec.activation}", lambda spec, _: spec.activation != "silu"),
    Trait("soft capping", lambda spec, _: spec.attention_softcap != 0 or spec.logits_softcap != 0),
    Trait("scaled logits", lambda spec, _: spec.logits_scale != 1),
    Trait("norms of Q and K over all heads", lambda spec, _: any(layer.wide_qk_norm for layer in spec.layers)),
    Trait("a scaled embedding", lambda spec, _: spec.embedding_scale != 1),
    Trait(
        "an attention scale of its own",
        lambda spec, _: not math.isclose(spec.attention_scale, spec.head_dim**-0.5, rel_tol=1e-5),
    ),
    Trait("several RoPE tables", lambda spec, _: len(spec.ropes) != 1),
    Trait("a partly rotated head", lambda spec, _: spec.ropes[0].dim != spec.head_dim),
    Trait("a sliding window shorter than max_context", _has_window),
    Trait(
        "norms after attention or MLP",
        lambda spec, _: any(layer.post_attention_norm or layer.post_mlp_norm for layer in spec.layers),
    ),
    Trait("biases outside QKV", _has_other_biases),
    Trait("more than 8 query heads for a KV head", lambda spec, _: spec.num_heads // spec.num_kv_heads > 8),
)
_GEMM = dataclasses.replace(CUDA, traits=(*CUDA.traits, *_GEMM_TRAITS))


def gemm_refusal(spec: ModelSpec, weight_format: str, max_context: int) -> str | None:
    """Say why the CUDA backend's kernels cannot do all but the GEMMs of the layers."""
    if weight_format != "fp16":
        return f"The exporter gemm has fp16 weights, not {weight_format}; choose plain."
    return _GEMM.model_refusal(spec, max_context)


def _kv_cache_types_of(spec: ModelSpec | None, weight_format: str, max_context: int) -> tuple[str, ...]:
    if weight_format != "fp16" or (spec is not None and gemm_refusal(spec, weight_format, max_context)):
        return (weight_format,)
    return CUDA.kv_cache_types


def _runs_format(kind: WeightFormat) -> bool:
    """A plan's own weights are floats without scales."""
    from engine_core.formats.weight_formats.base import FloatFormat

    return isinstance(kind, FloatFormat)


def _missing(machine: Machine) -> Missing | None:
    from engine_core.backends.machine import Missing, missing_driver

    if (missing := missing_driver(machine)) is not None:
        return missing
    if machine.packages["tensorrt"]:
        return None
    jetson, pip = "sudo apt install python3-libnvinfer", f"pip install tensorrt-cu{machine.cuda_major}"
    return Missing("tensorrt is not installed", jetson if machine.on_jetson else pip)


CAPABILITIES = Capabilities(
    backend="tensorrt",
    on_gpu=True,
    runs_format=_runs_format,
    default_format="fp16",
    kv_cache_types=("fp16", "int8", "fp8", "fp32"),
    longest_default=4096,
    traits=(
        VISION_ENCODER,
        CONVOLUTIONS,
        # kv_append.cu moves 16 bytes at a time.
        Trait("a head size that is not a multiple of 8", lambda spec, _: spec.head_dim % 8 > 0),
        SCALED_QUERIES,
        Trait("experts", lambda spec, _: spec.num_experts > 0),
    ),
    kv_cache_types_of=_kv_cache_types_of,
    context_step=64,  # a layer's K starts at a multiple of this many positions: TensorRT takes addresses of 256 bytes
    cuda_graphs=True,
    declined_options={
        "group_size": "--group-size is for integers, which TensorRT engines are not built with; leave it out.",
        "head_bits": "--head-bits is for integers, which TensorRT engines are not built with; leave it out.",
        "calibration": "A TensorRT engine measures its int8 KV cache's scales as it runs; leave --calibration out.",
    },
    packages=("tensorrt",),
    missing=_missing,
)
