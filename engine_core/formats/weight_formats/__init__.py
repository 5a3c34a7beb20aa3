"""The weight formats: one file a format, which defines ``FORMAT``, and its name in ``NAMES``.

A format says how a weight [rows, columns] is rounded, stored and restored. Which formats a backend runs is for the
backend to say. Importing this package imports no numpy: commands and parameters need the names only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine_core.formats.weight_formats.base import FloatFormat, WeightFormat

# Each is a module of this package.
NAMES = (
    "fp32",
    "fp16",
    "fp8",
    "int8",
    "int4",
    "int4_awq",
    "nvfp4",
)


def weight_format(name: str) -> WeightFormat:
    """Return the format ``name``. Raises KeyError for a name that is not in NAMES."""
    if name not in NAMES:
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}").FORMAT


def float_format(name: str) -> FloatFormat:
    """Return the format ``name``, one of those without scales. Raises KeyError for another."""
    from engine_core.formats.weight_formats.base import FloatFormat

    found = weight_format(name)
    if not isinstance(found, FloatFormat):
        raise KeyError(name)
    return found


def preference(name: str) -> tuple[float, bool]:
    """Return a sort key that puts the best of several variants first: the smallest, calibrated before rounded.

    Names that this version does not know come last.
    """
    if name not in NAMES:
        return float("inf"), True
    found = weight_format(name)
    return found.bits_per_weight, not found.needs_calibration
