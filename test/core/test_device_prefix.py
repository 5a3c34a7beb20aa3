"""The KV pool of a GPU backend: the rows and, where the cache has them, the scales. On the fake driver."""

from __future__ import annotations

import numpy as np
import pytest

from engine_core.backends.cuda.layout import ArraySpec
from engine_core.backends.gpu_backend import DeviceBackend, SequenceLimits
from engine_core.cuda.driver import Arena, Device, Stream
from fake_gpu import FakeDriver, array_at, install

ROWS, CONTEXT, TOKENS, ITEM = 12, 21, 30, 16
POOL = {"pool": ((ROWS, TOKENS, ITEM), "int8"), "pool_scales": ((ROWS, TOKENS), "fp16")}


@pytest.fixture(params=["device", "host"])
def backend(request, monkeypatch):
    """A DeviceBackend with a KV cache of two layers and a pool on the device or the host, without a model."""
    install(monkeypatch, FakeDriver())
    device = Device()
    arena = Arena(device, 1 << 16)
    backend = DeviceBackend()
    backend._device, backend._stream = device, Stream(device)
    limits = SequenceLimits(
        max_context=CONTEXT,
        vocab_size=8,
        head_rows=8,
        chunk=64,
        pool_tokens=TOKENS,
        cache_rows=ROWS,
        cache_item_bytes=ITEM,
        scale_item_bytes=2,
    )
    backend._work = {
        "kv_cache": arena.take((2, 2, 3, CONTEXT, ITEM), "int8"),
        "kv_scales": arena.take((2, 2, 3, 24), "fp16"),
    }
    on_host = {name: ArraySpec("prefix_cache", *values) for name, values in POOL.items()}
    if request.param == "device":
        backend._work |= {name: arena.take(*values) for name, values in POOL.items()}
        on_host = None
    backend._allocate_host(lambda resource: resource, device, limits, on_host)
    return backend


def contents(backend: DeviceBackend) -> tuple[np.ndarray, np.ndarray]:
    """Views of (rows [ROWS, CONTEXT, ITEM], scales [ROWS, CONTEXT])."""
    rows = array_at(backend._work["kv_cache"].address, (ROWS, CONTEXT, ITEM), np.int8)
    return rows, array_at(backend._work["kv_scales"].address, (ROWS, 24), np.float16)[:, :CONTEXT]


def test_scales_come_back_with_their_rows(backend):
    rows, scales = contents(backend)
    random = np.random.default_rng(0)
    saved = {}
    for place, position, length in ((20, 0, 10), (0, 7, 14), (14, 2, 3)):
        rows[:] = random.integers(-127, 128, rows.shape)
        scales[:] = random.random(scales.shape)
        span = slice(position, position + length)
        saved[place] = (position, rows[:, span].copy(), scales[:, span].copy())
        backend.save_kv(0, position, place, length)
    for place, (position, old_rows, old_scales) in saved.items():
        length = old_rows.shape[1]
        rows[:], scales[:] = 55, 0.5
        backend.load_kv(0, position, place, length)
        span = np.zeros(CONTEXT, dtype=bool)
        span[position : position + length] = True
        assert (rows[:, span] == old_rows).all() and (scales[:, span] == old_scales).all()
        assert (rows[:, ~span] == 55).all() and (scales[:, ~span] == 0.5).all()
