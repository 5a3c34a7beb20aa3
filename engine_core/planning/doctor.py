"""Find out what this machine has and what a backend lacks, for ``edgellm doctor``. Nothing is changed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from engine_core.backends.capabilities import Capabilities, all_capabilities
from engine_core.backends.machine import Machine, Missing
from engine_core.cuda.gpu_info import find_gpus
from engine_core.host_cpu import count_cores

# Distributions by what they are for; several names = alternatives.
PACKAGES: dict[str, tuple[str, ...]] = {
    "numpy": ("numpy",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "onnx": ("onnx",),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "cuda-bindings": ("cuda-bindings",),
    "cuda-core": ("cuda-core",),
    "cuda-pathfinder": ("cuda-pathfinder",),
    "NVRTC (wheel)": ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
    "cuBLAS (wheel)": ("nvidia-cublas", "nvidia-cublas-cu12"),
    "transformers": ("transformers",),
    "tokenizers": ("tokenizers",),
    "llguidance": ("llguidance",),
    "jinja2": ("jinja2",),
    "pillow": ("pillow",),
    "cryptography (signed engines)": ("cryptography",),
    "torch (build machine)": ("torch",),
}
REQUIRED = ("numpy", "tokenizers", "transformers", "jinja2", "llguidance", "pillow")
_CPU_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve", "bf16")
# NVIDIA L4T release → JetPack.
_JETPACKS = {"35": "5", "36.2": "6.0 DP", "36.3": "6.0", "36.4": "6.1 or 6.2", "38.2": "7.0", "38.4": "7.1"}
_ROOT = Path("/")


@dataclass(frozen=True)
class Check:
    """One variant of one backend: if it can run here, why not, and the command that changes it."""

    backend: str
    quantization: str
    kv_cache_types: tuple[str, ...]  # of a model that the backend runs in full
    why_not: str = ""
    install: str = ""

    @property
    def runs(self) -> bool:
        return not self.why_not


def examine() -> dict:
    """JSON-safe: everything ``edgellm doctor`` shows. ``healthy``: at least one backend can run."""
    gpus = find_gpus()
    packages = {name: version_of(*names) for name, names in PACKAGES.items()}
    jetson = find_jetson()
    checks = check_backends(Machine(packages, gpus, bool(jetson)))
    missing = [name for name in REQUIRED if not packages[name]]
    return {
        "healthy": any(check.runs for check in checks) and not missing,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{_os_name()}, {platform.machine()}",
        "jetson": jetson,
        "ros": find_ros(),
        "cpu": find_cpu(),
        "gpus": [asdict(gpu) for gpu in gpus.gpus],
        "cuda_driver": gpus.cuda_version,
        "no_gpu": gpus.why_none,
        "packages": packages,
        "missing": missing,
        "backends": [asdict(check) | {"runs": check.runs} for check in checks],
        "hints": hints(jetson),
    }


# --- the machine ------------------------------------------------------------------------------------------


def version_of(*distributions: str) -> str:
    """Return the version of the first that is installed, or an empty string."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def find_jetson(root: Path = _ROOT) -> dict:
    """Release, JetPack, model and power mode of a Jetson; empty elsewhere."""
    text = _read(root / "etc/nv_tegra_release")
    found = re.search(r"# R(\d+).*?REVISION: (\d+)(?:\.(\d+))?", text)
    if not found:
        return {}
    release = f"{found[1]}.{found[2]}"
    return {
        "l4t": release + (f".{found[3]}" if found[3] else ""),
        "jetpack": _JETPACKS.get(release) or _JETPACKS.get(found[1], "unknown"),
        "model": _read(root / "proc/device-tree/model").strip("\0\n"),
        "power_mode": _power_mode(root),
    }


def _power_mode(root: Path) -> str:
    """Return the name that nvpmodel.conf gives the mode that nvpmodel's status file holds."""
    mode = re.search(r"pmode:0*(\d+)", _read(root / "var/lib/nvpmodel/status"))
    if mode is None:
        return ""
    name = re.search(rf"POWER_MODEL\s+ID={mode[1]}\s+NAME=(\S+)", _read(root / "etc/nvpmodel.conf"))
    return f"{mode[1]} ({name[1]})" if name else mode[1]


def find_ros() -> dict:
    """Look for ROS in the environment alone: nothing of it is imported."""
    return {
        "distro": os.environ.get("ROS_DISTRO", ""),
        "rclpy": importlib.util.find_spec("rclpy") is not None,
        "edgellm_ros": bool([p for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if _has_package(p)]),
        "rmw": os.environ.get("RMW_IMPLEMENTATION", ""),
    }


def _has_package(prefix: str) -> bool:
    return bool(prefix) and (Path(prefix) / "share" / "edgellm_ros" / "package.xml").is_file()


def find_cpu(root: Path = _ROOT) -> dict:
    from engine_core.host_memory import available_memory

    text = _read(root / "proc/cpuinfo")
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.M)
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)[:1]).split())
    return {
        "name": name[1].strip() if name else platform.machine(),
        "cores": count_cores(),
        "features": [flag for flag in _CPU_FLAGS if flag in flags],
        "memory_free": available_memory(),
        "governor": _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip(),
    }


def hints(jetson: dict, root: Path = _ROOT) -> list[str]:
    """Return what costs speed on this machine."""
    found = []
    governor = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    if governor in ("powersave", "schedutil", "ondemand", "conservative"):
        command = "sudo jetson_clocks" if jetson else "sudo cpupower frequency-set -g performance"
        found.append(f"The CPU governor is {governor}: latencies vary with its clock; {command} fixes it.")
    mode = jetson.get("power_mode", "")
    if mode and "MAXN" not in mode:
        found.append(
            f"The power mode is {mode}: sudo nvpmodel -m N sets the MAXN mode that /etc/nvpmodel.conf numbers."
        )
    return found


def _os_name() -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read(Path("/etc/os-release")), re.M)
    return found[1] if found else platform.system()


def _read(path: Path) -> str:
    """Empty where it is not there or must not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# --- the backends -----------------------------------------------------------------------------------------


def check_backends(machine: Machine) -> list[Check]:
    """Return a check for every weight format that any backend knows."""
    return [_check(each, kind, machine) for each in all_capabilities() for kind in each.planned_formats]


def _check(capabilities: Capabilities, weight_format: str, machine: Machine) -> Check:
    kv_cache_types = capabilities.kv_cache_types_for(None, weight_format)
    gpus = machine.gpus.gpus if capabilities.on_gpu else ()
    reason = capabilities.refusal(None, weight_format, capability=gpus[0].capability if gpus else 0)
    if reason is not None:
        return Check(capabilities.backend, weight_format, kv_cache_types, reason)
    missing = capabilities.missing(machine) or Missing("")
    return Check(capabilities.backend, weight_format, kv_cache_types, missing.reason, missing.install)
