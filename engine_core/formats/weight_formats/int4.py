"""4-bit integers, rounded to nearest: the value of largest magnitude becomes -8, so that all 16 values are used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine_core.formats.weight_formats.integers import IntegerFormat


@dataclass(frozen=True)
class Int4(IntegerFormat):
    """See the module."""

    def symmetric_scales(self, grouped: np.ndarray) -> np.ndarray:
        peak = np.take_along_axis(grouped, np.abs(grouped).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
        return (peak / np.float32(-8)).astype(np.float32)


FORMAT = Int4(name="int4", kind="int4", bits=4, group_size=128, has_zero_points=True)
