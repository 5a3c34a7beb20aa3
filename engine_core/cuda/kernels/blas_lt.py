"""fp8 × fp8 GEMM for prefill, by cuBLASLt: codes of E4M3, a float32 scale for each row of both matrices.

cuBLASLt multiplies by the scales itself ("outer vector" scaling), from version 12.9 on and on GPUs of compute
capability 9.0; ``Fp8Gemm.plan`` says where it does. Algorithms are chosen when an engine is opened, and the workspace
is ours, so a GEMM takes no memory and can be captured.
"""

from __future__ import annotations

import ctypes
from typing import Any

from engine_core.cuda.driver import DeviceArray, DeviceError, DeviceUnavailableError, Stream
from engine_core.cuda.kernels import check
from engine_core.cuda.kernels.blas import TYPES, load_library

# cublasLt.h and library_types.h.
_E4M3 = 28  # CUDA_R_8F_E4M3
_FLOAT = TYPES["fp32"]
_COMPUTE_32F = 68
_OP_T = 1
_TRANSPOSE_A, _A_SCALES, _B_SCALES, _FAST, _A_MODE, _B_MODE = 3, 17, 18, 25, 31, 32  # of a matmul's description
_MODE_OUTER_VECTOR = 3  # CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F
_WORKSPACE_BYTES = 1  # CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
_FIRST_VERSION = 120900  # that scales rows
_CAPABILITY = 90
_GRAIN = 16  # fp8 sizes are multiples of it


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace_size", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class BlasLt:
    """A cuBLASLt handle with one stream and one workspace of ours. It owns what its GEMMs are made of."""

    def __init__(self, stream: Stream, workspace: DeviceArray) -> None:
        """Raises DeviceUnavailableError or DeviceError."""
        self._library = load_library("cublasLt")
        self.stream, self.workspace = stream, workspace
        self._handle: ctypes.c_void_p | None = None
        self._made: list[tuple[str, ctypes.c_void_p]] = []  # what destroys each, and it
        self._library.cublasLtGetVersion.restype = ctypes.c_size_t
        self.version = int(self._library.cublasLtGetVersion())
        handle = ctypes.c_void_p()
        self.call("cublasLtCreate", ctypes.byref(handle))
        self._handle = handle

    @classmethod
    def open(cls, stream: Stream, workspace: DeviceArray) -> BlasLt | None:
        """Return one, or None where no cuBLASLt is installed that multiplies by scales of rows on this GPU."""
        if stream.device.capability != _CAPABILITY:
            return None
        try:
            found = cls(stream, workspace)
        except DeviceUnavailableError:
            return None
        if found.version >= _FIRST_VERSION:
            return found
        found.close()
        return None

    def status(self, name: str, *args: object) -> int:
        return int(getattr(self._library, name)(*args))

    def call(self, name: str, *args: object) -> None:
        if (status := self.status(name, *args)) != 0:
            raise DeviceError(f"{name} failed with status {status}; configure again, and report it if it stays.")

    def make(self, kind: str, *args: object) -> ctypes.c_void_p:
        """Return a new object of cuBLASLt, such as a MatrixLayout, which ``close`` destroys."""
        made = ctypes.c_void_p()
        self.call(f"cublasLt{kind}Create", ctypes.byref(made), *args)
        self._made.append((f"cublasLt{kind}Destroy", made))
        return made

    def layout(self, dtype: int, rows: int, columns: int) -> ctypes.c_void_p:
        """Return a column-major matrix without gaps."""
        return self.make("MatrixLayout", dtype, ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows))

    @property
    def handle(self) -> ctypes.c_void_p:
        assert self._handle is not None, "it is closed"
        return self._handle

    def close(self) -> None:
        """May be called twice; its GEMMs are void then."""
        while self._made:
            destroy, made = self._made.pop()
            self.call(destroy, made)
        handle, self._handle = self._handle, None
        if handle is not None:
            self.call("cublasLtDestroy", handle)


