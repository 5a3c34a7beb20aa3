"""How far a build and the opening of an engine are is told from 0 to 1, and never goes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_core.backends.toolkit import BuildRequest, toolkit_of
from engine_core.config import EngineConfig
from engine_core.progress import portion
from engine_core.serving.engine import Engine

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Backend → engine directory and what its build told."""
    found = {}
    for backend in ("onnxruntime", "cuda"):
        shares: list[float] = []
        directory = tmp_path_factory.mktemp(backend) / "engine"
        request = BuildRequest(DEMO, directory, "int8", max_context=64, kv_cache_type="fp16")
        toolkit_of(backend).build(request, lambda line: None, shares.append)
        found[backend] = directory, shares
    return found


@pytest.mark.parametrize("backend", ["onnxruntime", "cuda"])
def test_a_build_tells_each_layer(built, backend):
    _, shares = built[backend]
    assert shares == sorted(shares) and shares[-1] == 1.0 and 0 < shares[0] < 0.3
    assert len(set(shares)) > 8


def test_opening_tells_the_hashes_then_the_backend(built):
    shares: list[float] = []
    Engine.open(EngineConfig(built["onnxruntime"][0]), lambda line: None, shares.append).close()
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert sum(share <= 0.3 for share in shares) >= 3 and any(0.3 < share < 1 for share in shares)


def test_portions():
    shares: list[float] = []
    inner = portion(portion(shares.append, 0.5, 1.0), 0.0, 0.5)
    inner(0.0)
    inner(1.0)
    assert shares == [0.5, 0.75]
