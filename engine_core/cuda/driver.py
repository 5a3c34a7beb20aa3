"""The NVIDIA GPU: memory, streams, events, graphs, launches. The one module that talks to the driver.

Everything goes through ``cuda.bindings`` (pip install cuda-bindings), imported when a ``Device`` is opened, so that
this module imports on a machine without a GPU. Nothing is allocated behind the caller's back: ``Device.allocations``
counts every call that takes device or pinned host memory.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine_core.errors import BackendUnavailableError, EngineFaultError, InsufficientMemoryError
from engine_core.memory import format_bytes

# Bytes per element of what a kernel can read or write. bf16 and fp16 are carried as uint16 on the host.
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int32": 4, "uint32": 4, "uint64": 8, "uint8": 1, "int8": 1, "fp8": 1}
ALIGNMENT = 512  # bytes; of every array of an arena, what TensorRT asks of its scratch


class DeviceError(EngineFaultError):
    """A CUDA call failed; the message names the call, the code and what to do."""


class DeviceUnavailableError(BackendUnavailableError):
    """No usable NVIDIA GPU, driver or CUDA Python package on this machine."""


class DeviceMemoryError(DeviceError, InsufficientMemoryError):
    """The driver refused an allocation."""


class KernelCompileError(BackendUnavailableError):
    """NVRTC refused a kernel; the message carries its log."""


_HINTS = {
    "CUDA_ERROR_ILLEGAL_ADDRESS": "a kernel left its memory; report it with the model and the prompt length",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "remove the kernel cache and configure again",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": "the kernel does not fit this GPU; report its name and the GPU",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process holds the GPU; stop it",
}


def bindings() -> tuple[Any, Any]:
    """Return (driver, nvrtc) of cuda.bindings. Raises DeviceUnavailableError."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise DeviceUnavailableError(
            "The cuda backend needs the Python package 'cuda-bindings' of this machine's CUDA version; "
            "install it, for instance with pip install 'cuda-bindings==12.*' nvidia-cuda-nvrtc-cu12."
        ) from error
    return driver, nvrtc


@dataclass(frozen=True)
class DeviceArray:
    """A view of device memory, contiguous, row-major. It owns nothing."""

    address: int
    shape: tuple[int, ...]
    dtype: str  # a key of ITEM_BYTES

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def at(self, *index: int) -> DeviceArray:
        """Return the sub-array at leading indices, as ``array[i, j]`` of numpy."""
        rest = self.shape[len(index) :]
        offset = 0
        for position, extent in zip(index, self.shape, strict=False):
            assert 0 <= position < extent, (index, self.shape)
            offset = offset * extent + position
        return DeviceArray(self.address + offset * math.prod(rest) * ITEM_BYTES[self.dtype], rest, self.dtype)

    def reshape(self, *shape: int) -> DeviceArray:
        assert math.prod(shape) == math.prod(self.shape), (shape, self.shape)
        return DeviceArray(self.address, shape, self.dtype)


