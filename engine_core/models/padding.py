"""Sizes that kernels do not take are rounded up, and what is added is zeros, which change no result."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def round_up(size: int, grain: int) -> int:
    """Return the least multiple of ``grain`` that is not below ``size``."""
    return -(-size // grain) * grain


@dataclass(frozen=True)
class Axis:
    """The places of values along an axis filled up with zeros: ``places``, int64 [n], ascending, below ``size``."""

    places: np.ndarray
    size: int

    @classmethod
    def at_the_end(cls, size: int, grain: int) -> Axis:
        """Return the axis of ``size`` values that is filled up at its end."""
        return cls(np.arange(size), round_up(size, grain))

    @classmethod
    def of_head(cls, head_dim: int, rotated: int, grain: int) -> Axis:
        """Return the axis of a head whose first ``rotated`` elements RoPE turns.

        RoPE turns an element of their first half with one of the second, so each half is filled up by itself.
        """
        turned = round_up(rotated, grain)
        rest = np.arange(rotated, head_dim) - rotated + turned
        half = np.arange(rotated // 2)
        size = round_up(turned + head_dim - rotated, grain)
        return cls(np.concatenate([half, turned // 2 + half, rest]), size)

    def repeated(self, count: int) -> Axis:
        """Return ``count`` of these, one after the other."""
        starts = self.size * np.arange(count)[:, None]
        return Axis((starts + self.places).ravel(), self.size * count)

    @property
    def is_whole(self) -> bool:
        """True if nothing is added."""
        return len(self.places) == self.size

    def spread(self, values: np.ndarray, axis: int, fill: int = 0) -> np.ndarray:
        """Return ``values`` with ``fill`` at the places that are added along ``axis``."""
        if self.is_whole:
            return values
        shape = list(values.shape)
        shape[axis] = self.size
        found = np.full(shape, fill, dtype=values.dtype)
        found[(slice(None),) * axis + (self.places,)] = values
        return found

    def sources(self) -> np.ndarray:
        """Return int64 [size]: the value that is at each place, or the number of values where something is added."""
        return self.spread(np.arange(len(self.places)), 0, len(self.places))
