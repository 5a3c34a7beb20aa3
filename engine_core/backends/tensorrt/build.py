"""Builds an engine directory for the TensorRT backend: ONNX from the checkpoint, then a plan for this machine's GPU."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine_core.backends.cuda.build import write_weights
from engine_core.backends.cuda.layout import CudaSpec, matrix_shapes
from engine_core.backends.cuda.weights import WEIGHTS_NAME
from engine_core.backends.tensorrt.api import TensorRT
from engine_core.backends.tensorrt.capabilities import CAPABILITIES, gemm_refusal
from engine_core.backends.tensorrt.export import export_onnx
from engine_core.backends.tensorrt.exporter import FP32
from engine_core.backends.tensorrt.gemm_exporter import export_plan
from engine_core.backends.tensorrt.gemm_layout import GEMM_PLANS, plan_name, weight_shapes, with_chunk
from engine_core.backends.tensorrt.layout import (
    DECODE,
    DEFAULT_MAX_PREFILL,
    EXPORTERS,
    PLAN_NAME,
    PREFILL,
    Profile,
    TrtOptions,
    TrtSpec,
    profile_shapes,
    work_arrays,
)
from engine_core.backends.tensorrt.plain_exporter import TRANSPOSED
from engine_core.config import EngineConfig
from engine_core.cuda.driver import Device
from engine_core.errors import BuildError, InsufficientMemoryError, UnsupportedModelError
from engine_core.formats import companions
from engine_core.formats.atomic import replaced_file, scratch_directory
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.manifest import Manifest, read_options, seal, write_variant
from engine_core.formats.onnx_writer import DATA_NAME
from engine_core.formats.weights import Weights
from engine_core.memory import format_bytes
from engine_core.models.reader import check_tensors, read_spec
from engine_core.models.spec import ModelSpec
from engine_core.progress import Progress, portion, untold

_log = logging.getLogger(__name__)

_WRITING = 0.3  # of the progress of a build: the weights; the rest is TensorRT's, which does not tell
# Bytes a layer may take while it runs. More than this buys no faster tactic for GEMMs of these sizes, and every
# byte of it is one less for the KV cache.
_WORKSPACE = 1 << 30
_MIN_WORKSPACE = 64 << 20
_RESERVE = 512 << 20  # for CUDA's own needs and the tactics' inputs while they are timed


def build_tensorrt(
    checkpoint_dir: Path,
    engine_dir: Path,
    *,
    quantization: str = "fp16",
    max_context: int = 0,
    max_prefill: int = 0,
    exporter: str = "auto",
    vocab_map: Path | None = None,
    kv_cache_type: str = "auto",
    model_name: str = "",
    level: int = 3,
    report: Callable[[str], None] = _log.info,
    progress: Progress = untold,
    api: TensorRT | None = None,
) -> Manifest:
    """Writes the variant ``engine_dir`` for this machine's GPU and TensorRT.

    ``quantization``: fp16 or fp32. ``max_context``: tokens, a multiple of 64; 0 = the model's, at most 4096.
    ``max_prefill``: tokens of a prefill step, 0 = 512. ``exporter``: gemm (fp16) leaves all but the layers' GEMMs to
    the CUDA backend's kernels and takes the models these run; plain takes every model and puts all of it into one plan;
    native does the same and needs TensorRT 10.15; auto is gemm where that can be, else plain. ``kv_cache_type``: what
    the engine opens with unless told otherwise, auto = the type of the weights; int8 needs the exporter gemm.
    ``level``: how long tactics are searched, 0 to 5. The timing cache is kept beside ``engine_dir``.

    Raises CheckpointError, UnsupportedModelError, BuildError, BackendUnavailableError, InsufficientMemoryError or
    TensorRTError; then ``engine_dir`` is as it was before.
    """
    checkpoint = Checkpoint(checkpoint_dir)
    spec = read_spec(checkpoint)
    check_tensors(spec, checkpoint)
    CAPABILITIES.check_build(spec, quantization, kv_cache_type, max_context=max_context)
    max_context = max_context or CAPABILITIES.default_context(spec)
    max_prefill = min(max_prefill or DEFAULT_MAX_PREFILL, max_context)
    exporter = choose_exporter(spec, max_context, quantization, exporter)
    if exporter != "gemm" and kv_cache_type not in ("auto", quantization):
        raise BuildError(f"The exporter {exporter} has a KV cache of the weights' type, {quantization}; choose gemm.")
    api = api or TensorRT()
    if exporter == "native" and not api.has_kv_cache_update:
        raise BuildError(
            f"TensorRT {api.version} lacks the operators of the exporter native (10.15 has them); choose plain."
        )
    companions.check_companions(checkpoint, spec.vocab_size)
    vocab_map = companions.find_vocab_map(checkpoint, vocab_map)
    kept = companions.kept_ids(vocab_map, checkpoint, spec)
    device = Device()
    try:
        manifest = Manifest(
            model_name=model_name or companions.model_name(checkpoint),
            model=spec,
            backend="tensorrt",
            quantization=quantization,
            kv_cache_type=quantization if kv_cache_type == "auto" else kv_cache_type,
            max_context=max_context,
            max_batch=1,
            eos_token_ids=companions.eos_token_ids(checkpoint),
            reduced_vocab_size=0 if kept is None else len(kept),
            use_cuda_graph=True,
            gpu_arch=device.arch,
            builder={**companions.versions(), "tensorrt": api.version},
            notes=companions.notes(CAPABILITIES, spec, max_context),
            options=asdict(TrtOptions(quantization, exporter, max_prefill)),
        )
        with write_variant(Path(engine_dir)) as directory:
            companions.copy_companions(checkpoint, directory)
            companions.copy_vocab_map(vocab_map, kept, directory)
            tools = _Tools(api, device, timing_cache_path(Path(engine_dir), api, device), level, report)
            manifest.options["scratch_bytes"] = _write_plans(
                tools, manifest, checkpoint, kept, directory, portion(progress, 0.0, _WRITING)
            )
            manifest = seal(directory, manifest)
        progress(1.0)
        return manifest
    finally:
        device.close()


def choose_exporter(spec: ModelSpec, max_context: int, quantization: str, exporter: str) -> str:
    """Return the exporter, with auto resolved.

    Raises BuildError or UnsupportedModelError where ``gemm`` is asked for and does not take the model.
    """
    if exporter not in ("auto", *EXPORTERS):
        raise BuildError(f"There is no exporter {exporter!r}; it is one of auto, {', '.join(EXPORTERS)}.")
    if exporter in ("plain", "native"):
        return exporter
    reason = gemm_refusal(spec, quantization, max_context)
    if reason is None:
        return "gemm"
    if exporter == "auto":
        return "plain"
    raise BuildError(reason) if quantization != "fp16" else UnsupportedModelError(reason)


def timing_cache_path(engine_dir: Path, api: TensorRT, device: Device) -> Path:
    """Return the path of the timing cache, beside the engine directory, where a rebuild finds it.

    There is one for each GPU and version.
    """
    return engine_dir.absolute().parent / f".tensorrt_{api.version}_{device.arch}.timing_cache"


def workspace_limit(free: int, weight_bytes: int, kv_bytes: int) -> int:
    """Return the bytes a layer may take: what is left of ``free`` beside weights (twice, while the plan is made) and KV
    cache.

    Raises InsufficientMemoryError with the numbers.
    """
    left = free - 2 * weight_bytes - kv_bytes - _RESERVE
    if left < _MIN_WORKSPACE:
        raise InsufficientMemoryError(
            f"Building needs {format_bytes(2 * weight_bytes + kv_bytes + _RESERVE + _MIN_WORKSPACE)} of GPU memory "
            f"(weights twice, {format_bytes(weight_bytes)} each, KV cache {format_bytes(kv_bytes)}), but "
            f"{format_bytes(free)} are free; close other users of the GPU or lower max_context."
        )
    return min(left, _WORKSPACE)


@dataclass(frozen=True)
class _Tools:
    """The tools with which every plan of a variant is built."""

    api: TensorRT
    device: Device
    cache_path: Path
    level: int
    report: Callable[[str], None]


def _write_plans(
    tools: _Tools,
    manifest: Manifest,
    checkpoint: Checkpoint,
    kept: np.ndarray | None,
    directory: Path,
    progress: Progress,
) -> int:
    """Write the plans of the manifest's exporter, and the weights that are not in them; return their scratch, bytes.

    ``progress`` is told of the weights alone.
    """
    if read_options(manifest, TrtOptions).exporter != "gemm":
        return _write_plan(tools, manifest, Weights(checkpoint, manifest.model, kept), directory)
    path = directory / WEIGHTS_NAME
    write_weights(path, checkpoint, manifest.model, manifest, kept, paired=False, progress=progress)
    return _write_gemm_plans(tools, manifest, directory)


def _write_plan(tools: _Tools, manifest: Manifest, weights: Weights, directory: Path) -> int:
    """Write the one plan of a whole decoder into ``directory``; return the scratch that a context needs, bytes."""
    options, device = read_options(manifest, TrtOptions), tools.device
    spec = TrtSpec.create(manifest, EngineConfig(directory))
    # On the disk of the output: the ONNX model is as large as the plan.
    with scratch_directory(directory, "onnx") as temporary:
        tools.report(f"Exporting {weights.spec.architecture} as ONNX ({options.exporter}, {options.dtype})")
        model = export_onnx(temporary, weights, manifest.max_context, exporter=options.exporter, dtype=options.dtype)
        weight_bytes = (temporary / DATA_NAME).stat().st_size
        kv_bytes = work_arrays(spec, 0)["kv_cache"].nbytes
        workspace = workspace_limit(device.memory_info()[0], weight_bytes, kv_bytes)
        profiles = [profile_shapes(spec, profile) for profile in (PREFILL, DECODE)]
        plan = build_plan(tools, model, profiles, workspace, half=spec.dtype == "fp16", fold=not spec.native)
    return _save_plan(tools, plan, directory / PLAN_NAME)


def _write_gemm_plans(tools: _Tools, manifest: Manifest, directory: Path) -> int:
    """Write the plans of a layer's GEMMs; return the largest scratch size, in bytes, that a context needs."""
    config = EngineConfig(directory)
    spec = with_chunk(CudaSpec.create(manifest, config), manifest, config)
    # The builder makes weights of its own to time a GEMM, and what runs is not there yet.
    weight_bytes = max(2 * math.prod(shape) for shape in matrix_shapes(spec).values())
    workspace = workspace_limit(tools.device.memory_info()[0], weight_bytes, 0)
    scratch = []
    for name in GEMM_PLANS:
        with scratch_directory(directory, "onnx") as temporary:
            model = export_plan(temporary, name, spec)
            width = next(iter(weight_shapes(spec)[name].values()))[1]
            sizes = ((1, spec.chunk, spec.chunk), (1, 1, 1))
            profiles: list[Profile] = [{"input": tuple((rows, width) for rows in three)} for three in sizes]
            plan = build_plan(tools, model, profiles, workspace, half=True)
        scratch.append(_save_plan(tools, plan, directory / plan_name(name)))
    return max(scratch)


