"""A loaded TensorRT plan: the engine, and contexts whose every address is bound once."""

from __future__ import annotations

import mmap
from functools import partial
from pathlib import Path
from typing import Any

from engine_core.backends.tensorrt.api import TensorRT, TensorRTError
from engine_core.cuda.driver import DeviceArray, Stream
from engine_core.errors import EngineDirectoryError


class TrtEngine:
    """Owns runtime and engine. Close it after its contexts."""

    def __init__(self, api: TensorRT, plan: Path) -> None:
        """Raises EngineDirectoryError or InsufficientMemoryError."""
        self.api = api
        try:
            with open(plan, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._runtime, self._engine = api.deserialize(data)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise EngineDirectoryError(f"{plan} cannot be read ({error}); build the engine again.") from error
        self.scratch_bytes = api.scratch_bytes(self._engine)

    def check_tensors(self, expected: set[str]) -> None:
        """Raises EngineDirectoryError unless the engine's inputs and outputs are those named."""
        found = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        if found != expected:
            odd = sorted(found ^ expected)
            raise EngineDirectoryError(
                f"The plan's inputs and outputs are not this version's (they differ in {', '.join(odd[:3])}); "
                "build the engine again."
            )

    def context(self, profile: int, scratch: DeviceArray, stream: Stream) -> TrtContext:
        """Return a context for ``profile`` that works in ``scratch``; contexts that share it must not run at the same
        time."""
        context = self.api.create_context(self._engine, scratch.address, scratch.nbytes)
        self.api.checked(
            "set_optimization_profile_async",
            partial(context.set_optimization_profile_async, profile, int(stream.handle)),
        )
        stream.wait()
        return TrtContext(self.api, context)

    def close(self) -> None:
        """Gives the engine back before its runtime; may be called twice."""
        self._engine = None
        self._runtime = None


class TrtContext:
    """One profile's context. Calling it queues one run, so that it can stand among launches."""

    def __init__(self, api: TensorRT, context: Any) -> None:
        self._api = api
        self._context = context
        self._shapes: dict[str, tuple[int, ...]] = {}

    def bind(self, arrays: dict[str, DeviceArray]) -> None:
        """Tensor → where it lies. Raises TensorRTError."""
        for name, array in arrays.items():
            assert array.address % 256 == 0, (name, hex(array.address))
            if not self._context.set_tensor_address(name, array.address):
                raise TensorRTError(f"TensorRT's set_tensor_address({name!r}) failed; {'; '.join(self._api.messages)}.")

    def set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Set the shapes (input → shape) that changed: each costs a new shape inference. Raises TensorRTError."""
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._api.checked(
                    f"set_input_shape({name!r}, {shape})",
                    partial(self._context.set_input_shape, name, shape),
                )
                self._shapes[name] = shape

    def __call__(self, stream: Stream) -> None:
        """Queues one run. Raises TensorRTError."""
        self._api.messages.clear()
        if not self._context.execute_async_v3(int(stream.handle)):
            raise TensorRTError(f"TensorRT's execute_async_v3 failed: {'; '.join(self._api.messages)}.")

    def close(self) -> None:
        self._context = None


class TrtRun:
    """A context with arrays of its own: they are bound before each run. Other runs may share the context."""

    def __init__(self, context: TrtContext, arrays: dict[str, DeviceArray]) -> None:
        self._context = context
        self._arrays = arrays

    def __call__(self, stream: Stream) -> None:
        """Queues one run. Raises TensorRTError."""
        self._context.bind(self._arrays)
        self._context(stream)
