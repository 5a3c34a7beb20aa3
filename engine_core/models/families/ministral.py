"""Ministral; ``MinistralConfig``. As Mistral, but layer_types may name layers without the window."""

import dataclasses

from engine_core.models.families import mistral
from engine_core.models.families.family import FULL, SLIDING
from engine_core.models.fields import Fields


def layer_kinds(fields: Fields, count: int) -> list[str]:
    """Return the kinds of ``count`` layers: all have the window, or none where it is null."""
    has_window = fields.whole("sliding_window", 4096, optional=True) is not None
    return [SLIDING if has_window else FULL] * count


FAMILY = dataclasses.replace(
    mistral.FAMILY,
    architecture="MinistralForCausalLM",
    model_type="ministral",
    head_dim_needed=True,
    reads_layer_types=True,
    layer_kinds=layer_kinds,
)
