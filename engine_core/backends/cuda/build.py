"""Builds an engine directory for the CUDA backend: the checkpoint's 16-bit weights, fused and laid out for the kernels.

Nothing is compiled here: one directory serves every NVIDIA GPU. Needs numpy only.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np

from engine_core.backends.cuda.capabilities import CAPABILITIES
from engine_core.backends.cuda.encoder_build import encoder_tensors
from engine_core.backends.cuda.layout import CONV_MATRICES, CudaOptions, CudaSpec, pair_rows, weight_arrays
from engine_core.backends.cuda.orders import (
    MATRICES,
    filled_up,
    kept_group,
    kept_linears,
    linear_of,
    orders_of,
    pairs_in_order,
    places_of,
)
from engine_core.backends.cuda.padding import Padding, padded_rope
from engine_core.backends.cuda.weights import ROPE_NAME, STORED_TYPES, WEIGHTS_NAME
from engine_core.config import EngineConfig
from engine_core.cuda.kernels.integer_layout import GROUP, GROUP_SIZES, TILE
from engine_core.cuda.kernels.linear_packed import LAYOUTS, layout_of, stored_group
from engine_core.errors import BuildError
from engine_core.formats import companions
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.detect import conversion_refusal, group_size_refusal, quantization_of
from engine_core.formats.manifest import Manifest, seal, write_variant
from engine_core.formats.number_formats import FP16_MAX, QuantizedTensor, ScaledFloat, from_16_bit, to_16_bit
from engine_core.formats.rounding_errors import RoundingErrors
from engine_core.formats.safetensors_file import SafetensorsWriter
from engine_core.formats.weight_formats import weight_format
from engine_core.formats.weight_formats.base import QuantizedFormat, Rounding, WeightFormat
from engine_core.formats.weight_formats.integers import IntegerFormat
from engine_core.formats.weights import Weights
from engine_core.models.reader import check_tensors, read_spec
from engine_core.models.spec import LayerSpec, ModelSpec
from engine_core.progress import Progress, portion, untold

_log = logging.getLogger(__name__)

_WRITING = 0.9  # of the progress of a build; the rest are the hashes
_FP8_ACTIVATIONS = (
    "Long prompts are multiplied with activations in fp8, as the checkpoint says, on GPUs of compute capability 9.0."
)
_ROUNDED = 1 << 22  # weights that are rounded to small floats at a time, which takes several times as much memory


def build_cuda(
    checkpoint_dir: Path,
    engine_dir: Path,
    *,
    quantization: str = "fp16",
    max_context: int = 0,
    dtype: str = "auto",
    vocab_map: Path | None = None,
    kv_cache_type: str = "auto",
    model_name: str = "",
    group_size: int = 0,
    progress: Progress = untold,
) -> Manifest:
    """Writes the variant ``engine_dir`` from a Hugging Face checkpoint directory.

    ``quantization``: fp16 (16-bit weights of either type), int8 or int4 (rounded to nearest, groups of 128, the LM head
    too), int4_awq, which is int4 from a checkpoint in int4, fp8 (a scale for each row) or nvfp4. A checkpoint's own
    quantized values of as many bits are kept with their scales and zero points, in groups of 32 columns or a multiple
    of that, or of a row; all matrices then have the smallest of these groups. So are its own fp8 values with scales of
    tensors, rows or blocks of 128 columns, and its own nvfp4 values. Others are dequantized first, and the manifest's
    option ``rounding_errors`` has the loss of each. An fp8 checkpoint that says that activations are fp8, too, has them
    so where prefill can (``CudaSpec.fp8_gemms``). ``group_size``: columns that share a scale of int8 or int4 where the
    checkpoint has none; 0 = 128.
    ``dtype``: fp16, bf16, or auto for the checkpoint's own. ``max_context``: 0 = the model's, at most 8192.
    ``vocab_map``: a safetensors file of the full ids an LM head of fewer rows keeps; a file of that name in the
    checkpoint is used by itself.
    ``kv_cache_type``: fp16, int8 or fp8, what the engine opens with unless told otherwise (auto = fp16).
    Raises CheckpointError, UnsupportedModelError or BuildError; nothing half-written is left behind.
    """
    checkpoint = Checkpoint(checkpoint_dir)
    spec = read_spec(checkpoint)
    max_context = max_context or CAPABILITIES.default_context(spec)
    if dtype == "auto":
        stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
        dtype = "bf16" if stored == "bfloat16" else "fp16"
    if dtype not in ("fp16", "bf16"):
        raise BuildError(f"The weight type {dtype!r} is unknown; it is one of auto, fp16, bf16.")
    CAPABILITIES.check_build(spec, quantization, kv_cache_type, max_context=max_context)
    found = quantization_of(checkpoint, spec, ordered=CAPABILITIES.keeps_order(spec))
    for reason in (
        conversion_refusal(quantization, found),
        CAPABILITIES.group_refusal(group_size),
        group_size_refusal(weight_format(quantization), found, group_size),
    ):
        if reason is not None:
            raise BuildError(reason)
    companions.check_companions(checkpoint, spec.vocab_size)
    vocab_map = companions.find_vocab_map(checkpoint, vocab_map)
    kept = companions.kept_ids(vocab_map, checkpoint, spec)
    check_tensors(spec, checkpoint)
    stored_as = engine_format(checkpoint, spec, weight_format(quantization), dtype, group_size)
    convolves = any(layer.conv_kernel for layer in spec.layers)
    fp8_activations = stored_as.kind == "fp8" and checkpoint.fp8_activations and not convolves
    options = CudaOptions(dtype, fp8_activations=fp8_activations, rope_switch=spec.rope_switch_within(max_context))
    if isinstance(stored_as, IntegerFormat):
        ordered = {name.split(".")[-1] for name in orders_of(checkpoint, spec, weight_format(quantization))}
        options = dataclasses.replace(
            options,
            zero_points=stored_as.asymmetric,
            half_scales=stored_as.half_scales,
            ordered=tuple(name for name in MATRICES if name in ordered),
        )
    manifest = Manifest(
        model_name=model_name or companions.model_name(checkpoint),
        model=spec,
        backend="cuda",
        quantization=quantization,
        kv_cache_type="fp16" if kv_cache_type == "auto" else kv_cache_type,
        max_context=max_context,
        max_batch=CAPABILITIES.max_batch,
        eos_token_ids=companions.eos_token_ids(checkpoint),
        reduced_vocab_size=0 if kept is None else len(kept),
        group_size=stored_group(stored_as),
        use_cuda_graph=True,
        builder=companions.versions(()),
        notes=(
            *companions.notes(CAPABILITIES, spec, max_context),
            *([_FP8_ACTIVATIONS] if options.fp8_activations else []),
        ),
        options=dataclasses.asdict(options),
    )
    with write_variant(Path(engine_dir)) as directory:
        companions.copy_companions(checkpoint, directory)
        companions.copy_vocab_map(vocab_map, kept, directory)
        errors = write_weights(
            directory / WEIGHTS_NAME, checkpoint, spec, manifest, kept, progress=portion(progress, 0.0, _WRITING)
        )
        if errors:
            sentence = errors.sentence(checkpoint.path.name, quantization)
            _log.warning("%s The cuda backend holds %s only; %s.", sentence, _held(stored_as), _otherwise(stored_as))
            options = dataclasses.replace(options, requantized=len(errors), rounding_errors=errors.relative())
            manifest = dataclasses.replace(
                manifest, notes=(*manifest.notes, sentence), options=dataclasses.asdict(options)
            )
        manifest = seal(directory, manifest)
    progress(1.0)
    return manifest


def fused_tensors(
    weights: Weights, has_head: bool, *, paired: bool = True
) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
    """Return (name in the engine's weights file, blocks of float32 values), in the order of ``weight_arrays``.

    ``paired``: rows of gate and up in turn, as the kernels read them; else all of gate, then all of up.
    """
    spec = weights.spec
    yield "embed", weights.embedding()
    yield "norm", [weights.norm(spec.final_norm, with_offset=False)]
    if has_head:
        yield "head", weights.head()
    for i, layer in enumerate(spec.layers):
        for name, blocks in _layer_tensors(weights, layer, paired):
            yield f"layers.{i}.{name}", blocks


def _layer_tensors(weights: Weights, layer: LayerSpec, paired: bool) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
    def norm(name: str) -> list[np.ndarray]:
        return [weights.norm(name, with_offset=False)]  # which the kernels add in float32

    if layer.input_norm:
        yield "input_norm", norm(layer.input_norm)
    first, second = CONV_MATRICES if layer.conv_kernel else ("qkv", "o")
    yield first, weights.linear(layer.qkv)
    yield second, weights.linear(layer.output)
    if layer.mlp_norm:
        yield "post_norm", norm(layer.mlp_norm)
    if layer.router:
        yield "router", [weights.matrix(layer.router)]
    gate_ups = [layer.expert(index)[0] for index in range(layer.num_experts)] or [layer.gate_up]
    make = weights.paired if paired else weights.linear
    yield "gate_up", (block for gate_up in gate_ups for block in make(gate_up))
    yield "down", weights.linear(layer.down)
    biases = {first: layer.qkv, second: layer.output, "gate_up": layer.gate_up, "down": layer.down}
    for name, linear in biases.items():
        if (bias := weights.bias(linear)) is not None:
            yield f"{name}_bias", [pair_rows(bias[:, None])[:, 0] if name == "gate_up" and paired else bias]
    if layer.conv_weight:
        yield "conv", [weights.matrix(layer.conv_weight)[:, 0].T]
    if layer.conv_bias_name:
        yield "conv_bias", [weights.matrix(layer.conv_bias_name)]
    if layer.q_norm:
        yield "q_norm", norm(layer.q_norm)
        yield "k_norm", norm(layer.k_norm)
    if layer.post_attention_norm:
        yield "attention_out_norm", norm(layer.post_attention_norm)
        yield "mlp_out_norm", norm(layer.post_mlp_norm)


def engine_format(
    checkpoint: Checkpoint, spec: ModelSpec, wanted: WeightFormat, dtype: str, group_size: int = 0
) -> WeightFormat:
    """Return how an engine of type ``dtype`` holds weights in ``wanted``.

    In fp8 with scales of groups if the checkpoint has such. Integers are in the smallest of the checkpoint's groups
    that are kept, with zero points if any of them has, or in groups of ``group_size``; 0 = 128. Their scales are fp16
    if any of those that are kept is, as bf16 would round them.
    """
    if isinstance(wanted, IntegerFormat):
        kept = [part for _, parts, _ in kept_linears(checkpoint, spec, wanted) for part in parts]
        size = min((kept_group(each, wanted) for each in kept), default=group_size or stored_group(wanted))
        has_halves = dtype == "bf16" and any(each.scale_type == "F16" for each in kept)
        return wanted.in_groups(size, any(each.has_zeros for each in kept), has_halves)
    linears = (each for layer in spec.layers for each in (layer.qkv, layer.output, layer.gate_up, layer.down))
    stored = [checkpoint.stored(part) for linear in linears for part in linear.parts]
    own = [each for each in stored if each is not None and each.format.kind == wanted.kind]
    has_groups = any(each.group_size < each.shape[1] and each.group_size % GROUP == 0 for each in own)
    return wanted.in_groups(GROUP if has_groups else 0)


def own_values(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    name: str,
    wanted: WeightFormat,
    dtype: str,
    padding: Padding,
    kept: np.ndarray | None = None,
    orders: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> np.ndarray | None:
    """Return packed tiles with the checkpoint's own quantized values and scales, of the fused tensor ``name``.

    ``kept``: the rows of the LM head, None = all; ``orders``: see ``orders_of``. None unless all its parts are of the
    kind of ``wanted``, with scales of columns that the kernels read, and no columns are added between those of a group.
    ``dtype`` holds the scales of integers exactly. Raises BuildError for values that are not finite.
    """
    kind = name.split(".")[-1]
    rows, columns = padding.rows(kind), padding.columns(kind)
    assert columns is not None and (rows is not None or kind == "head")
    if kind == "o" and not columns.is_whole:
        return None
    parts = (spec.head,) if kind == "head" else linear_of(spec, name).parts
    if isinstance(wanted, IntegerFormat):
        own, zero = _own_integers(checkpoint, parts, wanted, dtype, name in orders), wanted.zero
    else:
        own, zero = _own_floats(checkpoint, parts, wanted), 0
    if own is None:
        return None
    if name.endswith(".gate_up"):
        own = [np.concatenate([pair_rows(part) for part in np.split(array, max(1, spec.num_experts))]) for array in own]
        if (order := orders.get(_down_of(name))) is not None:
            own = [pairs_in_order(array, order) for array in own]
    if kind == "head" and kept is not None:
        own = [array[kept] for array in own]
    values, *scales = own
    if rows is not None:
        values, scales = rows.spread(values, 0, zero), [rows.spread(array, 0) for array in scales]
    return layout_of(wanted).pack(columns.spread(values, 1, zero), *scales)


def _down_of(gate_up: str) -> str:
    """Return the name of the matrix that reads what the rows of ``gate_up``, layers.N.gate_up, make."""
    return f"{gate_up.rpartition('.')[0]}.down"


def _own_integers(
    checkpoint: Checkpoint, parts: tuple[str, ...], wanted: IntegerFormat, dtype: str, is_ordered: bool
) -> list[np.ndarray] | None:
    """Return (values, 16-bit scales in groups of ``wanted``, zeros if it has any) of all parts, or None; see
    ``own_values``. Columns are in the order of the groups."""
    group_size, scale_type, found = stored_group(wanted), wanted.scale_type(dtype), []
    for part in parts:
        stored = checkpoint.stored(part)
        if stored is None or kept_group(stored, weight_format(wanted.name)) < group_size:
            return None
        if stored.order is not None and not is_ordered:
            return None
        quantized = stored.read(slice(None))
        assert isinstance(quantized, QuantizedTensor)
        found.append(quantized.regrouped(group_size))
    values, scales = (np.concatenate([getattr(part, name) for part in found]) for name in ("values", "scales"))
    if scale_type == "fp16" and np.abs(scales).max() > FP16_MAX:
        return None
    stored_scales = to_16_bit(scales, scale_type)
    if not np.array_equal(from_16_bit(stored_scales), scales):
        return None
    own = [values, stored_scales]
    if not wanted.asymmetric:
        return own
    middle = np.uint8(wanted.zero)
    zeros = [np.full_like(part.scales, middle, np.uint8) if part.zeros is None else part.zeros for part in found]
    return [*own, np.concatenate(zeros)]


def _own_floats(checkpoint: Checkpoint, parts: tuple[str, ...], wanted: WeightFormat) -> list[np.ndarray] | None:
    """Return what the layout of ``wanted`` packs, of all parts, or None; see ``own_values``."""
    found = []
    for part in parts:
        stored = checkpoint.stored(part)
        if stored is None or stored.format.name != wanted.name:
            return None
        weight = stored.read(slice(None))
        assert isinstance(weight, ScaledFloat)
        if np.isnan(weight.table).any() and np.isnan(weight.table[np.unique(weight.codes)]).any():
            raise BuildError(f"{part} of {checkpoint.directory} holds values that are no numbers; fetch it again.")
        if not np.isfinite(weight.scales).all():
            raise BuildError(f"{part} of {checkpoint.directory} has scales that are not finite; fetch it again.")
        arrays = LAYOUTS[wanted.kind].parts(weight)
        if arrays is None:
            return None
        found.append(arrays)
    return [np.concatenate(arrays) for arrays in zip(*found, strict=True)]


def _held(wanted: WeightFormat) -> str:
    """Return which values of a checkpoint an engine keeps."""
    if isinstance(wanted, IntegerFormat):
        return f"values in groups of {GROUP_SIZES[0]} columns or a multiple of that, or of a row"
    if wanted.bits == 8:
        return f"values with scales of rows or of {GROUP} columns"
    return f"{wanted.name} values"


def _otherwise(wanted: WeightFormat) -> str:
    """Return what keeps the values that an engine does not."""
    if isinstance(wanted, IntegerFormat):
        return "the backend onnxruntime keeps them as they are"
    return "build fp16 to keep what they stand for"


def rope_table(spec: ModelSpec, max_context: int, switch: int) -> np.ndarray:
    """Return float32, CudaSpec.rope_shape: cos and sin. What is added turns zeros. ``switch``: see CudaOptions."""
    tables = np.stack([np.stack(rope.rows(switch, max_context), axis=-1) for rope in spec.ropes])
    tables = np.pad(tables, ((0, 0), (0, 0), (0, padded_rope(spec) // 2 - tables.shape[2]), (0, 0)))
    return tables if len(tables) > 1 else tables[0]


def to_tiles(
    values: np.ndarray,
    wanted: WeightFormat,
    dtype: str,
    on_rounded: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Return float32 [rows, cols] rounded to nearest, symmetric: packed tiles of ``wanted``.

    What a row becomes does not depend on the others. Integers have scales of ``dtype``; raises BuildError for a scale
    that fp16 cannot hold. ``on_rounded`` gets blocks of rows before and after it, float32.
    """
    layout = layout_of(wanted)
    if isinstance(wanted, IntegerFormat):
        scale_type = wanted.scale_type(dtype)
        quantized = wanted.quantize(values, Rounding(stored_group(wanted), scale_type)).regrouped(layout.group_size)
        if on_rounded is not None:
            _compare(values, quantized, on_rounded)
        return layout.pack(quantized.values, to_16_bit(quantized.scales, scale_type))
    assert isinstance(wanted, QuantizedFormat)
    step = max(1, _ROUNDED // (TILE * values.shape[1])) * TILE
    packed = []
    for start in range(0, len(values), step):
        rows = values[start : start + step]
        rounding = Rounding(peak=np.abs(rows).max(axis=1, keepdims=True))
        weight = wanted.quantize(rows, rounding)
        if on_rounded is not None:
            on_rounded(rows, weight.dequantize())
        packed.append(layout.pack(*layout.parts(weight)))
    return np.concatenate(packed)


def _compare(
    values: np.ndarray, quantized: QuantizedTensor, on_rounded: Callable[[np.ndarray, np.ndarray], None]
) -> None:
    """Hand on blocks of rows: float32 of a whole LM head would take gigabytes."""
    step = max(1, _ROUNDED // values.shape[1])
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        zeros = None if quantized.zeros is None else quantized.zeros[rows]
        part = dataclasses.replace(quantized, values=quantized.values[rows], scales=quantized.scales[rows], zeros=zeros)
        on_rounded(values[rows], part.dequantize())


def write_weights(
    path: Path,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    manifest: Manifest,
    kept: np.ndarray | None,
    *,
    paired: bool = True,
    progress: Progress = untold,
) -> RoundingErrors:
    """Write the weights file of a variant; return the loss of the packed matrices whose own values were not kept.

    ``kept``: the LM head's rows, None = all; ``paired``: see ``fused_tensors``. Raises CheckpointError or BuildError.
    """
    cuda_spec = CudaSpec.create(manifest, EngineConfig(engine_dir=path.parent, max_context=manifest.max_context))
    dtype = cuda_spec.dtype
    arrays = weight_arrays(cuda_spec)
    tensors = {name: (STORED_TYPES[array.dtype], array.shape) for name, array in arrays.items()}
    table = rope_table(spec, manifest.max_context, cuda_spec.rope_switch)
    wanted = cuda_spec.weight_format

    padding = Padding(spec, paired=paired)
    orders = orders_of(checkpoint, spec, weight_format(wanted.name)) if cuda_spec.ordered else {}
    full_orders = {name: filled_up(order, cuda_spec.columns_of(name)) for name, order in orders.items()}
    errors = RoundingErrors()
    total, done = sum(array.nbytes for array in arrays.values()), 0

    def tiles(name: str, blocks: Iterable[np.ndarray]) -> np.ndarray:
        own = own_values(checkpoint, spec, name, wanted, dtype, padding, kept, orders)
        if own is not None:
            return own
        listener = partial(errors.add, name) if _is_quantized(checkpoint, spec, name) else None
        whole = in_order(name, np.concatenate(list(blocks)))
        return to_tiles(whole[:, full_orders[name]] if name in full_orders else whole, wanted, dtype, listener)

    def in_order(name: str, values: np.ndarray) -> np.ndarray:
        """Return rows of gate_up or its bias as the columns of down are."""
        stem = name.removesuffix("_bias")
        order = full_orders.get(_down_of(stem)) if stem.endswith(".gate_up") else None
        return values if order is None else pairs_in_order(values, order)

    with SafetensorsWriter(path, {**tensors, ROPE_NAME: ("F32", table.shape)}) as writer:
        for name, blocks in fused_tensors(Weights(checkpoint, spec, kept), cuda_spec.has_head, paired=paired):
            blocks = padding.fill(name.split(".")[-1], blocks)
            if arrays[name].dtype == "uint8":
                writer.write(name, tiles(name, blocks))
            else:
                blocks = (in_order(name, block) for block in blocks) if name.endswith("_bias") else blocks
                writer.write_blocks(name, (to_16_bit(block, dtype) for block in blocks))
            done += arrays[name].nbytes
            progress(min(1.0, done / total))
        for name, values in () if cuda_spec.encoder is None else encoder_tensors(checkpoint, cuda_spec.encoder):
            writer.write(name, values)
            done += arrays[name].nbytes
            progress(min(1.0, done / total))
        for i in range(spec.num_layers):
            for name in cuda_spec.ordered:
                matrix = f"layers.{i}.{name}"
                order = full_orders.get(matrix)
                as_it_is = np.arange(cuda_spec.columns_of(matrix))
                writer.write(f"{matrix}_places", places_of(as_it_is if order is None else order))
        writer.write(ROPE_NAME, table)
    return errors


def _is_quantized(checkpoint: Checkpoint, spec: ModelSpec, name: str) -> bool:
    """Return True if any part of the fused tensor ``name`` is stored quantized."""
    parts = linear_of(spec, name).parts if name.startswith("layers.") else (spec.head,)
    return any(checkpoint.is_rounded(part) for part in parts)