class Device:
    """One GPU and its primary context, shared with other CUDA users of the process."""

    def __init__(self, ordinal: int = 0) -> None:
        """Raises DeviceUnavailableError."""
        self._driver, self._nvrtc = bindings()
        self.allocations = 0
        self._context = None
        try:
            self.call("cuInit", 0)
            self._handle = self.call("cuDeviceGet", ordinal)
            self._context = self.call("cuDevicePrimaryCtxRetain", self._handle)
            self.call("cuCtxSetCurrent", self._context)
        except (DeviceError, RuntimeError) as error:
            self.close()
            raise DeviceUnavailableError(
                f"No NVIDIA GPU can be used here ({error}); check nvidia-smi, or use the backend onnxruntime."
            ) from error
        attribute = self._driver.CUdevice_attribute
        self.name = self.call("cuDeviceGetName", 256, self._handle).split(b"\0")[0].decode()
        self.capability = 10 * self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        self.capability += self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        self.num_sms = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self.max_shared = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        self.arch = f"sm_{self.capability}"
        # Its memory is the host's, as on a Jetson.
        self.is_integrated = bool(self._attribute(attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED))

    def memory_bandwidth(self) -> float:
        """Return the bytes per second of its memory by clock and bus width; 0 where the driver does not tell."""
        attribute = self._driver.CUdevice_attribute
        clock = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)  # kHz, two transfers each
        width = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)  # bits
        return 2e3 * clock * width / 8

    def _attribute(self, which: Any) -> int:
        return int(self.call("cuDeviceGetAttribute", which, self._handle))

    def call(self, name: str, *args: Any) -> Any:
        """Calls driver function ``name``; returns its value. Raises DeviceError or DeviceMemoryError."""
        code, *values = getattr(self._driver, name)(*args)
        if int(code) != 0:
            text = getattr(code, "name", str(code))
            if text == "CUDA_ERROR_OUT_OF_MEMORY":
                raise DeviceMemoryError(
                    f"{name} failed with {text}; lower max_context, close other users of the GPU "
                    "or take a smaller variant."
                )
            hint = _HINTS.get(text, "configure again, and restart the process if it happens again")
            raise DeviceError(f"{name} failed with {text} ({int(code)}); {hint}.")
        return values[0] if len(values) == 1 else tuple(values)

    def memory_info(self) -> tuple[int, int]:
        """Return (free, total) bytes of the GPU."""
        free, total = self.call("cuMemGetInfo")
        return int(free), int(total)

    def make_current(self) -> None:
        """Binds the context to the calling thread; needed once in each thread that uses the device."""
        self.call("cuCtxSetCurrent", self._context)

    def close(self) -> None:
        """Gives the context back; may be called twice. What was made on it has to be closed before."""
        context, self._context = self._context, None
        if context is not None:
            self.call("cuDevicePrimaryCtxRelease", self._handle)

    # --- memory ---------------------------------------------------------------------------------------

    def upload(self, array: DeviceArray, values: np.ndarray) -> None:
        """Copies host values (same bytes) to ``array``; any stream may use it at once.

        From pageable memory cuMemcpyHtoD returns when the driver has its own copy ("API synchronization behavior" in
        the CUDA driver API's manual), and a non-blocking stream does not wait for the rest of the way.
        """
        values = np.ascontiguousarray(values)
        assert values.nbytes == array.nbytes, (values.shape, array.shape)
        self.call("cuMemcpyHtoD", array.address, values.ctypes.data, values.nbytes)
        self.call("cuStreamSynchronize", 0)  # the default stream's, on which the copy is

    def download(self, array: DeviceArray) -> np.ndarray:
        """Return a host copy of ``array``; bf16 comes as uint16, fp8 as uint8. Waits for the whole device."""
        types = {"fp32": "float32", "fp16": "float16", "bf16": "uint16", "fp8": "uint8"}
        values = np.empty(array.shape, dtype=types.get(array.dtype, array.dtype))
        self.synchronize()
        self.call("cuMemcpyDtoH", values.ctypes.data, array.address, values.nbytes)
        return values

    def synchronize(self) -> None:
        """Waits for everything queued on any stream."""
        self.call("cuCtxSynchronize")

    def supports_overlap(self) -> bool:
        """Return whether a kernel may start while the one before it ends (programmatic dependent launch, sm_90)."""
        return self.capability >= 90


