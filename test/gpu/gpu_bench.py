"""A device to test on: arrays in, arrays out."""

from __future__ import annotations

import numpy as np

from engine_core.cuda.driver import Arena, Device, DeviceArray, Stream
from engine_core.cuda.kernels import Kernels, linear, reference
from engine_core.formats.number_formats import E4M3, to_minifloat

NUMPY = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}
NUMPY |= {"int32": np.int32, "uint32": np.uint32, "int8": np.int8, "fp8": np.uint8}
POISON = 0xFF  # bytes that are NaN in every floating-point type: an output nobody wrote shows


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float values as the device stores them."""
    if dtype == "fp8":
        return to_minifloat(np.asarray(values, dtype=np.float32), E4M3)
    if dtype != "bf16":
        return np.asarray(values).astype(NUMPY[dtype])
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return what the device stores, as float64."""
    if dtype == "fp8":
        return E4M3[values].astype(np.float64)
    if dtype == "bf16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """‖found − expected‖ / ‖expected‖; NaN never passes a comparison."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class Bench:
    """A device with a stream, an arena and a random generator; what is made on it lives until the test ends."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.stream = Stream(device)
        self._arena = Arena(device, 1 << 30)
        self._kernels: dict[str, Kernels] = {}
        self.random = np.random.default_rng(0)

    def start(self, seed: int) -> None:
        self._arena.used = 0
        self.random = np.random.default_rng(seed)

    def kernels(self, dtype: str) -> Kernels:
        return self._kernels.setdefault(dtype, Kernels(self.device, dtype))

    def poisoned(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        array = self._arena.take(shape, dtype)
        self.device.upload(array, np.full(array.nbytes, POISON, dtype=np.uint8))
        return array

    def put(self, values: np.ndarray, dtype: str) -> DeviceArray:
        array = self._arena.take(values.shape, dtype)
        self.device.upload(array, values)
        return array

    def chunk(self, position: int, count: int) -> DeviceArray:
        return self.put(np.array([position, count], dtype=np.int32), "int32")

    def normal(self, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> tuple[DeviceArray, np.ndarray]:
        """(on the device, the same values as float64)."""
        bits = to_bits(self.random.standard_normal(shape, dtype=np.float32) * scale, dtype)
        return self.put(bits, dtype), from_bits(bits, dtype)

    def get(self, array: DeviceArray) -> np.ndarray:
        return from_bits(self.device.download(array), array.dtype)

    def close(self) -> None:
        for kernels in self._kernels.values():
            kernels.close()
        self._arena.close()
        self.stream.close()


def epilogue_cases(bench: Bench, sums: np.ndarray, dtype: str) -> dict[int, tuple[DeviceArray, dict, np.ndarray]]:
    """Return (output, further arguments, what is expected in it) of each epilogue of a matrix multiplication.

    ``sums``: float64 [..., rows], what comes before the epilogue.
    """
    *lead, rows = sums.shape
    bias, b = bench.normal((rows,), dtype)
    residual, before = bench.normal((*lead, rows), "fp32")
    return {
        linear.STORE: (bench.poisoned((*lead, rows), dtype), {"bias": bias}, sums + b),
        linear.RESIDUAL: (residual, {}, before + sums),
        linear.SILU: (bench.poisoned((*lead, rows // 2), dtype), {}, reference.silu_multiply(sums)),
        linear.LOGITS: (bench.poisoned((*lead, rows), "fp32"), {}, sums),
    }
