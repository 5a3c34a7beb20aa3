"""Matrix × matrix for prefill, by cuBLAS.

The library is found through cuda.pathfinder (a part of cuda-bindings): the CUDA toolkit's, JetPack's or the wheel's.
"""

from __future__ import annotations

import ctypes

from engine_core.cuda.driver import DeviceArray, DeviceError, DeviceUnavailableError, Stream
from engine_core.cuda.kernels import check

# cublas_api.h and library_types.h.
_OP_N, _OP_T = 0, 1
TYPES = {"fp32": 0, "fp16": 2, "bf16": 14}
_COMPUTE_32F = 68
_GEMM_DEFAULT = -1


def load_library(name: str = "cublas") -> ctypes.CDLL:
    """Return cublas or cublasLt. Raises DeviceUnavailableError."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(load_nvidia_dynamic_lib(name).abs_path)
    except (ImportError, RuntimeError, OSError) as error:
        raise DeviceUnavailableError(
            f"cuBLAS was not found ({error}); install the CUDA toolkit's, or pip install nvidia-cublas."
        ) from error


class Blas:
    """A cuBLAS handle bound to one stream and one workspace of ours, so that it allocates nothing itself."""

    def __init__(self, stream: Stream, workspace: DeviceArray) -> None:
        """Raises DeviceUnavailableError or DeviceError."""
        self._library = load_library()
        self._handle: ctypes.c_void_p | None = ctypes.c_void_p()
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        self._call("cublasSetStream_v2", self._handle, ctypes.c_void_p(int(stream.handle)))
        size = ctypes.c_size_t(workspace.nbytes)
        self._call("cublasSetWorkspace_v2", self._handle, ctypes.c_void_p(workspace.address), size)

    def _call(self, name: str, *args: object) -> None:
        status = getattr(self._library, name)(*args)
        if status != 0:
            raise DeviceError(f"{name} failed with status {status}; configure again, and report it if it stays.")

    def matmul(
        self, rows: DeviceArray, weight: DeviceArray, output: DeviceArray, count: int, accumulate: bool = False
    ) -> None:
        """Queues output [n, m] ← rows [n, k] · weight [m, k]ᵀ for the first ``count`` rows; ``accumulate`` adds to it.

        rows and weight are fp16 or bf16, output the same or float32; sums are float32. Only float32 is added to.
        Raises KernelArgumentError.
        """
        (m, k), n = weight.shape, rows.shape[0]
        assert count <= n
        check("rows", rows, (n, k), weight.dtype)
        check("output", output, (n, m), "fp32" if accumulate or output.dtype == "fp32" else weight.dtype)
        kind = TYPES[weight.dtype]
        # Column-major to cuBLAS: output[m, n] = weight[k, m]ᵀ · rows[k, n].
        self._call(
            "cublasGemmEx",
            *(self._handle, _OP_T, _OP_N, m, count, k, ctypes.byref(self._one)),
            *(ctypes.c_void_p(weight.address), kind, k, ctypes.c_void_p(rows.address), kind, k),
            ctypes.byref(self._one if accumulate else self._zero),
            *(ctypes.c_void_p(output.address), TYPES[output.dtype], m, _COMPUTE_32F, _GEMM_DEFAULT),
        )

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._call("cublasDestroy_v2", handle)
