"""The one protocol every backend implements, and the lazy table that opens them.

A backend owns the weights, the linear KV cache and the sampling. It hands back tokens that may still be on
their way (``PendingToken``), so that the host's work on one token overlaps the computation of the next one:
the engine calls ``decode`` again *before* it reads the token of the call before.
"""

from __future__ import annotations

import importlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine_core.errors import BackendUnavailableError
from engine_core.request import GREEDY_BELOW, SamplingParams

if TYPE_CHECKING:
    import numpy as np

    from engine_core.config import EngineConfig
    from engine_core.formats.manifest import Manifest
    from engine_core.memory import MemoryPlan


@dataclass(frozen=True)
class TokenSampling:
    """What the sampler of one request needs, resolved: the seed is a value, the stop ids are complete."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    logit_bias: tuple[tuple[int, float], ...]
    stop_ids: frozenset[int]  # full-vocabulary ids after which the sequence has ended

    @classmethod
    def of(cls, sampling: SamplingParams, stop_ids: frozenset[int]) -> TokenSampling:
        """Return what every backend's sampler gets for ``sampling``, so that all of them agree: one finite (or -inf)
        bias for each id, and temperature 0 for all that is greedy. Without a seed it is a fresh random one."""
        return cls(
            temperature=0.0 if sampling.temperature < GREEDY_BELOW else sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
            logit_bias=sampling.biases(),
            stop_ids=stop_ids,
        )


class PendingToken(Protocol):
    """A sampled token that may still be on its way from the device."""

    def result(self) -> int | None:
        """Waits for the full-vocabulary id. None: the sequence had ended before (the step did nothing).

        Raises EngineFaultError if the step failed, InvalidSamplingError if no token was left to sample; the
        sequence has ended then, and steps queued behind give None.
        """


class Backend(Protocol):
    """One loaded engine that works on one sequence at a time.

    Positions are explicit: the KV cache holds ``position`` valid tokens; ``prefill`` states where it writes,
    so reusing a prefix is prefilling from a later position, and rolling back is free. All memory is taken by
    ``load`` and given back by ``close``. Not thread-safe: one thread calls it. A backend whose engines are bound to one
    kind of machine also has a class method ``check_here(manifest)``, which raises what ``load`` would raise on another.
    """

    name: str
    max_context: int  # tokens the KV cache holds
    vocab_size: int  # of the full vocabulary
    reduced_vocab_size: int  # rows of the LM head; vocab_size without a vocab map
    kept_ids: np.ndarray | None  # int32 [reduced_vocab_size], the ids of those rows; None without a vocab map

    @classmethod
    def plan(cls, variant_dir: Path, manifest: Manifest, config: EngineConfig) -> MemoryPlan:
        """Every byte ``load`` is going to take, by purpose, and what is free. Allocates nothing."""

    @classmethod
    def load(cls, variant_dir: Path, manifest: Manifest, config: EngineConfig) -> Backend:
        """Allocates, loads, captures graphs and warms up. Leaves nothing allocated when it raises.

        Raises BackendUnavailableError, InsufficientMemoryError, EngineDirectoryError or EngineFaultError.
        """

    def begin(self, sampling: TokenSampling, history: np.ndarray) -> None:
        """Starts a request. ``history``: int32 [n], the whole prompt, for the repetition penalty."""

    def prefill(self, token_ids: np.ndarray, position: int, mask: np.ndarray | None = None) -> PendingToken:
        """Writes the KV of ``token_ids`` (int32 [n], n >= 1) at positions ``position`` … ``position + n - 1`` and
        samples the token that follows. Works through chunks of its own when n is large; ``interrupt`` ends
        it between two chunks. ``mask``: see ``decode``."""

    def extend(self, token_ids: np.ndarray, position: int) -> None:
        """As ``prefill`` without sampling; for warming a prefix. Returns when the KV is valid."""

    def decode(self, mask: np.ndarray | None = None) -> PendingToken:
        """One step: feeds the last sampled token (which need not have reached the host) and samples the next.

        ``mask``: uint32 [ceil(vocab_size / 32)], bit i of word i // 32 set = full-vocabulary id i allowed (the
        layout of llguidance and xgrammar); None = all. A mask is read before the call returns."""

    def interrupt(self) -> None:
        """Makes a running ``prefill`` and all steps queued or still to come end early: their tokens become None.
        Holds until the next ``begin`` or ``extend``. From any thread; returns at once."""

    def save_prefix(self, slot: int, length: int) -> None:
        """Copies the KV of positions 0 … length-1 to prefix slot ``slot`` (< prompt_cache_entries)."""

    def load_prefix(self, slot: int, length: int) -> None:
        """Copies the KV back from slot ``slot`` to positions 0 … length-1."""

    def close(self) -> None:
        """Gives everything back; may be called twice."""


# name → (module, class); imported only when asked for. The fastest first, by tokens a second at batch 1: on one H200
# the CUDA kernels decode at 56 to 90 % of the memory limit (benchmarks/results/kernels.md), a TensorRT 8.6 plan from
# ONNX at 24 %; a CPU has a tenth of a GPU's bandwidth.
_BACKENDS = {
    "cuda": ("engine_core.backends.cuda.backend", "CudaBackend"),
    "tensorrt": ("engine_core.backends.tensorrt.backend", "TensorRTBackend"),
    "onnxruntime": ("engine_core.backends.onnxruntime.backend", "OnnxRuntimeBackend"),
}


def backend_names() -> tuple[str, ...]:
    """The backends of this version, installed or not, the fastest first."""
    return tuple(_BACKENDS)


def check_name(name: str) -> None:
    """Raises BackendUnavailableError unless ``name`` is a backend of this version."""
    if name not in _BACKENDS:
        raise BackendUnavailableError(
            f"The backend {name!r} is not part of this version; available: {', '.join(sorted(_BACKENDS))}."
        )


def backend_class(name: str) -> type[Backend]:
    """The class of backend ``name``. Raises BackendUnavailableError with what is missing."""
    check_name(name)
    module, attribute = _BACKENDS[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise BackendUnavailableError(
            f"The backend {name!r} needs the Python package {error.name!r}, which is not installed: pip install it."
        ) from error
