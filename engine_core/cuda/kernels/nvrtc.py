"""Compiling CUDA C++ with NVRTC for the GPU that is there, through a cache on disk."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
from pathlib import Path
from typing import Any

from engine_core.cuda.driver import DeviceUnavailableError, KernelCompileError, bindings
from engine_core.formats.atomic import replaced_file

_DIGEST_BYTES = hashlib.sha256().digest_size
_log = logging.getLogger(__name__)


def kernel_cache_dir() -> Path:
    """Return the kernel cache: $EDGELLM_KERNEL_CACHE, or edgellm_ros/kernels in the user's cache directory."""
    if os.environ.get("EDGELLM_KERNEL_CACHE"):
        return Path(os.environ["EDGELLM_KERNEL_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgellm_ros" / "kernels"


def compile_kernel(
    source: str, *, name: str, arch: str, headers: dict[str, str], defines: dict[str, int | str]
) -> bytes:
    """CUDA C++ to machine code for ``arch`` (such as sm_87), by NVRTC, through the cache on disk.

    The cache key is the SHA-256 of source, headers, options and NVRTC's version. A cached file is run on the GPU, so it
    is taken only if nobody but this user and root can write it, and if it is whole (its own SHA-256 stands in front).
    A cache that cannot be written is done without. Raises KernelCompileError with NVRTC's log, DeviceUnavailableError
    without NVRTC.
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
    if (cached := _read_cached(path)) is not None:
        return cached
    binary = _run_nvrtc(nvrtc, source, name, headers, options)
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replaced_file(path) as file:
            file.write_bytes(hashlib.sha256(binary).digest() + binary)
    return binary


def _read_cached(path: Path) -> bytes | None:
    """Return the machine code in a file of the cache; None if there is none, or none to trust."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            for status in (os.fstat(file.fileno()), path.parent.stat()):
                if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    _log.warning("%s is not used: other users can write it (chmod go-w, chown).", path)
                    return None
            content = file.read()
    except OSError:
        return None
    digest, binary = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return binary if hashlib.sha256(binary).digest() == digest else None


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
