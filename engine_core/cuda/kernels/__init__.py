"""CUDA C++ kernels, one ``.cu`` per operation, and their typed wrappers.

A wrapper checks the shapes, dtypes and alignment of its arrays, specialises the source for them (all sizes are
compile-time constants), takes its launch configuration from ``launch_configs`` and returns a ``Launch`` to be queued
as often as needed. Every wrapper has a reference in ``reference`` that tests compare it with. docs/kernels.md says what
the kernels expect of each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine_core.cuda.driver import Device, DeviceArray, DeviceError, Module
from engine_core.cuda.kernels.launch_configs import Config, Gpu, LaunchConfigs, Problem
from engine_core.cuda.kernels.nvrtc import compile_kernel

_DIRECTORY = Path(__file__).parent
CHUNK_WORDS = 2  # int32: a chunk's first position in the KV cache, and its tokens; Chunk of common.cuh


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
    """Return (source of ``name``.cu, header name → text)."""
    headers = {path.name: path.read_text(encoding="utf-8") for path in _DIRECTORY.glob("*.cuh")}
    return (_DIRECTORY / f"{name}.cu").read_text(encoding="utf-8"), headers


def source_hash() -> str:
    """Return the SHA-256 of everything that launch configurations depend on: kernels, headers, wrappers, rules."""
    digest = hashlib.sha256()
    for path in sorted(path for path in _DIRECTORY.iterdir() if path.suffix in (".cu", ".cuh", ".py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def gpu_of(device: Device) -> Gpu:
    """Return what launch configurations depend on of ``device``."""
    return Gpu(device.name, device.capability, device.num_sms, device.max_shared)


def float_define(value: float) -> str:
    """Return ``value`` as a float32 literal of C++."""
    return f"{value:.9e}f"


class Kernels:
    """The kernels of one device and one 16-bit type ("fp16" or "bf16"), compiled when first asked for."""

    def __init__(self, device: Device, dtype: str, gpu: Gpu | None = None) -> None:
        """``gpu``: what to launch for, ``gpu_of(device)`` unless given. Fewer SMs leave the others without work."""
        assert dtype in ("fp16", "bf16"), dtype
        self.device = device
        self.dtype = dtype
        self.configs = LaunchConfigs(gpu or gpu_of(device))
        self._modules: dict[tuple, Module] = {}
        self._functions: dict[tuple, Any] = {}
        self._wanted: set[tuple] | None = None  # keys

    def function(self, source: str, entry: str, defines: dict[str, int | str], shared: int = 0) -> Any:
        """Return kernel ``entry`` of ``source``.cu specialised by ``defines``; ``shared``: bytes of its dynamic shared
        memory. Raises KernelCompileError or DeviceError."""
        defines = {"BF16": int(self.dtype == "bf16"), **defines}
        key = (source, *sorted(defines.items()))
        if self._wanted is not None:
            self._wanted.add(key)
            return None
        if key not in self._modules:
            self._modules[key] = Module(self.device, self._compile(key))
        if (key, entry, shared) not in self._functions:
            self._functions[key, entry, shared] = self._modules[key].function(entry, shared)
        return self._functions[key, entry, shared]

    def compile_ahead(self, prepare: Callable[[], object]) -> None:
        """Compiles, side by side, what ``prepare`` asks for: a first configure waits for little else.

        ``prepare`` makes launches and queues none: it is run here only to see which kernels it takes.
        Raises KernelCompileError or DeviceError.
        """
        with self._noting() as wanted:
            prepare()
        missing = list(wanted - self._modules.keys())
        # Not on all cores: a robot has other work while it configures.
        with ThreadPoolExecutor(max(2, (os.cpu_count() or 1) // 2)) as threads:
            binaries = list(threads.map(self._compile, missing))
        for key, binary in zip(missing, binaries, strict=True):
            self._modules[key] = Module(self.device, binary)

    def problems(self, prepare: Callable[[], object]) -> list[Problem[Any]]:
        """Return what the launches that ``prepare`` makes look up configurations for. Nothing is compiled."""
        with self._noting(), self.configs.noting() as problems:
            prepare()
        return list(problems)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[set[tuple]]:
        """Within the context ``function`` only adds to the set that is yielded."""
        wanted: set[tuple] = set()
        self._wanted = wanted
        try:
            yield wanted
        finally:
            self._wanted = None

    def _compile(self, key: tuple) -> bytes:
        source, *defines = key
        text, headers = kernel_source(source)
        return compile_kernel(text, name=source, arch=self.device.arch, headers=headers, defines=dict(defines))

    @property
    def gpu(self) -> Gpu:
        """The GPU that grids and configurations are chosen for."""
        return self.configs.gpu

    def config(self, problem: Problem[Config]) -> Config:
        """Return the launch configuration of ``problem``."""
        return self.configs.lookup(problem)

    def close(self) -> None:
        """Unload everything compiled; what is asked for afterwards is loaded again. Launches made before are void."""
        self._functions.clear()
        while self._modules:
            self._modules.popitem()[1].close()
