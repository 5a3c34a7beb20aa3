"""The machine as ``edgellm doctor`` knows it, and what a backend lacks there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine_core.cuda.gpu_info import GpuReport


@dataclass(frozen=True)
class Machine:
    """``packages``: name (of ``planning.doctor.PACKAGES``) → version, "" where it is not installed."""

    packages: Mapping[str, str]
    gpus: GpuReport
    on_jetson: bool = False

    @property
    def cuda_major(self) -> str:
        """Return the newest major version of CUDA that the driver supports."""
        return self.gpus.cuda_version.partition(".")[0]


@dataclass(frozen=True)
class Missing:
    """The first thing that is missing, and the command that brings it ("" where there is none)."""

    reason: str
    install: str = ""


def missing_driver(machine: Machine) -> Missing | None:
    """Return what every GPU backend needs and ``machine`` lacks: a GPU, its driver, cuda-bindings that fit it."""
    if machine.gpus.why_none:
        line = "install the NVIDIA driver, then see nvidia-smi"
        return Missing(machine.gpus.why_none, "sudo apt install nvidia-jetpack" if machine.on_jetson else line)
    major, version = machine.cuda_major, machine.packages["cuda-bindings"]
    if not version:
        return Missing("cuda-bindings is not installed", f"pip install 'cuda-bindings=={major}.*' cuda-pathfinder")
    if int(version.partition(".")[0]) > int(major):
        reason = f"cuda-bindings is {version}, but the driver supports CUDA {machine.gpus.cuda_version}"
        return Missing(reason, f"pip install 'cuda-bindings=={major}.*'")
    return None
