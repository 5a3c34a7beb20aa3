"""Attention over the linear KV cache: one token (decode) and many (prefill)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass

from engine_core.cuda.driver import DeviceArray, Launch, Stream
from engine_core.cuda.kernels import CHUNK_WORDS, KernelArgumentError, Kernels, check, float_define
from engine_core.cuda.kernels.launch_configs import (
    ROPE_THREADS,
    SPLIT_SEQUENCES,
    DecodeAttentionConfig,
    DecodeAttentionProblem,
    PrefillAttentionConfig,
    PrefillAttentionProblem,
    max_decode_splits,
)
from engine_core.cuda.kernels.sampling import STATE

_MAX_GROUP = 16  # query heads of a KV head
_MAX_BUNDLE = 8  # of a CTA: the columns of a tensor core multiplication in attention_decode.cu
_SCALE_GROUP = 8  # fp16 scales in 16 bytes
# Chunks of more rows than this have one launch configuration for every so many, so that tuning ends.
_LONG_ROWS, _LONG_GRAIN = 512, 256


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int  # elements of a head in memory
    max_context: int
    norm_eps: float = 0.0
    qk_norm: bool = False
    kv_int8: bool = False  # the cache is int8 and has scales (kv_int8.cuh), else the kernels' 16-bit type
    _: KW_ONLY
    head_size: int = 0  # elements of a head in the model, the others being zeros; 0 = head_dim
    slot_layers: int = 0  # layers of a KV slot, where the cache has several: [slots, layers, 2, ...]; 0 = one slot
    rotated: int | None = None  # elements of a head, from its first on, that RoPE rotates; None = all
    window: int = 0  # tokens that a query sees, itself included; 0 = all
    scale: float = 0.0  # of scores; 0 = head_size^-1/2
    softcap: float = 0.0  # scores are below it in magnitude; 0 = they are not capped
    norm_offset: float = 0.0  # added to the weights of the head norms
    kv_fp8: bool = False  # the cache is E4M3 and has scales (kv_fp8.cuh); not with ``kv_int8``
    rope_switch: int = 0  # rows of the RoPE table before those of longer sequences than that (LongRoPE); 0 = none

    @property
    def chunk_words(self) -> int:
        """The number of int32 of a chunk: position, tokens and, with several KV slots, the slot."""
        return CHUNK_WORDS + (self.slot_layers > 0)

    @property
    def kv_scaled(self) -> bool:
        """True if the cache has 8-bit values, and scales."""
        return self.kv_int8 or self.kv_fp8

    @property
    def scale_pitch(self) -> int:
        """fp16 scales from one head's first to the next one's."""
        return scale_pitch(self.max_context)

    @property
    def lanes(self) -> int:
        """Lanes that hold a head vector, 8 elements each: LANES_PER_HEAD of rope.cuh."""
        return next(n for n in (4, 8, 16, 32) if 8 * n >= self.head_dim)

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def bundles(self) -> int:
        """Bundles of query heads that share a KV head, of one size, which attention_decode.cu takes as KV heads."""
        parts = next(n for n in range(1, self.group + 1) if self.group % n == 0 and self.group // n <= _MAX_BUNDLE)
        return self.num_kv_heads * parts

    @property
    def rope_length(self) -> int:
        """Rows of the RoPE table: one for each position, or one for each position of short and of long sequences."""
        return self.rope_switch + self.max_context

    @property
    def rope_width(self) -> int:
        """(cos, sin) of a position."""
        return (self.head_dim if self.rotated is None else self.rotated) // 2

    def partial_floats(self, num_sms: int, sequences: int = 0) -> int:
        """Return the float32 values that the splits leave to be merged, at most; ``sequences``: 0 = without slots."""
        splits = max_decode_splits(self.bundles * (SPLIT_SEQUENCES if sequences else 1), num_sms)
        return max(1, sequences) * splits * self.num_heads * (self.head_dim + 2)

    @property
    def decode_problem(self) -> DecodeAttentionProblem:
        return DecodeAttentionProblem(self.num_heads, self.bundles, self.head_dim, self.qk_norm, self.kv_scaled)

    @property
    def batch_problem(self) -> DecodeAttentionProblem:
        """The problem of a step of several sequences, whatever their number."""
        return dataclasses.replace(self.decode_problem, sequences=SPLIT_SEQUENCES)

    def prefill_problem(self, rows: int) -> PrefillAttentionProblem:
        """The problem of a chunk of so many rows. Long ones share one with those of almost the same length."""
        rows = rows if rows <= _LONG_ROWS else -(-rows // _LONG_GRAIN) * _LONG_GRAIN
        return PrefillAttentionProblem(self.num_heads, self.num_kv_heads, self.head_dim, self.kv_scaled, rows)

    def validate(self) -> None:
        """Raises KernelArgumentError if the kernels do not cover these sizes."""
        assert not (self.kv_int8 and self.kv_fp8)
        if self.head_dim % 16 or not 16 <= self.head_dim <= 256:
            raise KernelArgumentError(f"head_dim is {self.head_dim}; the kernels take multiples of 16 up to 256.")
        if self.rotated is not None and (self.rotated % 16 or not 0 <= self.rotated <= self.head_dim):
            raise KernelArgumentError(
                f"RoPE rotates {self.rotated} elements of heads of {self.head_dim}; the kernels take multiples of 16."
            )
        if self.num_heads % self.num_kv_heads or self.group > _MAX_GROUP:
            raise KernelArgumentError(
                f"{self.num_heads} query heads share {self.num_kv_heads} KV heads; at most {_MAX_GROUP} may."
            )

    def defines(self) -> dict[str, int | str]:
        scale = self.scale or (self.head_size or self.head_dim) ** -0.5
        return {
            "HEADS": self.num_heads,
            "KV_HEADS": self.num_kv_heads,
            "BUNDLES": self.bundles,
            "HEAD_DIM": self.head_dim,
            "HEAD_SIZE": self.head_size or self.head_dim,
            "CONTEXT": self.max_context,
            "QK_NORM": int(self.qk_norm),
            "KV_INT8": int(self.kv_scaled),
            **({"KV_FP8": 1} if self.kv_fp8 else {}),
            "SLOT_STRIDE": self.slot_layers * 2 * self.num_kv_heads * self.max_context * self.head_dim,
            "SCALE_SLOT_STRIDE": self.slot_layers * 2 * self.num_kv_heads * self.scale_pitch,
            "NORM_EPS": float_define(self.norm_eps),
            "NORM_OFFSET": float_define(self.norm_offset),
            "ROTATED": 2 * self.rope_width,
            "WINDOW": self.window,
            "SCALE_LOG2E": float_define(math.log2(math.e) * scale),
            "SOFTCAP": float_define(self.softcap),
            "LONG_ROPE": int(self.rope_switch > 0),
        }


def scale_pitch(tokens: int) -> int:
    """fp16 scales a row of ``tokens`` takes, so that the next row starts on 16 bytes."""
    return -(-tokens // _SCALE_GROUP) * _SCALE_GROUP


def _check_cache(kernels: Kernels, shape: AttentionShape, cache: DeviceArray, scales: DeviceArray | None) -> None:
    dtype = "fp8" if shape.kv_fp8 else "int8" if shape.kv_int8 else kernels.dtype
    check("cache", cache, (2, shape.num_kv_heads, shape.max_context, shape.head_dim), dtype)
    if shape.kv_scaled != (scales is not None):
        raise KernelArgumentError("An int8 or fp8 cache needs scales, and no other has any; give both or neither.")
    if scales is not None:
        check("scales", scales, (2, shape.num_kv_heads, shape.scale_pitch), "fp16")


def _check(
    kernels: Kernels,
    shape: AttentionShape,
    cache: DeviceArray,
    scales: DeviceArray | None,
    rope: DeviceArray,
    norms: tuple,
    rope_rows: DeviceArray | None,
) -> None:
    shape.validate()
    _check_cache(kernels, shape, cache, scales)
    if shape.rope_width:
        check("rope", rope, (shape.rope_length, shape.rope_width, 2), "fp32")
    if (shape.rope_switch > 0) != (rope_rows is not None):
        raise KernelArgumentError("A RoPE table for short and long sequences needs rope_rows, and no other has any.")
    if rope_rows is not None:
        check("rope_rows", rope_rows, rope_rows.shape, "int32")
    for norm in norms if shape.qk_norm else ():
        check("head norm", norm, (shape.head_dim,), kernels.dtype)


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
    config: DecodeAttentionConfig | None = None,
    slots: DeviceArray | None = None,
    appended: bool = False,
    places: DeviceArray | None = None,
    rope_rows: DeviceArray | None = None,
) -> Launch:
    """Attention of one token of each sequence: rotates q and k, appends K and V to the cache and attends.

    One sequence: qkv 16-bit [width]; ``state``: uint8 [STATE.itemsize], whose position is the token's; ``partial``:
    float32 [partial_floats(num_sms)]; ``counters``: uint32 [bundles], zeros; output: 16-bit [heads × head_dim].
    Several: ``slots``, int32 [n], is the KV slot of each one (negative = it does nothing); those arrays have n in
    front, and ``partial`` is [partial_floats(num_sms, n)].

    ``cache`` and ``scales`` are one layer's of the first slot: [2, kv_heads, max_context, head_dim] and, of an int8
    or fp8 cache, fp16 [2, kv_heads, scale_pitch]. ``rope``: float32 [rope_length, rope_width, 2]. ``norms``: weights of
    the query and key norms. ``rope_rows``: int32 [KV slots], with ``rope_switch`` alone, the row of ``rope`` that
    position 0 of each slot's sequence has. ``appended``: ``rope_append`` has put K and V of all rows into the cache,
    where each row then sees the earlier ones of its slot, too. ``places``: where ``output`` has each column, int32
    [heads × head_dim]. ``config``: another launch configuration than the chosen one. Raises KernelArgumentError.
    """
    num_sms, rows = kernels.gpu.num_sms, slots.shape if slots is not None else ()
    sequences = rows[0] if rows else 1
    _check(kernels, shape, cache, scales, rope, norms or (), rope_rows)
    if slots is not None:
        check("slots", slots, rows, "int32")
        check("state", state, (*rows, STATE.itemsize), "uint8")
    check("qkv", qkv, (*rows, shape.qkv_width), kernels.dtype)
    check("partial", partial, (shape.partial_floats(num_sms, sequences if rows else 0),), "fp32")
    check("counters", counters, (*rows, shape.bundles), "uint32")
    check("output", output, (*rows, shape.num_heads * shape.head_dim), kernels.dtype)
    q_norm, k_norm = norms or (0, 0)
    problem = shape.batch_problem if rows else shape.decode_problem
    config = config or kernels.config(problem)
    shared = max(problem.shared(config), kernels.gpu.shared_budget)
    defines = {
        **shape.defines(),
        "SPLITS": config.splits,
        "MIN_KEYS": config.min_keys,
        "WARPS": config.warps,
        "DEPTH": config.depth,
        "BATCHED": int(slots is not None),
        "APPENDED": int(appended),
        **_order(shape, places),
    }
    function = kernels.function("attention_decode", "attention_decode", defines, shared)
    args = [qkv, cache, rope, q_norm, k_norm, state, partial, counters, output, scales or 0, slots or 0]
    args += [extra for extra in (places, rope_rows) if extra is not None]
    # As many CTAs as every other kernel of a step has on each SM, though some have nothing to do: with a gap somewhere
    # the next kernel, which may start early, would be placed unevenly, and the one after it, too.
    grid = (max(-(-num_sms // sequences), shape.bundles * config.splits), sequences)
    return Launch(kernels.device, function, grid, config.threads, args, shared, problem=problem)


def rope_append(
    kernels: Kernels,
    shape: AttentionShape,
    qkv: DeviceArray,
    cache: DeviceArray,
    rope: DeviceArray,
    chunk: DeviceArray,
    norms: tuple[DeviceArray, DeviceArray] | None = None,
    scales: DeviceArray | None = None,
    kv_only: bool = False,
    bias: DeviceArray | None = None,
    rope_rows: DeviceArray | None = None,
) -> Launch:
    """Return the launch that rotates q of ``qkv``, 16-bit [n, width], in place and writes K and V into ``cache``.

    ``chunk``: int32 [CHUNK_WORDS], the position of the first row and how many rows are tokens. ``kv_only``: q stays
    as it is. ``bias``: 16-bit [width], added to q, k and v first. ``rope``, ``rope_rows``: see ``attention_decode``.
    Raises KernelArgumentError.
    """
    _check(kernels, shape, cache, scales, rope, norms or (), rope_rows)
    check("chunk", chunk, (shape.chunk_words,), "int32")
    check("qkv", qkv, (qkv.shape[0], shape.qkv_width), kernels.dtype)
    defines = {**shape.defines(), "THREADS": ROPE_THREADS, "KV_ONLY": int(kv_only)}
    q_norm, k_norm = norms or (0, 0)
    args = [qkv, cache, rope, q_norm, k_norm, chunk, scales or 0]
    if bias is not None:
        check("bias", bias, (shape.qkv_width,), kernels.dtype)
        defines["BIAS"] = 1
        args.append(bias)
    args += [] if rope_rows is None else [rope_rows]
    function = kernels.function("rope_append", "rope_append", defines)
    grid = (rope_append_blocks(shape, qkv.shape[0], kv_only=kv_only),)
    return Launch(kernels.device, function, grid, ROPE_THREADS, args)


def rope_append_blocks(shape: AttentionShape, count: int, *, kv_only: bool = False) -> int:
    """Return the CTAs of rope_append for ``count`` tokens."""
    vectors = count * (2 * shape.num_kv_heads + (0 if kv_only else shape.num_heads))
    return -(-vectors * shape.lanes // ROPE_THREADS)


def _order(shape: AttentionShape, places: DeviceArray | None) -> dict[str, int | str]:
    """Return the define of an output whose columns are at ``places``. Raises KernelArgumentError."""
    if places is None:
        return {}
    check("places", places, (shape.num_heads * shape.head_dim,), "int32")
    return {"ORDERED": 1}


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
    row_counts: Iterable[int],
    scales: DeviceArray | None = None,
    config: PrefillAttentionConfig | None = None,
    causal: bool = True,
    places: DeviceArray | None = None,
) -> AttentionPrefill:
    """Return the attention of the rows of ``chunk`` in ``qkv`` [n, width]; ``output``: [n, heads × head_dim].

    ``causal``: a query sees the keys up to its own; else those of all rows. ``row_counts``: every number of rows it
    will be queued for; ``config``: one launch configuration for all of them instead of the chosen ones; ``places``:
    see ``attention_decode``. Raises KernelArgumentError.
    """
    shape.validate()
    rows = qkv.shape[0]
    check("qkv", qkv, (rows, shape.qkv_width), kernels.dtype)
    _check_cache(kernels, shape, cache, scales)
    check("output", output, (rows, shape.num_heads * shape.head_dim), kernels.dtype)
    check("chunk", chunk, (shape.chunk_words,), "int32")
    args = [qkv, cache, output, chunk, scales or 0, *([] if places is None else [places])]
    variant = {**_order(shape, places), **({} if causal else {"CAUSAL": 0})}

    def launch(config: PrefillAttentionConfig) -> Launch:
        shared = config.shared(shape.head_dim, shape.kv_scaled)
        function = kernels.function(
            "attention_prefill", "attention_prefill", {**shape.defines(), **config.defines(), **variant}, shared
        )
        return Launch(kernels.device, function, (1, shape.num_heads), config.threads, args, shared)

    configs = {n: config or kernels.config(shape.prefill_problem(n)) for n in row_counts}
    launches = {each: launch(each) for each in set(configs.values())}
    return AttentionPrefill({n: (launches[each], -(-n // each.queries)) for n, each in configs.items()})
