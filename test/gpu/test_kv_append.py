"""kv_append.cu against numpy, over a table of shapes."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from engine_core.cuda.driver import DeviceArray
from engine_core.cuda.kernels.kv_append import AppendShape, NextStep, kv_append, kv_append_blocks
from engine_core.cuda.kernels.sampling import STATE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize(
    ("layers", "heads", "head_dim", "context", "room", "count", "start"),
    [
        (3, 2, 32, 64, 16, 5, 0),
        (2, 8, 64, 512, 128, 128, 300),
        (22, 4, 64, 256, 64, 1, 255),
        (2, 1, 8, 64, 64, 64, 40),  # runs past the end: what does not fit is left out
        (1, 3, 80, 128, 7, 7, 11),
    ],
)
def test_rows_go_where_they_belong(bench, dtype, layers, heads, head_dim, context, room, count, start):
    step = 256 // {"fp16": 2, "fp32": 4}[dtype]
    stride = -(-room * heads * head_dim // step) * step
    fresh, values = bench.normal((2 * layers, stride), dtype)
    cache, before = bench.normal((layers, 2, heads, context, head_dim), dtype)
    expected = before.reshape(2 * layers, heads, context, head_dim).copy()
    rows = values[:, : count * heads * head_dim].reshape(2 * layers, count, heads, head_dim)[:, : context - start]
    expected[:, :, start : start + rows.shape[1]] = rows.swapaxes(1, 2)
    positions = bench.put(np.array([start], dtype=np.int32), "int32")
    state = bench.put(_state(17, start + 1), "uint8")
    following = _next_step(bench)
    shape = AppendShape(layers, heads, head_dim, context, stride)
    launch = kv_append(bench.kernels("fp16"), shape, fresh, cache, positions, ctypes.c_int(count), None, following)
    launch.set_grid(kv_append_blocks(shape, count))
    launch(bench.stream)
    assert np.array_equal(bench.get(cache).reshape(expected.shape), expected)
    if count == 1:  # the same through the sampler's state, which also prepares the next step
        bench.device.upload(cache, np.zeros(before.shape, dtype={"fp16": np.float16, "fp32": np.float32}[dtype]))
        kv_append(bench.kernels("fp16"), shape, fresh, cache, None, ctypes.c_int(1), state, following)(bench.stream)
        found = bench.get(cache).reshape(expected.shape)
        assert np.array_equal(found[:, :, start], rows[:, 0]) and not found[:, :, :start].any()
        assert _read(bench, following) == (17, min(start + 1, context - 1), min(start + 1, context - 1))


def test_a_failed_step_feeds_a_token_that_exists(bench):
    shape = AppendShape(0, 2, 32, 64, 0)
    cache, _ = bench.normal((1, 2, 2, 64, 32), "fp16")
    following, state = _next_step(bench), bench.put(_state(-1, 9), "uint8")
    kv_append(bench.kernels("fp16"), shape, None, cache, None, ctypes.c_int(1), state, following)(bench.stream)
    assert _read(bench, following) == (0, 9, 9)


def _state(token: int, position: int) -> np.ndarray:
    state = np.zeros((), dtype=STATE)
    state["token"], state["position"] = token, position
    return np.frombuffer(state.tobytes(), dtype=np.uint8)


def _next_step(bench) -> NextStep:
    index = bench.put(np.zeros(4, dtype=np.uint32), "uint32")
    slots = [bench.put(np.zeros(1, dtype=np.int32), "int32") for _ in range(2)]
    return NextStep(*slots, DeviceArray(index.address, (1,), "uint64"))


def _read(bench, following: NextStep) -> tuple[int, ...]:
    arrays = (following.token, following.position, following.write_index)
    return tuple(int(bench.device.download(array)[0]) for array in arrays)
