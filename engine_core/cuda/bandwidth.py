"""The read bandwidth of a GPU's memory, measured."""

from __future__ import annotations

from engine_core.cuda.driver import ALIGNMENT, Arena, Device, Event, Launch, Module, Stream
from engine_core.cuda.kernels.nvrtc import compile_kernel

_SOURCE = """
extern "C" __global__ void read(const uint4* data, unsigned long long count, unsigned* sink) {
    unsigned sum = 0;
    const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    #pragma unroll 8
    for (unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x; i < count; i += stride) {
        uint4 v = __ldcs(data + i);
        sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == 0x12345678u) *sink = sum;
}
"""
_MOST = 4 << 30  # bytes
_REPEATS = 8


def read_bandwidth(device: Device) -> float:
    """Return the bytes per second of a kernel that only reads, the best of a few runs.

    It reads 4 GiB, or a quarter of what is free. Raises DeviceError, KernelCompileError or DeviceUnavailableError.
    """
    num_bytes = min(_MOST, device.memory_info()[0] // 4) // ALIGNMENT * ALIGNMENT
    binary = compile_kernel(_SOURCE, name="read", arch=device.arch, headers={}, defines={})
    stream, arena = Stream(device), Arena(device, num_bytes + ALIGNMENT)
    data, sink = arena.take((num_bytes // 4,), "uint32"), arena.take((1,), "uint32")
    stream.zero(data)
    module = Module(device, binary)
    args = [data, num_bytes // 16, sink]
    launch = Launch(device, module.function("read"), (device.num_sms * 8,), 256, args, overlap=False)
    best = float("inf")
    for _ in range(_REPEATS):
        start, end = Event(device, timing=True), Event(device, timing=True)
        start.record(stream)
        launch(stream)
        end.record(stream)
        end.wait()
        best = min(best, end.elapsed(start))
        start.close()
        end.close()
    module.close()
    arena.close()
    stream.close()
    return num_bytes / best
