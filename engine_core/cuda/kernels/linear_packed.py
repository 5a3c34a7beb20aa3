"""Products with 4- and 8-bit weights, and their dequantization; wrappers of gemv_packed.cu and gemm_packed.cu."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine_core.cuda.driver import DeviceArray, Launch, Stream
from engine_core.cuda.kernels import (
    CHUNK_WORDS,
    KernelArgumentError,
    Kernels,
    check,
    float_define,
    int4_layout,
    int8_layout,
)
from engine_core.cuda.kernels.int4_layout import GROUP, TILE
from engine_core.cuda.kernels.linear import LOGITS, RESIDUAL, SILU, STORE

_RECORD_BYTES = {4: int4_layout.RECORD_BYTES, 8: int8_layout.RECORD_BYTES}
# By bits of a weight: warps of a CTA, and stages of a warp's ring.
_WARPS, _MAX_DEPTH = {4: 16, 8: 8}, {4: 3, 8: 4}
_MAX_ROW_WARPS, _MIN_DEPTH = 8, 3
_ALIGNED_RECORDS = 4  # are a multiple of 128 bytes
_DEQUANTIZE_WARPS = 8
PACKED_TOKENS = 32  # of a CTA of gemm_packed.cu: more would take longer than to read its weights
_BAND = 2  # tiles of a warp
_MAX_GEMM_WARPS, _MIN_ROW_WARPS, _MAX_SPLITS, _STAGE = 16, 3, 8, 8
_SHARED_STATIC = 1024  # bytes of what the kernel declares itself, and the driver's


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
    shared = max(2 * cols + warps * depth * records.shape[2], kernels.shared_budget)
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
    """How gemm_packed.cu spreads a matrix over CTAs and their warps, and X over time."""

    row_warps: int
    k_warps: int
    splits: int
    stage: int  # groups of X
    buffers: int
    depth: int = 2

    def ctas(self, tiles: int) -> int:
        """Along the rows."""
        return -(-tiles // (_BAND * self.row_warps))

    def shared(self, record_bytes: int) -> int:
        """Bytes of the stages of X, their offsets and the rings, or of the sums that come after them."""
        warps = self.row_warps * self.k_warps
        stages = self.buffers * self.stage * PACKED_TOKENS * (GROUP * 2 + 4)
        sums = warps * _BAND * TILE * PACKED_TOKENS * 4 if self.k_warps > 1 else 0
        return max(stages + warps * self.depth * _BAND * record_bytes, sums)


def _splits(tiles: int, groups: int, num_sms: int) -> int:
    """CTAs along the columns: as many as leave each a few groups of X, but enough warps and not too many their rows."""

    def bands(splits: int) -> int:
        return -(-tiles * splits // (_BAND * num_sms))

    splits = 1
    while splits < _MAX_SPLITS and groups > splits * _STAGE and bands(2 * splits) <= _MAX_GEMM_WARPS:
        splits *= 2
    while splits < _MAX_SPLITS and groups >= 4 * splits and bands(splits) < _MIN_ROW_WARPS:
        splits *= 2
    return splits


def gemm_shape(tiles: int, groups: int, record_bytes: int, num_sms: int, max_shared: int) -> GemmShape:
    """For ``tiles`` by ``groups`` records, by what was fastest on an H200 (benchmarks/results/kernels.md)."""
    splits = _splits(tiles, groups, num_sms)
    bands, own_groups = -(-tiles // _BAND), -(-groups // splits)
    rounds = -(-bands * splits // (num_sms * _MAX_GEMM_WARPS))
    row_warps = -(-bands * splits // (num_sms * rounds))
    k_warps = 1 if row_warps > _MAX_GEMM_WARPS // 2 else 2 if row_warps > _MIN_ROW_WARPS else 4
    while k_warps > own_groups:
        k_warps //= 2
    while True:
        stage = min(_STAGE, 1 << (own_groups - 1).bit_length())
        while stage >= max(k_warps, min(2, own_groups)):
            shape = GemmShape(row_warps, k_warps, splits, stage, 1 if own_groups <= stage else 2)
            if shape.shared(record_bytes) <= max_shared - _SHARED_STATIC:
                return shape
            stage //= 2
        if k_warps > 1:
            k_warps //= 2
        else:
            row_warps = -(-row_warps // 2)


def packed_scratch(shapes: Iterable[tuple[int, int]], tokens: int, num_sms: int) -> tuple[int, int]:
    """(float32 partial sums, counters) that PackedProducts of ``shapes`` (rows, columns) need for ``tokens``."""
    sums = counters = 1
    for rows, cols in shapes:
        tiles, token_tiles = -(-rows // TILE), -(-tokens // PACKED_TOKENS)
        splits = _splits(tiles, -(-cols // GROUP), num_sms)
        if splits > 1:
            sums = max(sums, splits * tiles * TILE * PACKED_TOKENS * token_tiles)
            counters = max(counters, tiles * token_tiles)
    return sums, counters


class PackedProduct:
    """Vectors [n, cols] times weightᵀ for the rows of ``chunk``, see CHUNK_WORDS.

    ``epilogue`` STORE: output 16-bit [n, rows]; RESIDUAL: float32 and added to; SILU: 16-bit [n, rows / 2] of rows that
    are (gate, up) in turn. ``partial``, float32, and ``counters``, uint32 and zeros, are as long as ``packed_scratch``
    says for the most tokens there will be.
    """

    def __init__(
        self,
        kernels: Kernels,
        records: DeviceArray,
        vectors: DeviceArray,
        output: DeviceArray,
        epilogue: int,
        chunk: DeviceArray,
        partial: DeviceArray,
        counters: DeviceArray,
        shape: GemmShape | None = None,
    ) -> None:
        """Raises KernelArgumentError, KernelCompileError or DeviceError."""
        rows, cols = _sizes(records)
        check("vectors", vectors, (vectors.shape[0], cols), kernels.dtype)
        width = rows // 2 if epilogue == SILU else rows
        check("output", output, (vectors.shape[0], width), "fp32" if epilogue == RESIDUAL else kernels.dtype)
        check("partial", partial, partial.shape, "fp32")
        check("counters", counters, counters.shape, "uint32")
        check("chunk", chunk, (CHUNK_WORDS,), "int32")
        device = kernels.device
        shape = shape or gemm_shape(*records.shape, device.num_sms, device.max_shared)
        shared = shape.shared(records.shape[2])
        defines = {
            **_defines(records, shape.k_warps, shape.row_warps, shape.depth),
            "SPLITS": shape.splits,
            "STAGE": shape.stage,
            "BUFFERS": shape.buffers,
            "TOKENS": PACKED_TOKENS,
            "EPILOGUE": epilogue,
        }
        function = kernels.function("gemm_packed", "gemm_packed", defines, shared)
        grid = (1, shape.splits, shape.ctas(records.shape[0]))
        threads = 32 * shape.row_warps * shape.k_warps
        args = [records, vectors, output, chunk, partial, counters]
        self._launch = Launch(device, function, grid, threads, args, shared)

    def __call__(self, stream: Stream, rows: int) -> None:
        """Queues it for at most ``rows`` tokens."""
        self._launch.set_grid(-(-rows // PACKED_TOKENS))
        self._launch(stream)


def dequantize_packed(kernels: Kernels, records: DeviceArray, weight: DeviceArray) -> Launch:
    """weight [rows, cols] 16-bit ← records."""
    rows, cols = _sizes(records)
    check("weight", weight, (rows, cols), kernels.dtype)
    defines = {**_defines(records, 1, 1, 1), "EPILOGUE": LOGITS, "NORM": 0, "BIAS": 0, "NORM_EPS": "0.f"}
    function = kernels.function("gemv_packed", "dequantize_packed", defines)
    grid = -(-records.shape[0] * records.shape[1] // _DEQUANTIZE_WARPS)
    return Launch(kernels.device, function, (grid,), 32 * _DEQUANTIZE_WARPS, [records, weight], overlap=False)
