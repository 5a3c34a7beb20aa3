"""16-bit GEMV, RMSNorm and the small kernels around the matrix multiplications."""

from __future__ import annotations

from engine_core.cuda.driver import ITEM_BYTES, DeviceArray, Launch
from engine_core.cuda.kernels import CHUNK_WORDS, KernelArgumentError, Kernels, check, float_define
from engine_core.cuda.kernels.launch_configs import ELEMENTWISE_THREADS, RMS_NORM_THREADS, GemvConfig, GemvProblem
from engine_core.cuda.kernels.lora import LoraTerm

# EPILOGUE of gemv.cu.
STORE, RESIDUAL, SILU, LOGITS, GELU = range(5)
GATED = (SILU, GELU)  # of rows that are (gate, up) in turn

_PAIRS = 4  # that a thread of gate_multiply has


def check_output(kernels: Kernels, output: DeviceArray, epilogue: int, *shape: int) -> None:
    """Raises KernelArgumentError unless ``output`` is what ``epilogue`` makes of sums of ``shape``, [..., rows]."""
    *lead, rows = shape
    dtype = "fp32" if epilogue in (RESIDUAL, LOGITS) else kernels.dtype
    check("output", output, (*lead, rows // 2 if epilogue in GATED else rows), dtype)


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
    norm_size: int = 0,
    norm_offset: float = 0.0,
    softcap: float = 0.0,
    logits_scale: float = 1.0,
    lora: LoraTerm | None = None,
    config: GemvConfig | None = None,
) -> Launch:
    """output ← weight [rows, cols] · vector [cols], with what follows fused (``epilogue``).

    STORE: 16-bit [rows]; RESIDUAL: float32 [rows], added to; SILU or GELU: 16-bit [rows / 2] of rows that are (gate,
    up) in turn; LOGITS: float32 [rows] times ``logits_scale``, below ``softcap`` in magnitude if it is not 0.
    ``bias``, 16-bit [rows], is added first. With ``norm_weight`` [cols] the vector is float32 and RMS-normalised first,
    else 16-bit; ``norm_size``: how many values the norm's mean is over, those after them being zeros, 0 = all;
    ``norm_offset`` is added to the weight. ``lora``: what a LoRA adapter adds to the rows first. ``config``: another
    launch configuration than the chosen one. Raises KernelArgumentError.
    """
    rows, cols = weight.shape
    if cols % 8 or (epilogue in GATED and rows % 2):
        raise KernelArgumentError(
            f"The weight is {list(weight.shape)}; the columns must be a multiple of 8, pairs even."
        )
    check("weight", weight, (rows, cols), kernels.dtype)
    check("vector", vector, (cols,), "fp32" if norm_weight is not None else kernels.dtype)
    check_output(kernels, output, epilogue, rows)
    if norm_weight is not None:
        check("norm_weight", norm_weight, (cols,), kernels.dtype)
    if bias is not None:
        check("bias", bias, (rows,), kernels.dtype)
    if lora is not None:
        lora.check(kernels, rows, cols, 1)
    problem = GemvProblem(rows, cols, epilogue, norm_weight is not None)
    config = config or kernels.config(problem)
    shared = config.shared(cols)
    defines: dict[str, int | str] = {
        "ROWS": rows,
        "COLS": cols,
        "K_WARPS": config.k_warps,
        "ROW_WARPS": config.row_warps,
        "BATCH": config.batch,
        "DEPTH": config.depth,
        "EPILOGUE": epilogue,
        "NORM": int(norm_weight is not None),
        "BIAS": int(bias is not None),
        "NORM_EPS": float_define(norm_eps),
        "NORM_SIZE": norm_size or cols,
        "NORM_OFFSET": float_define(norm_offset),
        **logits_defines(softcap, logits_scale),
        **(lora.gemv_defines(kernels) if lora is not None else {}),
    }
    function = kernels.function("gemv", "gemv", defines, shared)
    grid = kernels.gpu.num_sms * config.ctas_per_sm  # some may have nothing to do; see attention_decode
    args = [weight, vector, norm_weight or 0, bias or 0, output, *(lora.gemv_args if lora is not None else [])]
    return Launch(kernels.device, function, (grid,), config.threads, args, shared, problem=problem)


def logits_defines(softcap: float, scale: float) -> dict[str, int | str]:
    """Return the defines of what becomes of logits."""
    scaled = {} if scale == 1 else {"LOGITS_SCALE": float_define(scale)}
    return {"LOGITS_SOFTCAP": float_define(softcap), **scaled}


def rms_norm(
    kernels: Kernels,
    rows: DeviceArray,
    weight: DeviceArray,
    output: DeviceArray,
    norm_eps: float,
    delta: DeviceArray | None = None,
    norm_size: int = 0,
    norm_offset: float = 0.0,
    rounded: DeviceArray | None = None,
    places: DeviceArray | None = None,
    scales: DeviceArray | None = None,
) -> Launch:
    """output [max_rows, cols] ← RMSNorm of rows [max_rows, cols] float32; the grid is the number of rows.

    ``output``: 16-bit, or float32 and added to; then ``rounded``, 16-bit [max_rows, cols], gets the sum, too. With
    ``scales``, float32 [max_rows], it is uint8, codes of E4M3, and a row's scale its largest magnitude / 448.
    ``delta``, 16-bit [max_rows, cols], is added to ``rows`` before. ``norm_size`` and ``norm_offset``: see ``gemv``.
    ``places``, int32 [cols]: where a 16-bit output has each column.
    Raises KernelArgumentError.
    """
    num_rows, cols = rows.shape
    if cols % 8:
        raise KernelArgumentError(f"Rows of {cols} values; the kernel reads a multiple of 8.")
    check("rows", rows, (num_rows, cols), "fp32")
    check("weight", weight, (cols,), kernels.dtype)
    dtype = "uint8" if scales is not None else "fp32" if output.dtype == "fp32" else kernels.dtype
    check("output", output, (num_rows, cols), dtype)
    if delta is not None:
        check("delta", delta, (num_rows, cols), kernels.dtype)
    defines: dict[str, int | str] = {"COLS": cols, "NORM_EPS": float_define(norm_eps), "ADD": int(delta is not None)}
    defines |= {"NORM_SIZE": norm_size or cols, "THREADS": RMS_NORM_THREADS, "RESIDUAL": int(output.dtype == "fp32")}
    defines["NORM_OFFSET"] = float_define(norm_offset)
    args = [rows, weight, output, delta or 0]
    if rounded is not None:
        check("rounded", rounded, (num_rows, cols), kernels.dtype)
        if output.dtype != "fp32":
            raise KernelArgumentError("Only a float32 output is rounded once more.")
        defines["ROUNDED"] = 1
        args.append(rounded)
    if places is not None:
        check("places", places, (cols,), "int32")
        if output.dtype != kernels.dtype:
            raise KernelArgumentError("Only a 16-bit output is put in order.")
        defines["ORDERED"] = 1
        args.append(places)
    if scales is not None:
        check("scales", scales, (num_rows,), "fp32")
        defines["QUANTIZED"] = 1
        args.append(scales)
    function = kernels.function("rms_norm", "rms_norm", defines)
    return Launch(kernels.device, function, (num_rows,), RMS_NORM_THREADS, args)


def qk_norm(
    kernels: Kernels,
    qkv: DeviceArray,
    q_norm: DeviceArray,
    k_norm: DeviceArray,
    norm_eps: float,
    norm_sizes: tuple[int, int],
) -> Launch:
    """Norm Q and K of qkv [n, q + k + v] in place, each over all its heads; the grid is n first.

    ``q_norm`` [q] and ``k_norm`` [k]: the weights, 16-bit like ``qkv``; ``norm_sizes``: how many values of each the
    mean is over, others being zeros. Raises KernelArgumentError.
    """
    (rows, width), q, k = qkv.shape, *q_norm.shape, *k_norm.shape
    check("qkv", qkv, (rows, width), kernels.dtype)
    check("q_norm", q_norm, (q,), kernels.dtype)
    check("k_norm", k_norm, (k,), kernels.dtype)
    if q % 8 or k % 8 or width != q + 2 * k:
        raise KernelArgumentError(f"Q and K have {q} and {k} of {width} values; the kernel reads multiples of 8.")
    defines: dict[str, int | str] = {
        "ROW_COLS": width,
        "Q_COLS": q,
        "K_COLS": k,
        "Q_SIZE": norm_sizes[0],
        "K_SIZE": norm_sizes[1],
    }
    defines |= {"NORM_EPS": float_define(norm_eps), "THREADS": RMS_NORM_THREADS}
    function = kernels.function("qk_norm", "qk_norm", defines)
    return Launch(kernels.device, function, (rows, 2), RMS_NORM_THREADS, [qkv, q_norm, k_norm])


def embed(
    kernels: Kernels,
    table: DeviceArray,
    tokens: DeviceArray,
    output: DeviceArray,
    token_stride: int = 1,
    scale: float = 1.0,
    rounded: DeviceArray | None = None,
    features: DeviceArray | None = None,
) -> Launch:
    """output [n, cols] float32 ← ``scale`` times rows of table [vocab, cols] named by tokens, int32 [n]; the grid is n.

    ``rounded``, 16-bit [n, cols], gets the same. ``features``, float32 [rows, cols]: the token vocab + i stands for its
    row i, which is not scaled.
    ``token_stride``: int32 from one token to the next one, such as those of sampler states side by side.
    It does not start before the kernel before it has ended: attention_decode relies on that.
    """
    vocab, cols = table.shape
    if cols % 8:
        raise KernelArgumentError(f"Rows of {cols} values; the kernel reads a multiple of 8.")
    check("table", table, (vocab, cols), kernels.dtype)
    check("output", output, (*tokens.shape, cols), "fp32")
    defines: dict[str, int | str] = {"COLS": cols, "THREADS": ELEMENTWISE_THREADS, "TOKEN_STRIDE": token_stride}
    defines["EMBEDDING_SCALE"] = float_define(scale)
    args = [table, tokens, output]
    if rounded is not None:
        check("rounded", rounded, (*tokens.shape, cols), kernels.dtype)
        defines["ROUNDED"] = 1
        args.append(rounded)
    if features is not None:
        check("features", features, (features.shape[0], cols), "fp32")
        defines["FEATURES"] = vocab
        args.append(features)
    function = kernels.function("elementwise", "embed", defines)
    return Launch(kernels.device, function, (tokens.shape[0],), ELEMENTWISE_THREADS, args, overlap=False)


def gate_multiply(kernels: Kernels, gate_up: DeviceArray, output: DeviceArray, epilogue: int = SILU) -> Launch:
    """output [n, width] ← silu(gate) · up of gate_up [n, 2 width], (gate, up) in turn, 16-bit; the grid is n first.

    ``epilogue`` GELU: gelu in silu's place.
    """
    rows, width = output.shape
    check("gate_up", gate_up, (rows, 2 * width), kernels.dtype)
    check("output", output, (rows, width), kernels.dtype)
    defines: dict[str, int | str] = {"COLS": width, "THREADS": ELEMENTWISE_THREADS, "GELU": int(epilogue == GELU)}
    function = kernels.function("elementwise", "gate_multiply", defines)
    grid = (rows, -(-width // (_PAIRS * ELEMENTWISE_THREADS)))
    return Launch(kernels.device, function, grid, ELEMENTWISE_THREADS, [gate_up, output])


def add_bias(kernels: Kernels, values: DeviceArray, bias: DeviceArray) -> Launch:
    """values [n, width], 16-bit or float32, += bias [width], 16-bit; the grid is n."""
    rows, width = values.shape
    is_float = values.dtype == "fp32"
    check("values", values, (rows, width), "fp32" if is_float else kernels.dtype)
    check("bias", bias, (width,), kernels.dtype)
    defines: dict[str, int | str] = {"COLS": width, "THREADS": ELEMENTWISE_THREADS, "FLOAT_VALUES": int(is_float)}
    function = kernels.function("elementwise", "add_bias", defines)
    return Launch(kernels.device, function, (rows,), ELEMENTWISE_THREADS, [values, bias])


def bias_gelu(kernels: Kernels, values: DeviceArray, bias: DeviceArray, *, exact: bool = False) -> Launch:
    """values [n, width] ← gelu(values + bias [width]), both 16-bit; the grid is n first.

    By the approximation with tanh, or ``exact``. Raises KernelArgumentError.
    """
    rows, width = values.shape
    if width % 8:
        raise KernelArgumentError(f"Rows of {width} values; the kernel reads a multiple of 8.")
    check("values", values, (rows, width), kernels.dtype)
    check("bias", bias, (width,), kernels.dtype)
    defines: dict[str, int | str] = {"COLS": width, "THREADS": ELEMENTWISE_THREADS, "ERF": int(exact)}
    function = kernels.function("elementwise", "bias_gelu", defines)
    grid = (rows, -(-width // (8 * ELEMENTWISE_THREADS)))
    return Launch(kernels.device, function, grid, ELEMENTWISE_THREADS, [values, bias])


def keep_last_row(kernels: Kernels, rows: DeviceArray, chunk: DeviceArray) -> Launch:
    """Copy to the first of rows [n, width] that of the last token of ``chunk``, see CHUNK_WORDS."""
    check("chunk", chunk, (CHUNK_WORDS,), "int32")
    row_bytes = rows.shape[1] * ITEM_BYTES[rows.dtype]
    if row_bytes % 16:
        raise KernelArgumentError(f"Rows of {row_bytes} bytes; the kernel copies a multiple of 16.")
    function = kernels.function(
        "elementwise", "keep_last_row", {"COLS": row_bytes // 16, "THREADS": ELEMENTWISE_THREADS}
    )
    grid = -(-row_bytes // (16 * ELEMENTWISE_THREADS))
    return Launch(kernels.device, function, (grid,), ELEMENTWISE_THREADS, [rows, chunk])
