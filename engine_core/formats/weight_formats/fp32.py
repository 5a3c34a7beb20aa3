"""Weights in IEEE single precision."""

from engine_core.formats.weight_formats.base import FloatFormat

FORMAT = FloatFormat(name="fp32", kind="fp32", bits=32)
