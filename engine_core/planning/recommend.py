"""The variant of a model that suits a device, and which of the known models to take there.

Weights are rounded by the build itself, without calibration texts: int8 loses hardly anything, int4 halves the memory
and nearly doubles the rate. So int8 is taken where it fits and answers fluently, else int4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from engine_core.backends.capabilities import capabilities_of
from engine_core.backends.toolkit import Size
from engine_core.errors import ConfigurationError, EdgeLLMError
from engine_core.formats.weight_formats import weight_format
from engine_core.hub.known_models import KnownModel, known_models
from engine_core.memory import MemoryPlan
from engine_core.planning.devices import DeviceProfile, cpu_of
from engine_core.planning.estimates import CheckpointEstimate

_DEFAULT_CONTEXT = 4096  # tokens
FLUENT = 20.0  # tokens/s: several times as fast as speech, with room for thinking and for tool calls
_RECIPES = ("int8", "int4")  # the better one first
_BANDWIDTH_SHARE = 0.6  # what decoding reaches of a device's bandwidth; small models stay below, large ones above
_KV_TOKENS = 1024  # of the context that a step reads, for the rate


@dataclass(frozen=True)
class Variant:
    """One variant of a model on a device. ``plan``: None where there is none; ``why_not``: why it cannot be used."""

    quantization: str
    backend: str
    max_context: int
    plan: MemoryPlan | None
    tokens_per_second: float  # an estimate; 0 = the device's bandwidth is unknown
    why_not: str = ""

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.total <= self.plan.available

    @property
    def usable(self) -> bool:
        return self.fits and not self.why_not

    @property
    def is_fluent(self) -> bool:
        return not 0 < self.tokens_per_second < FLUENT


@dataclass(frozen=True)
class Offer:
    """A known model with the variant of it that suits the device."""

    model: KnownModel
    variant: Variant


def context_of(max_position: int, asked: int = 0) -> int:
    """Return the tokens to plan and build for: what is asked for, at most what the model was made for."""
    return min(asked or _DEFAULT_CONTEXT, max_position)


def check_rounded(quantization: str) -> None:
    """Raises ConfigurationError for a weight format that a build cannot round to without calibration texts."""
    if weight_format(quantization).needs_calibration:
        raise ConfigurationError(
            f"{quantization} needs calibration texts: run 'edgellm quantize CHECKPOINT OUT --method {quantization} "
            "--calibration FILE' and build OUT."
        )


def choose_variant(
    estimate: CheckpointEstimate, device: DeviceProfile, max_context: int, quantization: str = "", backend: str = ""
) -> Variant:
    """Return the variant named, or the best one that can be used, or else the smallest with the reason against it.

    ``backend``: the one to run it; "" = any of the device's. Raises ConfigurationError for a variant that needs
    calibration texts or that the backend, or every one of the device, does not have.
    """
    if quantization:
        check_rounded(quantization)
    backends = dict(estimate.variants(backend, on_gpu=device.has_gpu))
    if quantization and quantization not in backends:
        who = backend or f"no backend of {device.title}"
        raise ConfigurationError(
            f"The variant {quantization} is none that {who} has; take one of {', '.join(backends)}."
        )
    asked = (quantization,) if quantization else tuple(kind for kind in _RECIPES if kind in backends) or tuple(backends)
    found = [_variant(estimate, kind, backends[kind], device, max_context) for kind in asked]
    usable = [variant for variant in found if variant.usable]
    fluent = [variant for variant in usable if variant.is_fluent]
    return (fluent or usable[-1:] or found[-1:])[0]


def _variant(
    estimate: CheckpointEstimate, quantization: str, backend: str, device: DeviceProfile, max_context: int
) -> Variant:
    size = Size(max_context)
    why_not = capabilities_of(backend).context_refusal(estimate.spec, max_context)
    why_not = why_not or estimate.why_not(quantization, backend, size, device)
    try:
        plan = estimate.plan(quantization, backend, size, device)
        step = estimate.step_bytes(quantization, backend, size, device, kv_tokens=min(_KV_TOKENS, max_context))
    except EdgeLLMError as error:
        return Variant(quantization, backend, max_context, None, 0.0, why_not or str(error))
    return Variant(quantization, backend, max_context, plan, device.bandwidth * _BANDWIDTH_SHARE / step, why_not)


def offers(device: DeviceProfile, task: str = "chat", max_context: int = 0) -> list[Offer]:
    """Return every known model for ``task`` with its variant for ``device``, the largest model first.

    A model that no backend of the device's GPU runs is offered for its CPU, as ``edgellm get`` builds it.
    """
    models = sorted(
        (model for model in known_models() if model.does(task)), key=lambda model: -model.spec.num_parameters
    )
    cpu = cache(lambda: cpu_of(device))  # which may measure its bandwidth
    return [Offer(model, _offered(model, device, cpu, context_of(model.context, max_context))) for model in models]


def _offered(model: KnownModel, device: DeviceProfile, cpu: Callable[[], DeviceProfile], max_context: int) -> Variant:
    estimate = CheckpointEstimate.of_config(model.config, model.name)
    variant = choose_variant(estimate, device, max_context)
    if variant.why_not and device.has_gpu:
        on_cpu = choose_variant(estimate, cpu(), max_context)
        return variant if on_cpu.why_not else on_cpu
    return variant


def is_for_cpu(variant: Variant, device: DeviceProfile) -> bool:
    """Return whether the variant runs on the CPU of a device that has a GPU."""
    return device.has_gpu and not capabilities_of(variant.backend).on_gpu


def best_of(found: Sequence[Offer]) -> Offer | None:
    """Return the largest model that fits, answers fluently and is open to everyone; None if there is none.

    A model that thinks first, and is not asked for it, comes after one of its size that answers at once. Without a
    fluent one, the fastest is taken.
    """
    usable = [offer for offer in found if offer.variant.usable and not offer.model.gated]
    fluent = [offer for offer in usable if offer.variant.is_fluent]
    if not fluent:
        return max(usable, key=lambda offer: offer.variant.tokens_per_second, default=None)
    return max(fluent, key=lambda offer: (offer.model.spec.num_parameters, not offer.model.thinking))


def notes(device: DeviceProfile, found: Sequence[Offer]) -> Iterator[str]:
    """Yield what the table's figures rest on, a sentence each."""
    if device.bandwidth:
        yield (
            f"tokens/s: estimated, as if {_BANDWIDTH_SHARE:.0%} of {device.bandwidth / 1e9:.0f} GB/s "
            f"({device.bandwidth_note}) read the weights and the KV of {_KV_TOKENS} tokens for each token."
        )
    else:
        yield "tokens/s: unknown without the device's memory bandwidth; give it with --bandwidth, in GB/s."
    if any(is_for_cpu(offer.variant, device) for offer in found):
        rate = "it is assumed to get half of the bandwidth" if device.shared_memory else "its bandwidth is measured now"
        yield f"on CPU: no backend of the GPU runs this model, so it is planned for the CPU beside it; {rate}."
    if any(offer.model.gated for offer in found):
        yield "gated: the hub asks you to accept the model's licence first; such a model is never marked."
