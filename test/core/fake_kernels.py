"""The kernels of the GPU backends' layers as numpy, for the driver in host memory: float64 between 16-bit values.

Each is made of its reference and reads its arguments as the real one does. 16 bits are fp16; weights may be packed, and
the KV cache may be int8 or fp8.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np

from engine_core.cuda.kernels import CHUNK_WORDS, linear, lora, reference
from engine_core.cuda.kernels.linear_packed import LAYOUTS, layout_of
from engine_core.cuda.kernels.sampling import STATE
from engine_core.formats.number_formats import E4M3, to_minifloat
from engine_core.formats.weight_formats import weight_format

F16, F32, F64 = np.float16, np.float32, np.float64


def array_at(address: int, shape: tuple[int, ...], dtype) -> np.ndarray:
    """A view of host memory."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * count).from_address(int(address)), dtype=dtype).reshape(shape)


def address_of(args, index: int) -> int:
    return ctypes.c_uint64.from_address(args[index]).value


def _float(define: str) -> float:
    return float(define.rstrip("f"))


def embed(defines: dict, args) -> None:
    table, tokens, output = (address_of(args, i) for i in range(3))
    cols, count = defines["COLS"], defines["GRID"]
    stride = defines["TOKEN_STRIDE"]
    ids = array_at(tokens, ((count - 1) * stride + 1,), np.int32)[::stride]
    ids = np.maximum(ids, 0)  # below 0: a failed step's token, which is none
    vocab = defines.get("FEATURES") or int(ids.max()) + 1
    is_text = ids < vocab
    rows = np.empty((count, cols), F32)
    rows[is_text] = array_at(table, (vocab, cols), F16)[ids[is_text]]
    rows[is_text] *= F32(_float(defines["EMBEDDING_SCALE"]))
    if not is_text.all():
        features = address_of(args, 3 + bool(defines.get("ROUNDED")))
        places = ids[~is_text] - vocab
        rows[~is_text] = array_at(features, (int(places.max()) + 1, cols), F32)[places]
    array_at(output, (count, cols), F32)[:] = rows
    if defines.get("ROUNDED"):
        array_at(address_of(args, 3), (count, cols), F16)[:] = rows


def _places(defines: dict, args, index: int, columns: int) -> np.ndarray:
    """Return where the columns are, of the argument ``index`` with ORDERED."""
    if not defines.get("ORDERED"):
        return np.arange(columns)
    return array_at(address_of(args, index), (columns,), np.int32)


def rms_norm(defines: dict, args) -> None:
    rows, weight, output, delta = (address_of(args, i) for i in range(4))
    shape = (defines["GRID"], defines["COLS"])
    values = array_at(rows, shape, F32)
    if defines["ADD"]:
        values += array_at(delta, shape, F16)
    scale = array_at(weight, shape[1:], F16).astype(F64)
    scale += _float(defines["NORM_OFFSET"])
    normed = reference.rms_norm(values.astype(F64), scale, _float(defines["NORM_EPS"]), defines["NORM_SIZE"])
    if defines["RESIDUAL"]:
        total = array_at(output, shape, F32)
        total += normed
        if defines.get("ROUNDED"):
            array_at(address_of(args, 4), shape, F16)[:] = total
    elif defines.get("QUANTIZED"):
        _quantize(normed, output, address_of(args, 4))
    else:
        array_at(output, shape, F16)[:, _places(defines, args, 4, shape[1])] = normed


def _quantize(rows: np.ndarray, codes: int, scales: int) -> None:
    found, factors = reference.quantize_rows(rows)
    array_at(codes, found.shape, np.uint8)[:] = found
    array_at(scales, factors.shape, F32)[:] = factors


def quantize_rows(defines: dict, args) -> None:
    rows, codes, scales = (address_of(args, i) for i in range(3))
    values = array_at(rows, (defines["GRID"], defines["COLS"] * (1 + defines["GATED"])), F16).astype(F64)
    if defines["GATED"]:
        values = (reference.gelu_multiply if defines["GELU"] else reference.silu_multiply)(values)
    _quantize(values, codes, scales)