class Arena:
    """One device allocation, handed out from the front."""

    def __init__(self, device: Device, num_bytes: int) -> None:
        """Raises DeviceMemoryError."""
        self._device = device
        self.num_bytes = num_bytes
        self.used = 0
        self._address: int | None = int(device.call("cuMemAlloc", num_bytes))
        device.allocations += 1

    def take(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        assert self._address is not None
        array = DeviceArray(self._address + self.used, shape, dtype)
        self.used += aligned(array.nbytes)
        if self.used > self.num_bytes:
            raise DeviceMemoryError(
                f"The arena has {format_bytes(self.num_bytes)}, but {format_bytes(self.used)} are asked of it; "
                "the memory plan is wrong: report the model and the configuration."
            )
        return array

    def close(self) -> None:
        address, self._address = self._address, None
        if address is not None:
            self._device.call("cuMemFree", address)


def aligned(num_bytes: int) -> int:
    """Return ``num_bytes`` rounded up to what an arena takes for it."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class PinnedArray:
    """Page-locked host memory the GPU can read and write: ``host`` is its numpy view, ``device`` its address there."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: str) -> None:
        self._device = device
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        self._pointer = device.call("cuMemHostAlloc", num_bytes, 0x02)  # CU_MEMHOSTALLOC_DEVICEMAP
        device.allocations += 1
        self.address = int(self._pointer)
        self.device_address = int(device.call("cuMemHostGetDevicePointer", self._pointer, 0))
        buffer = (ctypes.c_uint8 * num_bytes).from_address(self.address)
        self.host = np.frombuffer(buffer, dtype=dtype).reshape(shape)
        self.host[...] = 0

    def close(self) -> None:
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            self._device.call("cuMemFreeHost", pointer)


# --- order ------------------------------------------------------------------------------------------------


class Event:
    """A point in a stream. ``timing``: keeps a time stamp for ``elapsed``."""

    def __init__(self, device: Device, timing: bool = False) -> None:
        self._device = device
        self._event = device.call("cuEventCreate", 0 if timing else 0x2)  # CU_EVENT_DISABLE_TIMING

    def record(self, stream: Stream) -> None:
        self._device.call("cuEventRecord", self._event, stream.handle)

    def wait(self) -> None:
        """Blocks the calling thread until the point is reached. Raises DeviceError if a step before it failed."""
        self._device.call("cuEventSynchronize", self._event)

    def elapsed(self, start: Event) -> float:
        """Return the seconds from ``start`` to this event; both must be reached."""
        return 1e-3 * float(self._device.call("cuEventElapsedTime", start._event, self._event))

    def close(self) -> None:
        event, self._event = self._event, None
        if event is not None:
            self._device.call("cuEventDestroy", event)


class Stream:
    """An ordered queue of device work."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.handle = device.call("cuStreamCreate", 0x1)  # CU_STREAM_NON_BLOCKING

    def wait(self) -> None:
        self.device.call("cuStreamSynchronize", self.handle)

    def upload(self, array: DeviceArray, pinned: PinnedArray, offset: int = 0) -> None:
        """Queues a copy of ``array.nbytes`` bytes from byte ``offset`` of pinned memory."""
        self.device.call("cuMemcpyHtoDAsync", array.address, pinned.address + offset, array.nbytes, self.handle)

    def zero(self, array: DeviceArray) -> None:
        """Queues filling ``array`` with zero bytes."""
        self.fill(array, 0)

    def fill(self, array: DeviceArray, byte: int) -> None:
        """Queues filling ``array`` with copies of a byte."""
        self.device.call("cuMemsetD8Async", array.address, byte, array.nbytes, self.handle)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Queues a copy of ``rows`` rows of ``width`` bytes that lie ``pitch`` bytes apart.

        ``target``, ``source``: addresses of device memory or of pinned memory.
        """
        driver = self.device._driver
        copy = driver.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_UNIFIED
        copy.srcDevice, copy.srcPitch = source, source_pitch
        copy.dstDevice, copy.dstPitch = target, target_pitch
        copy.WidthInBytes, copy.Height = width, rows
        self.device.call("cuMemcpy2DAsync", copy, self.handle)

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            self.device.call("cuStreamDestroy", handle)


class Graph:
    """Work captured once and replayed whole."""

    def __init__(self, stream: Stream, work: Any) -> None:
        """Captures what ``work()`` queues on ``stream``; nothing runs."""
        self._device = device = stream.device
        driver = device._driver
        self._exec = None
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        device.call("cuStreamBeginCapture", stream.handle, mode)
        try:
            work()
        finally:
            graph = device.call("cuStreamEndCapture", stream.handle)
        try:
            self._exec = device.call("cuGraphInstantiate", graph, 0)
        finally:
            device.call("cuGraphDestroy", graph)
        device.call("cuGraphUpload", self._exec, stream.handle)

    def replay(self, stream: Stream) -> None:
        self._device.call("cuGraphLaunch", self._exec, stream.handle)

    def close(self) -> None:
        exec_, self._exec = self._exec, None
        if exec_ is not None:
            self._device.call("cuGraphExecDestroy", exec_)


# --- kernels ----------------------------------------------------------------------------------------------


class Module:
    """Loaded machine code."""

    def __init__(self, device: Device, binary: bytes) -> None:
        self._device = device
        self._module = device.call("cuModuleLoadData", binary)

    def function(self, name: str, shared: int = 0) -> Any:
        """Return the kernel ``name``, allowed ``shared`` bytes of dynamic shared memory."""
        function = self._device.call("cuModuleGetFunction", self._module, name.encode())
        attributes = self._device._driver.CUfunction_attribute
        if shared:  # from 48 KiB on, counted with what the kernel declares itself, it must be asked for
            which = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._device.call("cuFuncSetAttribute", function, which, shared)
        # An SM that has to divide its memory anew between L1 cache and shared memory first runs empty: all
        # kernels want the same, so that each can start beside the one before it.
        which = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        self._device.call("cuFuncSetAttribute", function, which, 100)
        return function

    def close(self) -> None:
        module, self._module = self._module, None
        if module is not None:
            self._device.call("cuModuleUnload", module)


class Launch:
    """One kernel with its grid and arguments, prepared once and queued often.

    ``args``: addresses (int, or DeviceArray) and ctypes scalars; a scalar can be changed between launches through
    ``scalars`` (name → ctypes object). ``overlap``: the kernel calls griddepcontrol.wait before it reads what the
    kernel before it wrote, so it may start early. ``problem``: what its launch configuration was looked up by.
    """

    def __init__(
        self,
        device: Device,
        function: Any,
        grid: tuple[int, ...],
        block: int,
        args: list[Any],
        shared: int = 0,
        overlap: bool = True,
        problem: object | None = None,
    ) -> None:
        self.problem = problem
        self._device = device
        self._function = function
        self._values = [self._as_ctypes(arg) for arg in args]
        self._pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(value) for value in self._values))
        self._params = ctypes.addressof(self._pointers)
        driver = device._driver
        self._config = driver.CUlaunchConfig()
        self._config.gridDimX, self._config.gridDimY, self._config.gridDimZ = (*grid, 1, 1)[:3]
        self._config.blockDimX, self._config.blockDimY, self._config.blockDimZ = block, 1, 1
        self._config.sharedMemBytes = shared
        self._config.numAttrs = 0
        if overlap and device.supports_overlap():
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            self._config.attrs = [attribute]
            self._config.numAttrs = 1

    @staticmethod
    def _as_ctypes(arg: Any) -> Any:
        if isinstance(arg, DeviceArray):
            return ctypes.c_uint64(arg.address)
        return ctypes.c_uint64(arg) if isinstance(arg, int) else arg

    def set_grid(self, x: int) -> None:
        """Changes the grid's first dimension; the others stay."""
        self._config.gridDimX = x

    def __call__(self, stream: Stream) -> None:
        self._config.hStream = stream.handle
        self._device.call("cuLaunchKernelEx", self._config, self._function, self._params, 0)
