"""The functions of a backend that ``build``, ``plan`` and ``bench`` call without opening an engine.

A backend's folder has a module ``toolkit`` with these functions. It may need the packages that building needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from engine_core.backends.registry import check_name
from engine_core.errors import ConfigurationError

if TYPE_CHECKING:
    from engine_core.backends.capabilities import Capabilities
    from engine_core.config import EngineConfig
    from engine_core.formats.manifest import Manifest
    from engine_core.memory import MemoryPlan
    from engine_core.models.spec import ModelSpec
    from engine_core.progress import Progress

_LARGEST = 2**31 - 1  # tokens, sequences or rows: an int32 counts them


@dataclass(frozen=True)
class BuildRequest:
    """The options of ``edgellm build``. 0, "" and "auto" leave a choice to the backend."""

    checkpoint: Path
    engine_dir: Path
    weight_format: str
    max_context: int = 0
    kv_cache_type: str = "auto"
    vocab_map: Path | None = None
    model_name: str = ""
    group_size: int = 0
    head_bits: int = 0
    calibration: Path | None = None
    max_prefill: int = 0
    exporter: str = "auto"


@dataclass(frozen=True)
class Size:
    """The size of an engine that is not built yet. Raises ConfigurationError for one that no engine can have."""

    max_context: int
    max_batch: int = 1
    kv_cache_type: str = ""  # "": the backend's default
    head_rows: int = 0  # of a reduced LM head; 0 = the whole vocabulary

    def __post_init__(self) -> None:
        for name, least in (("max_context", 1), ("max_batch", 1), ("head_rows", 0)):
            value = getattr(self, name)
            if not least <= value <= _LARGEST:
                raise ConfigurationError(f"{name} is {value}, expected {least} to {_LARGEST}.")


@dataclass(frozen=True)
class KernelCheck:
    """A kernel compared with its reference. ``error``: relative, None where it could not be run, for ``problem``."""

    name: str
    error: float | None
    tolerance: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.tolerance  # NaN is not


class Toolkit(Protocol):
    """The functions of a backend's ``toolkit``."""

    def build(self, request: BuildRequest, report: Callable[[str], None], progress: Progress = ...) -> Manifest:
        """Write the engine directory; ``report`` gets sentences on the way.

        Raises CheckpointError, UnsupportedModelError or BuildError.
        """

    def manifest_for(self, spec: ModelSpec, weight_format: str, size: Size) -> Manifest:
        """Return the manifest that ``build`` would write, as far as ``step_bytes`` and a plan read it."""

    def plan_for(self, spec: ModelSpec, weight_format: str, size: Size, num_sms: int) -> dict[str, int]:
        """Return the bytes an engine would take, by purpose, before there is one.

        ``weight_format`` and ``size`` are something the backend has, for one sequence. ``num_sms``: streaming
        multiprocessors of the GPU.
        """

    def engine_bytes(self, variant_dir: Path, manifest: Manifest, config: EngineConfig, num_sms: int) -> dict[str, int]:
        """Return the bytes an engine takes, by purpose. Raises what ``Backend.plan`` raises."""

    def step_bytes(self, manifest: Manifest, plan: MemoryPlan, config: EngineConfig, head_rows: int) -> int:
        """Return the bytes of weights a decode step reads with so many rows of the LM head."""

    def num_threads(self, variant_dir: Path, manifest: Manifest, config: EngineConfig) -> int:
        """Return the CPU threads that compute; 0 on a GPU."""

    def check_kernels(self, report: Callable[[str], None]) -> list[KernelCheck]:
        """Compare the backend's own kernels with their references here; none where it has no kernels of its own.

        Raises BackendUnavailableError or DeviceError where there is no GPU to run them.
        """


def manifest_before_build(
    capabilities: Capabilities, spec: ModelSpec, weight_format: str, size: Size, **fields: Any
) -> Manifest:
    """Return the manifest that ``build`` would write, as far as a plan reads it. ``fields``: the backend's own."""
    from engine_core.formats.manifest import Manifest

    common = dict(
        model_name="",
        model=spec,
        backend=capabilities.backend,
        quantization=weight_format,
        kv_cache_type=size.kv_cache_type or capabilities.kv_cache_types[0],
        max_context=size.max_context,
        max_batch=capabilities.max_batch,
        eos_token_ids=(),
    )
    return Manifest(**{**common, **fields})


def toolkit_of(backend: str) -> Toolkit:
    """Return the toolkit of ``backend``. Raises BackendUnavailableError for another name, ImportError where a package
    is missing that building or planning needs."""
    check_name(backend)
    return cast(Toolkit, importlib.import_module(f"engine_core.backends.{backend}.toolkit"))
