"""What an fp8 × fp8 GEMM reads: activations rounded to fp8, and a matrix's codes row by row.

Wrappers of quantize_rows.cu and unpack_fp8.cu; ``linear.rms_norm`` rounds what it norms.
"""

from __future__ import annotations

from engine_core.cuda.driver import DeviceArray, Launch
from engine_core.cuda.kernels import KernelArgumentError, Kernels, check
from engine_core.cuda.kernels.launch_configs import DEQUANTIZE_WARPS, RMS_NORM_THREADS
from engine_core.cuda.kernels.linear import GATED, GELU, STORE
from engine_core.cuda.kernels.linear_packed import PackedWeight

_UNIT = 16  # bytes that unpack_fp8 moves at once


def quantize_rows(
    kernels: Kernels, rows: DeviceArray, codes: DeviceArray, scales: DeviceArray, epilogue: int = STORE
) -> Launch:
    """codes [n, cols] of E4M3 and scales float32 [n] ← rows, 16-bit [n, cols]; the grid is n.

    A row's scale is its largest magnitude / 448. ``epilogue`` SILU or GELU: rows are [n, 2 cols] of (gate, up) in turn,
    of which the activation's results become codes. Raises KernelArgumentError.
    """
    n, cols = codes.shape
    is_gated = epilogue in GATED
    if cols % 8:
        raise KernelArgumentError(f"Rows of {cols} values; the kernel reads a multiple of 8.")
    check("rows", rows, (n, 2 * cols if is_gated else cols), kernels.dtype)
    check("codes", codes, (n, cols), "uint8")
    check("scales", scales, (n,), "fp32")
    defines: dict[str, int | str] = {"COLS": cols, "THREADS": RMS_NORM_THREADS, "GATED": int(is_gated)}
    defines["GELU"] = int(epilogue == GELU)
    function = kernels.function("quantize_rows", "quantize_rows", defines)
    return Launch(kernels.device, function, (n,), RMS_NORM_THREADS, [rows, codes, scales])


def unpack_fp8(kernels: Kernels, weight: PackedWeight, codes: DeviceArray, scales: DeviceArray) -> Launch:
    """codes uint8 [rows, cols] and scales float32 [rows] ← weight in fp8 with a scale for each row.

    Raises KernelArgumentError.
    """
    if weight.format.kind != "fp8" or weight.cols % _UNIT:
        raise KernelArgumentError(
            f"The weight is {weight.format.kind} of {weight.cols} columns; fp8 with scales of rows and a multiple of "
            f"{_UNIT} columns is unpacked."
        )
    check("codes", codes, (weight.rows, weight.cols), "uint8")
    check("scales", scales, (weight.rows,), "fp32")
    tiles, groups, _ = weight.sizes
    defines: dict[str, int | str] = {"ROWS": weight.rows, "COLS": weight.cols, **weight.format.kernel_defines}
    defines["DEQUANTIZE_WARPS"] = DEQUANTIZE_WARPS
    function = kernels.function("unpack_fp8", "unpack_fp8", defines)
    grid = -(-tiles * groups // DEQUANTIZE_WARPS)
    args = [weight.tiles, codes, scales]
    return Launch(kernels.device, function, (grid,), 32 * DEQUANTIZE_WARPS, args, overlap=False)
