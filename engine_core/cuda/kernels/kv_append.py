"""Appending a TensorRT step's keys and values to the KV cache: wrapper of kv_append.cu."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from engine_core.cuda.driver import ITEM_BYTES, DeviceArray, Launch
from engine_core.cuda.kernels import KernelArgumentError, Kernels, check
from engine_core.cuda.kernels.launch_configs import KV_APPEND_THREADS
from engine_core.cuda.kernels.sampling import STATE

_MAX_BLOCKS = 1024
_VECTOR_BYTES = 16


@dataclass(frozen=True)
class AppendShape:
    """``num_layers`` 0: the engine writes its cache itself and only the next step is prepared."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    fresh_stride: int  # elements from one layer's new keys to its new values, and on to the next layer's keys


@dataclass(frozen=True)
class NextStep:
    """Device addresses that the decode engine reads its next input from: int32 [1] each, uint64 [1] or None."""

    token: DeviceArray
    position: DeviceArray
    write_index: DeviceArray | None


def kv_append(
    kernels: Kernels,
    shape: AppendShape,
    fresh: DeviceArray | None,
    cache: DeviceArray,
    start: DeviceArray | None,
    count: ctypes.c_int,
    state: DeviceArray | None,
    following: NextStep,
) -> Launch:
    """Copies ``count`` tokens' rows of ``fresh`` [2 layers, stride] to ``cache`` [layers, 2, kv_heads, max_context, d].

    ``start``: int32, its first element is the first token's position; None: the one before ``state``'s, after a decode
    step. With ``state`` the next step's token and position are set, too. Raises KernelArgumentError.
    """
    check("cache", cache, (cache.shape[0], 2, shape.num_kv_heads, shape.max_context, shape.head_dim), cache.dtype)
    vector = _VECTOR_BYTES // ITEM_BYTES[cache.dtype]
    if shape.head_dim % vector or shape.fresh_stride % vector:
        raise KernelArgumentError(
            f"head_dim is {shape.head_dim} and the stride {shape.fresh_stride}; the kernel takes multiples of {vector}."
        )
    if shape.num_layers:
        assert fresh is not None
        check("fresh", fresh, (2 * shape.num_layers, shape.fresh_stride), cache.dtype)
    if state is not None:
        check("state", state, (STATE.itemsize,), "uint8")
    assert start is not None or state is not None
    defines: dict[str, int | str] = {
        "LAYERS": shape.num_layers,
        "KV_HEADS": shape.num_kv_heads,
        "VECTORS": shape.head_dim // vector,
        "CONTEXT": shape.max_context,
        "FRESH": shape.fresh_stride // vector,
        "THREADS": KV_APPEND_THREADS,
    }
    function = kernels.function("kv_append", "kv_append", defines)
    optional = [0 if array is None else array for array in (state, following.token, following.position)]
    args = [fresh or 0, cache, start or 0, count, *optional, following.write_index or 0]
    grid = (kv_append_blocks(shape, count.value),)
    return Launch(kernels.device, function, grid, KV_APPEND_THREADS, args, overlap=False)


def kv_append_blocks(shape: AppendShape, count: int) -> int:
    """CTAs for ``count`` tokens; each thread takes several vectors where there are many."""
    vectors = 2 * shape.num_layers * count * shape.num_kv_heads * -(-shape.head_dim // 4)
    return max(1, min(_MAX_BLOCKS, -(-vectors // KV_APPEND_THREADS)))
