"""Writes a quantized checkpoint: tensor by tensor, into a temporary sibling that is renamed when it is whole."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine_core.errors import BuildError, CheckpointError
from engine_core.formats.atomic import replaced_directory
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.detect import MARK
from engine_core.formats.number_formats import to_16_bit
from engine_core.formats.rounding_errors import RoundingErrors
from engine_core.formats.safetensors_file import SafetensorsWriter
from engine_core.formats.vocab_map import VOCAB_MAP_NAME
from engine_core.models.spec import LayerSpec, LinearSpec, ModelSpec
from engine_core.quantize.scheme import Scheme

_BLOCK_BYTES = 16 << 20
_WEIGHT_FILES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


@dataclass
class Change:
    """The calibration of one layer. Keys are names of checkpoint tensors, of linears that of the first part.

    ``norms``: the weights as stored. ``columns``: float32 [in_features], multiplied onto a linear's columns. ``rows``:
    float32 [out_features], multiplied onto its rows and bias. ``ratios``: float32 [rows, groups], see
    ``Rounding``.
    """

    norms: dict[str, np.ndarray] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    ratios: dict[str, np.ndarray] = field(default_factory=dict)


def changed_weights(checkpoint: Checkpoint, linear: LinearSpec, change: Change) -> list[np.ndarray]:
    """Return float32 [rows, columns] of each part, scaled. Raises CheckpointError for weights that are not finite."""
    parts, row = [], 0
    for name in linear.parts:
        weights = checkpoint.read(name)
        if not np.isfinite(weights).all():
            raise CheckpointError(f"The tensor {name!r} holds values that are not finite.")
        if linear.parts[0] in change.columns:
            weights *= change.columns[linear.parts[0]]
        if linear.parts[0] in change.rows:
            weights *= change.rows[linear.parts[0]][row : row + len(weights), None]
        parts.append(weights)
        row += len(weights)
    return parts


class CheckpointWriter:
    """``write_start``, ``write_layer`` for each layer in order, ``write_end``. A context manager."""

    def __init__(self, directory: Path, checkpoint: Checkpoint, spec: ModelSpec, scheme: Scheme, head: bool) -> None:
        self._checkpoint, self._spec, self._scheme = checkpoint, spec, scheme
        self._quantizes_head = head
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, linear in self._order():
            for part in (name,) if linear is None else linear.parts:
                shape = checkpoint.shape(part)
                if linear is None:
                    tensors[part] = (scheme.stored, shape)
                else:
                    rows, columns = shape
                    scheme.check(part, (rows, columns))
                    tensors |= scheme.tensors(part, (rows, columns))
        self.rounding_errors = RoundingErrors()  # of weights that are quantized already
        self._writer = SafetensorsWriter(directory / "model.safetensors", tensors, {"format": "pt"})

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    def _order(self) -> Iterator[tuple[str, LinearSpec | None]]:
        """(first name, the linear if it is quantized) of everything that is written."""
        yield self._spec.embedding, None
        for layer in self._spec.layers:
            yield from self._layer_order(layer)
        yield from self._end_order()

    def _end_order(self) -> Iterator[tuple[str, LinearSpec | None]]:
        yield self._spec.final_norm, None
        if not self._spec.tied:
            yield self._spec.head, LinearSpec((self._spec.head,)) if self._quantizes_head else None
        if self._spec.vision is not None:
            for name in self._spec.vision.shapes():
                yield name, None

    def _layer_order(self, layer: LayerSpec) -> Iterator[tuple[str, LinearSpec | None]]:
        for item in (
            layer.input_norm,
            layer.qkv,
            layer.q_norm,
            layer.k_norm,
            layer.conv_weight,
            layer.conv_bias_name,
            layer.output,
            layer.post_attention_norm,
            layer.mlp_norm,
            layer.router,
            layer.gate_up,
            layer.down,
            layer.post_mlp_norm,
        ):
            if isinstance(item, str):
                if item:
                    yield item, None
                continue
            names = () if self._scheme.quantized else item.parts
            yield from ((name, None) for name in names)
            if self._scheme.quantized:
                yield item.parts[0], item
            yield from ((bias, None) for bias in item.biases)

    def write_start(self) -> None:
        self._copy(self._spec.embedding)

    def write_layer(self, index: int, change: Change) -> None:
        layer = self._spec.layers[index]
        biases: dict[str, np.ndarray] = {}
        for changed in (layer.qkv, layer.output, layer.gate_up, layer.down):
            biases |= self._changed_biases(changed, change)
        for name, linear in self._layer_order(layer):
            if linear is not None:
                self._write_linear(linear, change)
            elif name in change.norms or name in biases:
                values = change.norms[name] if name in change.norms else biases[name]
                self._writer.write(name, to_16_bit(values, self._scheme.dtype))
            else:
                self._copy(name)

    def write_end(self) -> None:
        for name, linear in self._end_order():
            if linear is None:
                self._copy(name)
            else:
                self._write_linear(linear, Change())

    def _changed_biases(self, linear: LinearSpec, change: Change) -> dict[str, np.ndarray]:
        if not linear.biases or linear.parts[0] not in change.rows:
            return {}
        biases, row = {}, 0
        for name in linear.biases:
            bias = self._checkpoint.read(name)
            biases[name] = bias * change.rows[linear.parts[0]][row : row + len(bias)]
            row += len(bias)
        return biases

    def _write_linear(self, linear: LinearSpec, change: Change) -> None:
        parts = changed_weights(self._checkpoint, linear, change)
        ratios = change.ratios.get(linear.parts[0])
        # Of all parts, which runtimes fuse into one matrix.
        peak = max(float(np.abs(part).max()) for part in parts)
        row = 0
        for name, weights in zip(linear.parts, parts):
            own = None if ratios is None else ratios[row : row + len(weights)]
            for tensor, values in self._scheme.encode(name, weights, own, peak, self._listener(name)).items():
                self._writer.write(tensor, values)
            row += len(weights)

    def _listener(self, name: str) -> Callable[[np.ndarray, np.ndarray], None] | None:
        """Return what counts the loss of a weight that is quantized already, or None."""
        return partial(self.rounding_errors.add, name) if self._checkpoint.is_rounded(name) else None

    def _copy(self, name: str) -> None:
        """Write a tensor without quantizing it, in 16 bits, a block of rows at a time."""
        shape = self._checkpoint.shape(name)
        step = max(1, _BLOCK_BYTES * shape[0] // (4 * int(np.prod(shape))))
        blocks = (self._checkpoint.read(name, slice(start, start + step)) for start in range(0, shape[0], step))
        self._writer.write_blocks(name, (to_16_bit(block, self._scheme.dtype) for block in blocks))


def write_config(directory: Path, checkpoint: Checkpoint, scheme: Scheme, head: bool, errors: RoundingErrors) -> None:
    """Write config.json. ``errors``: of the weights that were quantized already, for the record."""
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    dtype = {"fp16": "float16", "bf16": "bfloat16"}[scheme.dtype]
    config.update({key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"torch_dtype": dtype})
    if scheme.quantized:
        config["quantization_config"] = scheme.config([] if head else ["lm_head"])
    config[MARK] = {"method": scheme.method, "group_size": scheme.group_size}
    if errors:
        config[MARK]["rounding_errors"] = errors.relative()
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_companions(directory: Path, checkpoint: Checkpoint) -> None:
    """Copy tokenizer, templates, vocabulary map and licence: all but the weights, their index and the model card."""
    for path in sorted(checkpoint.directory.iterdir()):
        is_left = path.name in ("config.json", "README.md") or path.name.startswith(".")
        is_weights = path.name.endswith(_WEIGHT_FILES) and path.name != VOCAB_MAP_NAME
        if path.is_file() and not is_left and not is_weights:
            shutil.copyfile(path, directory / path.name)


@contextlib.contextmanager
def write_directory(out_dir: Path) -> Iterator[Path]:
    """Gives a temporary sibling to fill; on success it takes the place of ``out_dir``, else it is removed.

    A checkpoint of ours at ``out_dir`` is replaced, any other non-empty directory refused. Raises BuildError, also for
    an OSError of the body (disk full).
    """
    out_dir = Path(out_dir).absolute()
    if out_dir.exists() and not _replaceable(out_dir):
        raise BuildError(f"{out_dir} exists and is not a checkpoint of 'edgellm quantize'; name another directory.")
    try:
        with replaced_directory(out_dir) as temporary:
            yield temporary
    except OSError as error:
        raise BuildError(
            f"The checkpoint could not be written to {out_dir} ({error.strerror or error}); nothing was left behind."
        ) from error


def _replaceable(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    if not any(directory.iterdir()):
        return True
    try:
        return MARK in json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