def unpack_fp8(defines: dict, args) -> None:
    tiles, codes, scales = (address_of(args, i) for i in range(3))
    shape, layout = (defines["ROWS"], defines["COLS"]), LAYOUTS["fp8"]
    found, factors = layout.unpack(array_at(tiles, layout.tiles_shape(*shape), np.uint8), shape)
    array_at(codes, shape, np.uint8)[:] = found
    array_at(scales, shape[:1], F32)[:] = factors[:, 0]


def qk_norm(defines: dict, args) -> None:
    rows = array_at(address_of(args, 0), (defines["GRID"], defines["ROW_COLS"]), F16)
    q, k, eps = defines["Q_COLS"], defines["K_COLS"], _float(defines["NORM_EPS"])
    for index, columns, size in ((1, slice(0, q), defines["Q_SIZE"]), (2, slice(q, q + k), defines["K_SIZE"])):
        values = rows[:, columns].astype(F64)
        weight = array_at(address_of(args, index), values.shape[1:], F16).astype(F64)
        rows[:, columns] = reference.rms_norm(values, weight, eps, size)


def _matrix(defines: dict, address: int) -> np.ndarray:
    """float64 [ROWS, COLS] of 16-bit weights, or of packed tiles as packed.cuh tells them apart."""
    shape = defines["ROWS"], defines["COLS"]
    kinds = {(4, 0): "int4", (8, 0): "int8", (8, 1): "fp8", (4, 1): "nvfp4"}
    if defines.get("BITS", 16) == 16:
        return array_at(address, shape, F16).astype(F64)
    if "GROUP_SIZE" in defines:
        integers = weight_format(kinds[defines["BITS"], 0]).in_groups(defines["GROUP_SIZE"], bool(defines["ZEROS"]))
        tiles = array_at(address, layout_of(integers).tiles_shape(*shape), np.uint8)
        return reference.packed_weight(tiles, integers, shape, "fp16")
    kind = "fp8_blocks" if defines.get("GROUP_SCALES") else kinds[defines["BITS"], defines.get("FLOATS", 0)]
    return reference.packed_weight(array_at(address, LAYOUTS[kind].tiles_shape(*shape), np.uint8), kind, shape, "fp16")


def dequantize_packed(defines: dict, args) -> None:
    matrix = _matrix(defines, address_of(args, 0))
    array_at(address_of(args, 1), matrix.shape, F16)[:] = matrix


def gemv_packed(defines: dict, args) -> None:
    gemv(defines, args)


def gemv(defines: dict, args) -> None:
    """The GEMV with every epilogue, also for packed weights."""
    if "EXPERTS_PER_TOKEN" in defines:
        return _gemv_of_experts(defines, args)
    weight, vector, norm, bias, output = (address_of(args, i) for i in range(5))
    rows, cols = defines["ROWS"], defines["COLS"]
    values = array_at(vector, (defines.get("TOKENS", 1), cols), F32 if defines["NORM"] else F16).astype(F64)
    if defines["NORM"]:
        scale = array_at(norm, (cols,), F16).astype(F64) + _float(defines["NORM_OFFSET"])
        values = reference.rms_norm(values, scale, _float(defines["NORM_EPS"]), defines["NORM_SIZE"])
    values = values[:, np.argsort(_places(defines, args, 9 if defines.get("LORA_RANK") else 5, cols))]
    if defines.get("LORA_RANK"):
        _make_lora_sums(defines, args, values[0])
    matrix = _matrix(defines, weight)
    result = np.stack([matrix @ row for row in values]) + _lora_term(defines, args, 6, 1)
    if defines["BIAS"]:
        result += array_at(bias, (rows,), F16)
    _finish(defines, output, result)


def _gemv_of_experts(defines: dict, args) -> None:
    """A GEMV for each expert of each token; see experts.cuh."""
    weight, vectors, _, _, output, picked = (address_of(args, i) for i in range(6))
    tokens, count, rows, cols = (defines[key] for key in ("GRID", "EXPERTS_PER_TOKEN", "ROWS", "COLS"))
    experts = array_at(picked, (tokens * count,), np.int32)
    all_rows = (int(experts.max()) + 1) * rows
    stack = _matrix({**defines, "ROWS": all_rows}, weight).reshape(-1, rows, cols)
    values = array_at(vectors, (tokens * (count if defines["EXPERT_VECTORS"] else 1), cols), F16).astype(F64)
    of_pairs = np.arange(tokens * count) // (1 if defines["EXPERT_VECTORS"] else count)
    sums = np.stack([stack[expert] @ values[row] for expert, row in zip(experts, of_pairs, strict=True)])
    _finish(defines, output, sums)


