"""The limits of an engine's images: how many a prompt may have, and how many tokens each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from engine_core.config import EngineConfig
from engine_core.errors import ConfigurationError
from engine_core.models.spec import ModelSpec
from engine_core.models.vision import VisionSpec
from engine_core.vision.preprocess import PatchSettings

_USUAL_TOKENS = 256  # a picture of 512 x 512 pixels in Qwen3-VL


@dataclass(frozen=True)
class ImageLimits:
    """``spec``: the encoder with the settings of its processor within the limits."""

    spec: VisionSpec
    max_images: int  # of a prompt

    @property
    def most_tokens(self) -> int:
        """The tokens of the largest image."""
        return self.spec.most_tokens


def image_limits(model: ModelSpec, config: EngineConfig, max_context: int) -> ImageLimits | None:
    """Return the limits of an engine; None: it takes no images.

    The model's own processor decides how many tokens an image has, up to ``max_image_tokens``: beyond, an image is
    scaled down further. Where that is 0, it is half of ``max_context``, and ``_USUAL_TOKENS`` at most for processors
    that keep the size of a picture: theirs takes minutes on a CPU. Raises ConfigurationError for fewer tokens than any
    image has.
    """
    if model.vision is None or not config.max_images:
        return None
    spec = model.vision
    most = config.max_image_tokens
    if not most:
        most = min(max_context // 2, _USUAL_TOKENS if isinstance(spec.processor, PatchSettings) else max_context)
        most = max(most, spec.least_tokens)
    if most < spec.least_tokens:
        raise ConfigurationError(
            f"max_image_tokens is {most}, but an image has at least {spec.least_tokens} tokens in this model; set it "
            "to that or more, or to 0 for the model's own limit."
        )
    spec = dataclasses.replace(spec, processor=spec.processor.within(most))
    return ImageLimits(spec, config.max_images)
