"""Backends on the CPU for tests: opened with a test's own settings, closed after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from engine_core.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine_core.config import EngineConfig
from engine_core.formats.manifest import Manifest


@contextmanager
def opening(variant: tuple[Path, Manifest], **defaults) -> Iterator[Callable[..., OnnxRuntimeBackend]]:
    """Give a function that opens backends of ``variant``, with one thread and ``defaults`` unless it is told others."""
    with ExitStack() as opened:

        def make(**config) -> OnnxRuntimeBackend:
            found = EngineConfig(variant[0], **{"num_threads": 1, **defaults, **config})
            return opened.enter_context(closing(OnnxRuntimeBackend.load(*variant, found)))

        yield make
