"""Energy and power of an NVIDIA GPU, asked of its management library (NVML): needs no Python package and no context."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_SUCCESS = 0


class NvmlDevice:
    """One GPU as NVML knows it."""

    def __init__(self, library: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self._library = library
        self._handle = handle

    def energy(self) -> float | None:
        """Return the joules since the driver was loaded; None where the GPU does not count them."""
        found = self._value("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong())
        return None if found is None else found / 1e3

    def power(self) -> float | None:
        """Return watts; None where the GPU does not tell."""
        found = self._value("nvmlDeviceGetPowerUsage", ctypes.c_uint())
        return None if found is None else found / 1e3

    def _value(self, name: str, value: ctypes.c_uint | ctypes.c_ulonglong) -> int | None:
        try:
            code = getattr(self._library, name)(self._handle, ctypes.byref(value))
        except AttributeError:  # an older library
            return None
        return value.value if code == _SUCCESS else None


def open_nvml(ordinal: int = 0, load: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> NvmlDevice | None:
    """Return CUDA device ``ordinal``, which need not have the same number there; None without NVML or such a GPU."""
    try:
        cuda, library = load("libcuda.so.1"), load("libnvidia-ml.so.1")
    except OSError:
        return None
    device, bus = ctypes.c_int(), ctypes.create_string_buffer(32)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), ordinal):
        return None
    if cuda.cuDeviceGetPCIBusId(bus, len(bus), device) or library.nvmlInit_v2() != _SUCCESS:
        return None
    handle = ctypes.c_void_p()
    if library.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(handle)) != _SUCCESS:
        return None
    return NvmlDevice(library, handle)
