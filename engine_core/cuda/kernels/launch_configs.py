"""Launch configurations: how each kernel divides a problem over CTAs, warps and pipeline stages.

``TABLE`` holds the numbers that were measured, by GPU. The rules below turn them into a configuration for any shape. A
GPU that the table does not list starts from ``FALLBACK``; ``tuning`` then measures ``Problem.candidates`` on it. Every
candidate computes the same result within the tests' tolerance; only the order of additions differs.

A problem is what a kernel is asked to compute (shapes and types), a configuration how it is launched. Both are frozen
dataclasses of numbers and booleans, so that they can be dictionary keys and be stored as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from engine_core.cuda.kernels.integer_layout import GROUP, TILE

# Threads of a CTA of the kernels whose work per thread does not depend on the GPU; passed to them as macros.
ELEMENTWISE_THREADS = 256
RMS_NORM_THREADS = 512
ROPE_THREADS = 128
KV_APPEND_THREADS = 128
SAMPLE_SCAN_THREADS, SAMPLE_PICK_THREADS = 256, 1024
LOG_PROBABILITY_THREADS = 1024
DEQUANTIZE_WARPS = 8
SHORT_CONV_THREADS = 64
SHORT_CONV_TILE = 8  # tokens of a chunk that a thread of short_conv.cu works on
LORA_THREADS = 256
LORA_TOKENS = 8  # of a prompt's chunk that a CTA of lora.cu takes at a time

GEMM_TOKENS = 32  # tokens of a CTA of gemm_packed.cu in prefill: more would take longer than reading its weights
BATCH_TOKENS = (8, 16)  # the same in a decode step of several sequences: the first that holds them
MAX_SEQUENCES = BATCH_TOKENS[-1]  # of a decode step
MAX_VECTORS = 8  # that gemv_packed.cu multiplies at once: the columns of a tensor core's B
# A decode step of several sequences divides each one's keys as if it had this many sequences, whatever it has, so that
# their results are added in the same order and no text depends on who else is there.
SPLIT_SEQUENCES = 2
_GEMM_BAND = 2  # tiles of a warp of gemm_packed.cu
_GEMV_COLUMNS = 256  # columns of a warp's load in gemv.cu
_KV_TILE = 16  # keys of a tile of kv_ring.cuh
_STATIC_SHARED = 12 * 1024  # bytes of shared memory for what kernels declare themselves
_ROWS_STATIC_SHARED = 20 * 1024  # the same of gemv_packed.cu with several vectors
_GEMM_STATIC_SHARED = 1024  # the same of gemm_packed.cu
_SYSTEM_SHARED = 1024  # bytes of an SM's shared memory that each CTA takes besides its own


@dataclass(frozen=True)
class Gpu:
    """A GPU as far as launch configurations depend on it."""

    name: str
    capability: int  # 87 = sm_87
    num_sms: int
    max_shared: int  # bytes of dynamic shared memory a CTA may ask for

    @property
    def overlaps(self) -> bool:
        """True if a kernel may start while the one before it ends (programmatic dependent launch)."""
        return self.capability >= 90

    @property
    def shared_budget(self) -> int:
        """Bytes of dynamic shared memory that every kernel of a decode step asks for, needed or not.

        Half of what an SM has: the next kernel's CTA fits beside it, and a third one does not.
        """
        return self.max_shared // 2 - _STATIC_SHARED

    @property
    def alone_shared(self) -> int:
        """Bytes of dynamic shared memory of which no two CTAs fit on an SM; 0 where no kernel starts early.

        Kernels with a CTA for each SM ask for them in a step whose other kernels have more or fewer. Else, starting
        while such a kernel ends, two of them would be placed on one SM and none on another.
        """
        return self.max_shared * 5 // 8 if self.overlaps else 0


@dataclass(frozen=True)
class Numbers:
    """The measured numbers that the rules use. benchmarks/results/kernels.md says how they were found."""

    gemv_warps: int = 16  # of a CTA; half of them at most along the columns
    gemv_two_ctas_bytes: int = 96 * 1024  # of weights a CTA must have for a second CTA per SM to pay
    gemv_max_depth: int = 8  # stages of the ring
    gemv_batches: tuple[int, ...] = (4, 2, 1)  # rows of a stage, the first that fits
    packed_gemv_warps_4: int = 16  # of a CTA, 4-bit weights
    packed_gemv_warps_8: int = 8
    packed_gemv_depth_4: int = 3  # stages of a warp's ring at most
    packed_gemv_depth_8: int = 4
    packed_gemv_row_warps: int = 8  # at most, 4-bit weights
    packed_gemv_ctas: int = 1  # of an SM
    gemm_warps: int = 16  # of a CTA at most
    gemm_row_warps: int = 3  # with fewer the columns are split over CTAs
    gemm_splits: int = 8  # CTAs along the columns at most
    gemm_stage: int = 8  # groups of columns of a stage of X
    gemm_rows_small: int = 64  # rows up to which prefill multiplies packed weights, where hidden is small
    gemm_rows_large: int = 96
    gemm_small_hidden: int = 2048  # hidden up to this is small
    decode_warps: tuple[int, ...] = (8, 4, 2)  # of an attention CTA, the first whose ring is deep enough
    decode_depth: int = 6  # pieces of a warp's ring at most
    decode_splits: int = 64  # CTAs of a KV head at most
    decode_ctas: int = 1  # of an SM
    decode_min_keys: int = 256  # of a split; with fewer, merging takes longer than reading them
    shared_share: int = 2  # rings may take this part of an SM's shared memory

    def shared_budget(self, gpu: Gpu) -> int:
        """Return the bytes of shared memory for rings."""
        return gpu.max_shared // self.shared_share - _STATIC_SHARED


@dataclass(frozen=True)
class Row:
    """GPUs of one compute capability with a similar number of SMs, and the numbers measured there."""

    capability: int
    num_sms: range
    numbers: Numbers
    measured_on: str

    def covers(self, gpu: Gpu) -> bool:
        return gpu.capability == self.capability and gpu.num_sms in self.num_sms


FALLBACK = Numbers()
TABLE = (Row(90, range(100, 145), Numbers(), "H200 and H100 SXM, 132 SMs, 2026-11-24 to 26"),)


def table_numbers(gpu: Gpu) -> Numbers | None:
    """Return the numbers measured on GPUs like ``gpu``, or None."""
    return next((row.numbers for row in TABLE if row.covers(gpu)), None)


Config = TypeVar("Config")


@dataclass(frozen=True)
class Problem(ABC, Generic[Config]):
    """A computation that a kernel is asked for: shapes and types."""

    config_type: ClassVar[type]
    order: ClassVar[int]  # tuning measures problems of a lower order first

    @abstractmethod
    def rule(self, gpu: Gpu, numbers: Numbers) -> Config:
        """Return the configuration that follows from ``numbers``."""

    @abstractmethod
    def variants(self, gpu: Gpu) -> list[Config]:
        """Configurations that may be faster than the rule's."""

    @property
    def size(self) -> int:
        """Relative weight among problems of the same order; tuning measures large ones first."""
        return 0

    def candidates(self, gpu: Gpu) -> list[Config]:
        """Return the configurations that tuning measures: the rule's first, each one once."""
        return list(dict.fromkeys([self.rule(gpu, table_numbers(gpu) or FALLBACK), *self.variants(gpu)]))

    @property
    def key(self) -> str:
        """Name of the problem in a file."""
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in dataclasses.asdict(self).items())})"

    def _rules(self, gpu: Gpu, *changes: dict[str, Any]) -> list[Config]:
        """The rule's configurations with each of ``changes`` made to the fallback's numbers."""
        return [self.rule(gpu, dataclasses.replace(FALLBACK, **change)) for change in changes]


