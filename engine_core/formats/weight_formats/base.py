"""The description that every weight format gives of itself, and the formats whose weights are plain floats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from engine_core.formats.number_formats import QuantizedTensor, ScaledFloat

Shape = tuple[int, ...]
Quantized = TypeVar("Quantized", QuantizedTensor, ScaledFloat)  # what a format rounds weights to


@dataclass(frozen=True)
class Rounding:
    """The way a weight is rounded to a format, which reads the fields that concern it.

    ``group_size``: columns that share a scale, 0 = all of a row. ``scale_type``: fp16, bf16 or fp32, to which scales
    are rounded before the weights, so that the weights make up for it. ``symmetric``: whether there are no zero points.
    ``ratios``: [rows, groups] or one number, what is left of each group's range before values are clipped; None = all.
    ``peak``: the largest magnitude of all parts that share a tensor's scale, or [rows, 1], of each row; None = that of
    the weights given.
    """

    group_size: int = 0
    scale_type: str = "fp32"
    symmetric: bool = True
    ratios: np.ndarray | np.float32 | None = None
    peak: float | np.ndarray | None = None


@dataclass(frozen=True)
class WeightFormat(ABC):
    """One format of the weights of linear layers. Shapes are [rows, columns]; the columns are multiplied and summed."""

    name: str
    kind: str  # how weights lie in memory; formats of one kind differ in how they are rounded
    bits: int  # of a weight, scales not counted
    group_size: int = 0  # columns that share a scale unless another size is asked for; 0 = all of a row
    has_fixed_group: bool = False  # whether ``group_size`` belongs to the format, so that no other is built
    scale_bytes: int = 0  # of a group's scale in a checkpoint; 0 = there are none
    needs_calibration: bool = False  # whether its weights are made with sample texts, by 'edgellm quantize' or others
    least_capability: int = 0  # compute capability from which GPUs compute with the type (89 = 8.9); 0 = any

    # --- sizes ----------------------------------------------------------------------------------------

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight of a long row, its share of a scale counted."""
        return self.bits + (8 * self.scale_bytes / self.group_size if self.group_size else 0)

    def num_groups(self, columns: int, group_size: int | None = None) -> int:
        """Return the scales of a row. ``group_size``: None = the format's own, 0 = all of a row."""
        size = self.group_size if group_size is None else group_size
        return -(-columns // size) if size else 1

    def nbytes(self, shape: tuple[int, int], group_size: int | None = None) -> int:
        """Return the bytes of a weight with its scales; see ``num_groups``."""
        rows, columns = shape
        return rows * (-(-columns * self.bits // 8) + self.num_groups(columns, group_size) * self.scale_bytes)

    # --- kernels --------------------------------------------------------------------------------------

    @property
    def kernel_defines(self) -> dict[str, int]:
        """Macros that specialise the packed kernels (cuda/kernels/packed.cuh) for the format."""
        return {"BITS": self.bits}

    def in_groups(self, group_size: int, asymmetric: bool = False, half_scales: bool = False) -> WeightFormat:
        """Return the format of an engine whose manifest says ``group_size``, where that changes how weights lie.

        ``asymmetric``: whether its groups have zero points; ``half_scales``: whether its scales are fp16 beside bf16.
        """
        return self

    # --- values ---------------------------------------------------------------------------------------

    @abstractmethod
    def pack(self, values: np.ndarray) -> np.ndarray:
        """Return the stored form of quantized values or floats [..., n]; a row is a whole number of bytes."""

    @abstractmethod
    def unpack(self, stored: np.ndarray, count: int) -> np.ndarray:
        """Return [..., count], what ``pack`` was given."""


@dataclass(frozen=True)
class FloatFormat(WeightFormat):
    """Weights that are floats of their own, without scales."""

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(f"float{self.bits}")

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Return ``values`` as this type. A value that is too large becomes infinite."""
        with np.errstate(over="ignore"):
            return values.astype(self.dtype)

    def unpack(self, stored: np.ndarray, count: int) -> np.ndarray:
        """Return float32 [..., count]."""
        return stored[..., :count].astype(np.float32)


@dataclass(frozen=True)
class QuantizedFormat(WeightFormat, Generic[Quantized]):
    """A format with scales. 'edgellm quantize' writes it in the layout of compressed-tensors."""

    layout: str = ""  # compressed-tensors' name of it

    @abstractmethod
    def quantize(self, weights: np.ndarray, rounding: Rounding) -> Quantized:
        """Return ``weights``, float32 [rows, columns], rounded to the nearest values of the format."""

    @abstractmethod
    def tensors(self, name: str, shape: tuple[int, int], rounding: Rounding) -> dict[str, tuple[str, Shape]]:
        """Return the tensors of the weight ``name`` in the order of ``store``: name → (safetensors type, shape)."""

    @abstractmethod
    def store(self, name: str, quantized: Quantized, rounding: Rounding) -> dict[str, np.ndarray]:
        """Return the tensors of a weight that ``quantize`` made with ``rounding``."""

    @abstractmethod
    def config(self, rounding: Rounding) -> dict:
        """Return what config.json says of the weights: compressed-tensors' QuantizationArgs."""


SCALE_TYPES = {"fp16": "F16", "bf16": "BF16"}  # as safetensors spells them


def grouped(weights: np.ndarray, group_size: int) -> np.ndarray:
    """Return [rows, groups, group_size], the last group filled up with zeros."""
    rows, columns = weights.shape
    groups = -(-columns // group_size)
    if columns != groups * group_size:
        padded = np.zeros((rows, groups * group_size), dtype=weights.dtype)
        padded[:, :columns] = weights
        weights = padded
    return weights.reshape(rows, groups, group_size)
