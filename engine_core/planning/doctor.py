"""What this machine has and what of it a backend lacks, for ``edgellm doctor``. Nothing here changes anything."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from engine_core.cuda.gpu_info import GpuReport, find_gpus
from engine_core.errors import BackendUnavailableError
from engine_core.planning.devices import DeviceProfile
from engine_core.planning.estimates import cpu_variants, gpu_variants, why_no_builder

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
    "torch (build machine)": ("torch",),
}
REQUIRED = ("numpy", "tokenizers", "transformers", "jinja2", "llguidance")
_CPU_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve", "bf16")
_MIN_CAPABILITY = 80  # the cuda backend's kernels copy asynchronously and use the matrix units of Ampere
# NVIDIA L4T release → JetPack.
_JETPACKS = {"35": "5", "36.2": "6.0 DP", "36.3": "6.0", "36.4": "6.1 or 6.2", "38.2": "7.0", "38.4": "7.1"}
_ROOT = Path("/")


@dataclass(frozen=True)
class Check:
    """Whether one variant of one backend can run here, why not, and the command that changes it."""

    backend: str
    quantization: str
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
    checks = [*cpu_checks(packages), *gpu_checks(packages, gpus, bool(jetson))]
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
    """Of the first that is installed, or empty."""
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
    """The name nvpmodel.conf gives the mode that nvpmodel's status file holds."""
    mode = re.search(r"pmode:0*(\d+)", _read(root / "var/lib/nvpmodel/status"))
    if mode is None:
        return ""
    name = re.search(rf"POWER_MODEL\s+ID={mode[1]}\s+NAME=(\S+)", _read(root / "etc/nvpmodel.conf"))
    return f"{mode[1]} ({name[1]})" if name else mode[1]


def find_ros() -> dict:
    """From the environment alone: nothing of ROS is imported."""
    return {
        "distro": os.environ.get("ROS_DISTRO", ""),
        "rclpy": importlib.util.find_spec("rclpy") is not None,
        "edgellm_ros": bool([p for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if _has_package(p)]),
        "rmw": os.environ.get("RMW_IMPLEMENTATION", ""),
    }


def _has_package(prefix: str) -> bool:
    return bool(prefix) and (Path(prefix) / "share" / "edgellm_ros" / "package.xml").is_file()


def find_cpu(root: Path = _ROOT) -> dict:
    from engine_core.backends.onnxruntime.plan import count_cores
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
    """What costs speed on this machine."""
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


def cpu_checks(packages: dict[str, str]) -> list[Check]:
    try:
        quantizations = cpu_variants()
    except ImportError:  # of onnx, which only the builder needs
        quantizations = ("fp32", "int8", "int4")
    why_not, install = "", ""
    version = packages["onnxruntime"]
    if not version:
        why_not, install = "onnxruntime is not installed", "pip install 'onnxruntime>=1.20'"
    elif tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (1, 20):
        why_not, install = f"onnxruntime is {version}, 1.20 is needed", "pip install -U 'onnxruntime>=1.20'"
    return [Check("onnxruntime", quantization, why_not, install) for quantization in quantizations]


def gpu_checks(packages: dict[str, str], gpus: GpuReport, on_jetson: bool) -> list[Check]:
    checks = []
    for quantization, backend in sorted(gpu_variants(), key=lambda pair: pair[1]):
        if reason := why_no_builder(quantization, backend):
            checks.append(Check(backend, quantization, reason))
            continue
        if gpus.why_none:
            checks.append(Check(backend, quantization, gpus.why_none, _driver_line(on_jetson)))
            continue
        gpu = gpus.gpus[0]
        profile = DeviceProfile("this", gpu.name, gpu.memory, capability=gpu.capability, num_sms=gpu.num_sms)
        if reason := profile.why_not(quantization):
            checks.append(Check(backend, quantization, reason))
            continue
        why_not, install = _backend_lacks(backend, packages, gpus, on_jetson)
        checks.append(Check(backend, quantization, why_not, install))
    return checks


def _driver_line(on_jetson: bool) -> str:
    return "sudo apt install nvidia-jetpack" if on_jetson else "install the NVIDIA driver, then see nvidia-smi"


def _backend_lacks(backend: str, packages: dict[str, str], gpus: GpuReport, on_jetson: bool) -> tuple[str, str]:
    """(reason, command), both empty if ``backend`` has all it needs."""
    major = gpus.cuda_version.partition(".")[0]
    capability = gpus.gpus[0].capability
    if backend == "cuda" and capability < _MIN_CAPABILITY:
        return f"the kernels need sm_{_MIN_CAPABILITY} or newer; this GPU is sm_{capability}", ""
    if not packages["cuda-bindings"]:
        return "cuda-bindings is not installed", f"pip install 'cuda-bindings=={major}.*' cuda-pathfinder"
    if int(packages["cuda-bindings"].partition(".")[0]) > int(major):
        reason = f"cuda-bindings is {packages['cuda-bindings']}, but the driver supports CUDA {gpus.cuda_version}"
        return reason, f"pip install 'cuda-bindings=={major}.*'"
    if backend == "tensorrt":
        line = "sudo apt install python3-libnvinfer" if on_jetson else f"pip install tensorrt-cu{major}"
        return ("", "") if packages["tensorrt"] else ("tensorrt is not installed", line)
    return _libraries_lack(gpus.cuda_version, on_jetson)


def _libraries_lack(cuda_version: str, on_jetson: bool) -> tuple[str, str]:
    """NVRTC and cuBLAS, asked as the kernels ask for them."""
    from engine_core.cuda.driver import bindings
    from engine_core.cuda.kernels.blas import load_library

    major, dashed = cuda_version.partition(".")[0], cuda_version.replace(".", "-")
    suffix = "-cu12" if major == "12" else ""
    try:
        _, nvrtc = bindings()
        nvrtc.nvrtcVersion()
    except (BackendUnavailableError, RuntimeError) as error:
        line = f"sudo apt install cuda-nvrtc-{dashed}" if on_jetson else f"pip install nvidia-cuda-nvrtc{suffix}"
        return f"NVRTC was not found ({_first_line(error)})", line
    try:
        load_library()
    except BackendUnavailableError as error:
        line = f"sudo apt install libcublas-{dashed}" if on_jetson else f"pip install nvidia-cublas{suffix}"
        return _first_line(error), line
    return "", ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
