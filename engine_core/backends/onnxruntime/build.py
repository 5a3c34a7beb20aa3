"""Builds an engine variant for the CPU from a checkpoint; needs no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from engine_core.backends.onnxruntime.capabilities import CAPABILITIES
from engine_core.backends.onnxruntime.encoder_graph import write_encoder
from engine_core.backends.onnxruntime.exporter import OrtExporter, Packing, Precision
from engine_core.backends.onnxruntime.files import ENCODER_DATA_NAME
from engine_core.backends.onnxruntime.kv_scales import int8_scales, measure_peaks
from engine_core.backends.onnxruntime.plan import OrtOptions
from engine_core.backends.onnxruntime.weight_writer import own_block_size
from engine_core.errors import BuildError
from engine_core.formats import companions
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.detect import conversion_refusal, group_size_refusal, quantization_of
from engine_core.formats.manifest import Manifest, seal, write_variant
from engine_core.formats.onnx_graph import write_decoder
from engine_core.formats.onnx_writer import GraphWriter
from engine_core.formats.weight_formats import weight_format
from engine_core.formats.weight_formats.base import WeightFormat
from engine_core.formats.weight_formats.integers import IntegerFormat
from engine_core.formats.weights import Weights
from engine_core.models.reader import check_tensors, read_spec
from engine_core.progress import Progress, portion, untold
from engine_core.quantize.calibration_texts import NAMES, find_calibration, read_sequences

_log = logging.getLogger(__name__)

_EXPORTING = 0.9  # of the progress of a build; the rest are calibration and hashes
_GROUP_SIZE = 32  # of what is rounded here, unless asked otherwise


def build_engine(
    checkpoint_dir: Path,
    out_dir: Path,
    *,
    quantization: str = "auto",
    max_context: int = 0,
    group_size: int = 0,
    head_bits: int = 0,
    vocab_map: Path | None = None,
    model_name: str = "",
    kv_cache_type: str = "auto",
    calibration: Path | None = None,
    report: Callable[[str], None] = _log.info,
    progress: Progress = untold,
) -> Manifest:
    """Writes the variant directory ``out_dir`` and returns its manifest.

    ``quantization``: one of CAPABILITIES.weight_formats, or auto: what the checkpoint is quantized as (int8 for fp8 and
    nvfp4, which no operator multiplies by), else fp32. A quantized checkpoint's int4 or int8 weights keep their values,
    scales and zeros; built as anything else they are dequantized first, and the manifest's option ``rounding_errors``
    has the loss of those that are rounded anew.
    int4_awq needs a checkpoint in int4. ``max_context``: tokens the RoPE table covers, 0 = the model's own, at most
    4096. ``group_size``: weights per scale, 0 = 32.
    ``head_bits``: 4 or 8 for the LM head and the embedding of a quantized variant, 0 = 8. ``vocab_map``: a safetensors
    file of the full ids an LM head of fewer rows keeps; a file of that name in the checkpoint is used by itself.
    ``kv_cache_type``: what the engine opens with unless told otherwise; auto = fp32. It holds fp32 and fp16 in any
    case, and int8 where that was asked for or there is ``calibration`` text (see ``text.documents``; by default the
    checkpoint's own calibration.jsonl or .txt).

    Raises CheckpointError, UnsupportedModelError or BuildError; then ``out_dir`` is as it was before.
    """
    checkpoint = Checkpoint(checkpoint_dir)
    spec = read_spec(checkpoint)
    found = quantization_of(checkpoint, spec)
    if quantization == "auto":
        quantization = CAPABILITIES.format_for(found) if found else "fp32"
        if (notice := CAPABILITIES.rounding_notice(found)) is not None:
            report(notice)
    CAPABILITIES.check_build(spec, quantization, kv_cache_type, max_context=max_context)
    if (reason := conversion_refusal(quantization, found)) is not None:
        raise BuildError(reason)
    precision = precision_of(quantization, group_size, head_bits)
    _check_group_size(precision.linear, found, group_size)
    check_tensors(spec, checkpoint)
    max_context = max_context or CAPABILITIES.default_context(spec)
    companions.check_companions(checkpoint, spec.vocab_size)
    vocab_map = companions.find_vocab_map(checkpoint, vocab_map)
    kept = companions.kept_ids(vocab_map, checkpoint, spec)
    calibration = _calibration(kv_cache_type, calibration, checkpoint)
    weights = Weights(checkpoint, spec, kept)
    report(
        f"Building {spec.architecture} with {spec.num_parameters / 1e6:.1f} M parameters as {quantization} in {out_dir}"
    )
    with write_variant(Path(out_dir)) as directory:
        exporter = _write_decoder(directory, checkpoint, weights, precision, max_context, calibration, report, progress)
        if spec.vision is not None:
            with GraphWriter(directory, f"{spec.architecture}.encoder", ENCODER_DATA_NAME) as writer:
                write_encoder(writer, checkpoint, spec.vision, int8=has_int8_encoder(precision))
        companions.copy_companions(checkpoint, directory)
        companions.copy_vocab_map(vocab_map, kept, directory)
        shares_head = spec.tied and kept is None
        options = engine_options(precision, exporter.packing, shares_head=shares_head, rope_switch=exporter.rope_switch)
        manifest = Manifest(
            model_name=model_name or companions.model_name(checkpoint),
            model=spec,
            backend="onnxruntime",
            quantization=quantization,
            kv_cache_type="fp32" if kv_cache_type == "auto" else kv_cache_type,
            max_context=max_context,
            max_batch=CAPABILITIES.max_batch,
            eos_token_ids=companions.eos_token_ids(checkpoint),
            reduced_vocab_size=0 if kept is None else len(kept),
            group_size=_group_size(weights, precision),
            builder=companions.versions(),
            notes=companions.notes(CAPABILITIES, spec, max_context),
            options=asdict(options),
        )
        manifest = seal(directory, _with_losses(manifest, checkpoint, exporter, report))
    progress(1.0)
    return manifest


def _write_decoder(
    directory: Path,
    checkpoint: Checkpoint,
    weights: Weights,
    precision: Precision,
    max_context: int,
    calibration: Path | None,
    report: Callable[[str], None],
    progress: Progress,
) -> OrtExporter:
    """Write the graph of the decoder and its weights; with text for ``calibration``, that of an int8 KV cache, too."""
    spec = weights.spec
    with GraphWriter(directory, spec.architecture) as writer:
        exporter = OrtExporter(writer, weights, precision, max_context)
        write_decoder(spec, exporter, portion(progress, 0.0, _EXPORTING))
        if calibration is not None:
            sequences = read_sequences(calibration, checkpoint, max_context, spec.vocab_size)
            report(f"Calibrating the int8 KV cache on {sum(map(len, sequences))} tokens of {calibration}")
            exporter.add_int8_cache(int8_scales(measure_peaks(directory, spec, weights.head_rows, sequences)))
    return exporter


def _with_losses(
    manifest: Manifest, checkpoint: Checkpoint, exporter: OrtExporter, report: Callable[[str], None]
) -> Manifest:
    """Return ``manifest`` with the loss of the weights that were rounded anew, if there are any; report it."""
    errors = exporter.rounding_errors
    if not errors:
        return manifest
    sentence = errors.sentence(checkpoint.path.name, manifest.quantization)
    report(sentence)
    options = {**manifest.options, "requantized": len(errors), "rounding_errors": errors.relative()}
    return replace(manifest, notes=(*manifest.notes, sentence), options=options)


def has_int8_encoder(precision: Precision) -> bool:
    """Return whether a vision encoder is in int8. It is beside int4 weights, too: what it loses every token sees."""
    return isinstance(precision.linear, IntegerFormat)


def engine_options(precision: Precision, packing: Packing, *, shares_head: bool, rope_switch: int) -> OrtOptions:
    """Return the options of the manifest. ``shares_head``: the token lookup and the whole LM head use the same
    bytes."""
    return OrtOptions(
        head_bits=precision.head.bits,
        shares_head=shares_head,
        released_bytes=packing.released,
        packed_bytes=packing.packed + packing.largest_scales,
        packed_head_bytes=packing.head,
        rope_switch=rope_switch,
    )


def _check_group_size(wanted: WeightFormat, found: str, group_size: int) -> None:
    """Raises BuildError for a group size that the format or the checkpoint's own groups do not allow."""
    if (reason := group_size_refusal(wanted, found, group_size)) is not None:
        raise BuildError(reason)


def precision_of(quantization: str, group_size: int = 0, head_bits: int = 0) -> Precision:
    """Return how ``build_engine`` stores one of CAPABILITIES.weight_formats; raises BuildError."""
    linear = weight_format(quantization)
    if not isinstance(linear, IntegerFormat):
        if group_size or head_bits:
            raise BuildError(f"group_size and head_bits belong to integer weights; {linear.name} has neither.")
        return Precision(linear, linear)
    if (reason := CAPABILITIES.group_refusal(group_size)) is not None:
        raise BuildError(reason)
    if head_bits not in (0, 4, 8):
        raise BuildError(f"head_bits is {head_bits}, expected 4 or 8.")
    own = linear.group_size if linear.has_fixed_group else _GROUP_SIZE
    return Precision(linear, weight_format(f"int{head_bits or 8}"), group_size or own)


def _group_size(weights: Weights, precision: Precision) -> int:
    """Return the group size of the first linear: that of the checkpoint's integers where they are kept."""
    linear = weights.spec.layers[0].qkv
    layout = weights.integer_layout(linear)
    linear_format = precision.linear
    if (
        layout is not None
        and isinstance(linear_format, IntegerFormat)
        and linear_format.keeps(layout.format, layout.group_size)
    ):
        return own_block_size(weights, linear, precision.group_size)
    return precision.group_size


def _calibration(kv_cache_type: str, given: Path | None, checkpoint: Checkpoint) -> Path | None:
    """Return the text to calibrate an int8 cache on; None: the engine will hold none."""
    if kv_cache_type in ("fp32", "fp16") and given is None:
        return None
    found = find_calibration(checkpoint, given)
    if found is None and kv_cache_type == "int8":
        raise BuildError(
            f"An int8 KV cache is calibrated on text, but {checkpoint.path} has no {' or '.join(NAMES)}; give "
            "--calibration FILE with conversations like those the robot will have."
        )
    return found
