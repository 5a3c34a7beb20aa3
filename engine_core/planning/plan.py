"""``edgellm plan``: what of a checkpoint or an engine fits a device, at which context, and what would help.

A ``Row`` is one variant at one size. ``plan_checkpoint`` estimates them (estimates.py), ``plan_engine``
asks the backends of the variants an engine directory holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from engine_core.backends import backend_class
from engine_core.backends.capabilities import capabilities_of
from engine_core.backends.registry import backend_names
from engine_core.backends.toolkit import Size, toolkit_of
from engine_core.config import EngineConfig
from engine_core.errors import EdgeLLMError
from engine_core.formats.manifest import Manifest, list_variants, read_manifest, select_variant
from engine_core.formats.signatures import TrustedKeys, read_trusted_keys
from engine_core.formats.weight_formats import preference
from engine_core.memory import MemoryPlan, format_bytes
from engine_core.planning.devices import DeviceProfile
from engine_core.planning.estimates import CheckpointEstimate
from engine_core.planning.recommend import context_of

_GRAIN = 64  # tokens a suggested context is a multiple of


@dataclass(frozen=True)
class Row:
    """One variant at one size. ``plan`` is None where there is none; ``why_not`` says why it cannot run there."""

    quantization: str
    backend: str
    kv_cache_type: str
    max_context: int
    max_batch: int
    plan: MemoryPlan | None
    why_not: str = ""
    # (batch, KV type) → most tokens that fit, 0 = none; only of KV types the device computes with
    longest: dict[tuple[int, str], int] = field(default_factory=dict)
    only_planned: frozenset[str] = frozenset()  # KV types of ``longest`` that this version's backend does not have
    notes: tuple[str, ...] = ()  # what its user should know, a sentence each

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.total <= self.plan.available

    @property
    def total(self) -> int:
        """The bytes of the plan, which there has to be."""
        assert self.plan is not None
        return self.plan.total

    @property
    def usable(self) -> bool:
        return self.fits and not self.why_not

    def as_dict(self) -> dict:
        plan = self.plan
        return {
            "quantization": self.quantization,
            "backend": self.backend,
            "kv_cache_type": self.kv_cache_type,
            "max_context": self.max_context,
            "max_batch": self.max_batch,
            "items": {} if plan is None else {item.name: item.bytes for item in plan.items},
            "total": None if plan is None else plan.total,
            "available": None if plan is None else plan.available,
            "fits": self.fits,
            "runs": not self.why_not,
            "why_not": self.why_not,
            "notes": list(self.notes),
            "longest_context": [
                {"max_batch": batch, "kv_cache_type": kv, "max_context": count, "runs": kv not in self.only_planned}
                for (batch, kv), count in self.longest.items()
            ],
        }


@dataclass(frozen=True)
class Asked:
    """The options of the command line; 0 and "" leave a choice open."""

    contexts: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)
    kv_cache_type: str = ""
    quantization: str = ""
    head_rows: int = 0
    backend: str = ""


def plan_checkpoint(estimate: CheckpointEstimate, device: DeviceProfile, asked: Asked) -> list[Row]:
    """Return every variant of the device's backends, at every context and batch, in that order of nesting: batch,
    context."""
    kinds = estimate.variants(asked.backend, on_gpu=device.has_gpu)
    contexts = asked.contexts or (context_of(estimate.spec.max_position),)
    return [
        _estimated(estimate, kind, device, asked, context, batch)
        for batch in asked.batches
        for context in contexts
        for kind in kinds
    ]


def _estimated(
    estimate: CheckpointEstimate, kind: tuple[str, str], device: DeviceProfile, asked: Asked, context: int, batch: int
) -> Row:
    quantization, backend = kind
    kv_types = estimate.kv_cache_types(*kind, device)
    size = Size(context, batch, asked.kv_cache_type or kv_types[0], asked.head_rows)
    if (reason := capabilities_of(backend).context_refusal(estimate.spec, context)) is not None:
        # Its RoPE tables alone could be too large for this machine.
        return Row(quantization, backend, size.kv_cache_type, context, batch, None, reason)
    why_not = estimate.why_not(*kind, size, device)
    try:
        plan = estimate.plan(*kind, size, device)
    except EdgeLLMError as error:
        return Row(quantization, backend, size.kv_cache_type, context, batch, None, why_not or str(error))
    longest = {}
    for each in sorted({1, batch}):
        for kv in kv_types:

            def fits(tokens: int, each=each, kv=kv) -> bool:
                found = estimate.plan(*kind, Size(tokens, each, kv, asked.head_rows), device)
                return found.total <= found.available

            longest[each, kv] = longest_context(fits, estimate.spec.max_position)
    small = [Size(_GRAIN, kv_cache_type=kv) for kv in kv_types]
    refused = {each.kv_cache_type for each in small if estimate.why_not(*kind, each, device)}
    only_planned = frozenset(refused) if len(refused) < len(kv_types) else frozenset()
    return Row(
        quantization, backend, size.kv_cache_type, context, batch, plan, why_not, longest, only_planned,
        notes=capabilities_of(backend).notes(estimate.spec, context),
    )  # fmt: skip


def longest_context(fits: Callable[[int], bool], limit: int) -> int:
    """Return the most tokens up to ``limit`` for which ``fits``: ``limit`` or a multiple of 64; 0 if not even 64 do."""
    if fits(limit):
        return limit
    low, high = 0, -(-limit // _GRAIN)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * _GRAIN) else (low, middle)
    return low * _GRAIN


def plan_engine(engine_dir: Path, config: EngineConfig, device: DeviceProfile | None) -> list[Row]:
    """Return a row for each variant (or the one ``config`` names), by its backend's own plan.

    ``device``: None = this machine. Raises EngineDirectoryError, ConfigurationError.
    """
    trusted = read_trusted_keys(config.trusted_keys)
    variants = list_variants(engine_dir, trusted)
    if (only := config.quantization) != "auto":
        variants = {only: variants.get(only) or select_variant(engine_dir, only, trusted)}
    return [_planned(directory, config, device, trusted) for directory in variants.values()]


def _planned(directory: Path, config: EngineConfig, device: DeviceProfile | None, trusted: TrustedKeys | None) -> Row:
    manifest = read_manifest(directory, verify_hashes=False, trusted=trusted)
    context = config.max_context or manifest.max_context
    kv = manifest.kv_cache_type if config.kv_cache_type == "auto" else config.kv_cache_type
    row = Row(manifest.quantization, manifest.backend, kv, context, config.max_batch, None)
    try:
        plan = engine_plan(directory, manifest, config, device)
    except EdgeLLMError as error:
        return dataclasses.replace(row, why_not=str(error))

    def fits(tokens: int) -> bool:
        found = engine_plan(directory, manifest, dataclasses.replace(config, max_context=tokens), device)
        return found.total <= found.available

    longest = {(config.max_batch, kv): longest_context(fits, manifest.max_context)}
    why_not = ""
    if device is not None and device.has_gpu:
        capabilities = capabilities_of(manifest.backend)
        why_not = capabilities.device_refusal(manifest.quantization, device.capability) or ""
    return dataclasses.replace(row, plan=plan, why_not=why_not, longest=longest, notes=manifest.notes)


def engine_plan(directory: Path, manifest: Manifest, config: EngineConfig, device: DeviceProfile | None) -> MemoryPlan:
    """Return the backend's plan, against ``device`` (None = this machine). Raises what ``Backend.plan`` raises."""
    if device is None:
        return backend_class(manifest.backend).plan(directory, manifest, config)
    found = toolkit_of(manifest.backend).engine_bytes(directory, manifest, config, device.num_sms)
    return MemoryPlan.of(found, device.free, device.title)


