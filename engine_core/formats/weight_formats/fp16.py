"""Weights in 16 bits: IEEE half precision, or bfloat16 where a backend keeps a checkpoint's own type."""

from engine_core.formats.weight_formats.base import FloatFormat

FORMAT = FloatFormat(name="fp16", kind="fp16", bits=16)