def route(defines: dict, args) -> None:
    vectors, router, picked, shares = (address_of(args, i) for i in range(4))
    tokens, cols, count = (defines[key] for key in ("GRID", "COLS", "EXPERTS_PER_TOKEN"))
    values = array_at(vectors, (tokens, cols), F16).astype(F64)
    matrix = array_at(router, (defines["EXPERTS"], cols), F16).astype(F64)
    found, parts = reference.route(np.nan_to_num(values @ matrix.T), count, bool(defines["NORM_SHARES"]))
    array_at(picked, found.shape, np.int32)[:] = found
    array_at(shares, parts.shape, F32)[:] = parts


def combine(defines: dict, args) -> None:
    made, shares, sums = (address_of(args, i) for i in range(3))
    tokens, count, cols = (defines[key] for key in ("GRID", "EXPERTS_PER_TOKEN", "COLS"))
    parts = array_at(shares, (tokens, count, 1), F32) * array_at(made, (tokens, count, cols), F32)
    array_at(sums, (tokens, cols), F32)[:] += parts.sum(axis=1)


def gemm_packed(defines: dict, args) -> None:
    """Each row by itself, so that its sums do not depend on how many there are."""
    weight, vectors, output, chunk, _, _, bias = (address_of(args, i) for i in range(7))
    rows, cols = defines["ROWS"], defines["COLS"]
    count = int(array_at(chunk, (CHUNK_WORDS,), np.int32)[1])
    matrix = _matrix(defines, weight)
    result = np.stack([matrix @ row for row in array_at(vectors, (count, cols), F16).astype(F64)])
    result += _lora_term(defines, args, 7, count)
    if defines.get("BIAS"):
        result += array_at(bias, (rows,), F16)
    _finish(defines, output, result)