# --- verdict ----------------------------------------------------------------------------------------------


def is_possible(rows: list[Row], quantization: str = "") -> bool:
    """Return True if the variant named, or any where none is named, runs and fits at every size asked for."""
    sizes = {(row.max_context, row.max_batch) for row in rows}
    usable = {(row.max_context, row.max_batch) for row in rows if row.usable and quantization in ("", row.quantization)}
    return sizes == usable


def opened_by_auto(rows: list[Row]) -> str:
    """Return the variant of an engine that ``quantization: auto`` opens of those that run and fit; "" if none does."""
    fastest_first = backend_names()
    usable = [row for row in rows if row.usable]
    best = min(usable, key=lambda row: (fastest_first.index(row.backend), preference(row.quantization)), default=None)
    return "" if best is None else best.quantization


def verdict(name: str, rows: list[Row], where: str, quantization: str = "", recommended: str = "") -> str:
    """Return one sentence: whether ``name`` fits ``where``, of the variant asked for or of the recommended one."""
    asked = [row for row in rows if quantization in ("", row.quantization)]
    usable = [row for row in asked if row.usable]
    planned = [row for row in asked if row.plan is not None]
    subject = f"{name} as {quantization}" if quantization else name
    if not usable:
        if not planned:
            return f"{subject} does not run on {where}."
        least = min(planned, key=lambda row: row.total)
        if least.fits:
            return f"{subject} would fit {where}, but does not run there."
        assert least.plan is not None
        return (
            f"{subject} does not fit {where}: {least.quantization} needs {format_bytes(least.total)}, "
            f"{format_bytes(least.plan.available)} are free."
        )
    if not is_possible(rows, quantization):
        return f"{subject} fits {where} at some of the sizes asked for."
    shown = next((row for row in usable if row.quantization == (recommended or quantization)), usable[0])
    what = f"{shown.quantization} is recommended and" if recommended else f"{shown.quantization}"
    return f"{name} fits {where}: {what} takes {format_bytes(shown.total)} with max_context {shown.max_context}."


