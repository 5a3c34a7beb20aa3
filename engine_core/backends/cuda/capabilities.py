"""The models and formats that the CUDA backend builds and runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_core.backends.capabilities import SCALED_QUERIES, Capabilities, Trait

if TYPE_CHECKING:
    from engine_core.backends.machine import Machine, Missing
    from engine_core.formats.weight_formats.base import WeightFormat
    from engine_core.models.spec import ModelSpec


def _padded_head(spec: ModelSpec) -> int:
    from engine_core.backends.cuda.padding import padded_head

    return padded_head(spec)


def _has_odd_encoder(spec: ModelSpec) -> bool:
    return spec.vision is not None and (spec.vision.hidden_size % 8 > 0 or spec.vision.head_dim > 256)


# What the kernels lack.
TRAITS = (
    Trait("positions of three axes (M-RoPE)", lambda spec, _: bool(spec.mrope)),
    Trait(
        "an encoder whose hidden size is no multiple of 8 or whose heads are above 256",
        lambda spec, _: _has_odd_encoder(spec),
    ),
    Trait(
        "short convolutions of different lengths, or over more than 8 tokens",
        lambda spec, _: len(taps := {layer.conv_kernel for layer in spec.layers} - {0}) > 1 or max(taps, default=0) > 8,
    ),
    Trait("RoPE tables of different sizes", lambda spec, _: len({rope.dim for rope in spec.ropes}) > 1),
    Trait("a head size above 256", lambda spec, _: _padded_head(spec) > 256),
    SCALED_QUERIES,
    Trait(
        "experts of sizes that are no multiples of 16",
        lambda spec, _: spec.num_experts > 0 and (spec.hidden_size % 16 or spec.intermediate_size % 16) > 0,
    ),
    Trait("more than 32 experts for a token", lambda spec, _: spec.experts_per_token > 32),
    Trait("more than 16 query heads for a KV head", lambda spec, _: spec.num_heads // spec.num_kv_heads > 16),
)


def _is_packed(kind: WeightFormat) -> bool:
    """Return whether the kernels multiply by packed tiles of the format: integers have a scale for 32 columns or
    more."""
    from engine_core.cuda.kernels.integer_layout import GROUP_SIZES
    from engine_core.cuda.kernels.linear_packed import INTEGER_LAYOUTS, LAYOUTS

    if kind.kind in INTEGER_LAYOUTS:
        return not (kind.has_fixed_group and kind.group_size % GROUP_SIZES[0])
    return kind.kind in LAYOUTS


def _keeps_order(spec: ModelSpec) -> bool:
    from engine_core.backends.cuda.orders import keeps_order

    return keeps_order(spec)


def _missing(machine: Machine) -> Missing | None:
    """Return what is missing of the driver, NVRTC and cuBLAS, the last two asked as the kernels ask for them."""
    from engine_core.backends.machine import Missing, missing_driver
    from engine_core.cuda.driver import bindings
    from engine_core.cuda.kernels import blas
    from engine_core.errors import BackendUnavailableError, first_line

    if (missing := missing_driver(machine)) is not None:
        return missing
    dashed = machine.gpus.cuda_version.replace(".", "-")
    suffix = "-cu12" if machine.cuda_major == "12" else ""
    try:
        _, nvrtc = bindings()
        nvrtc.nvrtcVersion()
    except (BackendUnavailableError, RuntimeError) as error:
        line = (
            f"sudo apt install cuda-nvrtc-{dashed}" if machine.on_jetson else f"pip install nvidia-cuda-nvrtc{suffix}"
        )
        return Missing(f"NVRTC was not found ({first_line(error)})", line)
    try:
        blas.load_library()
    except BackendUnavailableError as error:
        line = f"sudo apt install libcublas-{dashed}" if machine.on_jetson else f"pip install nvidia-cublas{suffix}"
        return Missing(first_line(error), line)
    return None


CAPABILITIES = Capabilities(
    backend="cuda",
    on_gpu=True,
    runs_format=lambda kind: kind.kind == "fp16" or _is_packed(kind),  # fp16 stands for the checkpoint's 16-bit type
    default_format="fp16",
    kv_cache_types=("fp16", "int8", "fp8"),  # fp16 stands for the 16-bit type of the weights
    longest_default=8192,
    lora=True,
    drafts=True,
    log_probabilities=True,
    switches_rope=True,
    max_batch=16,  # MAX_SEQUENCES of cuda/kernels/launch_configs.py
    plans_others=True,
    traits=TRAITS,
    keeps_order=_keeps_order,
    group_sizes=(32, 64, 128),  # GROUP_SIZES of cuda/kernels/integer_layout.py
    least_capability=80,  # the kernels copy asynchronously and use the matrix units of Ampere
    cuda_graphs=True,
    declined_options={
        "head_bits": "The cuda backend's LM head has the weights' own format; leave --head-bits out.",
        "calibration": "The cuda backend measures its KV cache's scales as it runs; leave --calibration out.",
        "max_prefill": "--max-prefill is fixed in an engine for tensorrt only; elsewhere set prefill_chunk.",
        "exporter": "--exporter is a matter of tensorrt only; leave it out.",
    },
    packages=("cuda-bindings",),
    missing=_missing,
)
