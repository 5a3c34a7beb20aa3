"""Uploads against other streams, on the fake driver: its copies from pageable memory come as late as real ones may."""

from __future__ import annotations

import numpy as np
import pytest

from engine_core.cuda.driver import Arena, Device, Stream
from fake_gpu import FakeDriver, array_at, install


@pytest.fixture
def device(monkeypatch):
    install(monkeypatch, FakeDriver())
    return Device()


def test_an_upload_has_arrived_when_it_returns(device):
    """Else it would overwrite what a stream wrote after it, or a stream would read what was there before."""
    array = Arena(device, 1 << 12).take((8,), "int32")
    stream = Stream(device)
    device.upload(array, np.full(8, 7, dtype=np.int32))
    assert array_at(array.address, (8,), np.int32).tolist() == [7] * 8
    stream.zero(array)
    device.synchronize()
    assert device.download(array).tolist() == [0] * 8


def test_an_upload_takes_any_layout_and_the_callers_memory_is_free_afterwards(device):
    array = Arena(device, 1 << 12).take((2, 3), "int32")
    values = np.arange(6, dtype=np.int32).reshape(3, 2).T
    device.upload(array, values)
    values[:] = -1
    assert device.download(array).tolist() == [[0, 2, 4], [1, 3, 5]]
