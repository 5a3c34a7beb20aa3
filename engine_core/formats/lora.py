"""LoRA adapters: directories that peft writes, checked against the model of an engine.

An adapter adds s · B (A x) to what a linear gives of x: A is [rank, in_features], B [out_features, rank]. A directory
has adapter_config.json and adapter_model.safetensors. What would change more than linears of the decoder layers
(biases, other modules, the magnitudes of DoRA, a further variant of LoRA) is refused, and so is a tensor that is not
read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engine_core.errors import AdapterError, CheckpointError, ConfigurationError, first_line
from engine_core.formats.json_file import read_json
from engine_core.formats.safetensors_file import SafetensorsFile
from engine_core.models.spec import ModelSpec
from engine_core.paths import expand_user

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Field of the configuration → (the values that leave a plain LoRA, what it is otherwise).
_PLAIN: dict[str, tuple[tuple[Any, ...], str]] = {
    "peft_type": (("LORA",), "is no LoRA"),
    "task_type": ((None, "CAUSAL_LM"), "is not for text generation"),
    "bias": ((None, "none"), "has biases of its own"),
    "lora_bias": ((None, False), "has biases of its own"),
    "use_dora": ((None, False), "is a DoRA"),
    "use_qalora": ((None, False), "is a QALoRA"),
    "alora_invocation_tokens": ((None,), "is an activated LoRA"),
    "modules_to_save": ((None, []), "replaces whole modules"),
    "trainable_token_indices": ((None, [], {}), "replaces token embeddings"),
    "target_parameters": ((None, []), "changes parameters that are no linears"),
    "layer_replication": ((None, []), "replicates layers"),
    "fan_in_fan_out": ((None, False), "is for transposed weights"),
}


@dataclass(frozen=True)
class LowRank:
    """The product b (a x) that an adapter adds to rows. float32; ``a`` [rank, columns], ``b`` [rows, rank]."""

    a: np.ndarray
    b: np.ndarray


@dataclass(frozen=True)
class _Module:
    """One linear of the checkpoint that an adapter changes."""

    rank: int
    scale: float


@dataclass(frozen=True)
class _Part:
    """The rows of a stacked matrix that one linear of the checkpoint makes up."""

    module: str
    first: int
    rows: int
    columns: int


class LoraAdapter:
    """One adapter of ``spec``. Only the header is read until ``parts`` is called.

    Raises AdapterError if it is missing, damaged, of another model, above ``max_rank`` or of a kind that is not run.
    """

    def __init__(self, name: str, directory: Path, spec: ModelSpec, max_rank: int) -> None:
        self.name = name
        self.directory = Path(directory)
        self._parts = _parts(spec)
        for file in (CONFIG_NAME, WEIGHTS_NAME):
            if not (self.directory / file).is_file():
                raise self._error(f"has no {file}; name a directory that peft's save_pretrained wrote")
        try:
            config = read_json(self.directory / CONFIG_NAME)
            self._file = SafetensorsFile(self.directory / WEIGHTS_NAME)
        except CheckpointError as error:
            raise AdapterError(f"The adapter {name!r} cannot be read: {error}") from error
        self.base_name = str(config.get("base_model_name_or_path") or "")  # of the model it was trained on, for people
        for field, (plain, what) in _PLAIN.items():
            if config.get(field) not in plain:
                found = f"{field} is {config.get(field)!r:.80}"
                raise self._error(f"{what} ({found}), which is not run; train a plain LoRA")
        self._modules = self._check(config, spec)
        if self.rank > max_rank:
            raise self._error(f"has rank {self.rank}, but lora_max_rank is {max_rank}; raise it")

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(module.rank for module in self._modules.values())

    @cached_property
    def targets(self) -> frozenset[str]:
        """The matrices, of ``ModelSpec.layer_matrices``, that it changes in some layer."""
        return frozenset(
            name for (_, name), parts in self._parts.items() if any(part.module in self._modules for part in parts)
        )

    def rank_of(self, layer: int, matrix: str, rows: range) -> int:
        """Return the rank of ``dense``."""
        return sum(self._modules[part.module].rank for part in self._within(layer, matrix, rows))

    def dense(self, layer: int, matrix: str, rows: range) -> LowRank:
        """Return what is added to ``rows`` of a layer's matrix, the scale in ``b``.

        Linears that are stacked there have ranks of their own, side by side, and ``b`` is zero where they do not meet.
        """
        parts, columns = self._within(layer, matrix, rows), self._parts[layer, matrix][0].columns
        rank, at = self.rank_of(layer, matrix, rows), 0
        found = LowRank(np.zeros((rank, columns), np.float32), np.zeros((len(rows), rank), np.float32))
        for part in parts:
            low, end = self.low_rank(part.module), at + self._modules[part.module].rank
            first, last = max(part.first, rows.start), min(part.first + part.rows, rows.stop)
            found.a[at:end] = low.a
            found.b[first - rows.start : last - rows.start, at:end] = low.b[first - part.first : last - part.first]
            at = end
        return found

    def stacked(self, layer: int, matrix: str) -> list[tuple[int, LowRank]]:
        """Return (first row in the layer's matrix, what is added from there on) of each linear that it changes."""
        parts = self._within(layer, matrix, range(1 << 62))
        return [(part.first, self.low_rank(part.module)) for part in parts]

    def low_rank(self, module: str) -> LowRank:
        """Return the two matrices of a linear, the scale in ``b``. Raises AdapterError if they are not finite."""
        a, b = (self._file.read(self._tensors[module][half]) for half in "AB")
        b *= np.float32(self._modules[module].scale)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise self._error(f"has values of {module} that are not finite")
        return LowRank(a, b)

    def _within(self, layer: int, matrix: str, rows: range) -> list[_Part]:
        """Return the linears it changes that have some of ``rows``."""
        return [
            part
            for part in self._parts[layer, matrix]
            if part.module in self._modules and part.first < rows.stop and part.first + part.rows > rows.start
        ]

    # --- checks ---------------------------------------------------------------------------------------

    @cached_property
    def _tensors(self) -> dict[str, dict[str, str]]:
        """Linear of the checkpoint → half (A or B) → name of its tensor."""
        found: dict[str, dict[str, str]] = {}
        for name in self._file.names():
            match = _TENSOR.fullmatch(name)
            if match is None:
                raise self._error(f"has the tensor {name!r:.120}, which belongs to no linear of the decoder's layers")
            found.setdefault(match["module"], {})[match["half"]] = name
        return found

    def _check(self, config: Mapping[str, Any], spec: ModelSpec) -> dict[str, _Module]:
        linears = {part.module: part for parts in self._parts.values() for part in parts}
        modules = {}
        for module, halves in self._tensors.items():
            part = linears.get(module)
            if part is None:
                raise self._other_base(module, spec)
            if len(halves) < 2:
                raise self._error(f"has only one of the two matrices of {module}")
            (rank, columns), (rows, other) = (self._shape(halves[half]) for half in "AB")
            if (rows, columns) != (part.rows, part.columns) or rank != other or rank < 1:
                raise self._error(
                    f"has matrices of {[rank, columns]} and {[rows, other]} for {module}, but the engine's is "
                    f"{[part.rows, part.columns]}: it was trained on another model"
                )
            modules[module] = self._module(config, module, rank)
        named = {module for module in linears if _is_target(self, config, module)}
        for module in sorted(named ^ modules.keys()):
            what = "has no matrices for" if module in named else "does not name in its target_modules"
            raise self._error(f"{what} {module}; it is not whole, or it was trained on another model")
        if not modules:
            raise self._error("changes no linear of this model")
        return modules

    def _shape(self, tensor: str) -> tuple[int, int]:
        shape = self._file.shape(tensor)
        if len(shape) != 2 or self._file.dtype(tensor) not in ("F32", "F16", "BF16"):
            raise self._error(f"has the tensor {tensor} of {self._file.dtype(tensor)} {list(shape)}, expected a matrix")
        return shape[0], shape[1]

    def _module(self, config: Mapping[str, Any], module: str, rank: int) -> _Module:
        """Return a module with its rank and alpha, which the first pattern that fits gives, as in peft."""
        try:
            own_rank = _of_pattern(config.get("rank_pattern"), module, config.get("r"))
            alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
            is_number = type(alpha) in (int, float) and math.isfinite(alpha)
        except (re.error, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise self._error(
                f"has ranks or alphas in its configuration that cannot be read ({first_line(error)})"
            ) from error
        if type(own_rank) is not int or own_rank != rank:
            raise self._error(f"has matrices of rank {rank} for {module}, but its configuration says {own_rank!r:.40}")
        if not is_number:
            raise self._error(f"has a lora_alpha of {alpha!r:.40} for {module}, expected a number")
        return _Module(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))

    def _other_base(self, module: str, spec: ModelSpec) -> AdapterError:
        match = _LAYER.match(module)
        if match and int(match[1]) >= spec.num_layers:
            return self._error(
                f"changes layer {int(match[1])}, but the engine's model has {spec.num_layers}: it was trained on "
                "another model"
            )
        return self._error(
            f"changes {module!r:.120}, which is no linear of the layers of the engine's {spec.architecture}: it was "
            "trained on another model, or targets what is not run"
        )

    def _error(self, what: str) -> AdapterError:
        return AdapterError(f"The adapter {self.name!r} of {self.directory} {what}.")


def _parts(spec: ModelSpec) -> dict[tuple[int, str], list[_Part]]:
    """Return the linears of the checkpoint, by layer and matrix, in the order of their rows."""
    shapes, found = spec.shapes(), {}
    for layer in spec.layers:
        stacks = {"qkv": layer.qkv, "o": layer.output, "gate_up": layer.gate_up, "down": layer.down}
        for matrix, linear in stacks.items():
            parts, first = [], 0
            is_of_experts = layer.num_experts > 0 and matrix in ("gate_up", "down")  # which adapters do not change
            for name in () if is_of_experts else linear.parts:
                rows, columns = shapes[name]
                parts.append(_Part(name.removesuffix(".weight"), first, rows, columns))
                first += rows
            found[layer.index, matrix] = parts
    return found


def _is_target(adapter: LoraAdapter, config: Mapping[str, Any], module: str) -> bool:
    """Return whether the configuration has ``module``, a linear of the decoder, among its targets, as peft decides."""
    try:
        if _matches(config.get("exclude_modules") or (), module):
            return False
        targets = config.get("target_modules") or ()
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return True
        layers = config.get("layers_to_transform")
        if not _matches(targets, module) or layers is None or isinstance(targets, str):
            return _matches(targets, module)
        match = _LAYER.match(module)
        return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    except (re.error, TypeError, RecursionError) as error:
        raise adapter._error(f"has targets in its configuration that cannot be read ({first_line(error)})") from error


def _matches(targets: str | Iterable[str], module: str) -> bool:
    """``targets``: a pattern of the whole name, or ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


# --- the adapters of an engine ----------------------------------------------------------------------------


def adapter_paths(entries: Iterable[str]) -> dict[str, Path]:
    """Return name → directory of entries "name:directory". Raises ConfigurationError."""
    found: dict[str, Path] = {}
    for entry in entries:
        name, colon, path = entry.partition(":")
        if not (_NAME.fullmatch(name) and colon and path):
            raise ConfigurationError(
                f"lora_adapters has {entry!r:.120}, expected NAME:DIRECTORY; a name has letters, digits, '.', '_', '-'."
            )
        if name in found:
            raise ConfigurationError(f"lora_adapters has two adapters named {name!r}; give each a name of its own.")
        found[name] = expand_user(path)
    return found


def read_adapters(entries: Iterable[str], spec: ModelSpec, max_rank: int) -> tuple[LoraAdapter, ...]:
    """Return the adapters of a configuration, checked. Raises ConfigurationError or AdapterError."""
    return tuple(LoraAdapter(name, path, spec, max_rank) for name, path in adapter_paths(entries).items())
