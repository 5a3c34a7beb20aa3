"""The methods of ``edgellm quantize``."""

from __future__ import annotations

from engine_core.formats import weight_formats

SMOOTHQUANT = "int8_smoothquant"  # int8 whose outliers of the activations are moved into the weights
# A format each, but SmoothQuant's, which writes int8 too.
METHODS = (*(name for name in weight_formats.NAMES if name != "fp32"), SMOOTHQUANT)
GROUP_SIZES = (32, 64, 128)  # columns that may share a scale, for integers
