"""cuda.bindings.driver in host memory: addresses are the host's, a stream runs at once, a graph is a list of calls.

What the device layer asks of a driver, no more. Kernels are functions by name that read their arguments as the real
ones do. New memory is full of NaN bytes, as nothing says a real one's is not.
"""

from __future__ import annotations

import ast
import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np

import fake_kernels
from engine_core.cuda.kernels import reference, sampling
from engine_core.cuda.kernels.sampling import FAULT_EMPTY, FAULT_NAN, PARAMS, RING, STATE
from fake_kernels import address_of, array_at

POISON = 0xFF


class _Code(int):
    name = "CUDA_SUCCESS"


class _OutOfMemory(int):
    name = "CUDA_ERROR_OUT_OF_MEMORY"


class _Names:
    def __getattr__(self, name: str) -> str:
        return name


class FakeDriver:
    """``log``: every call's name, in order. ``kernels``: entry name → function(driver, defines, argument pointers)."""

    def __init__(self, memory: int = 1 << 30, capability: int = 90) -> None:
        self.memory, self.capability = memory, capability
        self.is_integrated = False  # its memory is the host's
        self.kernels: dict[str, Callable] = {
            "sample_scan": sample_scan,
            "sample_pick": sample_pick,
            "kv_append": kv_append,
            "log_probability": log_probability,
            **fake_kernels.KERNELS,
        }
        self.log: list[str] = []
        self.milliseconds: Callable[[], float] = lambda: 1.0  # between any two events
        self._buffers: dict[int, np.ndarray] = {}
        self._captured: list[Callable] | None = None
        self._on_the_way: list[Callable] = []  # copies from pageable memory, which nothing but a wait brings in
        self.CUdevice_attribute = self.CUmemorytype = self.CUfunction_attribute = _Names()
        self.CUstreamCaptureMode = self.CUlaunchAttributeID = _Names()
        self.CUDA_MEMCPY2D = self.CUlaunchConfig = SimpleNamespace
        self.CUlaunchAttribute = lambda: SimpleNamespace(value=SimpleNamespace())

    @property
    def used(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def run(self, work: Callable[[], None]) -> tuple[int]:
        """Queue ``work`` on a stream: it runs now, or is noted while a graph is captured."""
        if self._captured is None:
            work()
        else:
            self._captured.append(work)
        return (_Code(0),)

    def __getattr__(self, name: str):
        if not name.startswith("cu") or not hasattr(type(self), f"_{name}"):
            if name in _WITHOUT_EFFECT:
                return lambda *_: (self.log.append(name), (_Code(0), _WITHOUT_EFFECT[name]))[1]
            raise AttributeError(name)

        def call(*args):
            self.log.append(name)
            result = getattr(self, f"_{name}")(*args)
            return result if isinstance(result, tuple) else (_Code(0), result)  # a tuple has its code already

        return call

    # --- memory ---------------------------------------------------------------------------------------

    def _allocate(self, num_bytes: int):
        if self.used + num_bytes > self.memory:
            return (_OutOfMemory(2), None)
        buffer = np.full(num_bytes + 512, POISON, dtype=np.uint8)
        address = -(-buffer.ctypes.data // 512) * 512
        self._buffers[address] = buffer
        return address

    def _cuMemAlloc(self, num_bytes):
        return self._allocate(num_bytes)

    def _cuMemHostAlloc(self, num_bytes, _flags):
        return self._allocate(num_bytes)

    def _cuMemHostGetDevicePointer(self, pointer, _flags):
        return pointer

    def _cuMemFree(self, address):
        del self._buffers[int(address)]

    _cuMemFreeHost = _cuMemFree

    def _cuMemGetInfo(self):
        return (_Code(0), self.memory - self.used, self.memory)

    def _cuMemcpyHtoD(self, target, source, num_bytes):
        """Copy as late as a real driver may: other streams do not wait for it."""
        staged = ctypes.string_at(int(source), num_bytes)
        self._on_the_way.append(lambda: ctypes.memmove(int(target), staged, num_bytes))

    def _cuMemcpyDtoH(self, target, source, num_bytes):
        self._cuCtxSynchronize()
        ctypes.memmove(int(target), int(source), num_bytes)

    def _cuCtxSynchronize(self):
        while self._on_the_way:
            self._on_the_way.pop(0)()

    def _cuStreamSynchronize(self, stream):
        if stream == 0:
            self._cuCtxSynchronize()

    def _cuMemcpyHtoDAsync(self, target, source, num_bytes, _stream):
        return self.run(lambda: ctypes.memmove(int(target), int(source), num_bytes))

    def _cuMemsetD8Async(self, address, value, num_bytes, _stream):
        return self.run(lambda: ctypes.memset(int(address), value, num_bytes))

    def _cuMemcpy2DAsync(self, c, _stream):
        def rows(address, pitch):
            whole = array_at(address, ((c.Height - 1) * pitch + c.WidthInBytes,), np.uint8)
            return np.lib.stride_tricks.as_strided(whole, (c.Height, c.WidthInBytes), (pitch, 1))

        def work():
            rows(c.dstDevice, c.dstPitch)[:] = rows(c.srcDevice, c.srcPitch)

        return self.run(work)

    # --- the rest -------------------------------------------------------------------------------------

    def _cuDeviceGetName(self, _length, _device):
        return b"Fake GPU\0"

    def _cuDeviceGetAttribute(self, which, _device):
        values = {"MAJOR": self.capability // 10, "MINOR": self.capability % 10, "COUNT": 8, "OPTIN": 100 << 10}
        values |= {"INTEGRATED": self.is_integrated, "RATE": 1_000_000, "WIDTH": 256}
        return values[which.rsplit("_", 1)[1]]

    def _cuStreamBeginCapture(self, _stream, _mode):
        self._captured = []
        return (_Code(0),)

    def _cuStreamEndCapture(self, _stream):
        captured, self._captured = self._captured, None
        return captured

    def _cuGraphInstantiate(self, graph, _flags):
        return graph

    def _cuEventElapsedTime(self, _start, _end):
        return self.milliseconds()

    def _cuGraphLaunch(self, graph, _stream):
        for work in graph:
            work()
        return (_Code(0),)

    def _cuModuleLoadData(self, binary):
        return ast.literal_eval(binary.decode())

    def _cuModuleGetFunction(self, module, name):
        return (_Code(0), (name.decode(), module))

    def _cuLaunchKernelEx(self, config, function, params, _extra):
        entry, defines = function
        defines = {**defines, "GRID": config.gridDimX, "GRID_Y": config.gridDimY}  # what it is now
        return self.run(lambda: self.kernels[entry](defines, ctypes.cast(params, ctypes.POINTER(ctypes.c_void_p))))


_WITHOUT_EFFECT = dict.fromkeys(
    "cuInit cuDeviceGet cuDevicePrimaryCtxRetain cuDevicePrimaryCtxRelease cuCtxSetCurrent "
    "cuStreamCreate cuStreamDestroy cuEventCreate cuEventRecord cuEventSynchronize cuEventDestroy "
    "cuGraphDestroy cuGraphUpload cuGraphExecDestroy cuModuleUnload cuFuncSetAttribute".split(),
    7,
)


def compile_kernel(source: str, *, name: str, arch: str, headers: dict, defines: dict) -> bytes:
    return repr(dict(defines)).encode()


def install(monkeypatch, driver: FakeDriver) -> None:
    """Makes every ``Device`` opened from here on one of ``driver``, and cuBLAS numpy."""
    import engine_core.backends.cuda.model
    import engine_core.cuda.driver
    import engine_core.cuda.kernels

    monkeypatch.setattr(engine_core.cuda.driver, "bindings", lambda: (driver, None))
    monkeypatch.setattr(engine_core.cuda.kernels, "compile_kernel", compile_kernel)
    monkeypatch.setattr(engine_core.backends.cuda.model, "Blas", fake_kernels.FakeBlas)
    monkeypatch.setattr(engine_core.backends.cuda.model, "BlasLt", fake_kernels.FakeBlasLt)
    monkeypatch.setattr(engine_core.backends.cuda.model, "Fp8Gemm", fake_kernels.FakeFp8Gemm)


# --- kernels, as numpy --------------------------------------------------------------------------------------


def kv_append(defines: dict, args) -> None:
    """See kv_append.cu."""
    fresh, cache, start, state, token, position_out, index = (address_of(args, i) for i in (0, 1, 2, 4, 5, 6, 7))
    count = ctypes.c_int.from_address(args[3]).value
    state = array_at(state, (), STATE) if state else None
    position = int(array_at(start, (), np.int32)) if start else int(state["position"]) - 1
    layers, heads, vectors, context = (defines[key] for key in ("LAYERS", "KV_HEADS", "VECTORS", "CONTEXT"))
    if layers and count:
        source = array_at(fresh, (2 * layers, defines["FRESH"], 16), np.uint8)
        target = array_at(cache, (2 * layers, heads, context, vectors * 16), np.uint8)
        rows = source[:, : count * heads * vectors].reshape(2 * layers, count, heads, vectors * 16)
        rows = rows[:, : max(0, context - position)]
        target[:, :, position : position + rows.shape[1]] = rows.swapaxes(1, 2)
    if state is not None:
        array_at(token, (), np.int32)[...] = max(0, int(state["token"]))
        array_at(position_out, (), np.int32)[...] = min(int(state["position"]), context - 1)
        if index:
            array_at(index, (), np.uint64)[...] = min(int(state["position"]), context - 1)


def _rows_of(defines: dict, args, slots: int, count: int, strides: dict[int, int]) -> Iterator[list[int]]:
    """The addresses of the arguments before number ``slots``, of each sequence that has a slot.

    ``strides``: argument → bytes from one sequence to the next one.
    """
    addresses = [address_of(args, i) for i in range(slots)]
    if not defines["BATCHED"]:
        yield addresses
        return
    given = address_of(args, slots)
    named = array_at(given, (count,), np.int32) if given else np.zeros(count, dtype=np.int32)
    for row in np.flatnonzero(named >= 0):
        yield [address + int(row) * strides.get(i, 0) for i, address in enumerate(addresses)]


def sample_scan(defines: dict, args) -> None:
    """The steps of sample.cu that come before the choice."""
    rows = defines["ROWS"]
    words, scores = -(-rows // 32), sampling.scores_shape(rows)[0]
    strides = {0: 4 * rows, 1: 4 * words, 2: 4 * rows, 3: 4 * defines["MASK_WORDS"], 5: PARAMS.itemsize, 7: 4 * scores}
    for addresses in _rows_of(defines, args, 8, defines["GRID_Y"], strides):
        _scan(rows, *addresses)


def _scan(
    rows: int, logits: int, seen: int, bias: int, mask: int, vocab_map: int, params: int, _: int, scores: int
) -> None:
    params = array_at(params, (), PARAMS)
    values = array_at(logits, (rows,), np.float32).copy()
    if params["repetition_penalty"] != 1.0:
        bits = np.unpackbits(array_at(seen, (-(-rows // 32) * 4,), np.uint8), bitorder="little")[:rows]
        penalized = np.where(values < 0, values * params["repetition_penalty"], values / params["repetition_penalty"])
        values = np.where(bits, penalized, values)
    if params["has_bias"]:
        values += array_at(bias, (rows,), np.float32)
    if params["has_mask"]:
        ids = array_at(vocab_map, (rows,), np.int32) if vocab_map else np.arange(rows)
        words = array_at(mask, (int(ids.max()) // 32 + 1,), np.uint32)
        values[(words[ids // 32] >> (ids % 32).astype(np.uint32) & 1) == 0] = -np.inf
    array_at(scores, (rows,), np.float32)[:] = values


def log_probability(defines: dict, args) -> None:
    """See log_probability.cu."""
    row, place = (ctypes.c_int.from_address(args[i]).value for i in (1, 2))
    logits = array_at(address_of(args, 0), (defines["ROWS"],), np.float32).astype(np.float64)
    array_at(address_of(args, 3), (place + 1,), np.float32)[place] = reference.log_probability(logits, row)


def sample_pick(defines: dict, args) -> None:
    """sample.cu at temperature 0."""
    rows = defines["ROWS"]
    strides = {0: 4 * sampling.scores_shape(rows)[0], 1: PARAMS.itemsize, 2: STATE.itemsize, 3: 4 * -(-rows // 32)}
    for addresses in _rows_of(defines, args, 6, defines["GRID"], {**strides, 5: 4 * RING}):
        _pick(rows, *addresses)


def _pick(rows: int, scores: int, params: int, state: int, _: int, vocab_map: int, tokens: int) -> None:
    state = array_at(state, (), STATE)
    values = array_at(scores, (rows,), np.float32)
    assert float(array_at(params, (), PARAMS)["temperature"]) == 0.0
    if np.isnan(values).any():
        token = FAULT_NAN
    elif values.max() == -np.inf:
        token = FAULT_EMPTY
    else:
        token = int(values.argmax())
        token = int(array_at(vocab_map, (rows,), np.int32)[token]) if vocab_map else token
    array_at(tokens, (RING,), np.int32)[int(state["step"]) % RING] = token
    state["token"], state["position"], state["step"] = token, state["position"] + 1, state["step"] + 1