class Fp8Gemm:
    """output [n, m] ← (rows · row_scales) [n, k] · (weight · weight_scales)ᵀ [k, m] for the first rows.

    ``rows`` and ``weight`` [m, k]: codes of E4M3, uint8; scales: float32 [n] and [m]. ``output``: 16-bit or float32;
    ``accumulate`` adds to it. Sums are float32, of parts that the tensor cores add with about 13 bits.
    """

    def __init__(
        self,
        lt: BlasLt,
        rows: DeviceArray,
        row_scales: DeviceArray,
        weight: DeviceArray,
        weight_scales: DeviceArray,
        output: DeviceArray,
        accumulate: bool = False,
    ) -> None:
        """Raises KernelArgumentError or DeviceError."""
        (n, k), m = rows.shape, weight.shape[0]
        check("rows", rows, (n, k), "uint8")
        check("row_scales", row_scales, (n,), "fp32")
        check("weight", weight, (m, k), "uint8")
        check("weight_scales", weight_scales, (m,), "fp32")
        check("output", output, (n, m), "fp32" if accumulate else output.dtype)
        self._lt, self._rows, self._weight, self._output = lt, rows, weight, output
        self._one, self._beta = ctypes.c_float(1), ctypes.c_float(accumulate)
        self._plans: dict[int, tuple[Any, ...]] = {}  # by rows: layouts of B and of C, the algorithm
        self._description = lt.make("MatmulDesc", _COMPUTE_32F, _FLOAT)
        self._set(_TRANSPOSE_A, ctypes.c_int32(_OP_T))  # the one way in which fp8 is multiplied
        for mode, pointer, scales in ((_A_MODE, _A_SCALES, weight_scales), (_B_MODE, _B_SCALES, row_scales)):
            self._set(mode, ctypes.c_int32(_MODE_OUTER_VECTOR))
            self._set(pointer, ctypes.c_void_p(scales.address))
        self._set(_FAST, ctypes.c_int8(1))
        self._a = lt.layout(_E4M3, k, m)

    def _set(self, attribute: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._lt.call("cublasLtMatmulDescSetAttribute", self._description, attribute, ctypes.byref(value), size)

    def plan(self, count: int) -> bool:
        """Choose the algorithm for ``count`` rows; False if cuBLASLt has none. Raises DeviceError."""
        lt, k, m = self._lt, self._rows.shape[1], self._weight.shape[0]
        assert count <= self._rows.shape[0]
        if count in self._plans:
            return True
        if k % _GRAIN or m % _GRAIN or count % _GRAIN:
            return False
        b, c = lt.layout(_E4M3, k, count), lt.layout(TYPES[self._output.dtype], m, count)
        preference, size = lt.make("MatmulPreference"), ctypes.c_size_t(lt.workspace.nbytes)
        lt.call(
            "cublasLtMatmulPreferenceSetAttribute",
            *(preference, _WORKSPACE_BYTES, ctypes.byref(size), ctypes.c_size_t(ctypes.sizeof(size))),
        )
        found, number = _Heuristic(), ctypes.c_int()
        status = lt.status(
            "cublasLtMatmulAlgoGetHeuristic",
            *(lt.handle, self._description, self._a, b, c, c, preference, 1, ctypes.byref(found), ctypes.byref(number)),
        )
        if status != 0 or number.value < 1 or found.state != 0:
            return False
        self._plans[count] = b, c, found
        return True

    def __call__(self, count: int) -> None:
        """Queue it for a number of rows that is planned. Raises DeviceError."""
        lt, (b, c, found) = self._lt, self._plans[count]
        output = ctypes.c_void_p(self._output.address)
        lt.call(
            "cublasLtMatmul",
            *(lt.handle, self._description, ctypes.byref(self._one)),
            *(ctypes.c_void_p(self._weight.address), self._a, ctypes.c_void_p(self._rows.address), b),
            *(ctypes.byref(self._beta), output, c, output, c, ctypes.byref(found.algo)),
            *(ctypes.c_void_p(lt.workspace.address), ctypes.c_size_t(found.workspace_size)),
            ctypes.c_void_p(int(lt.stream.handle)),
        )