def advice(rows: list[Row], quantization: str = "", saved_by_vocab: Callable[[str], int] | None = None) -> list[str]:
    """Return advice for what does not fit: a sentence for each size of the variant asked for, or of the smallest one.

    ``saved_by_vocab``: quantization → bytes a vocabulary of a quarter saves.
    """
    sentences = []
    for size in sorted({(row.max_batch, row.max_context) for row in rows}):
        here = [row for row in rows if (row.max_batch, row.max_context) == size and row.plan is not None]
        runs = [row for row in here if not row.why_not]
        if quantization:
            chosen = [row for row in here if row.quantization == quantization]
        elif any(row.usable for row in runs):
            continue
        else:
            chosen = sorted(runs or here, key=lambda row: row.total)[:1]
        sentences += [_sentence(row, runs, saved_by_vocab) for row in chosen if not row.usable]
    return sentences


def _sentence(row: Row, runs: list[Row], saved_by_vocab: Callable[[str], int] | None) -> str:
    plan = row.plan
    assert plan is not None
    at = f"at max_context {row.max_context}" + (f" and batch {row.max_batch}" if row.max_batch > 1 else "")
    needs = f"{row.quantization} {at} needs {format_bytes(plan.total)}; {plan.device} has "
    needs += f"{format_bytes(plan.available)} free"
    reason = f"; and it does not run there ({row.why_not.rstrip('.')})" if row.why_not else ""
    options = [] if row.fits else _smaller(row)
    options += _other_variant(row, [other for other in runs if other is not row])
    missing = plan.total - plan.available
    if saved_by_vocab is not None and missing > 0:
        saved = saved_by_vocab(row.quantization)
        if 4 * saved >= missing:
            rest = "enough" if saved >= missing else f"{format_bytes(missing)} are missing"
            options.append(f"a vocabulary reduced to a quarter saves {format_bytes(saved)} ({rest})")
    return (
        f"{needs}{reason}"
        + (": " + ", or ".join(options) if options else "; take a smaller model or more memory")
        + "."
    )


def _smaller(row: Row) -> list[str]:
    """Less context, smaller KV or batch that fits."""
    found = []
    for (batch, kv), count in row.longest.items():
        if batch != row.max_batch or count <= 0 or kv in row.only_planned or row.why_not:
            continue
        if kv == row.kv_cache_type:
            found.append(f"--max-context {count} fits")
        elif kv == "int8" and row.kv_cache_type != "int8":
            found.append(f"--kv-cache-type int8 fits{f' up to {count} tokens' if count < row.max_context else ''}")
    if row.max_batch > 1 and row.longest.get((1, row.kv_cache_type), 0) >= row.max_context:
        found.append("batch 1 fits")
    return found


def _other_variant(row: Row, others: list[Row]) -> list[str]:
    """Return the largest variant that fits as asked and is smaller, or else the one that holds the most tokens."""
    usable = sorted((other for other in others if other.usable), key=lambda other: other.total)
    if usable:
        smaller = [other for other in usable if other.total <= row.total]
        best = smaller[-1] if smaller else usable[0]
        return [f"--quantization {best.quantization} fits ({format_bytes(best.total)})"]
    lengths = {other.quantization: other.longest.get((other.max_batch, other.kv_cache_type), 0) for other in others}
    roomiest = max(lengths, key=lengths.__getitem__, default="")
    if not roomiest or lengths[roomiest] <= row.longest.get((row.max_batch, row.kv_cache_type), 0):
        return []
    return [f"--quantization {roomiest} fits up to {lengths[roomiest]} tokens"]
