"""TensorRT engines of the exporter ``gemm``: TensorRT's GEMMs between the CUDA backend's kernels.

A step is one CUDA graph, as on the cuda backend: for every layer norm, the QKV GEMM, attention (with RoPE and the
append to the KV cache), the output GEMM, norm, MLP; then head and sampling. The weights lie in our own memory and are
inputs of the plans, so one plan runs all layers: its context is bound anew before each run, and a graph keeps what it
captured.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.layout import ArraySpec, CudaSpec
from engine_core.backends.gpu_backend import plan_here
from engine_core.backends.gpu_model import DeviceModel, WeightSource, Work
from engine_core.backends.tensorrt.api import TensorRT
from engine_core.backends.tensorrt.engine import TrtContext, TrtEngine, TrtRun
from engine_core.backends.tensorrt.gemm_layout import (
    GEMM_PLANS,
    gemm_work_arrays,
    plan_name,
    weight_shapes,
)
from engine_core.backends.tensorrt.layout import DECODE, PREFILL, TrtOptions
from engine_core.backends.tensorrt.machine import check_machine
from engine_core.backends.tensorrt.plan import engine_bytes_on, resolve_gemm
from engine_core.config import EngineConfig
from engine_core.cuda.driver import Arena, Device, DeviceArray, Launch, Stream
from engine_core.cuda.kernels import Kernels, linear
from engine_core.cuda.kernels.attention import AttentionPrefill
from engine_core.errors import EngineDirectoryError
from engine_core.formats.manifest import Manifest, read_options
from engine_core.memory import MemoryPlan
from engine_core.progress import Progress, untold


class GemmBackend(CudaBackend):
    """See ``engine_core.backends.Backend``."""

    name = "tensorrt"

    @classmethod
    def plan(cls, variant_dir: Path, manifest: Manifest, config: EngineConfig) -> MemoryPlan:
        return plan_here(lambda device: engine_bytes_on(variant_dir, manifest, config, device))

    @classmethod
    def load(
        cls,
        variant_dir: Path,
        manifest: Manifest,
        config: EngineConfig,
        api: TensorRT | None = None,
        *,
        progress: Progress = untold,
    ) -> GemmBackend:
        """See ``Backend.load``. ``api``: a stand-in for tests."""
        resolved, api = resolve_gemm(variant_dir, manifest, config), api or TensorRT()
        plans = Plans(api, variant_dir, read_options(manifest, TrtOptions).scratch_bytes)
        check = partial(check_machine, manifest, api)
        return cls._load(variant_dir, resolved, config, check, progress=progress, plans=plans)

    def __init__(
        self, device: Device, spec: CudaSpec, source: WeightSource, rope: np.ndarray, *, plans: Plans, **kwargs: Any
    ) -> None:
        """See ``CudaBackend``."""
        self._plans = plans
        super().__init__(device, spec, source, rope, **kwargs)

    def _work_arrays(self) -> dict[str, ArraySpec]:
        return gemm_work_arrays(self._spec, self._device.num_sms, self._plans.scratch_bytes)

    def _make_model(self, arena: Arena, kernels: Kernels) -> DeviceModel:
        return GemmModel(self._device, self._stream, arena, kernels, self._spec, self._work_arrays(), self._plans)


@dataclass(frozen=True)
class Plans:
    """The plans of a variant: their folder, and the scratch that they need."""

    api: TensorRT
    variant_dir: Path
    scratch_bytes: int


@dataclass
class _Layer:
    """The launches of one layer's prefill."""

    input_norm: Launch
    qkv: Work
    rope_append: Launch
    attend: AttentionPrefill
    output: Work
    post_norm: Launch
    mlp: Work


