"""8-bit integers, rounded to nearest: the value of largest magnitude becomes ±127, and -128 is not used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine_core.formats.weight_formats.integers import IntegerFormat


@dataclass(frozen=True)
class Int8(IntegerFormat):
    """See the module."""

    def symmetric_scales(self, grouped: np.ndarray) -> np.ndarray:
        return (np.abs(grouped).max(axis=2) / np.float32(127)).astype(np.float32)


FORMAT = Int8(name="int8", kind="int8", bits=8, lowest=1)
