"""The NVIDIA GPUs of this machine, asked of the driver's library: needs no Python package, context or memory.

For what needs a context, such as the free memory, see ``device``.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

# CUdevice_attribute of cuda.h.
_MULTIPROCESSORS, _MAJOR, _MINOR, _INTEGRATED = 16, 75, 76, 18


@dataclass(frozen=True)
class GpuInfo:
    """One NVIDIA GPU of this machine."""

    name: str
    capability: int  # 87 = sm_87
    num_sms: int
    memory: int  # bytes in all
    integrated: bool  # shares the CPU's memory, as on a Jetson


@dataclass(frozen=True)
class GpuReport:
    """The GPUs that the driver finds.

    ``why_none`` is empty if there is a GPU. ``cuda_version`` is the newest the driver supports, such as 12.6.
    """

    gpus: tuple[GpuInfo, ...] = ()
    cuda_version: str = ""
    why_none: str = ""


def find_gpus(library_name: str = "libcuda.so.1") -> GpuReport:
    try:
        library = ctypes.CDLL(library_name)
    except OSError:
        return GpuReport(why_none=f"there is no NVIDIA driver ({library_name} is missing)")
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    cuda_version = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return GpuReport(cuda_version=cuda_version, why_none="the NVIDIA driver finds no GPU")
    return GpuReport(tuple(_describe(library, ordinal) for ordinal in range(count.value)), cuda_version)


def _describe(library: ctypes.CDLL, ordinal: int) -> GpuInfo:
    device = ctypes.c_int(0)
    library.cuDeviceGet(ctypes.byref(device), ordinal)
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGetName(name, 256, device)
    memory = ctypes.c_size_t(0)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(which: int) -> int:
        value = ctypes.c_int(0)
        library.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value

    return GpuInfo(
        name=name.value.decode(errors="replace"),
        capability=10 * attribute(_MAJOR) + attribute(_MINOR),
        num_sms=attribute(_MULTIPROCESSORS),
        memory=memory.value,
        integrated=bool(attribute(_INTEGRATED)),
    )
