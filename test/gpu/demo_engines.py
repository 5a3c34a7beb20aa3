"""The demo model, built for a GPU backend."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from engine_core.backends.cuda.build import build_cuda

MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"


def build_demo(backend: str, engine_dir: Path) -> None:
    """Skips the test where ``backend`` is tensorrt and there is none."""
    if backend == "cuda":
        build_cuda(MODEL, engine_dir, dtype="fp16")
        return
    if importlib.util.find_spec("tensorrt") is None:
        pytest.skip("needs the Python package tensorrt")
    from engine_core.backends.tensorrt.build import build_tensorrt

    build_tensorrt(MODEL, engine_dir, level=1)
