"""GEMV and GEMM with 4- and 8-bit weights, and their dequantization; wrappers of gemv_packed.cu and gemm_packed.cu.

Weights are integers or small floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine_core.cuda.driver import DeviceArray, Launch, Stream
from engine_core.cuda.kernels import (
    CHUNK_WORDS,
    KernelArgumentError,
    Kernels,
    check,
    float_define,
    fp8_layout,
    int4_layout,
    int8_layout,
    nvfp4_layout,
)
from engine_core.cuda.kernels.integer_layout import GROUP, TILE, IntegerLayout
from engine_core.cuda.kernels.launch_configs import (
    DEQUANTIZE_WARPS,
    FALLBACK,
    GEMM_TOKENS,
    MAX_VECTORS,
    PackedGemmConfig,
    PackedGemmProblem,
    PackedGemvConfig,
    PackedGemvProblem,
    gemm_splits,
)
from engine_core.cuda.kernels.linear import LOGITS, check_output, logits_defines
from engine_core.cuda.kernels.lora import LoraTerm
from engine_core.formats.weight_formats.base import WeightFormat
from engine_core.formats.weight_formats.integers import IntegerFormat

# Kind of a weight format → how the kernels store a matrix of it. The kernels read no others. Integers in smaller groups
# or with zero points have layouts of their own: see ``layout_of``.
INTEGER_LAYOUTS = {"int4": int4_layout.LAYOUT, "int8": int8_layout.LAYOUT}
FLOAT_LAYOUTS = {"fp8": fp8_layout.ROWS, "fp8_blocks": fp8_layout.GROUPS, "nvfp4": nvfp4_layout}
LAYOUTS: dict[str, Any] = {**INTEGER_LAYOUTS, **FLOAT_LAYOUTS}


def stored_group(weight_format: WeightFormat) -> int:
    """Return the columns that share a scale where the kernels read the format; 0 = all of a row, or no scales."""
    if weight_format.kind not in LAYOUTS or weight_format.has_fixed_group:
        return weight_format.group_size
    return GROUP


def layout_of(weight_format: WeightFormat) -> Any:
    """Return how the kernels store a matrix of a format whose kind is in LAYOUTS."""
    if not isinstance(weight_format, IntegerFormat):
        return LAYOUTS[weight_format.kind]
    return IntegerLayout(weight_format.bits, min(GROUP, stored_group(weight_format)), weight_format.asymmetric)


@dataclass(frozen=True)
class PackedWeight:
    """A matrix [rows, cols] on the device, in packed tiles of ``format``."""

    tiles: DeviceArray
    format: WeightFormat
    rows: int
    cols: int

    def __post_init__(self) -> None:
        """Raises KernelArgumentError."""
        if self.cols % 8:
            raise KernelArgumentError(f"A packed weight has {self.cols} columns; the kernels read a multiple of 8.")
        check("tiles", self.tiles, layout_of(self.format).tiles_shape(self.rows, self.cols), "uint8")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return the tiles along the rows, those along the columns, and the bytes of one."""
        return -(-self.rows // TILE), -(-self.cols // GROUP), layout_of(self.format).TILE_BYTES

    @property
    def sums(self) -> int:
        """Float32 values that gemm_packed.cu keeps of a token for a tile's columns; see ``IntegerLayout``."""
        layout = layout_of(self.format)
        return layout.sums if isinstance(layout, IntegerLayout) else 1

    @property
    def vector_sums(self) -> int:
        """The same of gemv_packed.cu, beside one that it always has room for."""
        return self.sums if self.sums > 1 else 0

    @property
    def defines(self) -> dict[str, int]:
        """Macros that specialise the kernels for the tiles."""
        layout = layout_of(self.format)
        defines = {**self.format.kernel_defines, **(layout.defines if isinstance(layout, IntegerLayout) else {})}
        has_halves = isinstance(self.format, IntegerFormat) and self.format.half_scales
        return defines | ({"HALF_SCALES": 1} if has_halves else {})

    def gemv_problem(self, rows: int, epilogue: int = 0, normed: bool = False) -> PackedGemvProblem:
        """Return what ``gemv_packed.cu`` computes with ``rows`` of it."""
        _, groups, tile_bytes = self.sizes
        bits, sums = self.format.bits, self.vector_sums
        return PackedGemvProblem(-(-rows // TILE), groups, tile_bytes, bits, epilogue, normed, sums)


def _defines(weight: PackedWeight, k_warps: int, row_warps: int, depth: int) -> dict[str, int | str]:
    sizes = {"ROWS": weight.rows, "COLS": weight.cols, **weight.defines}
    return {**sizes, "K_WARPS": k_warps, "ROW_WARPS": row_warps, "DEPTH": depth}


def gemv_packed(
    kernels: Kernels,
    weight: PackedWeight,
    vector: DeviceArray,
    output: DeviceArray,
    epilogue: int,
    *,
    norm_weight: DeviceArray | None = None,
    bias: DeviceArray | None = None,
    norm_eps: float = 0.0,
    norm_size: int = 0,
    norm_offset: float = 0.0,
    softcap: float = 0.0,
    logits_scale: float = 1.0,
    lora: LoraTerm | None = None,
    places: DeviceArray | None = None,
    config: PackedGemvConfig | None = None,
) -> Launch:
    """Return the launch of ``linear.gemv`` with a packed weight, for one vector [cols] or up to MAX_VECTORS, [n, cols].

    ``places``, int32 [cols]: the column of ``weight`` that each column of one vector meets.
    The output of several has n in front, too, and they have neither a norm nor a LoRA term. The sums of each are
    added in the same order however many there are.
    """
    rows, cols = weight.rows, weight.cols
    lead, count = vector.shape[:-1], math.prod(vector.shape[:-1])
    if len(lead) > 1 or not 1 <= count <= MAX_VECTORS or (count > 1 and (lora is not None or norm_weight is not None)):
        raise KernelArgumentError(
            f"The vectors are {list(vector.shape)}; the kernel takes up to {MAX_VECTORS}, and one with a norm or LoRA."
        )
    check("vector", vector, (*lead, cols), "fp32" if norm_weight is not None else kernels.dtype)
    check_output(kernels, output, epilogue, *lead, rows)
    if norm_weight is not None:
        check("norm_weight", norm_weight, (cols,), kernels.dtype)
    if bias is not None:
        check("bias", bias, (rows,), kernels.dtype)
    if lora is not None:
        lora.check(kernels, rows, cols, 1)
    if places is not None:
        check("places", places, (cols,), "int32")
        if count > 1:
            raise KernelArgumentError("Only one vector is put in order.")
    problem = weight.gemv_problem(rows, epilogue, norm_weight is not None)
    config = config or kernels.config(problem)
    shared = max(problem.shared(config), kernels.gpu.shared_budget)
    if count > 1:
        config, shared = problem.for_vectors(config, count, kernels.gpu)
    if shared > kernels.gpu.max_shared:
        raise KernelArgumentError(
            f"{count} rows of {cols} values do not fit the shared memory of {kernels.gpu.name}: see vectors_fit."
        )
    defines = {
        **_defines(weight, config.k_warps, config.row_warps, config.depth),
        "EPILOGUE": epilogue,
        "NORM": int(norm_weight is not None),
        "BIAS": int(bias is not None),
        "NORM_EPS": float_define(norm_eps),
        "NORM_SIZE": norm_size or cols,
        "NORM_OFFSET": float_define(norm_offset),
        **logits_defines(softcap, logits_scale),
        **(lora.gemv_defines(kernels) if lora is not None else {}),
        **({"TOKENS": count} if count > 1 else {}),
        **({"ORDERED": 1} if places is not None else {}),
        "DEQUANTIZE_WARPS": DEQUANTIZE_WARPS,
    }
    function = kernels.function("gemv_packed", "gemv_packed", defines, shared)
    grid = kernels.gpu.num_sms * config.ctas_per_sm  # some may have nothing to do; see attention_decode
    args = [weight.tiles, vector, norm_weight or 0, bias or 0, output, *(lora.gemv_args if lora is not None else [])]
    args += [] if places is None else [places]
    return Launch(kernels.device, function, (grid,), config.threads, args, shared, problem=problem)


def vectors_fit(kernels: Kernels, weight: PackedWeight, vectors: int) -> bool:
    """Return whether so many vectors fit in shared memory for ``gemv_packed``, beside two stages of the weights."""
    problem = weight.gemv_problem(weight.rows)
    rule = problem.rule(kernels.gpu, FALLBACK)
    return vectors <= MAX_VECTORS and problem.for_vectors(rule, vectors, kernels.gpu)[0].depth > 1


def packed_scratch(
    shapes: Iterable[tuple[int, int]], tokens: int, num_sms: int, cta_tokens: int = GEMM_TOKENS
) -> tuple[int, int]:
    """Return the float32 partial sums and the counters that GEMMs of ``shapes`` (rows, columns) need at most.

    ``tokens``: rows of X; ``cta_tokens``: of one CTA.
    """
    sums = counters = 1
    for rows, cols in shapes:
        tiles, token_tiles = -(-rows // TILE), -(-tokens // cta_tokens)
        splits = gemm_splits(tiles, -(-cols // GROUP), num_sms)
        if splits > 1:
            sums = max(sums, splits * tiles * TILE * cta_tokens * token_tiles)
            counters = max(counters, tiles * token_tiles)
    return sums, counters


class PackedGemm:
    """GEMM of vectors [n, cols] and weightᵀ for the rows of ``chunk``, see CHUNK_WORDS.

    ``epilogue`` STORE: output 16-bit [n, rows]; RESIDUAL: float32 and added to; LOGITS: float32; SILU or GELU: 16-bit
    [n, rows / 2] of rows that are (gate, up) in turn. ``bias``, 16-bit [rows], is added first. ``partial``, float32,
    and ``counters``, uint32 and zeros, are as long as ``packed_scratch`` says for the most tokens there will be.
    """

    def __init__(
        self,
        kernels: Kernels,
        weight: PackedWeight,
        vectors: DeviceArray,
        output: DeviceArray,
        epilogue: int,
        chunk: DeviceArray,
        partial: DeviceArray,
        counters: DeviceArray,
        config: PackedGemmConfig | None = None,
        bias: DeviceArray | None = None,
    ) -> None:
        """Raises KernelArgumentError, KernelCompileError or DeviceError."""
        rows, cols, (tiles, groups, tile_bytes) = weight.rows, weight.cols, weight.sizes
        check("vectors", vectors, (vectors.shape[0], cols), kernels.dtype)
        check_output(kernels, output, epilogue, vectors.shape[0], rows)
        if bias is not None:
            check("bias", bias, (rows,), kernels.dtype)
        check("partial", partial, partial.shape, "fp32")
        check("counters", counters, counters.shape, "uint32")
        check("chunk", chunk, (CHUNK_WORDS,), "int32")
        bits, sums = weight.format.bits, weight.sums
        self.problem = PackedGemmProblem(tiles, groups, tile_bytes, bits, epilogue, sums=sums)
        config = config or kernels.config(self.problem)
        shared = config.shared(tile_bytes, sums=sums)
        defines = {
            **_defines(weight, config.k_warps, config.row_warps, config.depth),
            "SPLITS": config.splits,
            "STAGE": config.stage,
            "BUFFERS": config.buffers,
            "TOKENS": GEMM_TOKENS,
            "EPILOGUE": epilogue,
            "BIAS": int(bias is not None),
        }
        function = kernels.function("gemm_packed", "gemm_packed", defines, shared)
        grid = (1, config.splits, config.ctas(tiles))
        args = [weight.tiles, vectors, output, chunk, partial, counters, bias or 0]
        self._launch = Launch(kernels.device, function, grid, config.threads, args, shared)

    def __call__(self, stream: Stream, rows: int) -> None:
        """Queue it for at most ``rows`` tokens."""
        self._launch.set_grid(-(-rows // GEMM_TOKENS))
        self._launch(stream)


def dequantize_packed(kernels: Kernels, weight: PackedWeight, output: DeviceArray) -> Launch:
    """output [rows, cols] 16-bit ← weight."""
    tiles, groups, _ = weight.sizes
    check("output", output, (weight.rows, weight.cols), kernels.dtype)
    defines = {**_defines(weight, 1, 1, 1), "EPILOGUE": LOGITS, "NORM": 0, "BIAS": 0, "NORM_EPS": "0.f"}
    defines["DEQUANTIZE_WARPS"] = DEQUANTIZE_WARPS
    function = kernels.function("gemv_packed", "dequantize_packed", defines)
    grid = -(-tiles * groups // DEQUANTIZE_WARPS)
    return Launch(kernels.device, function, (grid,), 32 * DEQUANTIZE_WARPS, [weight.tiles, output], overlap=False)
