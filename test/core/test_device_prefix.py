"""Saved prefixes of a GPU backend: the rows and, where the cache has them, the scales. On the fake driver."""

from __future__ import annotations

import numpy as np
import pytest

from engine_core.backends.gpu_backend import DeviceBackend, SequenceLimits
from engine_core.cuda.driver import Arena, Device, Stream
from fake_gpu import FakeDriver, array_at, install

ROWS, CONTEXT, TOKENS, SLOTS, ITEM = 12, 21, 10, 3, 16


@pytest.fixture
def backend(monkeypatch):
    install(monkeypatch, FakeDriver())
    device = Device()
    arena = Arena(device, 1 << 16)
    backend = DeviceBackend()
    backend._device, backend._stream = device, Stream(device)
    backend._limits = SequenceLimits(
        max_context=CONTEXT,
        vocab_size=8,
        head_rows=8,
        chunk=64,
        prefix_slots=SLOTS,
        prefix_tokens=TOKENS,
        cache_rows=ROWS,
        cache_item_bytes=ITEM,
        scale_item_bytes=2,
    )
    backend._work = {
        "kv_cache": arena.take((2, 2, 3, CONTEXT, ITEM), "int8"),
        "kv_scales": arena.take((2, 2, 3, 24), "fp16"),
        "prefixes": arena.take((SLOTS, ROWS, TOKENS, ITEM), "int8"),
        "prefix_scales": arena.take((SLOTS, ROWS, 16), "fp16"),
    }
    return backend


def contents(backend: DeviceBackend) -> tuple[np.ndarray, np.ndarray]:
    """Views of (rows [ROWS, CONTEXT, ITEM], scales [ROWS, CONTEXT])."""
    rows = array_at(backend._work["kv_cache"].address, (ROWS, CONTEXT, ITEM), np.int8)
    return rows, array_at(backend._work["kv_scales"].address, (ROWS, 24), np.float16)[:, :CONTEXT]


def test_scales_come_back_with_their_rows(backend):
    rows, scales = contents(backend)
    random = np.random.default_rng(0)
    saved = {}
    for slot, length in ((2, 10), (0, 3)):
        rows[:] = random.integers(-127, 128, rows.shape)
        scales[:] = random.random(scales.shape)
        saved[slot] = (rows[:, :length].copy(), scales[:, :length].copy())
        backend.save_prefix(0, slot, length)
    for slot, (old_rows, old_scales) in saved.items():
        length = old_rows.shape[1]
        rows[:], scales[:] = 55, 0.5
        backend.load_prefix(0, slot, length)
        assert (rows[:, :length] == old_rows).all() and (scales[:, :length] == old_scales).all()
        assert (rows[:, length:] == 55).all() and (scales[:, length:] == 0.5).all()
