"""Idefics 3 and the first SmolVLM (``Idefics3Config``): as SmolVLM 2, but for the names."""

import dataclasses

from engine_core.models.families import smolvlm

FAMILY = dataclasses.replace(smolvlm.FAMILY, architecture="Idefics3ForConditionalGeneration", model_type="idefics3")
