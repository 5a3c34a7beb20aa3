"""What an engine that is built from a checkpoint would take, variant by variant, before it is built.

Nothing is computed here that a backend computes itself: an estimate writes the manifest the builder would write and
hands it to the backend's own plan. Only what no backend of this version runs is estimated from the number format
(``FORMATS``), and says so.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from engine_core.backends import backend_names
from engine_core.backends.cuda.layout import CudaSpec, planned_bytes
from engine_core.backends.onnxruntime.files import DATA_NAME, KV_CACHE_TYPES, graph_name
from engine_core.backends.onnxruntime.plan import plan_memory, resolve
from engine_core.config import EngineConfig
from engine_core.cuda.kernels import int4_layout
from engine_core.errors import ConfigurationError, EdgeLLMError, UnsupportedModelError
from engine_core.formats.manifest import FileRecord, Manifest
from engine_core.memory import MemoryPlan, kv_cache_bytes
from engine_core.models.shapes import read_shapes
from engine_core.models.spec import ModelSpec
from engine_core.planning.devices import DeviceProfile

if TYPE_CHECKING:
    from engine_core.backends.onnxruntime.exporter import Packing

_GPU_KINDS = ("fp16", "fp8", "int8", "int4", "int4_awq", "nvfp4")  # the columns of a GPU's plan, in order
_CPU_VARIANTS = ("fp32", "int8", "int4", "int4_awq")  # those that the runtime computes with as they are stored
_AWQ_GROUP = 128
_GPU_KV_TYPES = ("fp16", "int8", "fp8")
KV_TYPES = {"onnxruntime": ("fp32", "fp16", "int8"), "cuda": _GPU_KV_TYPES, "tensorrt": _GPU_KV_TYPES}
# A graph for each KV type: what a builder writes for those its backend has.
_GRAPHS = tuple(map(graph_name, KV_CACHE_TYPES))


@dataclass(frozen=True)
class NumberFormat:
    """How the matrices of the layers are stored; embedding, LM head and norms stay 16-bit."""

    bits: int
    group: int  # weights of a row that share a scale; 0 = the whole row
    scale_bytes: int

    def matrix_bytes(self, rows: int, columns: int) -> int:
        groups = -(-columns // self.group) if self.group else 1
        return rows * (-(-columns * self.bits // 8) + groups * self.scale_bytes)


FORMATS = {
    "fp16": NumberFormat(16, 0, 0),
    "fp8": NumberFormat(8, 0, 2),
    "int8": NumberFormat(8, 0, 2),
    "int4_awq": NumberFormat(4, 128, 2),
    "nvfp4": NumberFormat(4, 16, 1),
}


@dataclass(frozen=True)
class Size:
    """What is asked of an engine."""

    max_context: int
    max_batch: int = 1
    kv_cache_type: str = ""
    head_rows: int = 0  # of a reduced LM head; 0 = the whole vocabulary


class CheckpointEstimate:
    """The plans of one checkpoint. Raises CheckpointError or UnsupportedModelError where it cannot be read."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.checkpoint, self.spec, self.num_parameters = read_shapes(self.directory)
        self._counted_data = lru_cache(maxsize=None)(self._count_data)

    @property
    def name(self) -> str:
        name = str(self.checkpoint.config.get("_name_or_path") or "")
        return Path(name).name or self.directory.resolve().name

    def variants(self, backend: str) -> tuple[tuple[str, str], ...]:
        """(quantization, backend) of every column for ``backend``; gpu means those of all GPU backends."""
        if backend == "onnxruntime":
            return tuple((quantization, backend) for quantization in cpu_variants())
        own = (("fp16", "tensorrt"),) if backend == "tensorrt" else ()  # of all GPU backends, cuda has the fp16 column
        return own + tuple(pair for pair in gpu_variants() if backend in ("gpu", pair[1]))

    def plan(self, quantization: str, backend: str, size: Size, device: DeviceProfile) -> MemoryPlan:
        """Every byte by purpose, against what is free on ``device``. Raises UnsupportedModelError."""
        found = self.plan_items(quantization, backend, size, device.num_sms)
        return MemoryPlan.of(found, device.free, device.title)

    def plan_items(self, quantization: str, backend: str, size: Size, num_sms: int = 0) -> dict[str, int]:
        """Bytes by purpose. Raises UnsupportedModelError."""
        items = self._cpu_items if backend == "onnxruntime" else self._gpu_items
        return items(quantization, backend, size, num_sms)

    def why_not(self, quantization: str, backend: str, size: Size, device: DeviceProfile) -> str:
        """Empty if a backend of this version runs it on ``device``, else the first reason against it."""
        checks: tuple[Callable[[], str], ...] = (
            lambda: device.why_not(quantization) if backend != "onnxruntime" else "",
            lambda: device.why_not(size.kv_cache_type) if backend != "onnxruntime" else "",
            lambda: why_no_builder(quantization, backend),
            lambda: self._why_not_built(quantization, backend, size),
            lambda: self._why_not_configured(quantization, backend, size),
        )
        return next((reason for check in checks if (reason := check())), "")

    # --- reasons --------------------------------------------------------------------------------------

    def _why_not_built(self, quantization: str, backend: str, size: Size) -> str:
        spec = self.spec
        if size.max_context > spec.max_position:
            return f"the model was made for at most {spec.max_position} tokens"
        if backend != "cuda":
            return ""
        from engine_core.backends.cuda.build import check_supported

        try:
            check_supported(spec, size.max_context)
        except UnsupportedModelError as error:
            return str(error)
        return self.why_not_packed(size.head_rows or spec.vocab_size, quantization)

    def why_not_packed(self, head_rows: int, quantization: str) -> str:
        """Empty if the cuda backend's records of int4 and int8 can hold every matrix, or are not needed."""
        spec = self.spec
        if not quantization.startswith("int"):
            return ""
        for rows, columns in (*_matrices(spec), (head_rows, spec.hidden_size)):
            if not int4_layout.fits(rows, columns):
                return (
                    f"a matrix is {rows} × {columns}, but {quantization} takes rows in multiples of {int4_layout.TILE} "
                    f"and columns in multiples of {int4_layout.GROUP}"
                )
        return ""

    def _why_not_configured(self, quantization: str, backend: str, size: Size) -> str:
        """What the backend says to such a configuration."""
        try:
            config = _config(size, batch=size.max_batch, kv=size.kv_cache_type)
            if backend == "onnxruntime":
                resolve(self.directory, self._cpu_manifest(quantization, size), config)
            elif backend == "cuda":
                CudaSpec.create(self._gpu_manifest(quantization, size), config)
        except EdgeLLMError as error:
            return str(error).rstrip(".")
        return ""

    # --- CPU ------------------------------------------------------------------------------------------

    def _cpu_items(self, quantization: str, backend: str, size: Size, num_sms: int) -> dict[str, int]:
        manifest = self._cpu_manifest(quantization, size)
        layout, kv = _resolved(lambda config: resolve(self.directory, manifest, config), size)
        layout = dataclasses.replace(layout, head_rows=size.head_rows or self.spec.vocab_size)
        items = {item.name: item.bytes for item in plan_memory(layout, manifest).items}
        return self._adjusted(items, size, kv or "fp32")

    def _cpu_manifest(self, quantization: str, size: Size) -> Manifest:
        from engine_core.backends.onnxruntime.build import engine_options, precision_of

        spec = self.spec
        precision = precision_of(quantization)
        rows = size.head_rows or spec.vocab_size
        data, packing = self._counted_data(quantization, size.max_context, rows)
        shares_head = spec.tied and rows == spec.vocab_size
        return self._manifest(
            "onnxruntime",
            quantization,
            size,
            group_size=precision.group_size,
            options=engine_options(spec, precision, packing, shares_head=shares_head),
            files={DATA_NAME: FileRecord(data, "")} | {name: FileRecord(0, "") for name in _GRAPHS},
        )

    def _count_data(self, quantization: str, max_context: int, head_rows: int) -> tuple[int, Packing]:
        from engine_core.backends.onnxruntime.build import precision_of
        from engine_core.backends.onnxruntime.size import count_data

        checkpoint = self.checkpoint
        if quantization == "int4_awq":  # its levels come with the checkpoint
            checkpoint = checkpoint.with_levels(4, _AWQ_GROUP)
        return count_data(checkpoint, self.spec, precision_of(quantization), max_context, head_rows)

    # --- GPU ------------------------------------------------------------------------------------------

    def _gpu_items(self, quantization: str, backend: str, size: Size, num_sms: int) -> dict[str, int]:
        stored = quantization if backend == "cuda" else "fp16"  # the scratch of 16-bit products
        manifest = self._gpu_manifest(stored, size)
        cuda, kv = _resolved(lambda config: CudaSpec.create(manifest, config), size)
        cuda = dataclasses.replace(cuda, head_rows=size.head_rows or self.spec.vocab_size)
        items = planned_bytes(cuda, num_sms or 1)
        if backend != "cuda":
            items["weights"] = format_bytes_of(self.spec, FORMATS[quantization], cuda.head_rows)
        return self._adjusted(items, size, kv or "fp16")

    def _gpu_manifest(self, quantization: str, size: Size) -> Manifest:
        from engine_core.backends.cuda.build import model_options

        group = int4_layout.GROUP if quantization.startswith("int") else 0
        options = model_options(self.spec, "fp16")
        manifest = self._manifest("cuda", quantization, size, group_size=group, options=options)
        return dataclasses.replace(manifest, kv_cache_type="fp16")  # the configuration names another

    # --- both -----------------------------------------------------------------------------------------

    def _manifest(self, backend: str, quantization: str, size: Size, **values) -> Manifest:
        return Manifest(
            model_name=self.name,
            geometry=self.spec.geometry(self.num_parameters),
            backend=backend,
            quantization=quantization,
            kv_cache_type=size.kv_cache_type or KV_TYPES[backend][0],
            max_context=size.max_context,
            max_batch=1,
            eos_token_ids=(),
            **values,
        )

    def _adjusted(self, items: dict[str, int], size: Size, planned_kv: str) -> dict[str, int]:
        """``items`` of one sequence and KV type ``planned_kv``, for what is asked: what the backend cannot do yet."""
        wanted = size.kv_cache_type or planned_kv
        geometry = dict(num_layers=len(self.spec.layers), num_kv_heads=self.spec.num_kv_heads)
        geometry |= dict(head_dim=self.spec.head_dim, max_context=size.max_context)
        before, after = (kv_cache_bytes(**geometry, kv_cache_type=kind) for kind in (planned_kv, wanted))
        result = dict(items)
        for name in ("kv_cache", "prefix_cache"):
            if name in result and wanted != planned_kv:
                result[name] = result[name] * after // before
        for name in ("kv_cache", "io"):
            result[name] *= size.max_batch
        return result


