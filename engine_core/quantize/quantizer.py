"""``quantize_checkpoint``: from one checkpoint directory to another, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine_core.errors import BuildError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.models.reader import check_tensors, read_spec
from engine_core.models.spec import ModelSpec
from engine_core.quantize.calibration_texts import NAMES, find_calibration
from engine_core.quantize.output import (
    Change,
    CheckpointWriter,
    copy_companions,
    write_config,
    write_directory,
)
from engine_core.quantize.scheme import Scheme, make_scheme


def quantize(
    checkpoint_dir: Path,
    out_dir: Path,
    *,
    method: str,
    group_size: int,
    calibration: Path | None,
    num_samples: int,
    sequence_length: int,
    symmetric: bool,
    head: bool,
    report: Callable[[str], None],
    progress: Callable[[int, int], object],
) -> None:
    """See ``engine_core.quantize.quantize_checkpoint``."""
    checkpoint = Checkpoint(checkpoint_dir)
    spec = read_spec(checkpoint)
    check_tensors(spec, checkpoint)
    is_bf16 = not checkpoint.is_quantized and checkpoint.dtype(spec.embedding) == "BF16"
    scheme = make_scheme(method, group_size, symmetric, "bf16" if is_bf16 else "fp16")
    _check(checkpoint, spec, scheme, head)
    tokens = None
    if scheme.is_calibrated:
        from engine_core.quantize.calibration import read_tokens

        texts = _calibration(calibration, checkpoint, method)
        tokens = read_tokens(texts, checkpoint, spec, num_samples, sequence_length)
        report(f"Calibrating on {int(tokens.lengths.sum())} tokens of {texts}")
    elif calibration is not None:
        raise BuildError(f"{method} is not calibrated; leave the calibration text out.")
    report(f"Quantizing {spec.architecture} with {spec.num_parameters / 1e6:.1f} M parameters to {method} in {out_dir}")
    with write_directory(out_dir) as directory:
        copy_companions(directory, checkpoint)
        with CheckpointWriter(directory, checkpoint, spec, scheme, head) as writer:
            _write(writer, checkpoint, spec, scheme, tokens, progress)
        write_config(directory, checkpoint, scheme, head, writer.rounding_errors)
    if writer.rounding_errors:
        report(writer.rounding_errors.sentence(checkpoint.path.name, method))


def _write(
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    scheme: Scheme,
    tokens,
    progress: Callable[[int, int], object],
) -> None:
    count = len(spec.layers)
    progress(0, count)
    writer.write_start()
    if tokens is None:
        for index in range(count):
            writer.write_layer(index, Change())
            progress(index + 1, count)
    else:
        from engine_core.quantize.calibration import run_layers
        from engine_core.quantize.search import change_of

        def on_layer(index: int, activations: dict) -> None:
            writer.write_layer(index, change_of(checkpoint, spec, index, scheme, activations))
            progress(index + 1, count)

        run_layers(checkpoint, spec, tokens, on_layer)
    writer.write_end()


def _check(checkpoint: Checkpoint, spec: ModelSpec, scheme: Scheme, head: bool) -> None:
    """Raises BuildError."""
    # A GGUF file is often all there is of a model: its quantized weights are rounded anew, which is reported.
    if checkpoint.is_quantized and scheme.quantized and not checkpoint.is_gguf:
        raise BuildError(
            f"{checkpoint.path} is quantized already; quantize the checkpoint it was made from, or take the "
            "method fp16, which dequantizes it."
        )
    if scheme.is_calibrated and spec.vision is not None:
        raise BuildError(
            f"{scheme.method} is calibrated on texts, which is not implemented for models that see; take int8 or int4, "
            "which round to nearest."
        )
    if head and not scheme.quantized:
        raise BuildError("fp16 quantizes nothing; leave the option for the head out.")
    if head and spec.tied:
        raise BuildError(
            "This model's head is its embedding, which stays in 16 bits in the checkpoint; "
            "'edgellm build' quantizes both."
        )


def _calibration(given: Path | None, checkpoint: Checkpoint, method: str) -> Path:
    path = find_calibration(checkpoint, given)
    if path is None:
        raise BuildError(
            f"{method} is calibrated on texts like those the model will see, and {checkpoint.path} brings no "
            f"{' or '.join(NAMES)}; give a text file or JSONL chats with --calibration."
        )
    return path