def _finish(defines: dict, output: int, sums: np.ndarray) -> None:
    """What EPILOGUE makes of the sums [n, rows]."""
    (count, rows), epilogue, cap = sums.shape, defines["EPILOGUE"], _float(defines.get("LOGITS_SOFTCAP", "0"))
    if epilogue == linear.RESIDUAL:
        array_at(output, (count, rows), F32)[:] += sums
    elif epilogue in linear.GATED:
        multiply = reference.silu_multiply if epilogue == linear.SILU else reference.gelu_multiply
        array_at(output, (count, rows // 2), F16)[:] = multiply(sums)
    elif epilogue == linear.LOGITS:
        sums = sums * _float(defines.get("LOGITS_SCALE", "1"))
        array_at(output, (count, rows), F32)[:] = cap * np.tanh(sums / cap) if cap else sums
    else:
        array_at(output, (count, rows), F16)[:] = sums


def _lora_b(defines: dict, b: int, adapter: int) -> tuple[np.ndarray, np.ndarray]:
    """(B of an adapter, the part of each of its rows)."""
    rows, rank = defines["ROWS"], defines["LORA_RANK"]
    every = np.arange(rows)
    parts = (every >= defines["LORA_SPLIT_1"]).astype(int) + (every >= defines["LORA_SPLIT_2"])
    parts = every % 2 if defines["LORA_PAIRS"] else parts
    return array_at(b + 2 * adapter * rows * rank, (rows, rank), F16).astype(F64), parts


def _lora_term(defines: dict, args, index: int, count: int) -> np.ndarray:
    """Return what LORA_PARAMETERS, from ``index`` on, add: [count, rows], or [count, 1] of none."""
    if not defines.get("LORA_RANK"):
        return np.zeros((count, 1))
    b, sums, adapters = (address_of(args, index + i) for i in range(3))
    added = np.zeros((count, defines["ROWS"]))
    for token, adapter in enumerate(array_at(adapters, (count,), np.int32)):
        if adapter >= 0:
            own = _lora_sums(defines, sums, count)[token : token + 1]
            added[token] = reference.lora_expand(own, *_lora_b(defines, b, int(adapter)))[0]
    return added


def _make_lora_sums(defines: dict, args, values: np.ndarray) -> None:
    """Write the sums A x of ``values`` for GEMV_LORA_PARAMETERS, where a step has left NOT_YET."""
    a, sums, adapters = (address_of(args, i) for i in (5, 7, 8))
    adapter, own = int(array_at(adapters, (1,), np.int32)[0]), _lora_sums(defines, sums, 1)
    if adapter >= 0:
        assert (own.view(np.uint8) == lora.NOT_YET).all()
        own[:] = (_lora_a(defines, a, adapter) @ values).reshape(own.shape)


def _lora_sums(defines: dict, sums: int, count: int) -> np.ndarray:
    return array_at(sums, (count, defines["LORA_PARTS"], defines["LORA_RANK"]), F32)


def _lora_a(defines: dict, a: int, adapter: int) -> np.ndarray:
    rows, cols = defines["LORA_PARTS"] * defines["LORA_RANK"], defines["COLS"]
    return array_at(a + 2 * adapter * rows * cols, (rows, cols), F16).astype(F64)


def lora_shrink(defines: dict, args) -> None:
    a, vectors, adapters, sums = (address_of(args, i) for i in range(4))
    count, cols = defines["GRID_Y"], defines["COLS"]
    values = array_at(vectors, (count, cols), F16).astype(F64)
    for token, adapter in enumerate(array_at(adapters, (count,), np.int32)):
        if adapter >= 0:
            own = _lora_sums(defines, sums, count)[token]
            own[:] = (_lora_a(defines, a, int(adapter)) @ values[token]).reshape(own.shape)


def _adapter_of_chunk(args, index: int) -> tuple[int, int]:
    """(tokens, number of the adapter)."""
    _, count, _, adapter = array_at(address_of(args, index), (4,), np.int32)
    return int(count), int(adapter)


def lora_shrink_chunk(defines: dict, args) -> None:
    a, vectors, sums = (address_of(args, i) for i in (0, 1, 3))
    count, adapter = _adapter_of_chunk(args, 2)
    if adapter >= 0:
        values = array_at(vectors, (count, defines["COLS"]), F16).astype(F64)
        own = _lora_sums(defines, sums, count)
        own[:] = (values @ _lora_a(defines, a, adapter).T).reshape(own.shape)


def lora_expand_chunk(defines: dict, args) -> None:
    b, sums, output = (address_of(args, i) for i in (0, 1, 3))
    count, adapter = _adapter_of_chunk(args, 2)
    if adapter >= 0:
        target = array_at(output, (count, defines["ROWS"]), F32 if defines["FLOAT_OUTPUT"] else F16)
        own = _lora_sums(defines, sums, count).astype(F64)
        target[:] = target + reference.lora_expand(own, *_lora_b(defines, b, adapter))


def gate_multiply(defines: dict, args) -> None:
    gate_up, output, pairs = address_of(args, 0), address_of(args, 1), defines["GRID"] * defines["COLS"]
    values = array_at(gate_up, (2 * pairs,), F16).astype(F64)
    multiply = reference.gelu_multiply if defines["GELU"] else reference.silu_multiply
    array_at(output, (pairs,), F16)[:] = multiply(values)


def add_bias(defines: dict, args) -> None:
    values, bias, rows, width = address_of(args, 0), address_of(args, 1), defines["GRID"], defines["COLS"]
    array_at(values, (rows, width), F32 if defines["FLOAT_VALUES"] else F16)[:] += array_at(bias, (width,), F16)


def bias_gelu(defines: dict, args) -> None:
    rows = array_at(address_of(args, 0), (defines["GRID"], defines["COLS"]), F16)
    bias = array_at(address_of(args, 1), (defines["COLS"],), F16).astype(F64)
    rows[:] = reference.bias_gelu(rows.astype(F64), bias, exact=bool(defines["ERF"]))


def layer_norm(defines: dict, args) -> None:
    rows, params, output = (address_of(args, i) for i in range(3))
    shape = (defines["GRID"], defines["COLS"])
    values = array_at(params, (3, shape[1]), F32).astype(F64)
    normed = reference.layer_norm(array_at(rows, shape, F32).astype(F64), values, _float(defines["NORM_EPS"]))
    if merge := defines.get("MERGE", 0):
        normed = reference.merge_patches(normed, merge, defines["SIDE"])
    array_at(output, normed.shape, F16)[:] = normed


def patches(defines: dict, args) -> None:
    count, cols, values, size = defines["GRID"], defines["COLS"], defines["VALUES"], defines.get("TILE", 0)
    if size:
        channels = values // defines["PATCH"] ** 2
        pixels = array_at(address_of(args, 0), (channels, size, size), F32)
        found = reference.cut_patches(pixels, defines["PATCH"])
    else:
        found = array_at(address_of(args, 0), (count, values), F32)
    rows = array_at(address_of(args, 1), (count, cols), F16)
    rows[:, :values], rows[:, values:] = found, 0


def keep_last_row(defines: dict, args) -> None:
    rows, (_, count) = address_of(args, 0), _chunk(args, 1)
    values = array_at(rows, (count, 16 * defines["COLS"]), np.uint8)
    values[0] = values[-1]


def _chunk(args, index: int) -> tuple[int, int]:
    position, count = array_at(address_of(args, index), (CHUNK_WORDS,), np.int32)
    return int(position), int(count)


class FakeBlas:
    """Stands for ``engine_core.cuda.kernels.blas.Blas``: 16-bit in, sums in float64."""

    def __init__(self, stream, workspace) -> None:
        self._device = stream.device

    def matmul(self, rows, weight, output, count: int, accumulate: bool = False) -> None:
        def work() -> None:
            product = array_at(rows.address, (count, weight.shape[1]), F16).astype(F64)
            product = product @ array_at(weight.address, weight.shape, F16).astype(F64).T
            target = array_at(output.address, (count, weight.shape[0]), F32 if output.dtype == "fp32" else F16)
            target[:] = target + product if accumulate else product

        self._device._driver.run(work)

    def close(self) -> None:
        pass


class _Cache:
    """One layer's and slot's K and V, of 16 bits or of 8 with scales."""

    def __init__(self, defines: dict, cache: int, scales: int, slot: int) -> None:
        kv_heads, context, dim = (defines[key] for key in ("KV_HEADS", "CONTEXT", "HEAD_DIM"))
        self._kind = "fp8" if defines.get("KV_FP8") else "int8" if defines["KV_INT8"] else ""
        item = {"": F16, "int8": np.int8, "fp8": np.uint8}[self._kind]
        cache += np.dtype(item).itemsize * slot * defines["SLOT_STRIDE"]
        self._values = array_at(cache, (2, kv_heads, context, dim), item)
        if self._kind:
            pitch = -(-context // 8) * 8
            self._scales = array_at(scales + 2 * slot * defines["SCALE_SLOT_STRIDE"], (2, kv_heads, pitch), F16)

    def store(self, part: int, place: slice, vectors: np.ndarray) -> None:
        """``vectors``: [kv_heads, tokens, dim]."""
        if self._kind:
            vectors, self._scales[part, :, place] = reference.quantize_vectors(vectors.astype(F64), self._kind)
            vectors = to_minifloat(vectors, E4M3) if self._kind == "fp8" else vectors
        with np.errstate(invalid="ignore"):  # NaN becomes any integer; its scale is NaN
            self._values[part, :, place] = vectors

    def until(self, end: int) -> np.ndarray:
        """float64 [2, kv_heads, end, dim]."""
        values = self._values[:, :, :end]
        if not self._kind:
            return values.astype(F64)
        values = E4M3[values] if self._kind == "fp8" else values
        return values.astype(F64) * self._scales[:, :, :end, None].astype(F64)


class FakeBlasLt:
    """Stands for ``blas_lt.BlasLt`` on a GPU of compute capability 9.0."""

    def __init__(self, stream) -> None:
        self.driver = stream.device._driver

    @classmethod
    def open(cls, stream, workspace):
        return cls(stream) if stream.device.capability == 90 else None

    def close(self) -> None:
        pass


class FakeFp8Gemm:
    """Stands for ``blas_lt.Fp8Gemm``: sums in float64."""

    def __init__(self, lt, rows, row_scales, weight, weight_scales, output, accumulate: bool = False) -> None:
        self._driver, self._output, self._accumulate = lt.driver, output, accumulate
        self._operands = (rows, row_scales), (weight, weight_scales)

    def plan(self, count: int) -> bool:
        return True

    def __call__(self, count: int) -> None:
        def values(codes, scales, size: int) -> np.ndarray:
            codes = array_at(codes.address, (size, codes.shape[1]), np.uint8)
            return E4M3[codes].astype(F64) * array_at(scales.address, (size, 1), F32)

        def work() -> None:
            (rows, weight), output = self._operands, self._output
            product = values(*rows, count) @ values(*weight, weight[0].shape[0]).T
            target = array_at(output.address, product.shape, F32 if output.dtype == "fp32" else F16)
            target[:] = target + product if self._accumulate else product

        self._driver.run(work)


class _Attention:
    """The arrays of one layer, as attention.py lays them out."""

    def __init__(self, defines: dict, qkv: int, cache: int, scales: int, count: int, slot: int = 0) -> None:
        self.heads, self.kv_heads, dim = (defines[key] for key in ("HEADS", "KV_HEADS", "HEAD_DIM"))
        self.scale = _float(defines["SCALE_LOG2E"]) * np.log(2)
        self.window, self.softcap = defines["WINDOW"], _float(defines["SOFTCAP"])
        self.causal = bool(defines.get("CAUSAL", 1))
        rows = array_at(qkv, (count, self.heads + 2 * self.kv_heads, dim), F16)
        self.queries, self.keys, self.values = np.split(rows, [self.heads, self.heads + self.kv_heads], axis=1)
        self.cache = _Cache(defines, cache, scales, slot)

    def rotate(self, defines: dict, rope: int, norms: tuple[int, int], position: int, row: int) -> np.ndarray:
        """The rotated queries, float64; the keys and values go to the cache. ``row``: of position 0 in ``rope``."""
        count, _, dim = self.queries.shape
        table = array_at(rope, (row + position + count, defines["ROTATED"] // 2, 2), F32)
        table = table[row + position :].astype(F64)
        rotated = []
        for vectors, norm in zip((self.queries, self.keys), norms, strict=True):
            vectors = vectors.astype(F64)
            if defines["QK_NORM"]:
                weight = array_at(norm, (dim,), F16).astype(F64) + _float(defines["NORM_OFFSET"])
                vectors = reference.rms_norm(vectors, weight, _float(defines["NORM_EPS"]), defines["HEAD_SIZE"])
            rotated.append(reference.rotate(vectors, table))
        place = slice(position, position + count)
        self.cache.store(0, place, rotated[1].swapaxes(0, 1))
        self.cache.store(1, place, self.values.swapaxes(0, 1))
        return rotated[0]

    def add(self, bias: int) -> None:
        """Add a bias, which has the parts of a token's row."""
        parts = (self.queries, self.keys, self.values)
        heads, dim = sum(part.shape[1] for part in parts), self.queries.shape[2]
        added = array_at(bias, (heads, dim), F16)
        for part, own in zip(parts, np.split(added, [self.heads, self.heads + self.kv_heads]), strict=True):
            part += own

    def attend(self, queries: np.ndarray, start: int, output: int, places: np.ndarray) -> None:
        keys, values = self.cache.until(start + len(queries))
        options = (self.scale, self.window, self.softcap, self.causal)
        result = reference.attention(queries.astype(F64), keys, values, start, *options)
        columns = result.reshape(len(result), -1)
        array_at(output, columns.shape, F16)[:, places] = columns


def _slot(defines: dict, args, index: int) -> int:
    """The KV slot of a chunk."""
    words = CHUNK_WORDS + 1
    return int(array_at(address_of(args, index), (words,), np.int32)[2]) if defines["SLOT_STRIDE"] else 0


def _rope_row(defines: dict, args, index: int, slot: int) -> int:
    """The row of the RoPE table that position 0 of the sequence in ``slot`` has."""
    return int(array_at(address_of(args, index), (slot + 1,), np.int32)[slot]) if defines["LONG_ROPE"] else 0


def rope_append(defines: dict, args) -> None:
    qkv, cache, rope, *norms = (address_of(args, i) for i in range(5))
    (position, count), slot = _chunk(args, 5), _slot(defines, args, 5)
    layer = _Attention(defines, qkv, cache, address_of(args, 6), count, slot)
    biased = defines.get("BIAS", 0)
    if biased:
        layer.add(address_of(args, 7))
    rotated = layer.rotate(defines, rope, tuple(norms), position, _rope_row(defines, args, 7 + biased, slot))
    if not defines["KV_ONLY"]:
        layer.queries[:] = rotated


def attention_prefill(defines: dict, args) -> None:
    qkv, cache, output = (address_of(args, i) for i in range(3))
    start, count = _chunk(args, 3)
    layer = _Attention(defines, qkv, cache, address_of(args, 4), count, _slot(defines, args, 3))
    layer.attend(layer.queries, start, output, _places(defines, args, 5, layer.heads * defines["HEAD_DIM"]))


def attention_decode(defines: dict, args) -> None:
    qkv, cache, rope, q_norm, k_norm, state, _, _, output = (address_of(args, i) for i in range(9))
    rows = defines["GRID_Y"] if defines["BATCHED"] else 1
    slots = array_at(address_of(args, 10), (rows,), np.int32) if defines["BATCHED"] else [0]
    heads, kv_heads, dim = (defines[key] for key in ("HEADS", "KV_HEADS", "HEAD_DIM"))
    for row, slot in enumerate(slots):
        position = int(array_at(state + row * STATE.itemsize, (), STATE)["position"])
        if slot < 0 or position >= defines["CONTEXT"]:
            continue
        own, scales = qkv + 2 * row * (heads + 2 * kv_heads) * dim, address_of(args, 9)
        layer = _Attention(defines, own, cache, scales, 1, int(slot))
        target = output + 2 * row * heads * dim
        places = _places(defines, args, 11, heads * dim)
        rope_row = _rope_row(defines, args, 11 + bool(defines.get("ORDERED")), int(slot))
        rotated = layer.rotate(defines, rope, (q_norm, k_norm), position, rope_row)
        layer.attend(rotated, position, target, places)


def _convolve(defines: dict, args, first_row: int, slot: int, position: int, count: int) -> None:
    """``count`` rows from ``first_row`` on, the first at ``position``; see short_conv.cu."""
    rows, taps, bias, ring, _, output = (address_of(args, i) for i in range(6))
    cols, num_taps = defines["COLS"], defines["TAPS"]
    gates = array_at(rows + 2 * first_row * 3 * cols, (count, 3 * cols), F16).astype(F64)
    weights = array_at(taps, (num_taps, cols), F16).astype(F64)
    earlier = np.zeros((num_taps - 1, cols))
    for index in range(num_taps - 1 if num_taps > 1 else 0):
        place = position - num_taps + 1 + index
        if place >= 0:
            held = array_at(ring + 4 * slot * defines["SLOT_FLOATS"], (num_taps, cols), F32)
            earlier[index] = held[place % num_taps]
    added = array_at(bias, (cols,), F16).astype(F64) if defines["BIAS"] else 0.0
    result, inputs = reference.short_convolution(gates, earlier, weights, added)
    array_at(output + 2 * first_row * cols, (count, cols), F16)[:] = result
    if num_taps > 1:
        held = array_at(ring + 4 * slot * defines["SLOT_FLOATS"], (num_taps, cols), F32)
        for token in range(max(0, count - num_taps), count):
            held[(position + token) % num_taps] = inputs[token]


def short_conv_step(defines: dict, args) -> None:
    state, rows = address_of(args, 4), defines["GRID_Y"]
    slots = array_at(address_of(args, 6), (rows,), np.int32) if defines["BATCHED"] else [0]
    for row, slot in enumerate(slots):
        position = int(array_at(state + row * STATE.itemsize, (), STATE)["position"])
        if slot >= 0 and position < defines["CONTEXT"]:
            _convolve(defines, args, row, int(slot), position, 1)


def short_conv_chunk(defines: dict, args) -> None:
    position, count = _chunk(args, 4)
    slot = int(array_at(address_of(args, 4), (CHUNK_WORDS + 1,), np.int32)[2]) if defines["SLOT_FLOATS"] else 0
    _convolve(defines, args, 0, slot, position, min(count, defines["GRID"] * defines["TILE"]))


_ALL = (
    *(embed, rms_norm, qk_norm, gemv, gemv_packed, dequantize_packed, gemm_packed, gate_multiply, add_bias),
    *(bias_gelu, layer_norm, patches),
    *(keep_last_row, rope_append, attention_prefill, attention_decode, lora_shrink, lora_shrink_chunk),
    *(lora_expand_chunk, route, combine, quantize_rows, unpack_fp8, short_conv_step, short_conv_chunk),
)
KERNELS = {kernel.__name__: kernel for kernel in _ALL}
