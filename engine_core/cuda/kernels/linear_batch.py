"""GEMM of one token each of several sequences, with 16-bit, 8-bit or 4-bit weights: wrapper of gemm_packed.cu.

A decode step of 2 to 16 sequences reads every weight once for all of them. The norm before a GEMM is a kernel of its
own (``linear.rms_norm``): each CTA needs every row.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine_core.cuda.driver import DeviceArray, Launch
from engine_core.cuda.kernels import CHUNK_WORDS, KernelArgumentError, Kernels, check
from engine_core.cuda.kernels.integer_layout import GROUP, TILE
from engine_core.cuda.kernels.launch_configs import BATCH_TOKENS, MAX_SEQUENCES, PackedGemmConfig, PackedGemmProblem
from engine_core.cuda.kernels.linear import GATED, check_output, logits_defines
from engine_core.cuda.kernels.linear_packed import PackedWeight, packed_scratch
from engine_core.cuda.kernels.lora import LoraTerm

_TILE_BYTES = TILE * GROUP * 2  # of a tile in 16 bits
_VECTOR = 8  # 16-bit values that a kernel reads at once


def cta_tokens(sequences: int) -> int:
    """Return how many tokens a CTA takes in a decode step of ``sequences``."""
    return next(tokens for tokens in BATCH_TOKENS if sequences <= tokens)


def batch_scratch(shapes: Iterable[tuple[int, int]], sequences: int, num_sms: int) -> tuple[int, int]:
    """Return the float32 partial sums and the counters that ``gemm_batch`` needs for matrices of ``shapes``."""
    return packed_scratch(shapes, sequences, num_sms, cta_tokens(sequences))


def gemm_problem(weight: DeviceArray | PackedWeight, epilogue: int) -> PackedGemmProblem:
    """Return the problem of ``gemm_batch``.

    It does not depend on how many sequences there are, so that each one's sums are added in the same order whoever
    else is there.
    """
    tokens = MAX_SEQUENCES
    if isinstance(weight, PackedWeight):
        tiles, groups, tile_bytes = weight.sizes
        return PackedGemmProblem(tiles, groups, tile_bytes, weight.format.bits, epilogue, tokens, weight.sums)
    rows, cols = weight.shape
    return PackedGemmProblem(-(-rows // TILE), -(-cols // GROUP), _TILE_BYTES, 16, epilogue, tokens)


def gemm_batch(
    kernels: Kernels,
    weight: DeviceArray | PackedWeight,
    vectors: DeviceArray,
    output: DeviceArray,
    epilogue: int,
    chunk: DeviceArray,
    partial: DeviceArray,
    counters: DeviceArray,
    *,
    bias: DeviceArray | None = None,
    softcap: float = 0.0,
    logits_scale: float = 1.0,
    lora: LoraTerm | None = None,
    config: PackedGemmConfig | None = None,
) -> Launch:
    """output ← vectors [n, cols] · weightᵀ for n of 2 to 16 sequences, with what follows fused (``epilogue``).

    ``weight``: 16-bit [rows, cols], or packed; vectors are 16-bit, and cols a multiple of 8.
    STORE: output 16-bit [n, rows]; RESIDUAL: float32 [n, rows], added to; SILU or GELU: 16-bit [n, rows / 2] of rows
    that are (gate, up) in turn; LOGITS: float32 [n, rows] times ``logits_scale``, below ``softcap`` in magnitude
    if it is not 0. ``bias``, 16-bit [rows], is added first. ``chunk``: int32 [CHUNK_WORDS], whose second number is how
    many of the n rows are computed. ``partial``, float32, and ``counters``, uint32 and zeros: see ``batch_scratch``.
    ``lora``: what LoRA adapters add to the rows first. Raises KernelArgumentError, KernelCompileError or DeviceError.
    """
    sequences = vectors.shape[0]
    if not 1 <= sequences <= MAX_SEQUENCES:
        raise KernelArgumentError(f"{sequences} sequences; a decode step has 1 to {MAX_SEQUENCES}.")
    if isinstance(weight, PackedWeight):
        array, rows, cols, sizes = weight.tiles, weight.rows, weight.cols, weight.defines
    else:
        array, (rows, cols), sizes = weight, weight.shape, {"BITS": 16}
        check("weight", weight, (rows, cols), kernels.dtype)
    if cols % _VECTOR or (epilogue in GATED and rows % 2):
        raise KernelArgumentError(f"The weight is {[rows, cols]}; columns must be a multiple of {_VECTOR}, pairs even.")
    problem = gemm_problem(weight, epilogue)
    tokens = cta_tokens(sequences)
    check("vectors", vectors, (sequences, cols), kernels.dtype)
    check_output(kernels, output, epilogue, sequences, rows)
    check("chunk", chunk, (CHUNK_WORDS,), "int32")
    check("partial", partial, partial.shape, "fp32")
    check("counters", counters, counters.shape, "uint32")
    if bias is not None:
        check("bias", bias, (rows,), kernels.dtype)
    if lora is not None:
        lora.check(kernels, rows, cols, sequences)
    config = config or kernels.config(problem)
    shared = config.shared(problem.tile_bytes, tokens, problem.sums)
    if config.splits * config.ctas(problem.tiles) <= kernels.gpu.num_sms:
        shared = max(shared, kernels.gpu.alone_shared)
    if config.splits > 1 and partial.shape[0] < config.splits * problem.tiles * TILE * tokens:
        raise KernelArgumentError(f"partial has {partial.shape[0]} values for {config.splits} splits of {rows} rows.")
    defines: dict[str, int | str] = {
        "ROWS": rows,
        "COLS": cols,
        **sizes,
        "K_WARPS": config.k_warps,
        "ROW_WARPS": config.row_warps,
        "DEPTH": config.depth,
        "SPLITS": config.splits,
        "STAGE": config.stage,
        "BUFFERS": config.buffers,
        "TOKENS": tokens,
        "EPILOGUE": epilogue,
        "BIAS": int(bias is not None),
        **logits_defines(softcap, logits_scale),
        **(lora.matrix.defines if lora is not None else {}),
    }
    function = kernels.function("gemm_packed", "gemm_packed", defines, shared)
    grid = (1, config.splits, config.ctas(problem.tiles))
    args = [array, vectors, output, chunk, partial, counters, bias or 0, *(lora.args if lora is not None else [])]
    return Launch(kernels.device, function, grid, config.threads, args, shared, problem=problem)
