"""Attention over the linear KV cache: one token (decode) and many (prefill)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine_core.cuda.driver import DeviceArray, Launch, Stream
from engine_core.cuda.kernels import CHUNK_WORDS, KernelArgumentError, Kernels, check, float_define

_MAX_GROUP = 8  # query heads of a KV head: the columns of attention_decode.cu's products
_MAX_DEPTH, _MIN_DEPTH = 6, 3  # pieces of a ring of kv_ring.cuh
_TILE_KEYS = 16  # of a piece
_SCALE_GROUP = 8  # fp16 scales in 16 bytes
_ROPE_THREADS = 128
_SHARED_SYSTEM = 1024  # bytes of a multiprocessor's shared memory that each CTA takes besides its own


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float = 0.0
    qk_norm: bool = False
    kv_int8: bool = False  # the cache holds levels and scales (kv_int8.cuh), else the kernels' 16-bit type

    @property
    def scale_pitch(self) -> int:
        """fp16 scales from one head's first to the next one's."""
        return scale_pitch(self.max_context)

    @property
    def lanes(self) -> int:
        """Of a head vector, 8 elements each; LANES_PER_HEAD of rope.cuh."""
        return next(n for n in (4, 8, 16, 32) if 8 * n >= self.head_dim)

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def splits(self, num_sms: int) -> int:
        """CTAs per KV head in decode: as many as fill the GPU once."""
        return max(1, min(64, num_sms // self.num_kv_heads))

    def partial_floats(self, num_sms: int) -> int:
        """float32 values the splits of a decode step leave to be merged."""
        return self.splits(num_sms) * self.num_heads * (self.head_dim + 2)

    def validate(self) -> None:
        """Raises KernelArgumentError if the kernels do not cover these sizes."""
        if self.head_dim % 16 or not 16 <= self.head_dim <= 256:
            raise KernelArgumentError(f"head_dim is {self.head_dim}; the kernels take multiples of 16 up to 256.")
        if self.num_heads % self.num_kv_heads or self.group > _MAX_GROUP:
            raise KernelArgumentError(
                f"{self.num_heads} query heads share {self.num_kv_heads} KV heads; at most {_MAX_GROUP} may."
            )

    def defines(self, num_sms: int) -> dict[str, int | str]:
        return {
            "HEADS": self.num_heads,
            "KV_HEADS": self.num_kv_heads,
            "HEAD_DIM": self.head_dim,
            "CONTEXT": self.max_context,
            "SPLITS": self.splits(num_sms),
            "QK_NORM": int(self.qk_norm),
            "KV_INT8": int(self.kv_int8),
            "NORM_EPS": float_define(self.norm_eps),
            "SCALE_LOG2E": float_define(math.log2(math.e) / math.sqrt(self.head_dim)),
        }


def scale_pitch(tokens: int) -> int:
    """fp16 scales a row of ``tokens`` takes, so that the next row starts on 16 bytes."""
    return -(-tokens // _SCALE_GROUP) * _SCALE_GROUP


def _check_cache(kernels: Kernels, shape: AttentionShape, cache: DeviceArray, scales: DeviceArray | None) -> None:
    dtype = "int8" if shape.kv_int8 else kernels.dtype
    check("cache", cache, (2, shape.num_kv_heads, shape.max_context, shape.head_dim), dtype)
    if shape.kv_int8 != (scales is not None):
        raise KernelArgumentError("An int8 cache needs scales, and no other has any; give both or neither.")
    if scales is not None:
        check("scales", scales, (2, shape.num_kv_heads, shape.scale_pitch), "fp16")


def _check(
    kernels: Kernels,
    shape: AttentionShape,
    cache: DeviceArray,
    scales: DeviceArray | None,
    rope: DeviceArray,
    norms: tuple,
) -> None:
    shape.validate()
    _check_cache(kernels, shape, cache, scales)
    check("rope", rope, (shape.max_context, shape.head_dim // 2, 2), "fp32")
    for norm in norms if shape.qk_norm else ():
        check("head norm", norm, (shape.head_dim,), kernels.dtype)


def _decode_ring(shape: AttentionShape, budget: int) -> tuple[int, int, int]:
    """(warps, pieces of a warp's ring, bytes of all rings) for ``budget`` bytes of shared memory; see kv_ring.cuh."""
    row = -(-shape.head_dim // 64) * 64
    piece = _TILE_KEYS * (row + 2 if shape.kv_int8 else 2 * row)
    for warps in (8, 4, 2):
        depth = max(1, min(_MAX_DEPTH, budget // (warps * piece)))
        if depth >= _MIN_DEPTH:
            break
    return warps, depth, warps * depth * piece


def attention_decode(
    kernels: Kernels,
    shape: AttentionShape,
    qkv: DeviceArray,
    cache: DeviceArray,
    rope: DeviceArray,
    state: DeviceArray,
    partial: DeviceArray,
    counters: DeviceArray,
    output: DeviceArray,
    norms: tuple[DeviceArray, DeviceArray] | None = None,
    scales: DeviceArray | None = None,
) -> Launch:
    """One token at the state's position: rotates, appends to the cache and attends; output 16-bit [heads × head_dim].

    ``counters``: uint32 [kv_heads], zeros. ``norms``: weights of the query and key norms.
    ``scales``: fp16 [2, kv_heads, scale_pitch] of an int8 cache. Raises KernelArgumentError.
    """
    num_sms = kernels.device.num_sms
    _check(kernels, shape, cache, scales, rope, norms or ())
    check("qkv", qkv, (shape.qkv_width,), kernels.dtype)
    check("partial", partial, (shape.partial_floats(num_sms),), "fp32")
    check("counters", counters, (shape.num_kv_heads,), "uint32")
    check("output", output, (shape.num_heads * shape.head_dim,), kernels.dtype)
    q_norm, k_norm = norms or (0, 0)
    warps, depth, ring = _decode_ring(shape, kernels.shared_budget)
    shared = max(ring, warps * shape.group * shape.head_dim * 4, kernels.shared_budget)
    defines = {**shape.defines(num_sms), "WARPS": warps, "DEPTH": depth}
    function = kernels.function("attention_decode", "attention_decode", defines, shared)
    args = [qkv, cache, rope, q_norm, k_norm, state, partial, counters, output, scales or 0]
    # As many CTAs as every other kernel of a step has on each multiprocessor, though some have nothing to do: with a
    # gap somewhere the next kernel, which may start early, would be placed unevenly, and the one after it, too.
    grid = (max(num_sms, shape.num_kv_heads * shape.splits(num_sms)),)
    return Launch(kernels.device, function, grid, 32 * warps, args, shared)


def rope_append(
    kernels: Kernels,
    shape: AttentionShape,
    qkv: DeviceArray,
    cache: DeviceArray,
    rope: DeviceArray,
    chunk: DeviceArray,
    norms: tuple[DeviceArray, DeviceArray] | None = None,
    scales: DeviceArray | None = None,
) -> Launch:
    """Rotates q of the rows of ``chunk`` in qkv [n, width] in place; writes their K and V. See CHUNK_WORDS."""
    _check(kernels, shape, cache, scales, rope, norms or ())
    check("chunk", chunk, (CHUNK_WORDS,), "int32")
    check("qkv", qkv, (qkv.shape[0], shape.qkv_width), kernels.dtype)
    function = kernels.function("rope_append", "rope_append", shape.defines(kernels.device.num_sms))
    q_norm, k_norm = norms or (0, 0)
    args = [qkv, cache, rope, q_norm, k_norm, chunk, scales or 0]
    grid = (rope_append_blocks(shape, qkv.shape[0]),)
    return Launch(kernels.device, function, grid, _ROPE_THREADS, args)


def rope_append_blocks(shape: AttentionShape, count: int) -> int:
    """CTAs for ``count`` tokens."""
    vectors = count * (shape.num_heads + 2 * shape.num_kv_heads)
    return -(-vectors * shape.lanes // _ROPE_THREADS)


@dataclass(frozen=True)
class PrefillSpread:
    """How attention_prefill.cu spreads the queries of one head over warps."""

    warps: int  # of a group; together they have 16 × blocks × warps queries, a CTA's
    blocks: int  # of 16 queries a warp
    groups: int  # of warps that share the keys
    tile_keys: int  # a warp's scores at a time

    @property
    def queries(self) -> int:
        return 16 * self.blocks * self.warps

    @property
    def threads(self) -> int:
        return 32 * self.warps * self.groups

    def shared(self, head_dim: int, kv_int8: bool) -> int:
        """Bytes of shared memory a CTA takes."""
        keys, row = self.groups * self.tile_keys, 2 * (head_dim + 8)
        queries = self.queries * row if self.blocks > 1 else 0
        stage = 2 * keys * row
        return queries + (stage + 2 * 2 * keys * (head_dim + 2) if kv_int8 else 2 * stage)

    def defines(self) -> dict[str, int]:
        return {"WARPS": self.warps, "BLOCKS": self.blocks, "GROUPS": self.groups, "TILE_K": self.tile_keys}


def prefill_spread(shape: AttentionShape, count: int, num_sms: int, max_shared: int) -> PrefillSpread:
    """The spread that was fastest for ``count`` tokens where a GPU has about as many CTAs to run.

    ``max_shared``: bytes of shared memory a CTA may have. Measured with 32 heads of 64 and of 128 on an H200, once for
    each head and once eight times, as on a GPU with an eighth of its multiprocessors (benchmarks/results/kernels.md).
    """

    def fits(spread: PrefillSpread, limit: int) -> bool:
        return spread.shared(shape.head_dim, shape.kv_int8) <= limit

    def ctas(queries: int) -> int:
        return -(-count // queries) * shape.num_heads

    keys = 32 if shape.head_dim > 128 else 64
    half = (max_shared - _SHARED_SYSTEM) // 2  # of a multiprocessor's, so that two CTAs fit
    narrow, split = PrefillSpread(4, 1, 1, keys), PrefillSpread(4, 1, 2, keys)
    if ctas(16) <= num_sms:  # at most one CTA a multiprocessor: its warps share the keys
        for few in (
            PrefillSpread(1, 1, 8, 16) if shape.kv_int8 else PrefillSpread(1, 1, 4, 32),
            PrefillSpread(1, 1, 4, 16),
        ):
            if fits(few, max_shared):
                return few
    if count <= narrow.queries:
        return split if shape.head_dim <= 64 and fits(split, half) else narrow
    if 2 * ctas(128) < num_sms:
        return split if fits(split, max_shared) else narrow
    if shape.head_dim <= 128:  # more would not fit the registers
        if 2 * ctas(128) < 3 * num_sms:  # one CTA a multiprocessor: two groups, so that it has eight warps
            wide, limit = [PrefillSpread(4, 2, 2, keys)], max_shared
        else:
            wide, limit = [PrefillSpread(4, 2, 1, keys), PrefillSpread(4, 2, 1, keys // 2)], half
        for spread in wide:
            if fits(spread, limit):
                return spread
    return PrefillSpread(8, 1, 1, keys)


class AttentionPrefill:
    """Attention of a chunk of tokens, by the launch that suits their number."""

    def __init__(self, launches: dict[int, tuple[Launch, int]]) -> None:
        """``launches``: rows → (launch, tiles of queries)."""
        self._launches = launches

    def __call__(self, stream: Stream, rows: int) -> None:
        """Queues it for at most ``rows`` tokens."""
        launch, tiles = self._launches[rows]
        launch.set_grid(tiles)
        launch(stream)


def attention_prefill(
    kernels: Kernels,
    shape: AttentionShape,
    qkv: DeviceArray,
    cache: DeviceArray,
    output: DeviceArray,
    chunk: DeviceArray,
    spreads: Mapping[int, PrefillSpread],
    scales: DeviceArray | None = None,
) -> AttentionPrefill:
    """Causal attention of the rows of ``chunk`` in qkv [n, width]; output [n, heads × head_dim]. See CHUNK_WORDS.

    ``spreads``: of every number of rows it will be queued for; see ``prefill_spread``. Raises KernelArgumentError.
    """
    shape.validate()
    rows = qkv.shape[0]
    check("qkv", qkv, (rows, shape.qkv_width), kernels.dtype)
    _check_cache(kernels, shape, cache, scales)
    check("output", output, (rows, shape.num_heads * shape.head_dim), kernels.dtype)
    check("chunk", chunk, (CHUNK_WORDS,), "int32")
    args = [qkv, cache, output, chunk, scales or 0]

    def launch(spread: PrefillSpread) -> Launch:
        shared = spread.shared(shape.head_dim, shape.kv_int8)
        defines = {**shape.defines(kernels.device.num_sms), **spread.defines()}
        function = kernels.function("attention_prefill", "attention_prefill", defines, shared)
        return Launch(kernels.device, function, (1, shape.num_heads), spread.threads, args, shared)

    launches = {spread: launch(spread) for spread in set(spreads.values())}
    return AttentionPrefill({n: (launches[spread], -(-n // spread.queries)) for n, spread in spreads.items()})
