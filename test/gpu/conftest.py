"""One device for all GPU tests of a process."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpu_bench import Bench

from engine_core.cuda.driver import Device

sys.path.append(str(Path(__file__).resolve().parents[1] / "core"))  # device_steps, trt_runners


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
