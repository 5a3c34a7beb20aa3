"""The weight format of a checkpoint, and what can be made of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.weight_formats import NAMES, weight_format
from engine_core.formats.weight_formats.base import WeightFormat
from engine_core.formats.weight_formats.integers import IntegerFormat
from engine_core.models.reader import read_spec
from engine_core.models.spec import ModelSpec

MARK = "edgellm_quantization"  # in config.json: the method, which the layout alone does not tell


def quantization_of(checkpoint: Checkpoint, spec: ModelSpec, *, ordered: bool = False) -> str:
    """Return the format of the checkpoint's linears; "" if they are plain or of several formats.

    ``ordered``: whether that is the format of groups whose columns are not consecutive, too (GPTQ's desc_act).
    'edgellm quantize' marks what it wrote. Others calibrate (AWQ, GPTQ, llm-compressor): their int4 is int4_awq. GGUF's
    Q4_0 is rounded to nearest.
    """
    layers = spec.layers
    linears = (linear for layer in layers for linear in (layer.qkv, layer.output, layer.gate_up, layer.down))
    stored = [checkpoint.stored(part) for linear in linears for part in linear.parts]
    own = [None if each is None or (each.order is not None and not ordered) else each for each in stored]
    kinds = {"" if each is None else each.format.kind for each in own}
    kind = kinds.pop() if len(kinds) == 1 else ""
    of_kind = [name for name in NAMES if weight_format(name).kind == kind]
    mark = checkpoint.config.get(MARK)
    method = mark.get("method") if isinstance(mark, dict) else None
    if method in of_kind:
        return method
    is_calibrated = not checkpoint.is_gguf
    return min(of_kind, key=lambda name: weight_format(name).needs_calibration != is_calibrated, default="")


def conversion_refusal(quantization: str, found: str) -> str | None:
    """Say why a checkpoint that is ``found`` (see ``quantization_of``) cannot become ``quantization``; None: it can.

    A format whose weights are made with sample texts takes a checkpoint's own quantized values.
    """
    wanted = weight_format(quantization)
    if not wanted.needs_calibration or (found and weight_format(found).kind == wanted.kind):
        return None
    what = f"is in {found}" if found else "is not, or not in consecutive groups"
    return (
        f"{quantization} takes the quantized values of a checkpoint in {wanted.kind}, but this one {what}; make one "
        f"with 'edgellm quantize --method {quantization}', or build {wanted.kind}, which rounds to nearest."
    )


def group_size_refusal(wanted: WeightFormat, found: str, group_size: int) -> str | None:
    """Say why a checkpoint that is ``found`` is not built as ``wanted`` in groups of ``group_size``; 0 = not asked."""
    if not group_size:
        return None
    if not isinstance(wanted, IntegerFormat) and not wanted.has_fixed_group:
        return f"{wanted.name} weights have no groups; leave the group size out."
    if wanted.has_fixed_group:
        return f"{wanted.name} has groups of {wanted.group_size}; leave the group size out."
    # Without a group size of its own (int8) a format is by the row in most checkpoints, which any group size divides.
    if wanted.group_size and found and weight_format(found).kind == wanted.kind:
        return f"The checkpoint is in {wanted.kind} groups of its own; leave the group size out."
    return None


def default_quantization(checkpoint_dir: Path, keeps_order: Callable[[ModelSpec], bool] = lambda spec: False) -> str:
    """Return ``quantization_of`` a checkpoint, ``ordered`` for models that ``keeps_order`` of.

    Raises CheckpointError or UnsupportedModelError.
    """
    checkpoint = Checkpoint(checkpoint_dir)
    spec = read_spec(checkpoint)
    return quantization_of(checkpoint, spec, ordered=keeps_order(spec))
