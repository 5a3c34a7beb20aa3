"""The choice of the variant of an engine directory to open: the fastest of those that run here and fit.

``auto`` asks the variants' backends in the order of ``backend_names``; within a backend the smallest weights come
first, as decoding is bound by memory. Every variant that is passed over is named with its reason.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from engine_core.backends import Backend, backend_class
from engine_core.backends.registry import backend_names
from engine_core.config import EngineConfig
from engine_core.errors import BackendUnavailableError, ConfigurationError, EdgeLLMError, EngineDirectoryError
from engine_core.formats.manifest import Manifest, check_files, find_variants
from engine_core.formats.signatures import read_trusted_keys
from engine_core.formats.weight_formats import preference
from engine_core.memory import MemoryPlan
from engine_core.progress import Progress, untold


@dataclass(frozen=True)
class Choice:
    """One variant with the configuration resolved for it. ``reason``: why this one, a sentence or two."""

    directory: Path
    manifest: Manifest  # its files are checked as the configuration says
    config: EngineConfig
    backend: type[Backend]
    plan: MemoryPlan
    reason: str


def choose(config: EngineConfig, progress: Progress = untold) -> Choice:
    """Return the best variant by ``config``. Allocates nothing. ``progress``: of checking its files.

    Where only one variant comes into question, it is returned whether it fits or not; why it cannot run is raised as it
    is. Raises EngineDirectoryError (IntegrityError, SignatureError), ConfigurationError, BackendUnavailableError or
    InsufficientMemoryError, with the reason against every variant where there are several.
    """
    signed = bool(config.trusted_keys)
    candidates = _candidates(config)
    if len(candidates) == 1:
        directory, manifest = candidates[0]
        check_files(directory, manifest, verify_hashes=config.verify_files, progress=progress, signed=signed)
        return _examine(directory, manifest, config, _reason_for_one(config, manifest))
    refused: list[tuple[Manifest, EdgeLLMError]] = []
    for directory, manifest in candidates:
        try:
            check_files(directory, manifest, verify_hashes=False, signed=signed)
            choice = _examine(directory, manifest, config, "")
            choice.plan.check(advice(choice.config, choice.plan))
        except EdgeLLMError as error:
            refused.append((manifest, error))
            continue
        if config.verify_files:  # damage is raised: taking another variant would hide it
            check_files(directory, manifest, progress=progress, signed=signed)
        return dataclasses.replace(choice, reason=_reason(manifest, candidates, refused))
    reasons = "; ".join(f"{_title(manifest)}: {_clause(error)}" for manifest, error in refused)
    raise type(refused[0][1])(f"None of the {len(refused)} variants of {config.engine_dir} can be opened. {reasons}.")


def advice(config: EngineConfig, plan: MemoryPlan) -> str:
    """Return advice that would make the plan fit, for the refusal. ``config``: resolved."""
    rest = plan.total - plan.item("kv_cache")
    per_token = plan.item("kv_cache") / config.max_context
    fitting = int((plan.available - rest) / per_token) if per_token else 0
    if fitting >= 256:
        return f"max_context {fitting // 256 * 256} would fit (it is {config.max_context})"
    return "a variant with fewer bits per weight or a smaller model is needed"


def _candidates(config: EngineConfig) -> list[tuple[Path, Manifest]]:
    """Return the variants that the parameters leave, best first; never empty.

    Raises EngineDirectoryError, ConfigurationError or BackendUnavailableError.
    """
    found = find_variants(config.engine_dir, read_trusted_keys(config.trusted_keys))
    kept = [pair for pair in found if config.quantization in ("auto", pair[1].quantization)]
    if not kept:
        names = ", ".join(sorted({manifest.quantization for _, manifest in found}))
        raise EngineDirectoryError(
            f"{config.engine_dir} has no variant {config.quantization!r}; it has {names}. "
            f"Build it with 'edgellm build --quantization {config.quantization}'."
        )
    for_backend = [pair for pair in kept if config.backend in ("auto", pair[1].backend)]
    if not for_backend:
        names = " and ".join(sorted({manifest.backend for _, manifest in kept}))
        raise BackendUnavailableError(
            f"The engine in {config.engine_dir} was built for {names}, not for {config.backend}; "
            f"set backend to auto or {names}, or build it with 'edgellm build --backend {config.backend}'."
        )

    fastest_first = backend_names()

    def rank(pair: tuple[Path, Manifest]) -> tuple[int, tuple[float, bool]]:
        backend, quantization = pair[1].backend, pair[1].quantization
        return (
            fastest_first.index(backend) if backend in fastest_first else len(fastest_first),
            preference(quantization),
        )

    return sorted(for_backend, key=rank)


def _examine(directory: Path, manifest: Manifest, config: EngineConfig, reason: str) -> Choice:
    """Raises what tells that the variant cannot run here: its backend, this machine, or the configuration."""
    config = _resolve(config, manifest)
    backend = backend_class(manifest.backend)
    backend.check_here(manifest)
    return Choice(directory, manifest, config, backend, backend.plan(directory, manifest, config), reason)


def _resolve(config: EngineConfig, manifest: Manifest) -> EngineConfig:
    """Replaces ``auto`` and 0 by values. Raises ConfigurationError."""
    if config.max_context > manifest.max_context:
        raise ConfigurationError(
            f"max_context is {config.max_context}, but this engine was built for {manifest.max_context}; "
            "set a smaller one or build the engine again."
        )
    return dataclasses.replace(
        config,
        quantization=manifest.quantization,
        max_context=config.max_context or manifest.max_context,
    )


def _reason_for_one(config: EngineConfig, manifest: Manifest) -> str:
    asked = [f"{name} {value}" for name in ("backend", "quantization") if (value := getattr(config, name)) != "auto"]
    if asked:
        return f"{_title(manifest)} is the only variant for {' and '.join(asked)}, which the parameters name."
    return f"The engine directory was built for {manifest.backend}, in {manifest.quantization} alone."


def _reason(manifest: Manifest, candidates: list, refused: list[tuple[Manifest, EdgeLLMError]]) -> str:
    lead = f"{_title(manifest)} is the fastest of {len(candidates)} variants that runs here and fits"
    passed = [f"not {_title(other)}: {_clause(error)}" for other, error in refused]
    slower = [_title(other) for _, other in candidates[len(refused) + 1 :]]
    if slower:
        passed.append(f"expected to be slower: {', '.join(slower)}")
    return "; ".join([lead, *passed]) + "."


def _title(manifest: Manifest) -> str:
    return f"{manifest.backend} {manifest.quantization}"


def _clause(error: EdgeLLMError) -> str:
    return str(error).rstrip(".")
