"""CUDA C++ kernels, one ``.cu`` per operation, and their typed wrappers.

A wrapper checks the shapes, types and alignment of its arrays, specialises the source for them (all sizes are
compile-time constants), and returns a ``Launch`` to be queued as often as needed. Every wrapper has a slow
twin in ``reference`` that tests compare it with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine_core.device import Device, DeviceArray, DeviceError, Module
from engine_core.kernels.nvrtc import compile_kernel

_DIRECTORY = Path(__file__).parent
_SHARED_STATIC = 12 * 1024  # bytes of shared memory left for what kernels declare themselves


class KernelArgumentError(DeviceError):
    """An array handed to a kernel has another shape, type or alignment than the kernel reads."""


def check(name: str, array: DeviceArray, shape: tuple[int, ...], dtype: str) -> None:
    """Raises KernelArgumentError unless ``array`` is what the kernel reads: shape, type and 16-byte alignment."""
    if array.shape != shape or array.dtype != dtype:
        raise KernelArgumentError(
            f"{name} is {array.dtype} {list(array.shape)}, but the kernel reads {dtype} {list(shape)}."
        )
    if array.address % 16:
        raise KernelArgumentError(f"{name} starts at {array.address:#x}, but the kernel reads 16 bytes at a time.")


def kernel_source(name: str) -> tuple[str, dict[str, str]]:
    """(source of ``name``.cu, header name → text)."""
    headers = {path.name: path.read_text(encoding="utf-8") for path in _DIRECTORY.glob("*.cuh")}
    return (_DIRECTORY / f"{name}.cu").read_text(encoding="utf-8"), headers


def float_define(value: float) -> str:
    """A float32 literal of C++."""
    return f"{value:.9e}f"


class Kernels:
    """The kernels of one device and one 16-bit type ("fp16" or "bf16"), compiled when first asked for."""

    def __init__(self, device: Device, dtype: str) -> None:
        assert dtype in ("fp16", "bf16"), dtype
        self.device = device
        self.dtype = dtype
        self._modules: dict[tuple, Module] = {}

    def function(self, source: str, entry: str, defines: dict[str, int | str], shared: int = 0) -> Any:
        """Kernel ``entry`` of ``source``.cu specialised by ``defines``. Raises KernelCompileError or DeviceError."""
        defines = {"BF16": int(self.dtype == "bf16"), **defines}
        key = (source, *sorted(defines.items()))
        if key not in self._modules:
            text, headers = kernel_source(source)
            binary = compile_kernel(text, name=source, arch=self.device.arch, headers=headers, defines=defines)
            self._modules[key] = Module(self.device, binary)
        return self._modules[key].function(entry, shared)

    @property
    def shared_budget(self) -> int:
        """Bytes of dynamic shared memory a kernel of a decode step takes, so that the next one fits beside it.

        If it does not need them, too: a third kernel would fit else, and its CTAs would be spread unevenly.
        """
        return self.device.max_shared // 2 - _SHARED_STATIC

    def close(self) -> None:
        while self._modules:
            self._modules.popitem()[1].close()
