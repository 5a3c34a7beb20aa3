"""The errors of weights that were quantized already, and are dequantized and rounded anew."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class RoundingErrors:
    """Adds up the errors of matrices, by name. The relative error is the root of the squared error over the squares."""

    _sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, before: np.ndarray, after: np.ndarray) -> None:
        """Count a block of rows of the matrix ``name``: float32, dequantized and rounded anew."""
        sums = self._sums.setdefault(name, [0.0, 0.0])
        sums[0] += float(np.square(after - before).sum(dtype=np.float64))
        sums[1] += float(np.square(before).sum(dtype=np.float64))

    def __len__(self) -> int:
        return len(self._sums)

    def relative(self) -> dict[str, float]:
        """Return matrix → relative error, rounded to what is worth keeping."""
        return {
            name: float(f"{math.sqrt(error / squares) if squares else 0.0:.4g}")
            for name, (error, squares) in self._sums.items()
        }

    def sentence(self, source: str, weight_format: str) -> str:
        """Return how many matrices were rounded to ``weight_format``, and how much they lost."""
        errors = self.relative()
        worst = max(errors, key=lambda name: errors[name])
        mean = sum(errors.values()) / len(errors)
        return (
            f"{len(errors)} quantized matrices of {source} were dequantized and rounded anew to {weight_format}: the "
            f"relative error is {100 * mean:.2f} % on average and {100 * errors[worst]:.2f} % in the worst, {worst}."
        )
