"""TensorRT's Python API from 8.6 to 11, by asking what exists. The one module that imports it.

``TensorRT`` wraps what differs between the versions; what is the same in all of them (optimization profiles, shapes,
tensor addresses, execute_async_v3) is called on the objects it returns. Version 8.6.0 is the one this was run against;
see docs/tensorrt.md for what has not been run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine_core.errors import BackendUnavailableError, EngineDirectoryError, EngineFaultError, InsufficientMemoryError

_log = logging.getLogger(__name__)

_MAX_MESSAGES = 20  # of TensorRT's own, kept for the exception that follows


class TensorRTError(EngineFaultError):
    """A TensorRT call failed; the message names the call and carries what TensorRT logged."""


def _import_tensorrt() -> Any:
    try:
        import tensorrt
    except (ImportError, OSError) as error:  # OSError: a shared library it needs is missing
        raise BackendUnavailableError(
            f"The backend 'tensorrt' needs the Python package 'tensorrt' ({error}); it comes with JetPack, or with "
            "pip install tensorrt on a PC. The backends cuda and onnxruntime do without."
        ) from error
    return tensorrt


class TensorRT:
    """The module, its logger, and what it can do."""

    def __init__(self, module: Any = None) -> None:
        """``module``: a stand-in for tests. Raises BackendUnavailableError."""
        self.trt = module if module is not None else _import_tensorrt()
        self.version: str = self.trt.__version__
        self.messages: list[str] = []  # errors since the last call began
        self._warnings: list[str] = []  # a machine without a usable GPU is one of these
        self._quiet: list[str] = []  # while it is not empty, nothing TensorRT says is shown
        self._logger = _make_logger(self.trt, self.messages, self._warnings, self._quiet)

    # --- what exists ------------------------------------------------------------------------------------

    @property
    def chooses_types(self) -> bool:
        """True if networks are weakly typed: TensorRT picks each layer's type unless it is pinned (8.6)."""
        return not self._has_strong_flag and hasattr(self.trt.BuilderFlag, "FP16")

    @property
    def has_kv_cache_update(self) -> bool:
        """True if the operators of the exporter ``native`` exist (10.15 and later)."""
        network = self.trt.INetworkDefinition
        return hasattr(network, "add_attention") and hasattr(network, "add_kv_cache_update")

    @property
    def _has_strong_flag(self) -> bool:
        return hasattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    # --- building ---------------------------------------------------------------------------------------

    def create_builder(self) -> Any:
        return self.checked("Builder", lambda: self.trt.Builder(self._logger))

    def create_network(self, builder: Any) -> Any:
        """Return an empty network, strongly typed where that exists."""
        flags = 0
        for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED"):  # the first is implied from 10 on and gone in 11
            if hasattr(self.trt.NetworkDefinitionCreationFlag, name):
                flags |= 1 << int(getattr(self.trt.NetworkDefinitionCreationFlag, name))
        return self.checked("create_network", lambda: builder.create_network(flags))

    def parse(self, network: Any, model: Path) -> Any:
        """Fills ``network`` from an ONNX file, whose data file lies beside it. Raises TensorRTError.

        Returns the parser, which owns the weights: it must live until the plan is built.
        """
        parser = self.trt.OnnxParser(network, self._logger)
        if not parser.parse_from_file(str(model)):
            errors = "; ".join(str(parser.get_error(i)).strip() for i in range(parser.num_errors))
            raise TensorRTError(f"TensorRT {self.version} cannot parse {model.name}: {errors or self._logged()}.")
        return parser

    def create_config(self, builder: Any, workspace: int, level: int, half: bool, report: Callable[[str], None]) -> Any:
        """Return a configuration of ``builder``. ``workspace``: bytes a layer may take while it runs. ``level``: how
        long tactics are searched, 0 to 5. ``half``: layers may be fp16 where TensorRT chooses types; strongly typed
        networks say so themselves.
        """
        trt, config = self.trt, builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.builder_optimization_level = level
        config.max_aux_streams = 0  # one stream is captured, and layers side by side would need scratch each
        if hasattr(trt, "PreviewFeature") and hasattr(trt.PreviewFeature, "FASTER_DYNAMIC_SHAPES_0805"):
            # On by default in 8.6: the whole decoder is handed to one fusing compiler, which then finds no
            # implementation for it. Off, it compiles the static parts, and the rest runs as layers.
            config.set_preview_feature(trt.PreviewFeature.FASTER_DYNAMIC_SHAPES_0805, False)
        if self.chooses_types and half:
            config.set_flag(trt.BuilderFlag.FP16)
            config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        if hasattr(trt, "IProgressMonitor") and hasattr(config, "progress_monitor"):
            config.progress_monitor = _make_progress_monitor(trt, report)
        return config

    def layers(self, network: Any) -> list[Any]:
        return [network.get_layer(i) for i in range(network.num_layers)]

    def pin_to_float32(self, network: Any, marker: str) -> int:
        """Have every layer whose name contains ``marker`` and that writes float32 also compute it; return their number.

        Only for networks whose types TensorRT chooses. Casts and constants have their type from the model; look-ups and
        reshapes take that of their neighbours: 8.6 makes constants they read fp16 and then refuses its own choice.
        """
        kinds, trt = self.trt.LayerType, self.trt
        typed = (kinds.CAST, kinds.IDENTITY, kinds.CONSTANT, kinds.SHAPE, kinds.GATHER, kinds.SHUFFLE)
        count = 0
        for layer in self.layers(network):
            outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
            if marker not in layer.name or layer.type in typed or any(t.dtype != trt.float32 for t in outputs):
                continue
            layer.precision = trt.float32
            for i in range(layer.num_outputs):
                layer.set_output_type(i, trt.float32)
            count += 1
        return count

    def fold_transposes(self, network: Any, suffix: str) -> int:
        """Turn GEMMs with a transposed second operand into GEMMs that read it as it lies; return how many.

        A shuffle whose name ends in ``suffix`` feeds each: it is left without a reader, and the builder drops it.
        """
        trt, producer = self.trt, {}
        for layer in self.layers(network):
            for i in range(layer.num_outputs):
                producer[layer.get_output(i).name] = layer
        count = 0
        for layer in self.layers(network):
            if layer.type != trt.LayerType.MATRIX_MULTIPLY:
                continue
            shuffle = producer.get(layer.get_input(1).name)
            if shuffle is None or shuffle.type != trt.LayerType.SHUFFLE or not shuffle.name.endswith(suffix):
                continue
            layer.__class__ = trt.IMatrixMultiplyLayer  # get_layer gives the base class; this is the documented cast
            layer.set_input(1, shuffle.get_input(0))
            layer.op1 = trt.MatrixOperation.TRANSPOSE
            count += 1
        return count

    def use_timing_cache(self, config: Any, data: bytes) -> Any:
        """Attaches a timing cache made of ``data``, or an empty one if it is of another GPU or version."""
        self._quiet.append("timing cache")  # 8.6 calls one that it wrote without a fused graph in it an error
        try:
            for content in (data, b"") if data else (b"",):
                cache = config.create_timing_cache(content)
                if cache is not None and config.set_timing_cache(cache, False):
                    return cache
        finally:
            self._quiet.clear()
        raise TensorRTError(f"TensorRT {self.version} refused an empty timing cache: {self._logged()}.")

    def build(self, builder: Any, network: Any, config: Any) -> memoryview:
        """Return the serialized plan. Raises TensorRTError or InsufficientMemoryError."""
        plan = self.checked(
            "build_serialized_network", lambda: builder.build_serialized_network(network, config), memory_matters=True
        )
        return memoryview(plan)

    # --- running ----------------------------------------------------------------------------------------

    def deserialize(self, plan: Any, *, host_code_allowed: bool = False) -> tuple[Any, Any]:
        """Return (runtime, engine); the runtime must live as long as the engine. ``plan``: a buffer.

        Raises EngineDirectoryError if TensorRT does not take the plan, InsufficientMemoryError if memory is short.
        """
        runtime = self.checked("Runtime", lambda: self.trt.Runtime(self._logger))
        # A plan made version-compatible carries host code, which would run with the node's rights.
        runtime.engine_host_code_allowed = host_code_allowed
        self.messages.clear()
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            if self._out_of_memory():
                raise InsufficientMemoryError(
                    f"The GPU has too little memory for the plan's weights ({self._logged()}); take a smaller variant."
                )
            raise EngineDirectoryError(
                f"TensorRT {self.version} does not take the plan ({self._logged()}); it is damaged, or was built by "
                "another version or for another GPU: build the engine again on this machine."
            )
        return runtime, engine

    def scratch_bytes(self, engine: Any) -> int:
        """Return the bytes a context needs while it runs, whatever its profile."""
        name = "device_memory_size_v2" if hasattr(engine, "device_memory_size_v2") else "device_memory_size"
        return int(getattr(engine, name))

    def create_context(self, engine: Any, scratch: int, scratch_bytes: int) -> Any:
        """Return a context that works in ``scratch_bytes`` of the caller's device memory at ``scratch``, a multiple of
        512.

        Raises TensorRTError or InsufficientMemoryError.
        """
        if hasattr(engine, "create_execution_context_without_device_memory"):
            create = engine.create_execution_context_without_device_memory
        else:
            strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED

            def create() -> Any:
                return engine.create_execution_context(strategy)

        context = self.checked("create_execution_context", create, memory_matters=True)
        self.messages.clear()
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(scratch, scratch_bytes)
        else:
            context.device_memory = scratch
        if self.messages:  # there is no other sign of a refusal
            raise TensorRTError(f"TensorRT refused its scratch memory: {self._logged()}.")
        return context

    # --- errors -----------------------------------------------------------------------------------------

    def checked(self, call: str, make: Callable[[], Any], *, memory_matters: bool = False) -> Any:
        """Return the result of ``make()``, whose failure TensorRT shows as None, False or a TypeError of pybind11.

        Raises TensorRTError, or InsufficientMemoryError where ``memory_matters`` and the log says so.
        """
        self.messages.clear()
        try:
            result = make()
        except (TypeError, RuntimeError) as error:
            raise TensorRTError(f"TensorRT's {call} failed ({error}): {self._logged()}.") from error
        if result is None or result is False:
            if memory_matters and self._out_of_memory():
                raise InsufficientMemoryError(f"TensorRT's {call} ran out of GPU memory: {self._logged()}.")
            raise TensorRTError(f"TensorRT's {call} failed: {self._logged()}.")
        return result

    def _logged(self) -> str:
        return "; ".join(self.messages or self._warnings[-1:]) or "it logged nothing"

    def _out_of_memory(self) -> bool:
        text = " ".join(self.messages).lower()
        return "out of memory" in text or "outofmemory" in text