def why_no_builder(quantization: str, backend: str) -> str:
    """Empty if this version has the backend and builds the variant for it."""
    if backend not in backend_names():
        return f"the {backend} backend is not part of this version"
    if backend == "tensorrt":
        try:
            built = importlib.import_module("engine_core.backends.tensorrt.build").QUANTIZATIONS
        except ImportError as error:
            return f"building for tensorrt needs the Python package {error.name!r}"
        if quantization not in built:
            return f"this version builds {' and '.join(built)} for tensorrt, not {quantization}"
    return ""


def gpu_variants() -> tuple[tuple[str, str], ...]:
    """Return (quantization, backend) of every column: cuda if its builder makes it, else tensorrt, estimated."""
    from engine_core.backends.cuda.build import QUANTIZATIONS

    return tuple((kind, "cuda" if kind in QUANTIZATIONS else "tensorrt") for kind in _GPU_KINDS)


def cpu_variants() -> tuple[str, ...]:
    """What this version builds for the onnxruntime backend. Raises ImportError without onnx."""
    from engine_core.backends.onnxruntime.build import QUANTIZATIONS

    return tuple(kind for kind in _CPU_VARIANTS if kind in QUANTIZATIONS)


def format_bytes_of(spec: ModelSpec, number_format: NumberFormat, head_rows: int) -> int:
    """Bytes of the weights with the layers' matrices in ``number_format`` and the rest in 16 bits."""
    matrices = sum(number_format.matrix_bytes(rows, columns) for rows, columns in _matrices(spec)) * len(spec.layers)
    large = {spec.embedding, spec.head}
    small = sum(math.prod(shape) for name, shape in spec.shapes().items() if len(shape) == 1 and name not in large)
    whole = spec.tied and head_rows == spec.vocab_size
    rows = spec.vocab_size + (0 if whole else head_rows)
    return matrices + 2 * (small + rows * spec.hidden_size)


def _matrices(spec: ModelSpec) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of the matrices of a layer."""
    hidden = spec.hidden_size
    return (
        (spec.qkv_size, hidden),
        (hidden, spec.num_heads * spec.head_dim),
        (2 * spec.intermediate_size, hidden),
        (hidden, spec.intermediate_size),
    )


def _config(size: Size, *, batch: int = 1, kv: str = "") -> EngineConfig:
    return EngineConfig(engine_dir=Path("."), max_context=size.max_context, max_batch=batch, kv_cache_type=kv or "auto")


def _resolved(create: Callable, size: Size) -> tuple:
    """(what ``create`` makes of the configuration asked for, its KV type); one it has, "", where it refuses that."""
    try:
        return create(_config(size, kv=size.kv_cache_type)), size.kv_cache_type
    except ConfigurationError:
        return create(_config(size)), ""
