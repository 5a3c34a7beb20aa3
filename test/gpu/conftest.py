"""One device for all GPU tests of a process."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
from gpu_bench import Bench

from engine_core.device import Device


@pytest.fixture(scope="session")
def _bench() -> Iterator[Bench]:
    device = Device()
    bench = Bench(device)
    yield bench
    bench.close()
    device.close()


@pytest.fixture
def bench(_bench: Bench, request: pytest.FixtureRequest) -> Bench:
    _bench.start(zlib.crc32(request.node.name.encode()))
    return _bench
