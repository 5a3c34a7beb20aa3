"""Experts: which ones each token gets, their matrices, and the sum of what they make; wrapper of experts.cu.

Every expert that a token was given is a GEMV of its own, for a prompt's tokens, too.
"""

from __future__ import annotations

from engine_core.cuda.driver import DeviceArray, Launch
from engine_core.cuda.kernels import KernelArgumentError, Kernels, check, float_define
from engine_core.cuda.kernels.integer_layout import TILE
from engine_core.cuda.kernels.launch_configs import (
    DEQUANTIZE_WARPS,
    ELEMENTWISE_THREADS,
    GemvConfig,
    GemvProblem,
    PackedGemvConfig,
    Problem,
)
from engine_core.cuda.kernels.linear import GATED, LOGITS
from engine_core.cuda.kernels.linear_packed import PackedWeight

MAX_PICKED = 32  # experts of a token: a lane keeps each


def route(
    kernels: Kernels,
    vectors: DeviceArray,
    router: DeviceArray,
    picked: DeviceArray,
    shares: DeviceArray,
    *,
    norm_shares: bool,
) -> Launch:
    """picked, int32, and shares, float32 [n, k] ← the experts of vectors [n, cols] and what each counts; the grid is n.

    ``router``: [experts, cols], 16-bit like the vectors. The shares are softmax over all experts, with ``norm_shares``
    divided by their sum. Raises KernelArgumentError.
    """
    (rows, cols), experts, count = vectors.shape, router.shape[0], picked.shape[1]
    check("vectors", vectors, (rows, cols), kernels.dtype)
    check("router", router, (experts, cols), kernels.dtype)
    check("picked", picked, (rows, count), "int32")
    check("shares", shares, (rows, count), "fp32")
    if cols % 8 or not 1 <= count <= min(experts, MAX_PICKED):
        raise KernelArgumentError(f"{count} of {experts} experts and {cols} columns; see experts.py for what is read.")
    defines: dict[str, int | str] = {"COLS": cols, "EXPERTS": experts, "EXPERTS_PER_TOKEN": count}
    defines |= {"NORM_SHARES": int(norm_shares), "THREADS": ELEMENTWISE_THREADS}
    function = kernels.function("experts", "route", defines)
    return Launch(kernels.device, function, (rows,), ELEMENTWISE_THREADS, [vectors, router, picked, shares])


def combine(kernels: Kernels, made: DeviceArray, shares: DeviceArray, sums: DeviceArray) -> Launch:
    """sums [n, cols] float32 += shares [n, k] times made [n, k, cols] float32; the grid is n. Raises
    KernelArgumentError."""
    rows, count, cols = made.shape
    check("made", made, (rows, count, cols), "fp32")
    check("shares", shares, (rows, count), "fp32")
    check("sums", sums, (rows, cols), "fp32")
    if cols % 4 or not 1 <= count <= MAX_PICKED:
        raise KernelArgumentError(f"{count} experts and {cols} columns; the kernel reads 4 of up to {MAX_PICKED}.")
    defines: dict[str, int | str] = {"COLS": cols, "EXPERTS": count, "EXPERTS_PER_TOKEN": count, "NORM_SHARES": 0}
    function = kernels.function("experts", "combine", defines | {"THREADS": ELEMENTWISE_THREADS})
    return Launch(kernels.device, function, (rows,), ELEMENTWISE_THREADS, [made, shares, sums])


def gemv_experts(
    kernels: Kernels,
    weight: DeviceArray | PackedWeight,
    experts: int,
    picked: DeviceArray,
    vectors: DeviceArray,
    output: DeviceArray,
    epilogue: int,
) -> Launch:
    """output [n, k, …] ← the matrix of each of a token's ``picked`` experts times its vector; the grid is n first.

    ``weight``: the matrices of all ``experts`` stacked, 16-bit or packed. ``vectors``: 16-bit [n, cols], or [n, k,
    cols] with one for each expert. LOGITS: float32 [n, k, rows]; SILU or GELU: 16-bit [n, k, rows / 2]. Raises
    KernelArgumentError.
    """
    tokens, count = picked.shape
    stacked, cols = (weight.rows, weight.cols) if isinstance(weight, PackedWeight) else weight.shape
    rows, is_gated = stacked // experts, epilogue in GATED
    if stacked % experts or cols % 8 or (is_gated and rows % 2) or epilogue not in (*GATED, LOGITS):
        raise KernelArgumentError(f"The weight is {[stacked, cols]} of {experts} experts with the epilogue {epilogue}.")
    check("picked", picked, (tokens, count), "int32")
    has_own = len(vectors.shape) == 3
    check("vectors", vectors, (tokens, count, cols) if has_own else (tokens, cols), kernels.dtype)
    width, dtype = rows // 2 if is_gated else rows, kernels.dtype if is_gated else "fp32"
    check("output", output, (tokens, count, width), dtype)
    defines: dict[str, int | str] = {
        "ROWS": rows,
        "COLS": cols,
        "EPILOGUE": epilogue,
        "NORM": 0,
        "BIAS": 0,
        "NORM_EPS": float_define(0.0),
        "EXPERTS_PER_TOKEN": count,
        "EXPERT_VECTORS": int(has_own),
    }
    num_sms = kernels.gpu.num_sms
    if isinstance(weight, PackedWeight):
        if rows % TILE:
            raise KernelArgumentError(f"An expert has {rows} rows; the kernel reads a multiple of {TILE}.")
        packed = weight.gemv_problem(rows, epilogue)
        problem: Problem = packed
        config: PackedGemvConfig = kernels.config(packed)
        shared = max(packed.shared(config), kernels.gpu.shared_budget)
        defines |= {**weight.defines, "DEQUANTIZE_WARPS": DEQUANTIZE_WARPS}
        defines |= {"K_WARPS": config.k_warps, "ROW_WARPS": config.row_warps, "DEPTH": config.depth}
        function, array = kernels.function("gemv_packed", "gemv_packed", defines, shared), weight.tiles
        ctas, threads = config.ctas_per_sm, config.threads
    else:
        check("weight", weight, (stacked, cols), kernels.dtype)
        problem = GemvProblem(rows, cols, epilogue, False)
        own: GemvConfig = kernels.config(problem)
        shared = own.shared(cols)
        defines |= {"K_WARPS": own.k_warps, "ROW_WARPS": own.row_warps, "BATCH": own.batch, "DEPTH": own.depth}
        function, array = kernels.function("gemv", "gemv", defines, shared), weight
        ctas, threads = own.ctas_per_sm, own.threads
    grid = (tokens, count, max(1, num_sms * ctas // count))
    args = [array, vectors, 0, 0, output, picked]
    return Launch(kernels.device, function, grid, threads, args, shared, problem=problem)
