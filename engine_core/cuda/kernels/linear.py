"""Matrix × vector, RMSNorm and the small steps around the matrix products."""

from __future__ import annotations

from dataclasses import dataclass

from engine_core.cuda.driver import ITEM_BYTES, DeviceArray, Launch
from engine_core.cuda.kernels import CHUNK_WORDS, KernelArgumentError, Kernels, check, float_define

# EPILOGUE of gemv.cu.
STORE, RESIDUAL, SILU, LOGITS = range(4)

_CHUNK = 256  # columns of a warp's load
_MAX_WARPS = 16
_MIN_CTA_BYTES = 96 * 1024  # of weights: with less, a second CTA per multiprocessor only costs its start
_THREADS = 256
_PAIRS = 4  # that a thread of silu_multiply has
_NORM_THREADS = 512


@dataclass(frozen=True)
class GemvShape:
    """How the columns and rows of a matrix are spread over the warps of a CTA; see gemv.cu."""

    k_warps: int
    row_warps: int
    batch: int
    depth: int
    ctas_per_sm: int = 1

    def shared(self, cols: int) -> int:
        """Bytes of the ring."""
        parts = -(-cols // (_CHUNK * self.k_warps))
        return self.depth * self.batch * parts * 32 * self.k_warps * self.row_warps * 16


def gemv_shape(rows: int, cols: int, num_sms: int, shared_budget: int) -> GemvShape:
    """The spread for a matrix, by what was fastest on an H200 (benchmarks/results/kernels.md).

    Up to eight warps along the columns with the least waste, sixteen in all; two CTAs per multiprocessor where
    each has enough to read; then the deepest ring that fits, of three stages if it can.
    """
    chunks = -(-cols // _CHUNK)

    def waste(k_warps: int) -> tuple[int, int]:
        parts = -(-chunks // k_warps)
        return k_warps * parts - chunks, -k_warps

    k_warps = min(range(1, min(chunks, _MAX_WARPS // 2) + 1), key=waste)
    ctas = 2 if rows * cols * 2 >= 2 * num_sms * _MIN_CTA_BYTES else 1
    # With a single load per row the registers would let a third CTA in beside two, and the shares would be uneven.
    ring = shared_budget * 2 // 3 if ctas == 2 and chunks > k_warps else shared_budget
    row_warps = 1
    while row_warps * 2 * k_warps <= _MAX_WARPS:
        row_warps *= 2
    while True:
        for batch in (4, 2, 1) if ctas == 1 else (2, 1):
            stage = GemvShape(k_warps, row_warps, batch, 1).shared(cols)
            if (2 if ctas == 2 else 3) * stage <= ring:
                depth = max(ring // stage, min(3, shared_budget // stage))
                return GemvShape(k_warps, row_warps, batch, min(8, depth), ctas)
        if row_warps == 1:
            return GemvShape(k_warps, 1, 1, max(1, ring // stage), ctas)
        row_warps //= 2


def gemv(
    kernels: Kernels,
    weight: DeviceArray,
    vector: DeviceArray,
    output: DeviceArray,
    epilogue: int,
    *,
    norm_weight: DeviceArray | None = None,
    bias: DeviceArray | None = None,
    norm_eps: float = 0.0,
    shape: GemvShape | None = None,
) -> Launch:
    """output ← weight [rows, cols] · vector [cols], with what follows fused (``epilogue``).

    STORE: 16-bit [rows], plus ``bias`` [rows]; RESIDUAL: float32 [rows], added to; SILU: 16-bit [rows / 2] of rows that
    are (gate, up) in turn; LOGITS: float32 [rows]. With ``norm_weight`` [cols] the vector is float32 and RMS-normalised
    first, else 16-bit. Raises KernelArgumentError.
    """
    rows, cols = weight.shape
    if cols % 8 or (epilogue == SILU and rows % 2):
        raise KernelArgumentError(
            f"The weight is {list(weight.shape)}; the columns must be a multiple of 8, pairs even."
        )
    check("weight", weight, (rows, cols), kernels.dtype)
    check("vector", vector, (cols,), "fp32" if norm_weight is not None else kernels.dtype)
    check(
        "output",
        output,
        (rows // 2 if epilogue == SILU else rows,),
        "fp32" if epilogue in (RESIDUAL, LOGITS) else kernels.dtype,
    )
    if norm_weight is not None:
        check("norm_weight", norm_weight, (cols,), kernels.dtype)
    if bias is not None:
        assert epilogue == STORE
        check("bias", bias, (rows,), kernels.dtype)
    shape = shape or gemv_shape(rows, cols, kernels.device.num_sms, kernels.shared_budget)
    shared = shape.shared(cols)
    defines = {
        "ROWS": rows,
        "COLS": cols,
        "K_WARPS": shape.k_warps,
        "ROW_WARPS": shape.row_warps,
        "BATCH": shape.batch,
        "DEPTH": shape.depth,
        "EPILOGUE": epilogue,
        "NORM": int(norm_weight is not None),
        "BIAS": int(bias is not None),
        "NORM_EPS": float_define(norm_eps),
    }
    function = kernels.function("gemv", "gemv", defines, shared)
    grid = kernels.device.num_sms * shape.ctas_per_sm  # some may have nothing to do; see attention_decode
    args = [weight, vector, norm_weight or 0, bias or 0, output]
    return Launch(kernels.device, function, (grid,), 32 * shape.k_warps * shape.row_warps, args, shared)


def rms_norm(
    kernels: Kernels,
    rows: DeviceArray,
    weight: DeviceArray,
    output: DeviceArray,
    norm_eps: float,
    delta: DeviceArray | None = None,
) -> Launch:
    """output [max_rows, cols] 16-bit ← RMSNorm of rows [max_rows, cols] float32; the grid is the number of rows.

    ``delta``, 16-bit [max_rows, cols], is added to ``rows`` before. Raises KernelArgumentError.
    """
    num_rows, cols = rows.shape
    if cols % 8:
        raise KernelArgumentError(f"Rows of {cols} values; the kernel reads a multiple of 8.")
    check("rows", rows, (num_rows, cols), "fp32")
    check("weight", weight, (cols,), kernels.dtype)
    check("output", output, (num_rows, cols), kernels.dtype)
    if delta is not None:
        check("delta", delta, (num_rows, cols), kernels.dtype)
    defines = {"COLS": cols, "NORM_EPS": float_define(norm_eps), "ADD": int(delta is not None)}
    function = kernels.function("rms_norm", "rms_norm", defines)
    return Launch(kernels.device, function, (num_rows,), _NORM_THREADS, [rows, weight, output, delta or 0])


def embed(kernels: Kernels, table: DeviceArray, tokens: DeviceArray, output: DeviceArray) -> Launch:
    """output [n, cols] float32 ← rows of table [vocab, cols] named by tokens, int32 [n]; the grid is n.

    It does not start before the kernel before it has ended: attention_decode relies on that.
    """
    vocab, cols = table.shape
    if cols % 8:
        raise KernelArgumentError(f"Rows of {cols} values; the kernel reads a multiple of 8.")
    check("table", table, (vocab, cols), kernels.dtype)
    check("output", output, (*tokens.shape, cols), "fp32")
    function = kernels.function("elementwise", "embed", {"COLS": cols})
    return Launch(kernels.device, function, (tokens.shape[0],), _THREADS, [table, tokens, output], overlap=False)


def silu_multiply(kernels: Kernels, gate_up: DeviceArray, output: DeviceArray) -> Launch:
    """output [n, width] ← silu(gate) · up of gate_up [n, 2 width], (gate, up) in turn, 16-bit; the grid is n first."""
    rows, width = output.shape
    check("gate_up", gate_up, (rows, 2 * width), kernels.dtype)
    check("output", output, (rows, width), kernels.dtype)
    function = kernels.function("elementwise", "silu_multiply", {"COLS": width})
    grid = (rows, -(-width // (_PAIRS * _THREADS)))
    return Launch(kernels.device, function, grid, _THREADS, [gate_up, output])


def add_bias(kernels: Kernels, values: DeviceArray, bias: DeviceArray) -> Launch:
    """values [n, width] += bias [width], 16-bit; the grid is n."""
    rows, width = values.shape
    check("values", values, (rows, width), kernels.dtype)
    check("bias", bias, (width,), kernels.dtype)
    function = kernels.function("elementwise", "add_bias", {"COLS": width})
    return Launch(kernels.device, function, (rows,), _THREADS, [values, bias])


def keep_last_row(kernels: Kernels, rows: DeviceArray, chunk: DeviceArray) -> Launch:
    """The first of rows [n, width] becomes that of the last token of ``chunk``, see CHUNK_WORDS."""
    check("chunk", chunk, (CHUNK_WORDS,), "int32")
    row_bytes = rows.shape[1] * ITEM_BYTES[rows.dtype]
    if row_bytes % 16:
        raise KernelArgumentError(f"Rows of {row_bytes} bytes; the kernel copies a multiple of 16.")
    function = kernels.function("elementwise", "keep_last_row", {"COLS": row_bytes // 16})
    grid = -(-row_bytes // (16 * _THREADS))
    return Launch(kernels.device, function, (grid,), _THREADS, [rows, chunk])
