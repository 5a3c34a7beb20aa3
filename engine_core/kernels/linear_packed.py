"""Matrix × vector with 4- and 8-bit weights, and their dequantization for prefill; wrappers of gemv_packed.cu."""

from __future__ import annotations

from engine_core.device import DeviceArray, Launch
from engine_core.kernels import KernelArgumentError, Kernels, check, float_define, int4_layout, int8_layout
from engine_core.kernels.int4_layout import GROUP, TILE
from engine_core.kernels.linear import LOGITS, RESIDUAL, SILU, STORE

# By bits of a weight: warps of a CTA, and stages of a warp's ring.
_WARPS, _MAX_DEPTH = {4: 16, 8: 8}, {4: 3, 8: 4}
_MAX_ROW_WARPS, _MIN_DEPTH = 8, 3
_ALIGNED_RECORDS = 4  # are a multiple of 128 bytes
_DEQUANTIZE_WARPS = 8


def _bits(records: DeviceArray) -> int:
    """Of a weight: 8, or else 4, which ``_sizes`` checks."""
    return 8 if records.shape[-1] == int8_layout.RECORD_BYTES else 4


def _sizes(records: DeviceArray) -> tuple[int, int]:
    """(rows, columns) of the matrix."""
    record_bytes = {4: int4_layout.RECORD_BYTES, 8: int8_layout.RECORD_BYTES}[_bits(records)]
    check("records", records, (*records.shape[:2], record_bytes), "uint8")
    return records.shape[0] * TILE, records.shape[1] * GROUP


def _defines(records: DeviceArray, k_warps: int, row_warps: int, depth: int) -> dict[str, int | str]:
    rows, cols = _sizes(records)
    sizes = {"ROWS": rows, "COLS": cols, "BITS": _bits(records)}
    return {**sizes, "K_WARPS": k_warps, "ROW_WARPS": row_warps, "DEPTH": depth}


def _spread(records: DeviceArray, num_sms: int, ring: int) -> tuple[int, int, int]:
    """(warps along the columns, along the rows, stages) for ``ring`` bytes of shared memory.

    By what was fastest on an H200 (benchmarks/results/kernels.md). 4 bits: sixteen warps, a row of them for each tile
    a CTA has, up to eight; a warp's records start on 128 bytes if they can. 8 bits: eight warps along the columns.
    """
    tiles, groups, record_bytes = records.shape
    bits, row_warps = _bits(records), 1
    if bits == 4:
        while row_warps * num_sms < tiles and row_warps < _MAX_ROW_WARPS:
            row_warps *= 2
    for share in (1, 2):  # fewer warps where the ring would be too shallow
        rows = max(1, row_warps // share)
        most = _WARPS[bits] // share // rows
        aligned = [k for k in range(most // 2 + 1, most + 1) if bits == 4 and groups % (k * _ALIGNED_RECORDS) == 0]
        k_warps = max(aligned, default=-(-groups // -(-groups // most)))
        depth = ring // (k_warps * rows * record_bytes)
        if depth >= _MIN_DEPTH:
            break
    return k_warps, rows, max(1, min(_MAX_DEPTH[bits], depth))


def gemv_packed(
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
    """As ``linear.gemv``, with the weight in records of int4_layout or int8_layout."""
    rows, cols = _sizes(records)
    check("vector", vector, (cols,), "fp32" if norm_weight is not None else kernels.dtype)
    output_dtype = "fp32" if epilogue in (RESIDUAL, LOGITS) else kernels.dtype
    check("output", output, (rows // 2 if epilogue == SILU else rows,), output_dtype)
    if norm_weight is not None:
        check("norm_weight", norm_weight, (cols,), kernels.dtype)
    if bias is not None:
        assert epilogue == STORE
        check("bias", bias, (rows,), kernels.dtype)
    k_warps, row_warps, depth = _spread(records, kernels.device.num_sms, kernels.shared_budget - 2 * cols)
    warps = k_warps * row_warps
    shared = 2 * cols + warps * depth * records.shape[2]
    if shared > kernels.device.max_shared:
        raise KernelArgumentError(f"A row of {cols} values does not fit the shared memory of {kernels.device.name}.")
    defines = {
        **_defines(records, k_warps, row_warps, depth),
        "EPILOGUE": epilogue,
        "NORM": int(norm_weight is not None),
        "BIAS": int(bias is not None),
        "NORM_EPS": float_define(norm_eps),
    }
    function = kernels.function("gemv_packed", "gemv_packed", defines, shared)
    grid = kernels.device.num_sms  # some may have nothing to do; see attention_decode
    args = [records, vector, norm_weight or 0, bias or 0, output]
    return Launch(kernels.device, function, (grid,), 32 * warps, args, shared)


def dequantize_packed(kernels: Kernels, records: DeviceArray, weight: DeviceArray) -> Launch:
    """weight [rows, cols] 16-bit ← records."""
    rows, cols = _sizes(records)
    check("weight", weight, (rows, cols), kernels.dtype)
    defines = {**_defines(records, 1, 1, 1), "EPILOGUE": LOGITS, "NORM": 0, "BIAS": 0, "NORM_EPS": "0.f"}
    function = kernels.function("gemv_packed", "dequantize_packed", defines)
    grid = -(-records.shape[0] * records.shape[1] // _DEQUANTIZE_WARPS)
    return Launch(kernels.device, function, (grid,), 32 * _DEQUANTIZE_WARPS, [records, weight], overlap=False)