def _save_plan(tools: _Tools, plan: memoryview, path: Path) -> int:
    """Write ``plan``; return the scratch that a context of it needs, bytes."""
    path.write_bytes(plan)
    # Loaded once, so that a plan that does not load is never written, and for the memory plan of ``load``.
    runtime, engine = tools.api.deserialize(plan)
    scratch = tools.api.scratch_bytes(engine)
    del engine, runtime
    tools.report(f"Built {path.name}: {format_bytes(plan.nbytes)}, scratch {format_bytes(scratch)}")
    return scratch


def build_plan(
    tools: _Tools,
    model: Path,
    profiles: Sequence[Profile],
    workspace: int,
    *,
    half: bool,
    fold: bool = False,
) -> memoryview:
    """Return the serialized plan of an exported model. Raises TensorRTError or InsufficientMemoryError.

    ``workspace``: bytes a layer may take. ``half``: layers
    may be 16-bit where TensorRT chooses types. ``fold``: GEMMs read operands as they lie that the model transposes.
    """
    api = tools.api
    tools.report(
        f"Building for {tools.device.name} with TensorRT {api.version}, {format_bytes(workspace)} of workspace"
    )
    builder = api.create_builder()
    network = api.create_network(builder)
    parser = api.parse(network, model)
    if fold:
        api.fold_transposes(network, TRANSPOSED)
    if api.chooses_types and half:
        api.pin_to_float32(network, FP32)
    config = api.create_config(builder, workspace, tools.level, half, tools.report)
    for shapes in profiles:
        _add_profile(builder, config, shapes)
    cache_path = tools.cache_path
    cache = api.use_timing_cache(config, cache_path.read_bytes() if cache_path.is_file() else b"")
    plan = api.build(builder, network, config)
    del parser  # the owner of the weights, needed until here
    with contextlib.suppress(OSError), replaced_file(cache_path) as path:  # a cache that is not kept costs time only
        path.write_bytes(memoryview(cache.serialize()))
    return plan


def _add_profile(builder: Any, config: Any, shapes: Profile) -> None:
    profile = builder.create_optimization_profile()
    for name, (least, typical, largest) in shapes.items():
        profile.set_shape(name, least, typical, largest)
    index = config.add_optimization_profile(profile)
    assert index >= 0, shapes
