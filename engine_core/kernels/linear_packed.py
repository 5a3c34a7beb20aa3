"""Products with 4- and 8-bit weights, and their dequantization; wrappers of gemv_packed.cu and gemm_packed.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass, replace

from engine_core.device import DeviceArray, Launch, Stream
from engine_core.kernels import KernelArgumentError, Kernels, check, float_define, int4_layout, int8_layout
from engine_core.kernels.int4_layout import GROUP, TILE
from engine_core.kernels.linear import LOGITS, RESIDUAL, SILU, STORE

_RECORD_BYTES = {4: int4_layout.RECORD_BYTES, 8: int8_layout.RECORD_BYTES}
# By bits of a weight: warps of a CTA, and stages of a warp's ring.
_WARPS, _MAX_DEPTH = {4: 16, 8: 8}, {4: 3, 8: 4}
_MAX_ROW_WARPS, _MIN_DEPTH = 8, 3
_ALIGNED_RECORDS = 4  # are a multiple of 128 bytes
_DEQUANTIZE_WARPS = 8
PACKED_TOKENS = 32  # of a CTA of gemm_packed.cu: more would take longer than to read its weights
_MAX_CTA_TILES = 16
_SHARED_STATIC = 1024  # bytes of what the kernel declares itself, and the driver's
_MIN_GEMM_DEPTH, _MAX_GEMM_DEPTH = 3, 5


def _bits(records: DeviceArray) -> int:
    """Of a weight: 8, or else 4, which ``_sizes`` checks."""
    return 8 if records.shape[-1] == int8_layout.RECORD_BYTES else 4


def _sizes(records: DeviceArray) -> tuple[int, int]:
    """(rows, columns) of the matrix."""
    check("records", records, (*records.shape[:2], _RECORD_BYTES[_bits(records)]), "uint8")
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


@dataclass(frozen=True)
class GemmShape:
    """How gemm_packed.cu spreads a matrix over CTAs and their warps."""

    warp_tiles: int  # of 16 rows
    row_warps: int
    k_warps: int
    splits: int
    depth: int

    @property
    def cta_tiles(self) -> int:
        return self.warp_tiles * self.row_warps

    def ctas(self, tiles: int) -> int:
        """Along the rows."""
        return -(-tiles // self.cta_tiles)

    def stage(self, record_bytes: int) -> int:
        """Bytes of a stage of the ring."""
        return self.k_warps * (PACKED_TOKENS * GROUP * 2 + self.cta_tiles * record_bytes)

    def shared(self, record_bytes: int) -> int:
        """Bytes of the ring, or of the sums that come after it."""
        sums = self.k_warps * self.cta_tiles * TILE * (PACKED_TOKENS + 1) * 4
        return max(self.depth * self.stage(record_bytes), sums)


def _splits(tiles: int, groups: int, num_sms: int) -> int:
    """CTAs along the columns: several where there are too few rows to give each multiprocessor enough."""
    return next((n for n in (4, 2) if n <= groups and -(-tiles * n // num_sms) <= _MAX_CTA_TILES), 1)


def gemm_shape(tiles: int, groups: int, record_bytes: int, num_sms: int, max_shared: int) -> GemmShape:
    """For a matrix of ``tiles`` by ``groups`` records: a CTA for each multiprocessor, if it can hold as much."""
    splits = _splits(tiles, groups, num_sms)
    cta_tiles = min(_MAX_CTA_TILES, -(-tiles * splits // num_sms))
    warp_tiles = 1 if cta_tiles <= 2 else 2
    row_warps = -(-cta_tiles // warp_tiles)
    k_warps = 1 << (min(16 // row_warps, -(-groups // splits)).bit_length() - 1)
    budget = max_shared - _SHARED_STATIC
    while True:
        shape = GemmShape(warp_tiles, row_warps, k_warps, splits, _MIN_GEMM_DEPTH)
        if shape.shared(record_bytes) <= budget or (row_warps, k_warps) == (1, 1):
            return replace(shape, depth=max(2, min(_MAX_GEMM_DEPTH, budget // shape.stage(record_bytes))))
        if k_warps > 1:
            k_warps //= 2
        else:
            row_warps //= 2


def packed_scratch(shapes: Iterable[tuple[int, int]], tokens: int, num_sms: int) -> tuple[int, int]:
    """(float32 partial sums, counters) that PackedProducts of ``shapes`` (rows, columns) need for ``tokens``."""
    sums = counters = 1
    for rows, cols in shapes:
        tiles, token_tiles = -(-rows // TILE), -(-tokens // PACKED_TOKENS)
        splits = _splits(tiles, -(-cols // GROUP), num_sms)
        counters = max(counters, tiles * token_tiles)
        if splits > 1:
            sums = max(sums, splits * (tiles + _MAX_CTA_TILES - 1) * TILE * PACKED_TOKENS * token_tiles)
    return sums, counters


class PackedProduct:
    """output [n, rows] ← vectors [n, cols] · weightᵀ for the first ``count`` rows, which is read at each call.

    The output is 16-bit or, with ``accumulate``, float32 and added to. ``partial``, float32, and ``counters``, uint32
    and zeros, are as long as ``packed_scratch`` says for the most tokens there will be.
    """

    def __init__(
        self,
        kernels: Kernels,
        records: DeviceArray,
        vectors: DeviceArray,
        output: DeviceArray,
        count: ctypes.c_int,
        partial: DeviceArray,
        counters: DeviceArray,
        accumulate: bool = False,
    ) -> None:
        """Raises KernelArgumentError, KernelCompileError or DeviceError."""
        rows, cols = _sizes(records)
        check("vectors", vectors, (vectors.shape[0], cols), kernels.dtype)
        check("output", output, (vectors.shape[0], rows), "fp32" if accumulate else kernels.dtype)
        check("partial", partial, partial.shape, "fp32")
        check("counters", counters, counters.shape, "uint32")
        device = kernels.device
        shape = gemm_shape(*records.shape, device.num_sms, device.max_shared)
        shared = shape.shared(records.shape[2])
        defines = {
            **_defines(records, shape.k_warps, shape.row_warps, shape.depth),
            "WARP_TILES": shape.warp_tiles,
            "SPLITS": shape.splits,
            "TOKENS": PACKED_TOKENS,
            "ACCUMULATE": int(accumulate),
        }
        function = kernels.function("gemm_packed", "gemm_packed", defines, shared)
        self._count = count
        self._grid = (shape.splits, shape.ctas(records.shape[0]))
        threads = 32 * shape.row_warps * shape.k_warps
        args = [records, vectors, output, count, partial, counters]
        self._launch = Launch(device, function, (1, *self._grid), threads, args, shared)

    def __call__(self, stream: Stream) -> None:
        self._launch.set_grid(-(-self._count.value // PACKED_TOKENS), *self._grid)
        self._launch(stream)


def dequantize_packed(kernels: Kernels, records: DeviceArray, weight: DeviceArray) -> Launch:
    """weight [rows, cols] 16-bit ← records."""
    rows, cols = _sizes(records)
    check("weight", weight, (rows, cols), kernels.dtype)
    defines = {**_defines(records, 1, 1, 1), "EPILOGUE": LOGITS, "NORM": 0, "BIAS": 0, "NORM_EPS": "0.f"}
    function = kernels.function("gemv_packed", "dequantize_packed", defines)
    grid = -(-records.shape[0] * records.shape[1] // _DEQUANTIZE_WARPS)
    return Launch(kernels.device, function, (grid,), 32 * _DEQUANTIZE_WARPS, [records, weight], overlap=False)
