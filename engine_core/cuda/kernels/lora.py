"""LoRA adapters beside the GEMV and GEMM of a matrix: wrapper of lora.cu, and what the others' wrappers take of it.

The matrices of all adapters lie side by side, so that a launch is the same whichever adapter a sequence has: the
kernels read its number from device memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine_core.cuda.driver import DeviceArray, Launch, Stream
from engine_core.cuda.kernels import KernelArgumentError, Kernels, check
from engine_core.cuda.kernels.launch_configs import LORA_THREADS, LORA_TOKENS

RANK_GRAIN = 8  # 16-bit values that the kernels read at once
MAX_RANK = 256  # the sums of a tile of tokens fit the shared memory that a kernel has without asking
NOT_YET = 0xFF  # bytes of a sum that a GEMV has not made yet: lora_gemv.cuh
ADAPTED_CHUNK_WORDS = 4  # int32 of a chunk with an adapter: position, tokens, KV slot, the adapter's number


@dataclass(frozen=True)
class LoraMatrix:
    """The matrices A and B of all adapters for one matrix of a layer.

    ``a``: 16-bit [adapters, parts · rank, cols]; ``b``: 16-bit [adapters, rows, rank], the scale in it. ``splits``: the
    rows at which a further part begins; ``pairs``: the rows are of two parts in turn.
    """

    a: DeviceArray
    b: DeviceArray
    splits: tuple[int, ...] = ()
    pairs: bool = False

    @property
    def parts(self) -> int:
        """The number of linears that are stacked in the matrix."""
        return 2 if self.pairs else 1 + len(self.splits)

    @property
    def rank(self) -> int:
        return self.b.shape[2]

    @property
    def num_sums(self) -> int:
        """The length of A x of one token."""
        return self.parts * self.rank

    def check(self, kernels: Kernels, rows: int, cols: int) -> None:
        """Raises KernelArgumentError unless these belong to a matrix [rows, cols]."""
        count = self.a.shape[0]
        check("a", self.a, (count, self.num_sums, cols), kernels.dtype)
        check("b", self.b, (count, rows, self.rank), kernels.dtype)
        if self.rank % RANK_GRAIN or not 0 < self.rank <= MAX_RANK:
            raise KernelArgumentError(
                f"The rank is {self.rank}; the kernels take multiples of {RANK_GRAIN} to {MAX_RANK}."
            )

    @property
    def defines(self) -> dict[str, int | str]:
        """The macros of lora.cuh."""
        end = 1 << 30
        first, second = (*self.splits, end, end)[:2]
        names = {"LORA_RANK": self.rank, "LORA_PARTS": self.parts, "LORA_PAIRS": int(self.pairs)}
        return {**names, "LORA_SPLIT_1": first, "LORA_SPLIT_2": second}


@dataclass(frozen=True)
class LoraTerm:
    """The term that a GEMV or GEMM adds to its rows: B times ``sums``, A x as float32 [tokens, parts · rank].

    A GEMV makes the sums itself and needs them filled with ``NOT_YET`` before; for a GEMM ``lora_shrink`` makes them.
    ``adapters``: int32 [tokens], the number of each token's adapter, -1 = none.
    """

    matrix: LoraMatrix
    sums: DeviceArray
    adapters: DeviceArray

    def check(self, kernels: Kernels, rows: int, cols: int, tokens: int) -> None:
        """Raises KernelArgumentError."""
        self.matrix.check(kernels, rows, cols)
        check("sums", self.sums, (tokens, self.matrix.num_sums), "fp32")
        check("adapters", self.adapters, (tokens,), "int32")

    @property
    def args(self) -> list[DeviceArray]:
        """The last arguments of a kernel with ``LORA_PARAMETERS``."""
        return [self.matrix.b, self.sums, self.adapters]

    @property
    def gemv_args(self) -> list[DeviceArray]:
        """The last arguments of a kernel with ``GEMV_LORA_PARAMETERS``."""
        return [self.matrix.a, *self.args]

    def gemv_defines(self, kernels: Kernels) -> dict[str, int | str]:
        """Return the macros of lora_gemv.cuh."""
        return {**self.matrix.defines, "LORA_CTAS": kernels.gpu.num_sms}


class LoraChunk:
    """The two halves of what an adapter adds in a prefill step, after the GEMM of the matrix."""

    def __init__(self, shrink: Launch, expand: Launch) -> None:
        self._halves = (shrink, expand)

    def __call__(self, stream: Stream, rows: int) -> None:
        """Queue them for at most ``rows`` tokens."""
        for half in self._halves:
            half.set_grid(-(-rows // LORA_TOKENS))
            half(stream)


def lora_shrink(kernels: Kernels, term: LoraTerm, vectors: DeviceArray) -> Launch:
    """term.sums ← A · vectors of one token each of several sequences, by the adapter of each; without one they stay.

    ``vectors``: 16-bit [tokens, cols]. Raises KernelArgumentError.
    """
    tokens, cols = vectors.shape
    if cols % RANK_GRAIN:
        raise KernelArgumentError(f"The vectors have {cols} columns; the kernel reads a multiple of {RANK_GRAIN}.")
    term.check(kernels, term.matrix.b.shape[1], cols, tokens)
    check("vectors", vectors, (tokens, cols), kernels.dtype)
    function = kernels.function("lora", "lora_shrink", _defines(term.matrix, cols))
    grid = (term.matrix.num_sums, tokens)
    return Launch(kernels.device, function, grid, LORA_THREADS, [term.matrix.a, vectors, term.adapters, term.sums])


def lora_chunk(
    kernels: Kernels,
    matrix: LoraMatrix,
    vectors: DeviceArray,
    output: DeviceArray,
    chunk: DeviceArray,
    sums: DeviceArray,
) -> LoraChunk:
    """Return the launches of output += (vectors · Aᵀ) · Bᵀ for the tokens of ``chunk``.

    ``vectors``: 16-bit [n, cols]; ``output``: float32 or 16-bit [n, rows]; ``chunk``: int32 [ADAPTED_CHUNK_WORDS],
    whose last is the adapter's number, -1 = none; ``sums``: float32 [n, parts · rank]. Raises KernelArgumentError.
    """
    (tokens, cols), rows = vectors.shape, matrix.b.shape[1]
    matrix.check(kernels, rows, cols)
    check("vectors", vectors, (tokens, cols), kernels.dtype)
    check("output", output, (tokens, rows), "fp32" if output.dtype == "fp32" else kernels.dtype)
    check("sums", sums, (tokens, matrix.num_sums), "fp32")
    check("chunk", chunk, (ADAPTED_CHUNK_WORDS,), "int32")
    defines = _defines(matrix, cols, output.dtype == "fp32")
    warps = LORA_THREADS // 32

    def launch(entry: str, height: int, args: list[DeviceArray]) -> Launch:
        grid = (-(-tokens // LORA_TOKENS), height)
        return Launch(kernels.device, kernels.function("lora", entry, defines), grid, LORA_THREADS, args)

    shrink = launch("lora_shrink_chunk", -(-matrix.num_sums // warps), [matrix.a, vectors, chunk, sums])
    return LoraChunk(shrink, launch("lora_expand_chunk", -(-rows // LORA_THREADS), [matrix.b, sums, chunk, output]))


def _defines(matrix: LoraMatrix, cols: int, float_output: bool = True) -> dict[str, int | str]:
    sizes = {"ROWS": matrix.b.shape[1], "COLS": cols, "THREADS": LORA_THREADS, "TOKENS": LORA_TOKENS}
    return {**matrix.defines, **sizes, "FLOAT_OUTPUT": int(float_output)}