def _make_logger(trt: Any, messages: list[str], warnings: list[str], quiet: list[str]) -> Any:
    """Errors and warnings are kept in the two lists. Everything goes to this module's log, as debug if ``quiet``."""
    levels = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.DEBUG}

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            name = getattr(severity, "name", str(severity))
            kept = {"INTERNAL_ERROR": messages, "ERROR": messages, "WARNING": warnings}.get(name)
            if kept is not None:
                kept.append(msg.strip().rstrip("."))
                del kept[:-_MAX_MESSAGES]
            if name != "VERBOSE":
                level = logging.DEBUG if quiet else levels.get(name, logging.DEBUG)
                _log.log(level, "TensorRT: %s", msg)

    return Logger()


def _make_progress_monitor(trt: Any, report: Callable[[str], None]) -> Any:
    """Reports the outermost phases in tenths. TensorRT calls it from its own threads."""

    class ProgressMonitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._steps[phase_name] = num_steps
                report(f"TensorRT: {phase_name}")

        def step_complete(self, phase_name: str, step: int) -> bool:
            steps = self._steps.get(phase_name, 0)
            if steps and (step + 1) * 10 // steps > step * 10 // steps:
                report(f"TensorRT: {phase_name}: {100 * (step + 1) // steps} %")
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return ProgressMonitor()
