"""The methods of ``edgellm quantize``: what each writes for a weight, and what config.json says about it.

The layout is that of compressed-tensors (github.com/vllm-project/compressed-tensors), which transformers, vLLM and
SGLang read: a method here is a "preset scheme" there (W4A16, W8A16, W8A8, FP8_DYNAMIC, NVFP4A16).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine_core.errors import BuildError
from engine_core.formats.number_formats import QuantizedTensor, to_16_bit
from engine_core.formats.weight_formats import NAMES, weight_format
from engine_core.formats.weight_formats.base import (
    SCALE_TYPES,
    QuantizedFormat,
    Rounding,
    Shape,
    WeightFormat,
)
from engine_core.formats.weight_formats.integers import IntegerFormat
from engine_core.quantize.methods import GROUP_SIZES, METHODS, SMOOTHQUANT

_INT_QUANTIZED = "int-quantized"  # the layout of int8 weights that int8 activations are multiplied with: not packed


@dataclass(frozen=True)
class Scheme:
    """``group_size``: columns that share a scale, 0 = all of a row. ``dtype``: fp16 or bf16, of scales and the rest."""

    method: str
    group_size: int
    symmetric: bool
    dtype: str

    @property
    def format(self) -> WeightFormat:
        return weight_format("int8" if self.method == SMOOTHQUANT else self.method)

    @property
    def quantized(self) -> QuantizedFormat | None:
        """The format, or None if the weights stay floats."""
        return self.format if isinstance(self.format, QuantizedFormat) else None

    @property
    def is_calibrated(self) -> bool:
        return self.method == SMOOTHQUANT or self.format.needs_calibration

    @property
    def layout(self) -> str:
        return _INT_QUANTIZED if self.method == SMOOTHQUANT else self._quantized.layout

    @property
    def stored(self) -> str:
        return SCALE_TYPES[self.dtype]

    @property
    def _quantized(self) -> QuantizedFormat:
        assert self.quantized is not None, f"{self.method} weights are floats"
        return self.quantized

    def rounding(self, ratios: np.ndarray | np.float32 | None = None, peak: float | None = None) -> Rounding:
        return Rounding(self.group_size, self.dtype, self.symmetric, ratios, peak)

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raises BuildError for a weight whose columns are not a whole number of groups."""
        group = self.group_size
        if group and shape[1] % group:
            fitting = [size for size in GROUP_SIZES if shape[1] % size == 0]
            advice = " or ".join(map(str, fitting)) if fitting else f"{_either(_has_rows)}, which have no groups"
            raise BuildError(
                f"{name} has {shape[1]} columns, which are not a multiple of the group of {group}; choose {advice}."
            )

    def tensors(self, name: str, shape: tuple[int, int]) -> dict[str, tuple[str, Shape]]:
        """Name → (type, shape) of what ``encode`` gives for the weight ``name``, in the order of writing."""
        if self.layout == _INT_QUANTIZED:
            return {name: ("I8", shape), f"{name}_scale": (self.stored, (shape[0], 1))}
        return self._quantized.tensors(name, shape, self.rounding())

    def encode(
        self,
        name: str,
        weights: np.ndarray,
        ratios: np.ndarray | None,
        peak: float,
        on_rounded: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> dict[str, np.ndarray]:
        """Return the tensors of one weight, float32 [rows, columns]. ``ratios``, ``peak``: see ``Rounding``.

        ``on_rounded`` gets the weights before and after they are rounded.
        """
        rounding = self.rounding(ratios, peak)
        quantized = self._quantized.quantize(weights, rounding)
        if on_rounded is not None:
            on_rounded(weights, quantized.dequantize())
        if self.layout == _INT_QUANTIZED:
            assert isinstance(quantized, QuantizedTensor)
            signed = (quantized.values ^ 0x80).view(np.int8)
            return {name: signed, f"{name}_scale": to_16_bit(quantized.scales, self.dtype)}
        return self._quantized.store(name, quantized, rounding)

    def round(self, weights: np.ndarray, ratios: np.ndarray | np.float32 | None = None) -> QuantizedTensor:
        """Round to the nearest integers; scales are rounded to 16 bits first, so that the quantized values make up for
        it."""
        assert isinstance(self.format, IntegerFormat)
        return self.format.quantize(weights, self.rounding(ratios))

    def config(self, ignore: list[str]) -> dict:
        """Return ``quantization_config`` of config.json. ``ignore``: linear modules that stay as they are."""
        weights = self._quantized.config(self.rounding())
        activations = None
        if self.layout in (_INT_QUANTIZED, "float-quantized"):
            activations = {"num_bits": 8, "type": weights["type"], "symmetric": True}
            activations |= {"strategy": "token", "dynamic": True}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": self.layout,
            "config_groups": {"group_0": {**group, "output_activations": None, "format": self.layout}},
            "ignore": ignore,
        }


def make_scheme(method: str, group_size: int, symmetric: bool, dtype: str) -> Scheme:
    """Raises BuildError for a combination that does not exist."""
    if method not in METHODS:
        raise BuildError(f"There is no method {method!r}; choose one of {', '.join(METHODS)}.")
    found = Scheme(method, 0, True, dtype).format
    is_grouped = isinstance(found, IntegerFormat) and not found.has_fixed_group and method != SMOOTHQUANT
    if group_size and not is_grouped:
        raise BuildError(f"{method} has no group size of one's own choice; leave it out.")
    if group_size not in (0, *GROUP_SIZES):
        raise BuildError(f"The group size is {group_size}, expected one of {', '.join(map(str, GROUP_SIZES))}.")
    if not symmetric and not _has_zero_points(found):
        raise BuildError(f"{method} has no zero points; {_either(_has_zero_points)} can have them.")
    return Scheme(method, group_size or found.group_size, symmetric, dtype if method != "fp16" else "fp16")


def _has_rows(found: WeightFormat) -> bool:
    return isinstance(found, QuantizedFormat) and not found.group_size


def _has_zero_points(found: WeightFormat) -> bool:
    return isinstance(found, IntegerFormat) and found.has_zero_points


def _either(condition: Callable[[WeightFormat], bool]) -> str:
    """Return "a or b": the formats of which ``condition`` is true."""
    return " or ".join(name for name in NAMES if condition(weight_format(name)))
