"""Pictures for models that see: the image of a request, and what a model's processor makes of it."""

from engine_core.vision.images import Image

__all__ = ["Image"]
