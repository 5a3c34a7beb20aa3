"""Matrix × vector with 4-bit weights, and their dequantization for prefill; wrappers of gemv_int4.cu."""

from __future__ import annotations

from engine_core.device import DeviceArray, Launch
from engine_core.kernels import KernelArgumentError, Kernels, check, float_define
from engine_core.kernels.int4_layout import GROUP, RECORD_BYTES, TILE
from engine_core.kernels.linear import LOGITS, RESIDUAL, SILU, STORE

_MAX_WARPS = 16
_MAX_DEPTH = 8
_DEQUANTIZE_WARPS = 8


def _sizes(records: DeviceArray) -> tuple[int, int]:
    """(rows, columns) of the matrix."""
    check("records", records, (*records.shape[:2], RECORD_BYTES), "uint8")
    return records.shape[0] * TILE, records.shape[1] * GROUP


def _defines(rows: int, cols: int, k_warps: int, row_warps: int, depth: int) -> dict[str, int | str]:
    return {"ROWS": rows, "COLS": cols, "K_WARPS": k_warps, "ROW_WARPS": row_warps, "DEPTH": depth}


def gemv_int4(
    kernels: Kernels,
    records: DeviceArray,
    vector: DeviceArray,
    output: DeviceArray,
    epilogue: int,
    *,
    norm_weight: DeviceArray | None = None,
    bias: DeviceArray | None = None,
    norm_eps: float = 0.0,
) -> Launch:
    """As ``linear.gemv``, with the weight in records: uint8 [rows / 16, cols / 128, RECORD_BYTES]."""
    rows, cols = _sizes(records)
    check("vector", vector, (cols,), "fp32" if norm_weight is not None else kernels.dtype)
    output_dtype = "fp32" if epilogue in (RESIDUAL, LOGITS) else kernels.dtype
    check("output", output, (rows // 2 if epilogue == SILU else rows,), output_dtype)
    if norm_weight is not None:
        check("norm_weight", norm_weight, (cols,), kernels.dtype)
    if bias is not None:
        assert epilogue == STORE
        check("bias", bias, (rows,), kernels.dtype)
    groups = records.shape[1]
    k_warps = -(-groups // -(-groups // _MAX_WARPS))
    row_warps = 1
    while row_warps * 2 * k_warps <= _MAX_WARPS:
        row_warps *= 2
    warps = k_warps * row_warps
    depth = max(1, min(_MAX_DEPTH, (kernels.shared_budget - 2 * cols) // (warps * RECORD_BYTES)))
    shared = 2 * cols + warps * depth * RECORD_BYTES
    if shared > kernels.device.max_shared:
        raise KernelArgumentError(f"A row of {cols} values does not fit the shared memory of {kernels.device.name}.")
    defines = {
        **_defines(rows, cols, k_warps, row_warps, depth),
        "EPILOGUE": epilogue,
        "NORM": int(norm_weight is not None),
        "BIAS": int(bias is not None),
        "NORM_EPS": float_define(norm_eps),
    }
    function = kernels.function("gemv_int4", "gemv_int4", defines, shared)
    grid = kernels.device.num_sms  # some may have nothing to do; see attention_decode
    args = [records, vector, norm_weight or 0, bias or 0, output]
    return Launch(kernels.device, function, (grid,), 32 * warps, args, shared)


def dequantize_int4(kernels: Kernels, records: DeviceArray, weight: DeviceArray) -> Launch:
    """weight [rows, cols] 16-bit ← records."""
    rows, cols = _sizes(records)
    check("weight", weight, (rows, cols), kernels.dtype)
    defines = {**_defines(rows, cols, 1, 1, 1), "EPILOGUE": LOGITS, "NORM": 0, "BIAS": 0, "NORM_EPS": "0.f"}
    function = kernels.function("gemv_int4", "dequantize_int4", defines)
    grid = -(-records.shape[0] * records.shape[1] // _DEQUANTIZE_WARPS)
    return Launch(kernels.device, function, (grid,), 32 * _DEQUANTIZE_WARPS, [records, weight], overlap=False)
