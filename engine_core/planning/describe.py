"""What a checkpoint is and which backends can be built from it, for ``edgellm inspect``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from engine_core.backends.cuda.build import check_supported
from engine_core.cuda.kernels import int4_layout
from engine_core.errors import CheckpointError, EdgeLLMError, UnsupportedModelError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.safetensors_file import SafetensorsFile
from engine_core.models.rope import RopeSpec
from engine_core.models.shapes import ConfigCheckpoint, read_shapes, stored_bytes
from engine_core.models.spec import ModelSpec, check_tensors, read_spec
from engine_core.planning.estimates import CheckpointEstimate, Size, cpu_variants


def describe_checkpoint(directory: Path) -> dict:
    """JSON-safe: sizes, types, ``supported``, ``backends`` (name → quantizations), ``why_not`` (what → reason).

    Raises CheckpointError if config.json or a safetensors file cannot be read.
    """
    source = ConfigCheckpoint(directory)
    config = source.config
    found: dict = {
        "architecture": _architecture(config),
        "supported": False,
        "quantization": _stored_quantization(source.stored_quantization),
        "weights_bytes": stored_bytes(directory),
        "dtype": _dtypes(directory) or str(config.get("dtype") or config.get("torch_dtype") or ""),
    }
    why_not: dict[str, str] = {}
    backends: dict[str, list[str]] = {}
    try:
        _, spec, num_parameters = read_shapes(directory)
        found |= _sizes(spec, num_parameters, config)
        if found["weights_bytes"]:  # what the builders do first
            checkpoint = Checkpoint(directory)
            check_tensors(read_spec(checkpoint), checkpoint)
        found["supported"] = True
        backends, why_not = _backends(directory, spec)
    except (UnsupportedModelError, CheckpointError) as error:
        why_not["checkpoint"] = str(error)
    if not found["weights_bytes"]:
        why_not["weights"] = "there are no safetensors here, so that it can be planned, not built"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).is_file():
            why_not[name] = "missing; without it an engine cannot read text"
    return found | {"backends": backends, "why_not": why_not}


def _architecture(config: dict) -> str:
    names = config.get("architectures")
    return str(names[0] if isinstance(names, list) and names else config.get("model_type", "unknown"))


def _sizes(spec: ModelSpec, num_parameters: int, config: dict) -> dict:
    windows = sorted({layer.window for layer in spec.layers if layer.window})
    return {
        "parameters": num_parameters,
        "num_layers": len(spec.layers),
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position": spec.max_position,
        "tied_head": spec.tied,
        "rope": ", ".join(_rope(rope) for rope in spec.ropes),
        "sliding_window": windows[0] if windows else "",
    }


def _rope(rope: RopeSpec) -> str:
    return f"{rope.kind}, theta {rope.theta:g}"


def _backends(directory: Path, spec: ModelSpec) -> tuple[dict[str, list[str]], dict[str, str]]:
    """(backend → what can be built for it, backend → why not)."""
    backends: dict[str, list[str]] = {"onnxruntime": [], "cuda": []}
    why_not = {}
    context = min(spec.default_position, 4096)
    estimate = CheckpointEstimate(directory)
    try:
        estimate.plan_items("fp32", "onnxruntime", Size(context))
        backends["onnxruntime"] = list(cpu_variants())
    except EdgeLLMError as error:
        why_not["onnxruntime"] = str(error)
    except ImportError as error:
        why_not["onnxruntime"] = f"building for the CPU needs the Python package {error.name!r}: pip install it"
    try:
        check_supported(spec, context)
        backends["cuda"] = ["fp16"]
        for quantization in ("int8", "int4"):
            reason = estimate.why_not_packed(spec.vocab_size, quantization)
            if reason:
                why_not[f"cuda {quantization}"] = f"{reason} (groups of {int4_layout.GROUP})"
            else:
                backends["cuda"].append(quantization)
    except UnsupportedModelError as error:
        why_not["cuda"] = str(error)
    return backends, why_not


def _stored_quantization(values: dict | None) -> str:
    """Such as ``awq, 4 bits, groups of 128``."""
    if not values:
        return "none"
    parts = [str(values.get("quant_method") or values.get("quant_algo") or "unknown method")]
    bits = values.get("bits") or values.get("w_bit")
    group = values.get("group_size") or values.get("q_group_size")
    parts += [f"{bits} bits"] if bits else []
    parts += [f"groups of {group}"] if group else []
    return ", ".join(parts)


def _dtypes(directory: Path) -> str:
    """Types of the stored tensors, the most frequent first; empty without weights."""
    counts: Counter[str] = Counter()
    for path in sorted(Path(directory).glob("*.safetensors")):
        file = SafetensorsFile(path)
        counts.update(file.dtype(name) for name in file.names())
    return ", ".join(dtype for dtype, _ in counts.most_common())
