"""Mistral Small 3.1 and later and Ministral 3, which take images, without them; ``Mistral3Config``."""

from engine_core.models.families.family import TextPart

TEXT_PART = TextPart("Mistral3ForConditionalGeneration", "mistral3", text_types=("mistral", "ministral", "ministral3"))
