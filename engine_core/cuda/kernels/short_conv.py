"""Gated short convolutions (LFM2), whose ring of earlier inputs stands beside the KV cache."""

from __future__ import annotations

from engine_core.cuda.driver import DeviceArray, Launch
from engine_core.cuda.kernels import CHUNK_WORDS, KernelArgumentError, Kernels, check
from engine_core.cuda.kernels.launch_configs import SHORT_CONV_THREADS, SHORT_CONV_TILE
from engine_core.cuda.kernels.sampling import STATE

MAX_TAPS = 8  # tokens that an output sees: a thread holds their inputs and weights in registers
_CHANNELS = 8  # of a thread


def ring_rows(taps: int) -> int:
    """Return the rows of a ring of earlier inputs; 0: a convolution over one token has none.

    It has one row more than a token sees of earlier ones, so that a sequence may go back by one token.
    """
    return taps if taps > 1 else 0


def short_conv_step(
    kernels: Kernels,
    rows: DeviceArray,
    taps: DeviceArray,
    bias: DeviceArray | None,
    ring: DeviceArray | None,
    state: DeviceArray,
    output: DeviceArray,
    max_context: int,
    slots: DeviceArray | None = None,
    slot_floats: int = 0,
) -> Launch:
    """Return gate_2 * convolution(gate_1 * x) of one token of each sequence, which also goes into its ring.

    One sequence: rows 16-bit [3 cols], gate_1, gate_2 and x; ``state``: uint8 [STATE.itemsize], whose position is the
    token's; output: 16-bit [cols]. Several: ``slots``, int32 [n], is the KV slot of each one (negative = it does
    nothing); those arrays have n in front. ``taps``: 16-bit [taps, cols], the oldest token's first; ``bias``: [cols].
    ``ring``: float32 [ring_rows, cols] of this layer and the first slot, None without; ``slot_floats``: from a slot's
    ring to the next one's. Raises KernelArgumentError.
    """
    many = slots.shape if slots is not None else ()
    if slots is not None:
        check("slots", slots, many, "int32")
    check("state", state, (*many, STATE.itemsize), "uint8")
    defines = _defines(kernels, rows, taps, bias, ring, output, many, slot_floats)
    defines |= {"CONTEXT": max_context, "BATCHED": int(slots is not None)}
    function = kernels.function("short_conv", "short_conv_step", defines)
    grid = (_column_ctas(taps.shape[1]), many[0] if many else 1)
    args = [rows, taps, bias or 0, ring or 0, state, output, slots or 0]
    return Launch(kernels.device, function, grid, SHORT_CONV_THREADS, args)


def short_conv_chunk(
    kernels: Kernels,
    rows: DeviceArray,
    taps: DeviceArray,
    bias: DeviceArray | None,
    ring: DeviceArray | None,
    chunk: DeviceArray,
    output: DeviceArray,
    slot_floats: int = 0,
) -> Launch:
    """Return the same of a chunk's tokens: rows 16-bit [n, 3 cols], output [n, cols]; see ``short_conv_step``.

    ``chunk``: int32 [CHUNK_WORDS], the position of the first row and how many rows are tokens; with ``slot_floats`` the
    KV slot follows. ``short_conv_blocks`` says the grid of fewer rows. Raises KernelArgumentError.
    """
    check("chunk", chunk, (CHUNK_WORDS + (slot_floats > 0),), "int32")
    defines = _defines(kernels, rows, taps, bias, ring, output, rows.shape[:1], slot_floats)
    function = kernels.function("short_conv", "short_conv_chunk", {**defines, "CONTEXT": 0, "BATCHED": 0})
    grid = (short_conv_blocks(rows.shape[0]), _column_ctas(taps.shape[1]))
    return Launch(kernels.device, function, grid, SHORT_CONV_THREADS, [rows, taps, bias or 0, ring or 0, chunk, output])


def short_conv_blocks(count: int) -> int:
    """Return the CTAs of short_conv_chunk, along the tokens, for so many of them."""
    return -(-count // SHORT_CONV_TILE)


def _column_ctas(cols: int) -> int:
    return -(-cols // (_CHANNELS * SHORT_CONV_THREADS))


def _defines(
    kernels: Kernels,
    rows: DeviceArray,
    taps: DeviceArray,
    bias: DeviceArray | None,
    ring: DeviceArray | None,
    output: DeviceArray,
    many: tuple[int, ...],
    slot_floats: int,
) -> dict[str, int | str]:
    count, cols = taps.shape
    if not 1 <= count <= MAX_TAPS or cols % _CHANNELS:
        raise KernelArgumentError(
            f"The convolution is over {count} tokens of {cols} values; the kernel takes up to {MAX_TAPS}, and "
            f"multiples of {_CHANNELS}."
        )
    check("taps", taps, (count, cols), kernels.dtype)
    check("rows", rows, (*many, 3 * cols), kernels.dtype)
    check("output", output, (*many, cols), kernels.dtype)
    if bias is not None:
        check("bias", bias, (cols,), kernels.dtype)
    if (ring is None) != (ring_rows(count) == 0):
        raise KernelArgumentError("A convolution over several tokens needs a ring, and no other has any.")
    if ring is not None:
        check("ring", ring, (ring_rows(count), cols), "fp32")
    return {
        "COLS": cols,
        "TAPS": count,
        "BIAS": int(bias is not None),
        "SLOT_FLOATS": slot_floats,
        "THREADS": SHORT_CONV_THREADS,
        "TILE": SHORT_CONV_TILE,
    }
