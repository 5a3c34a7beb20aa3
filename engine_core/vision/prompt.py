"""Images in a prompt: the text that stands for one, as the model's processor writes it, and where its tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine_core.models.vision import SIGLIP, VisionSpec
from engine_core.vision.images import Clip, Image
from engine_core.vision.preprocess import num_tokens
from engine_core.vision.video import Shown, all_pictures, video_text

# Markers of Idefics3 and SmolVLM around the tokens of a tile.
_AROUND, _WHOLE = "<fake_token_around_image>", "<global-img>"
_VISION = "<|vision_start|>", "<|vision_end|>"  # of Qwen3-VL, around the tokens of frames


@dataclass(frozen=True)
class PlacedImage:
    """An image of a prompt, or frames of a video that are encoded at once. ``positions``: int32 [tokens], ascending,
    where its tokens stand there."""

    image: Image | Clip
    positions: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.positions)


def shown_text(spec: VisionSpec, placeholders: tuple[str, str], shown: Shown) -> str:
    """Return what takes the place of the placeholder of an image or a video.

    ``placeholders``: the texts of the tokens whose embeddings are replaced by the features of an image and of a frame
    of a video. Raises ValueError for a shape that the model's processor refuses.
    """
    texts = [_picture_text(spec, placeholders[shown.is_video], each) for each in shown.pictures(spec)]
    if not shown.is_video:
        return texts[0]
    if spec.kind != SIGLIP:
        texts = [f"{_VISION[0]}{text}{_VISION[1]}" for text in texts]
    return video_text(spec, texts, shown)


def _picture_text(spec: VisionSpec, placeholder: str, picture: Image | Clip) -> str:
    tokens = num_tokens(picture, spec.processor)
    if spec.kind != SIGLIP:
        return placeholder * tokens
    is_cut = not isinstance(picture, Clip)
    _, rows, columns = spec.processor.grid(picture.height, picture.width) if is_cut else (1, 0, 0)
    tile = placeholder * spec.part_tokens(tokens)
    whole = f"{_AROUND}{_WHOLE}{tile}{_AROUND}"
    if not rows:
        return whole
    parts = []
    for row in range(rows):
        parts += [f"{_AROUND}<row_{row + 1}_col_{column + 1}>{tile}" for column in range(columns)]
        parts.append("\n")
    return "".join([*parts, "\n", whole])


def placed(token_ids: np.ndarray, shown: Sequence[Shown], spec: VisionSpec) -> tuple[PlacedImage, ...] | None:
    """Return the images, and the frames of videos, with the places of their tokens in ``token_ids``, int32 [n].

    None: the prompt has more or fewer of these tokens than the images have.
    """
    is_token = (token_ids == spec.image_token_id) | (token_ids == spec.frame_token_id)
    positions = np.flatnonzero(is_token).astype(np.int32)
    images = list(all_pictures(shown, spec))
    counts = [num_tokens(image, spec.processor) for image in images]
    if sum(counts) != len(positions):
        return None
    ends = np.cumsum(counts)
    return tuple(PlacedImage(image, positions[end - count : end]) for image, count, end in zip(images, counts, ends))
