"""Describe a checkpoint and the backends that can be built from it, for ``edgellm inspect``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from engine_core.backends.capabilities import Capabilities, all_capabilities
from engine_core.errors import CheckpointError, EngineDirectoryError, UnsupportedModelError
from engine_core.formats.checkpoint import Checkpoint, stored_bytes
from engine_core.formats.detect import conversion_refusal, quantization_of
from engine_core.formats.gguf_file import is_gguf
from engine_core.formats.safetensors_file import SafetensorsFile
from engine_core.models.reader import check_tensors, read_spec
from engine_core.models.rope import RopeSpec
from engine_core.models.shapes import ConfigCheckpoint, read_shapes
from engine_core.models.spec import ModelSpec


def describe_checkpoint(path: Path) -> dict:
    """JSON-safe: sizes, types, ``supported``, ``backends`` (name → quantizations that can be built and run),
    ``kv_cache_types`` (name → quantization → types), ``why_not`` (what → reason), and what ``answer_format`` gives.

    Raises CheckpointError if config.json, a safetensors file or a GGUF file cannot be read.
    """
    source = ConfigCheckpoint.of(path)
    config = source.config
    num_bytes, dtypes = _stored(path)
    found: dict = {
        "architecture": _architecture(config),
        "supported": False,
        "quantization": _stored_quantization(source.stored_quantization),
        "weights_bytes": num_bytes,
        "dtype": dtypes or str(config.get("dtype") or config.get("torch_dtype") or ""),
    }
    why_not: dict[str, str] = {}
    backends: dict[str, list[str]] = {}
    kv_cache_types: dict[str, dict[str, list[str]]] = {}
    try:
        _, spec = read_shapes(path)
        found |= sizes(spec)
        stored = None if source.stored_quantization else ""  # None: its weights would have to be looked at
        if num_bytes:  # what the builders do first
            checkpoint = Checkpoint(path)
            check_tensors(read_spec(checkpoint), checkpoint)
            stored = quantization_of(checkpoint, spec)
        found["supported"] = True
        for each in all_capabilities():
            refused = _refusals(each, spec, stored)
            runs = [kind for kind in each.planned_formats if kind not in refused]
            backends[each.backend] = runs
            kv_cache_types[each.backend] = {kind: list(each.kv_cache_types_for(spec, kind)) for kind in runs}
            if (reason := each.model_refusal(spec)) is not None:
                why_not[each.backend] = reason
            else:
                why_not |= {f"{each.backend} {kind}": reason for kind, reason in refused.items()}
    except (UnsupportedModelError, CheckpointError) as error:
        why_not["checkpoint"] = str(error)
    if not num_bytes:
        why_not["weights"] = "there are no safetensors here, so that it can be planned, not built"
    answers, lacks = _texts(path)
    return found | answers | {
        "backends": backends,
        "kv_cache_types": kv_cache_types,
        "why_not": why_not | lacks,
    }  # fmt: skip


def answer_format(directory: Path) -> dict[str, str | bool]:
    """JSON-safe: ``tool_format`` ("" = requests cannot have tools) and ``thinks``, as ~/get_info has them; empty if
    ``directory`` has no tokenizer that can be read."""
    from engine_core.text.tokenizer import Tokenizer

    try:
        found = Tokenizer(directory).answer_format
    except EngineDirectoryError:
        return {}
    return {"tool_format": found.tools, "thinks": found.thinks}


def _texts(path: Path) -> tuple[dict[str, str | bool], dict[str, str]]:
    """Return the format of answers, and what the tokenizer lacks (what → reason)."""
    directory = path
    if is_gguf(path):
        try:
            checkpoint = Checkpoint(path)  # kept: its directory is gone with it
            directory = checkpoint.directory
        except (UnsupportedModelError, CheckpointError) as error:
            return {}, {"tokenizer": str(error)}
    names = ("tokenizer.json", "tokenizer_config.json")
    missing = [name for name in names if not (directory / name).is_file()]
    lacks = {name: "missing; without it an engine cannot read text" for name in missing}
    return ({} if missing else answer_format(directory)), lacks


def _architecture(config: dict) -> str:
    names = config.get("architectures")
    return str(names[0] if isinstance(names, list) and names else config.get("model_type", "unknown"))


def sizes(spec: ModelSpec) -> dict:
    """Return the sizes of a model, JSON-safe."""
    windows = sorted({layer.window for layer in spec.layers if layer.window})
    return {
        "parameters": spec.num_parameters,
        "num_layers": len(spec.layers),
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "experts": f"{spec.num_experts}, {spec.experts_per_token} for a token" if spec.num_experts else "",
        "short_convolutions": _convolutions(spec),
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position": spec.max_position,
        "tied_head": spec.tied,
        "rope": ", ".join(_rope(rope) for rope in spec.ropes),
        "sliding_window": windows[0] if windows else "",
        "sees": "" if spec.vision is None else f"{spec.vision.kind}, up to {spec.vision.most_tokens} tokens an image",
    }


def _convolutions(spec: ModelSpec) -> str:
    kernels = [layer.conv_kernel for layer in spec.layers if layer.conv_kernel]
    return f"in {len(kernels)} layers, of {max(kernels)} tokens" if kernels else ""


def _rope(rope: RopeSpec) -> str:
    return f"{rope.kind}, theta {rope.theta:g}"


def _refusals(capabilities: Capabilities, spec: ModelSpec, stored: str | None) -> dict[str, str]:
    """Return weight format → why it is not built from this checkpoint or does not run. ``stored``: see
    ``formats.detect.quantization_of``; None = unknown."""
    found = {}
    for kind in capabilities.planned_formats:
        reason = capabilities.refusal(spec, kind)
        if reason is None and stored is not None:
            reason = conversion_refusal(kind, stored)
        if reason is not None:
            found[kind] = reason
    return found


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


def _stored(path: Path) -> tuple[int, str]:
    """Return the bytes of the files with weights, and the types of the tensors, the most frequent first."""
    counts: Counter[str] = Counter()
    if is_gguf(path):
        checkpoint = Checkpoint(path)
        num_bytes = checkpoint.num_bytes
        counts.update(checkpoint.dtypes())
    else:
        num_bytes = stored_bytes(path)
        for name in sorted(Path(path).glob("*.safetensors")):
            file = SafetensorsFile(name)
            counts.update(file.dtype(tensor) for tensor in file.names())
    return num_bytes, ", ".join(dtype for dtype, _ in counts.most_common())
