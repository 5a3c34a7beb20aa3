"""Gemma 3 with images, from 4B on, without them; ``Gemma3Config``."""

from engine_core.models.families.family import TextPart

TEXT_PART = TextPart("Gemma3ForConditionalGeneration", "gemma3", text_types=("gemma3_text",))
