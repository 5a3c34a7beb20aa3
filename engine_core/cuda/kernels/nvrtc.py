"""Compiling CUDA C++ with NVRTC for the GPU that is there, through a cache on disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from engine_core.cuda.driver import DeviceUnavailableError, KernelCompileError, bindings
from engine_core.formats.atomic import replaced_file


def kernel_cache_dir() -> Path:
    """Return the kernel cache: $EDGELLM_KERNEL_CACHE, or edgellm_ros/kernels in the user's cache directory."""
    if os.environ.get("EDGELLM_KERNEL_CACHE"):
        return Path(os.environ["EDGELLM_KERNEL_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgellm_ros" / "kernels"


def compile_kernel(
    source: str, *, name: str, arch: str, headers: dict[str, str], defines: dict[str, int | str]
) -> bytes:
    """CUDA C++ to machine code for ``arch`` (such as sm_87), by NVRTC, through the cache on disk.

    The cache key is the SHA-256 of source, headers, options and NVRTC's version. A cache that cannot be written is
    done without. Raises KernelCompileError with NVRTC's log, DeviceUnavailableError without NVRTC.
    """
    _, nvrtc = bindings()
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        raise DeviceUnavailableError(
            f"NVRTC was not found ({error}); install the CUDA toolkit's, or pip install nvidia-cuda-nvrtc."
        ) from error
    options = [f"-arch={arch}", "-std=c++17", "-default-device", "-lineinfo"]
    options += [f"-D{key}={value}" for key, value in sorted(defines.items())]
    text = "\0".join([source, *(f"{k}\0{v}" for k, v in sorted(headers.items())), *options, f"{major}.{minor}"])
    path = kernel_cache_dir() / f"{name}-{arch}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.cubin"
    if path.is_file():
        return path.read_bytes()
    binary = _run_nvrtc(nvrtc, source, name, headers, options)
    try:
        with replaced_file(path) as file:
            file.write_bytes(binary)
    except OSError:
        pass
    return binary


def _run_nvrtc(nvrtc: Any, source: str, name: str, headers: dict[str, str], options: list[str]) -> bytes:
    names = [key.encode() for key in headers]
    texts = [value.encode() for value in headers.values()]
    code, program = nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), len(names), texts, names)
    if int(code) != 0:
        raise KernelCompileError(f"nvrtcCreateProgram failed for {name} with {code.name}; report it with the GPU.")
    try:
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if int(code) != 0:
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = b" " * size
            nvrtc.nvrtcGetProgramLog(program, log)
            raise KernelCompileError(
                f"nvrtcCompileProgram failed for {name} with {code.name} ({' '.join(options)}); "
                f"report it with this log:\n{log.decode(errors='replace').strip(chr(0))}"
            )
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        binary = b" " * size
        nvrtc.nvrtcGetCUBIN(program, binary)
        return binary
    finally:
        nvrtc.nvrtcDestroyProgram(program)