class GemmModel(DeviceModel[_Layer]):
    """See the module. A plan's output is added to ``hidden`` by the norm that follows it."""

    captures_prefill = False  # a graph would hold only until a context gets other shapes
    _kept = ("hidden", "delta")

    def __init__(
        self,
        device: Device,
        stream: Stream,
        arena: Arena,
        kernels: Kernels,
        spec: CudaSpec,
        work: dict[str, ArraySpec],
        plans: Plans,
    ) -> None:
        """Raises EngineDirectoryError, InsufficientMemoryError or TensorRTError; then nothing is left behind."""
        super().__init__(device, stream, arena, kernels, spec, work)
        self._prefill: dict[str, TrtContext] = {}
        self._decode: dict[str, TrtContext] = {}
        with contextlib.ExitStack() as undo:
            for name in GEMM_PLANS:
                self._open(undo, plans, name)
            self._resources = undo.pop_all()

    def _open(self, undo: contextlib.ExitStack, plans: Plans, name: str) -> None:
        """Load the plan ``name`` and make its two contexts, which read and write the same arrays."""
        engine = TrtEngine(plans.api, plans.variant_dir / plan_name(name))
        undo.callback(engine.close)
        engine.check_tensors({"input", *weight_shapes(self.spec)[name], "output"})
        if engine.scratch_bytes > plans.scratch_bytes:
            raise EngineDirectoryError(
                f"{plan_name(name)} needs {engine.scratch_bytes} bytes of scratch, but the manifest says "
                f"{plans.scratch_bytes}; build the engine again."
            )
        source, target = _ARRAYS[name]
        for contexts, profile, rows in ((self._prefill, PREFILL, self.spec.chunk), (self._decode, DECODE, 1)):
            context = engine.context(profile, self.work["engine"], self._stream)
            undo.callback(context.close)
            context.bind({"input": self.work[source], "output": self.work[target]})
            context.set_shapes({"input": (rows, self.work[source].shape[1])})
            contexts[name] = context

    def _run(self, contexts: dict[str, TrtContext], name: str, i: int) -> Work:
        """Return a run of the plan ``name`` with layer ``i``'s weights."""
        weights = {weight: self.weights[f"layers.{i}.{weight}"] for weight in weight_shapes(self.spec)[name]}
        return TrtRun(contexts[name], weights)

    def _norm(self, i: int, which: str, rows: int, add: bool) -> Launch:
        """Add the last plan's output to the first ``rows`` of ``hidden``, and write their norm into ``normed``."""
        hidden, normed, delta = (self._rows(name, rows) for name in ("hidden", "normed", "delta"))
        weight = self.weights["norm" if which == "norm" else f"layers.{i}.{which}"]
        spec, arrays = self.spec, (hidden, weight, normed)
        return linear.rms_norm(
            self._kernels, *arrays, spec.norm_eps, delta if add else None, norm_size=spec.model.hidden_size
        )

    def _rows(self, name: str, rows: int) -> DeviceArray:
        array = self.work[name]
        return DeviceArray(array.address, (rows, *array.shape[1:]), array.dtype)

    # --- decode ---------------------------------------------------------------------------------------

    def _decode_layer(self, i: int) -> list[Work]:
        return [
            self._norm(i, "input_norm", 1, add=i > 0),
            self._run(self._decode, "qkv", i),
            self._attend_one(i),
            self._run(self._decode, "o", i),
            self._norm(i, "post_norm", 1, add=True),
            self._run(self._decode, "mlp", i),
        ]

    def _head(self) -> list[Work]:
        # The head's kernel norms for itself; here the last layer's output is added.
        return [self._norm(0, "norm", 1, add=True), *super()._head()]

    # --- prefill --------------------------------------------------------------------------------------

    def _prefill_layer(self, i: int) -> _Layer:
        rows = self.spec.chunk
        return _Layer(
            input_norm=self._norm(i, "input_norm", rows, add=i > 0),
            qkv=self._run(self._prefill, "qkv", i),
            rope_append=self._rope_append(i),
            attend=self._attend(i),
            output=self._run(self._prefill, "o", i),
            post_norm=self._norm(i, "post_norm", rows, add=True),
            mlp=self._run(self._prefill, "mlp", i),
        )

    def _begin_chunk(self, rows: int) -> None:
        for name, context in self._prefill.items():
            context.set_shapes({"input": (rows, self.work[_ARRAYS[name][0]].shape[1])})

    def _run_layer(self, layer: _Layer, rows: int) -> None:
        stream = self._stream
        layer.input_norm.set_grid(rows)
        layer.input_norm(stream)
        layer.qkv(stream)
        self._run_attention(layer.rope_append, layer.attend, rows)
        layer.output(stream)
        layer.post_norm.set_grid(rows)
        layer.post_norm(stream)
        layer.mlp(stream)

    def close(self) -> None:
        self._resources.close()


# Plan → what it reads and what it writes.
_ARRAYS = {"qkv": ("normed", "qkv"), "o": ("attended", "delta"), "mlp": ("normed", "delta")}