class LaunchConfigs:
    """The launch configurations of one GPU: those that were chosen for it, else those of the table and its rules."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.numbers = table_numbers(gpu) or FALLBACK
        self._chosen: dict[Problem[Any], Any] = {}
        self._noted: dict[Problem[Any], None] | None = None

    @property
    def in_table(self) -> bool:
        """True if the table lists this GPU: nothing is left to measure."""
        return table_numbers(self.gpu) is not None

    def lookup(self, problem: Problem[Config]) -> Config:
        """Return the configuration to launch ``problem`` with."""
        if self._noted is not None:
            self._noted[problem] = None
        if problem in self._chosen:
            return self._chosen[problem]
        return problem.rule(self.gpu, self.numbers)

    def choose(self, problem: Problem[Config], config: Config) -> None:
        """Makes ``lookup`` return ``config`` from here on."""
        assert isinstance(config, problem.config_type)
        self._chosen[problem] = config

    @contextlib.contextmanager
    def trying(self, problem: Problem[Config], config: Config) -> Iterator[None]:
        """Within the context ``lookup`` returns ``config`` for ``problem``."""
        before = dict(self._chosen)
        self.choose(problem, config)
        try:
            yield
        finally:
            self._chosen = before

    @contextlib.contextmanager
    def noting(self) -> Iterator[dict[Problem[Any], None]]:
        """Yields a dictionary whose keys become the problems that are looked up within the context."""
        self._noted = {}
        try:
            yield self._noted
        finally:
            self._noted = None


# --- 16-bit GEMV ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GemvConfig:
    """Division of a matrix by gemv.cu: warps along columns and rows, rows of a stage, stages of the ring."""

    k_warps: int
    row_warps: int
    batch: int
    depth: int
    ctas_per_sm: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.k_warps * self.row_warps

    def shared(self, cols: int) -> int:
        """Return the bytes of the ring."""
        parts = -(-cols // (_GEMV_COLUMNS * self.k_warps))
        return self.depth * self.batch * parts * 16 * self.threads


@dataclass(frozen=True)
class GemvProblem(Problem[GemvConfig]):
    """A 16-bit matrix [rows, cols] times one vector; ``epilogue`` and ``normed`` as in gemv.cu."""

    rows: int
    cols: int
    epilogue: int = 0
    normed: bool = False

    config_type = GemvConfig
    order = 0

    @property
    def size(self) -> int:
        return self.rows * self.cols

    def rule(self, gpu: Gpu, numbers: Numbers) -> GemvConfig:
        """Up to eight warps along the columns with the least waste, sixteen in all; two CTAs per SM where each has
        enough to read; then the deepest ring that fits, of three stages if it can."""
        chunks = -(-self.cols // _GEMV_COLUMNS)

        def waste(k_warps: int) -> tuple[int, int]:
            parts = -(-chunks // k_warps)
            return k_warps * parts - chunks, -k_warps

        budget = numbers.shared_budget(gpu)
        k_warps = min(range(1, min(chunks, max(1, numbers.gemv_warps // 2)) + 1), key=waste)
        ctas = 2 if self.rows * self.cols * 2 >= 2 * gpu.num_sms * numbers.gemv_two_ctas_bytes else 1
        # With a single load per row the registers would let a third CTA in beside two, and the shares would be uneven.
        ring = budget * 2 // 3 if ctas == 2 and chunks > k_warps else budget
        row_warps = 1
        while row_warps * 2 * k_warps <= numbers.gemv_warps:
            row_warps *= 2
        while True:
            for batch in numbers.gemv_batches if ctas == 1 else numbers.gemv_batches[1:]:
                stage = GemvConfig(k_warps, row_warps, batch, 1).shared(self.cols)
                if (2 if ctas == 2 else 3) * stage <= ring:
                    depth = max(ring // stage, min(3, budget // stage))
                    return GemvConfig(k_warps, row_warps, batch, min(numbers.gemv_max_depth, depth), ctas)
            if row_warps == 1:
                return GemvConfig(k_warps, 1, 1, max(1, ring // stage), ctas)
            row_warps //= 2

    def variants(self, gpu: Gpu) -> list[GemvConfig]:
        one, two = {"gemv_two_ctas_bytes": 1 << 40}, {"gemv_two_ctas_bytes": 0}
        changes: list[dict[str, Any]] = [one, two, {**one, "gemv_warps": 8}, {**two, "gemv_warps": 8}]
        if not gpu.overlaps:  # no kernel waits beside this one for shared memory
            changes.append({**one, "shared_share": 1})
        return self._rules(gpu, *changes)


# --- GEMV of packed tiles ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedGemvConfig:
    """Division of a matrix by gemv_packed.cu: warps along columns and rows, stages of each warp's ring."""

    k_warps: int
    row_warps: int
    depth: int
    ctas_per_sm: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.k_warps * self.row_warps

    def shared(self, groups: int, tile_bytes: int, vectors: int = 1, sums: int = 0) -> int:
        """Return the bytes of the vectors in 16 bits, their ``sums`` for each group in float32, and the rings."""
        held = vectors * 2 * groups * GROUP + -(-vectors * groups * sums // 4) * 16
        return held + self.k_warps * self.row_warps * self.depth * tile_bytes

    def for_vectors(
        self, groups: int, tile_bytes: int, vectors: int, gpu: Gpu, sums: int = 0
    ) -> tuple[PackedGemvConfig, int]:
        """Return the same division of the sums for several vectors, and the bytes of dynamic shared memory to ask for.

        The rings have as many stages as fit. The bytes are more than the GPU has where not even one does.
        """
        stage = dataclasses.replace(self, depth=1).shared(0, tile_bytes)
        held = dataclasses.replace(self, depth=0).shared(groups, tile_bytes, vectors, sums)
        depth = (gpu.max_shared - _ROWS_STATIC_SHARED - held) // stage
        config = dataclasses.replace(self, depth=max(1, min(self.depth, depth)), ctas_per_sm=1)
        return config, max(config.shared(groups, tile_bytes, vectors, sums), gpu.alone_shared)


@dataclass(frozen=True)
class PackedGemvProblem(Problem[PackedGemvConfig]):
    """A matrix of packed tiles [tiles, groups] times one vector; ``bits`` of a weight, ``tile_bytes`` of a tile.

    ``sums``: float32 values in dynamic shared memory of a vector for each group.
    """

    tiles: int
    groups: int
    tile_bytes: int
    bits: int
    epilogue: int = 0
    normed: bool = False
    sums: int = 0

    config_type = PackedGemvConfig
    order = 0
    _MIN_DEPTH: ClassVar[int] = 3
    _ALIGNED_TILES: ClassVar[int] = 4  # so many are a multiple of 128 bytes

    @property
    def size(self) -> int:
        return self.tiles * self.groups * self.tile_bytes

    def rule(self, gpu: Gpu, numbers: Numbers) -> PackedGemvConfig:
        """4 bits: sixteen warps, a row of them for each tile a CTA has, up to eight; a warp's tiles start on 128 bytes
        if they can. 8 bits: eight warps along the columns."""
        narrow, row_warps = self.bits == 4, 1
        warps = numbers.packed_gemv_warps_4 if narrow else numbers.packed_gemv_warps_8
        max_depth = numbers.packed_gemv_depth_4 if narrow else numbers.packed_gemv_depth_8
        ring = numbers.shared_budget(gpu) - self.shared(PackedGemvConfig(1, 1, depth=0))
        if narrow:
            ctas = gpu.num_sms * numbers.packed_gemv_ctas
            while row_warps * ctas < self.tiles and row_warps < numbers.packed_gemv_row_warps:
                row_warps *= 2
        for share in (1, 2):  # fewer warps where the ring would be too shallow
            rows = max(1, row_warps // share)
            most = max(1, warps // share // rows)
            choices = range(most // 2 + 1, most + 1)
            aligned = [k for k in choices if narrow and self.groups % (k * self._ALIGNED_TILES) == 0]
            k_warps = max(aligned, default=-(-self.groups // -(-self.groups // most)))
            depth = ring // (k_warps * rows * self.tile_bytes)
            if depth >= self._MIN_DEPTH:
                break
        return PackedGemvConfig(k_warps, rows, max(1, min(max_depth, depth)), numbers.packed_gemv_ctas)

    def variants(self, gpu: Gpu) -> list[PackedGemvConfig]:
        other = {"packed_gemv_warps_4": 8, "packed_gemv_warps_8": 16}
        changes: list[dict[str, Any]] = [
            other,
            {"packed_gemv_ctas": 2, "packed_gemv_warps_4": 8},
            {"packed_gemv_row_warps": 1},
            {"packed_gemv_depth_4": 6, "packed_gemv_depth_8": 6},
        ]
        if not gpu.overlaps:
            changes.append({"shared_share": 1, "packed_gemv_depth_4": 6, "packed_gemv_depth_8": 6})
        return [config for config in self._rules(gpu, *changes) if self._fits(config, gpu)]

    def _fits(self, config: PackedGemvConfig, gpu: Gpu) -> bool:
        return self.shared(config) <= gpu.max_shared - _STATIC_SHARED

    def shared(self, config: PackedGemvConfig) -> int:
        """Return the bytes of dynamic shared memory that ``config`` needs."""
        return config.shared(self.groups, self.tile_bytes, sums=self.sums)

    def for_vectors(self, config: PackedGemvConfig, vectors: int, gpu: Gpu) -> tuple[PackedGemvConfig, int]:
        """See ``PackedGemvConfig.for_vectors``."""
        return config.for_vectors(self.groups, self.tile_bytes, vectors, gpu, self.sums)


# --- GEMM of packed tiles ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedGemmConfig:
    """Division of a matrix by gemm_packed.cu over CTAs and their warps, and X into stages."""

    row_warps: int
    k_warps: int
    splits: int
    stage: int  # groups of columns of X
    buffers: int
    depth: int = 2

    @property
    def threads(self) -> int:
        return 32 * self.k_warps * self.row_warps

    def ctas(self, tiles: int) -> int:
        """CTAs along the rows."""
        return -(-tiles // (_GEMM_BAND * self.row_warps))

    def shared(self, tile_bytes: int, tokens: int = GEMM_TOKENS, sums: int = 1) -> int:
        """Return the bytes of the stages of X with ``sums`` float32 values for each group of columns, and the rings, or
        of the sums that come after them."""
        warps = self.row_warps * self.k_warps
        stages = self.buffers * self.stage * tokens * (GROUP * 2 + 4 * sums)
        of_warps = warps * _GEMM_BAND * TILE * tokens * 4 if self.k_warps > 1 else 0
        return max(stages + warps * self.depth * _GEMM_BAND * tile_bytes, of_warps)


def gemm_splits(tiles: int, groups: int, num_sms: int, numbers: Numbers = FALLBACK) -> int:
    """CTAs along the columns: as many as leave each a few groups of X, but enough warps and not too many their rows.

    No candidate has more than with ``FALLBACK``.
    """

    def bands(splits: int) -> int:
        return -(-tiles * splits // (_GEMM_BAND * num_sms))

    most, splits = numbers.gemm_splits, 1
    while splits < most and groups > splits * numbers.gemm_stage and bands(2 * splits) <= numbers.gemm_warps:
        splits *= 2
    while splits < most and groups >= 4 * splits and bands(splits) < numbers.gemm_row_warps:
        splits *= 2
    return splits


_GEMM_CHANGES: tuple[dict[str, Any], ...] = (
    {"gemm_splits": 1},
    {"gemm_warps": 8},
    {"gemm_stage": 4},
    {"gemm_row_warps": 2},
    {"gemm_stage": 2},
)


@dataclass(frozen=True)
class PackedGemmProblem(Problem[PackedGemmConfig]):
    """A matrix of tiles [tiles, groups], packed or of 16 bits, times a few tokens, ``tokens`` of them in a CTA.

    ``sums``: float32 values in shared memory of a token for each group.
    """

    tiles: int
    groups: int
    tile_bytes: int
    bits: int
    epilogue: int = 0
    tokens: int = GEMM_TOKENS
    sums: int = 1

    config_type = PackedGemmConfig
    order = 2

    @property
    def size(self) -> int:
        return self.tiles * self.groups * self.tile_bytes

    def rule(self, gpu: Gpu, numbers: Numbers) -> PackedGemmConfig:
        splits = gemm_splits(self.tiles, self.groups, gpu.num_sms, numbers)
        bands, own_groups = -(-self.tiles // _GEMM_BAND), -(-self.groups // splits)
        rounds = -(-bands * splits // (gpu.num_sms * numbers.gemm_warps))
        row_warps = -(-bands * splits // (gpu.num_sms * rounds))
        k_warps = 1 if row_warps > numbers.gemm_warps // 2 else 2 if row_warps > numbers.gemm_row_warps else 4
        while k_warps > own_groups:
            k_warps //= 2
        while True:
            stage = min(numbers.gemm_stage, 1 << (own_groups - 1).bit_length())
            while stage >= max(k_warps, min(2, own_groups)):
                config = PackedGemmConfig(row_warps, k_warps, splits, stage, 1 if own_groups <= stage else 2)
                if config.shared(self.tile_bytes, self.tokens, self.sums) <= gpu.max_shared - _GEMM_STATIC_SHARED:
                    return config
                stage //= 2
            if k_warps > 1:
                k_warps //= 2
            else:
                row_warps = -(-row_warps // 2)

    def variants(self, gpu: Gpu) -> list[PackedGemmConfig]:
        configs = self._rules(gpu, *_GEMM_CHANGES)
        most = gemm_splits(self.tiles, self.groups, gpu.num_sms)  # the memory plan has room for so many partial sums
        return [config for config in configs if config.splits <= most]


@dataclass(frozen=True)
class PackedRowsConfig:
    """Prefill multiplies packed tiles for up to ``rows`` rows; for more it dequantizes and calls cuBLAS."""

    rows: int


@dataclass(frozen=True)
class PackedRowsProblem(Problem[PackedRowsConfig]):
    """All four matrices of a layer of packed tiles, for every number of rows in ``PACKED_ROWS``."""

    hidden: int
    intermediate: int
    qkv_width: int
    bits: int

    config_type = PackedRowsConfig
    order = 3

    def rule(self, gpu: Gpu, numbers: Numbers) -> PackedRowsConfig:
        """Small matrices are dequantized so fast that it soon pays."""
        small = self.hidden <= numbers.gemm_small_hidden
        return PackedRowsConfig(numbers.gemm_rows_small if small else numbers.gemm_rows_large)

    def variants(self, gpu: Gpu) -> list[PackedRowsConfig]:
        return [PackedRowsConfig(rows) for rows in PACKED_ROWS]


PACKED_ROWS = (32, 64, 96, 128, 192, 256)  # rows up to which packed tiles may be multiplied; sizes of a prefill step


# --- attention of one token -------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeAttentionConfig:
    """Division of a KV head by attention_decode.cu: CTAs (splits), least keys of a split, warps, pieces of a ring."""

    splits: int
    min_keys: int
    warps: int
    depth: int

    @property
    def threads(self) -> int:
        return 32 * self.warps


def decode_splits(num_kv_heads: int, num_sms: int, numbers: Numbers = FALLBACK) -> int:
    """CTAs per KV head: as many as fill the GPU once."""
    return max(1, min(numbers.decode_splits, numbers.decode_ctas * num_sms // num_kv_heads))


def max_decode_splits(num_kv_heads: int, num_sms: int) -> int:
    """Return the most splits of any candidate: what the memory plan has room for."""
    return decode_splits(num_kv_heads, num_sms, dataclasses.replace(FALLBACK, decode_ctas=2))


@dataclass(frozen=True)
class DecodeAttentionProblem(Problem[DecodeAttentionConfig]):
    """One token of ``num_heads`` query heads over a linear KV cache, divided as suits a step of ``sequences``."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool
    kv_int8: bool  # the cache has 8-bit values with scales, int8 or fp8
    sequences: int = 1

    config_type = DecodeAttentionConfig
    order = 1
    _MIN_DEPTH: ClassVar[int] = 3

    def piece_bytes(self) -> int:
        """K or V of a tile of keys in shared memory, see kv_ring.cuh."""
        row = -(-self.head_dim // 64) * 64
        return _KV_TILE * (row + 2 if self.kv_int8 else 2 * row)

    def shared(self, config: DecodeAttentionConfig) -> int:
        """Return the bytes of the rings, or of the values that are merged after them."""
        group = self.num_heads // self.num_kv_heads
        return max(
            config.warps * config.depth * self.piece_bytes(),
            config.warps * group * self.head_dim * 4,
        )

    def rule(self, gpu: Gpu, numbers: Numbers) -> DecodeAttentionConfig:
        budget, piece = numbers.shared_budget(gpu), self.piece_bytes()
        for warps in numbers.decode_warps:
            depth = max(1, min(numbers.decode_depth, budget // (warps * piece)))
            if depth >= self._MIN_DEPTH:
                break
        splits = decode_splits(self.num_kv_heads * self.sequences, gpu.num_sms, numbers)
        return DecodeAttentionConfig(splits, numbers.decode_min_keys, warps, depth)

    def variants(self, gpu: Gpu) -> list[DecodeAttentionConfig]:
        configs = self._rules(
            gpu,
            {"decode_ctas": 2},
            {"decode_warps": (4, 2)},
            {"decode_ctas": 2, "decode_warps": (4, 2)},
            {"decode_min_keys": 128},
            {"decode_ctas": 2, "decode_min_keys": 128},
        )
        return [config for config in configs if self.shared(config) <= gpu.max_shared - _STATIC_SHARED]


# --- attention of many tokens -----------------------------------------------------------------------------


@dataclass(frozen=True)
class PrefillAttentionConfig:
    """Division of the queries of one head over warps by attention_prefill.cu."""

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
        """Return the bytes of shared memory a CTA takes."""
        keys, row = self.groups * self.tile_keys, 2 * (head_dim + 8)
        queries = self.queries * row if self.blocks > 1 else 0
        stage = 2 * keys * row
        return queries + (stage + 2 * 2 * keys * (head_dim + 2) if kv_int8 else 2 * stage)

    def defines(self) -> dict[str, int]:
        return {"WARPS": self.warps, "BLOCKS": self.blocks, "GROUPS": self.groups, "TILE_K": self.tile_keys}


@dataclass(frozen=True)
class PrefillAttentionProblem(Problem[PrefillAttentionConfig]):
    """``rows`` tokens of ``num_heads`` query heads over a linear KV cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_int8: bool  # the cache has 8-bit values with scales, int8 or fp8
    rows: int

    config_type = PrefillAttentionConfig
    order = 4

    @property
    def size(self) -> int:
        return -self.rows  # a turn of a conversation has few rows

    def _fits(self, config: PrefillAttentionConfig, limit: int) -> bool:
        return config.shared(self.head_dim, self.kv_int8) <= limit

    def _ctas(self, queries: int) -> int:
        return -(-self.rows // queries) * self.num_heads

    def rule(self, gpu: Gpu, numbers: Numbers) -> PrefillAttentionConfig:
        """Choose by how many CTAs each SM gets and what fits its shared memory. Measured with 32 heads of 64 and of
        128, once for each head and once eight times, as on a GPU with an eighth of an H200's SMs."""
        keys = 32 if self.head_dim > 128 else 64
        half = (gpu.max_shared - _SYSTEM_SHARED) // 2  # of an SM's, so that two CTAs fit
        narrow, split = PrefillAttentionConfig(4, 1, 1, keys), PrefillAttentionConfig(4, 1, 2, keys)
        if self._ctas(16) <= gpu.num_sms:  # at most one CTA an SM: its warps share the keys
            for few in (
                PrefillAttentionConfig(1, 1, 8, 16) if self.kv_int8 else PrefillAttentionConfig(1, 1, 4, 32),
                PrefillAttentionConfig(1, 1, 4, 16),
            ):
                if self._fits(few, gpu.max_shared):
                    return few
        if self.rows <= narrow.queries:
            return split if self.head_dim <= 64 and self._fits(split, half) else narrow
        if 2 * self._ctas(128) < gpu.num_sms:
            return split if self._fits(split, gpu.max_shared) else narrow
        if self.head_dim <= 128:  # more would not fit the registers
            if 2 * self._ctas(128) < 3 * gpu.num_sms:  # one CTA an SM: two groups, so that it has eight warps
                wide, limit = [PrefillAttentionConfig(4, 2, 2, keys)], gpu.max_shared
            else:
                wide = [PrefillAttentionConfig(4, 2, 1, keys), PrefillAttentionConfig(4, 2, 1, keys // 2)]
                limit = half
            for config in wide:
                if self._fits(config, limit):
                    return config
        return PrefillAttentionConfig(8, 1, 1, keys)

    def variants(self, gpu: Gpu) -> list[PrefillAttentionConfig]:
        keys = 32 if self.head_dim > 128 else 64
        wide = [(4, 2, 2, keys), (4, 2, 1, keys), (4, 2, 1, keys // 2)] if self.head_dim <= 128 else []
        shapes = [(4, 1, 1, keys), (4, 1, 2, keys), *wide, (8, 1, 1, keys), (1, 1, 4, 32), (1, 1, 4, 16)]
        configs = [PrefillAttentionConfig(*shape) for shape in shapes]
        return [
            config
            for config in configs
            if self._fits(config, gpu.max_shared)
            and config.queries < 4 * self.rows  # else most of a CTA's rows are none
            and self._ctas(config.queries) <= max(64 * gpu.num_sms, self.num_heads)
        ]
