"""What a checkpoint is quantized as, by the names of the variants."""

from __future__ import annotations

from pathlib import Path

from engine_core.formats.checkpoint import Checkpoint
from engine_core.models.spec import ModelSpec, read_spec

MARK = "edgellm_quantization"  # in config.json: the method, which the layout alone does not tell


def quantization_of(checkpoint: Checkpoint, spec: ModelSpec) -> str:
    """What the checkpoint's linears are: int8, int4, int4_awq, fp8 or nvfp4; "" if they are plain or of several kinds.

    int4 is what 'edgellm quantize' rounded to nearest; whoever else wrote int4 (AWQ, GPTQ, llm-compressor) calibrated.
    """
    layers = spec.layers
    linears = (linear for layer in layers for linear in (layer.qkv, layer.output, layer.gate_up, layer.down))
    stored = [checkpoint.stored(part) for linear in linears for part in linear.parts]
    kinds = {"" if each is None or each.order is not None else each.kind for each in stored}
    kind = kinds.pop() if len(kinds) == 1 else ""
    mark = checkpoint.config.get(MARK)
    rounded = isinstance(mark, dict) and mark.get("method") == "int4"
    return "int4_awq" if kind == "int4" and not rounded else kind


def levels_refusal(quantization: str, found: str) -> str | None:
    """Say why a checkpoint that is ``found`` (see ``quantization_of``) cannot become ``quantization``; None: it can."""
    if quantization != "int4_awq" or found.startswith("int4"):
        return None
    what = f"is {found}" if found else "is not, or not in consecutive groups"
    return (
        f"int4_awq takes the levels of a checkpoint in int4, but this one {what}; make one with 'edgellm quantize "
        "--method int4_awq', or build int4, which rounds to nearest."
    )


def default_quantization(checkpoint_dir: Path) -> str:
    """``quantization_of`` a directory. Raises CheckpointError or UnsupportedModelError."""
    checkpoint = Checkpoint(checkpoint_dir)
    return quantization_of(checkpoint, read_spec(checkpoint))
