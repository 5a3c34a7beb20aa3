"""Preprocess images as a model's own processor does: resize, split into tiles or patches, normalize.

Two kinds of processors are known: those of Idefics3 and SmolVLM (``TileSettings``), and those of Qwen2-VL, Qwen2.5-VL
and Qwen3-VL (``PatchSettings``). Pixels are bit for bit those of transformers' PIL processors. Its torchvision
processors, which it takes where torchvision is installed, resize with other rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine_core.errors import CheckpointError, UnsupportedModelError
from engine_core.formats.json_file import read_json
from engine_core.models.fields import Fields
from engine_core.vision.images import Clip, Image

if TYPE_CHECKING:
    from PIL import Image as PillowImage

PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_MAX_TILED_EDGE = 4096  # pixels, to which the processor of tiles scales at most
_MAX_ASPECT = 200  # of an image in patches
_CHANNELS = 3
# Pillow's filters by their numbers, as in preprocessor_config.json.
_LANCZOS, _BICUBIC = 1, 3
_FILTERS = range(6)


@dataclass(frozen=True)
class Normalization:
    """The value of a channel is ``(level * scale - mean) / std``, with a level of 0 to 255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: float = 1 / 255

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Return float32 [..., 3, height, width] of uint8 [..., height, width, 3]."""
        table = _levels(self)
        values = np.empty((*pixels.shape[:-3], _CHANNELS, *pixels.shape[-3:-1]), np.float32)
        for index in np.ndindex(pixels.shape[:-3]):
            for channel in range(_CHANNELS):
                place = (*index, channel)
                np.take(table[channel], pixels[index][:, :, channel], out=values[place], mode="clip")
        return values


@lru_cache(maxsize=8)
def _levels(normalization: Normalization) -> np.ndarray:
    """Return float32 [3, 256], the value of each level, with the roundings of transformers."""
    scaled = (np.arange(256, dtype=np.float64) * normalization.scale).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None] for values in (normalization.mean, normalization.std))
    return (scaled - mean) / std


@dataclass(frozen=True)
class ProcessedImage:
    """An image as the encoder takes it.

    ``pixels``: of tiles float32 [tiles, 3, size, size], row by row and then the whole image in one tile; of patches
    float32 [rows * columns, 3 * temporal * patch * patch], those that are merged into one token one after another.
    ``grid``: (tiles, rows, columns), where one tile alone has 0 rows and 0 columns, or (1, rows, columns) of patches.
    ``tokens``: the embeddings that the language model gets for it, without the markers around them.
    """

    pixels: np.ndarray
    grid: tuple[int, int, int]
    tokens: int


@dataclass(frozen=True)
class TileSettings:
    """The processor of Idefics3 and SmolVLM: scale the longer edge, cut square tiles, add the whole image as a tile."""

    longest_edge: int  # pixels, to which the longer edge is scaled first
    tile_size: int  # pixels
    tile_tokens: int  # embeddings of a tile
    split: bool  # whether tiles are cut; without it the whole image is the only one
    resample: int  # a filter of Pillow
    normalization: Normalization

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the grid of an image of this size in pixels."""
        if not self.split:
            return 1, 0, 0
        height, width = _multiple_of_tile(*_scaled(height, width, self.longest_edge), self.tile_size)
        rows, columns = height // self.tile_size, width // self.tile_size
        return (1, 0, 0) if rows == columns == 1 else (rows * columns + 1, rows, columns)

    def tokens(self, height: int, width: int) -> int:
        """Return the embeddings of an image of this size in pixels."""
        return self.grid(height, width)[0] * self.tile_tokens

    def clip_tokens(self, height: int, width: int) -> int:
        """Return the embeddings of a frame of a video, which is never cut."""
        return self.tile_tokens

    @property
    def most_tokens(self) -> int:
        """The embeddings of the image that has the most."""
        longest = min(self.longest_edge, _MAX_TILED_EDGE)
        side = math.ceil((longest + longest % 2) / self.tile_size)  # the shorter edge is rounded up to an even one
        return self.tile_tokens * (side * side + 1 if self.split and side > 1 else 1)

    def within(self, tokens: int) -> TileSettings:
        """Return settings of which no image has more than ``tokens`` embeddings. Raises ValueError if a tile has."""
        if tokens < self.tile_tokens:
            raise ValueError(f"An image has at least {self.tile_tokens} tokens, but {tokens} are allowed.")
        if self.most_tokens <= tokens:
            return self
        longest = math.isqrt(max(1, tokens // self.tile_tokens - 1)) * self.tile_size
        return dataclasses.replace(self, longest_edge=longest - longest % 2)

    def process(self, image: Image) -> ProcessedImage:
        size = self.tile_size
        scaled = _resize(_to_pillow(image), *_scaled(image.height, image.width, self.longest_edge), self.resample)
        grid = self.grid(image.height, image.width)
        if not self.split:
            scaled = _resize(scaled, size, size, self.resample)
            return self._processed(np.asarray(scaled)[None], grid)
        scaled = _resize(scaled, *_multiple_of_tile(scaled.height, scaled.width, size), self.resample)
        count, rows, columns = grid
        tiles = np.empty((count, size, size, _CHANNELS), np.uint8)
        if count > 1:
            cut = np.asarray(scaled).reshape(rows, size, columns, size, _CHANNELS).swapaxes(1, 2)
            tiles[:-1] = cut.reshape(rows * columns, size, size, _CHANNELS)
            scaled = _resize(scaled, size, size, self.resample)
        tiles[-1] = np.asarray(scaled)
        return self._processed(tiles, grid)

    def process_clip(self, clip: Clip) -> ProcessedImage:
        (frame,) = clip.frames
        scaled = _resize(_to_pillow(frame), *_scaled(frame.height, frame.width, self.longest_edge), self.resample)
        return self._processed(
            np.asarray(_resize(scaled, self.tile_size, self.tile_size, self.resample))[None], (1, 0, 0)
        )

    def _processed(self, tiles: np.ndarray, grid: tuple[int, int, int]) -> ProcessedImage:
        return ProcessedImage(self.normalization.apply(tiles), grid, len(tiles) * self.tile_tokens)


@dataclass(frozen=True)
class PatchSettings:
    """The processor of Qwen2-VL and its successors: scale to whole merged patches, within limits of pixels."""

    patch_size: int  # pixels
    merge_size: int  # patches of a side that become one embedding
    temporal_size: int  # frames of a patch, among which a picture is repeated
    min_pixels: int
    max_pixels: int
    resample: int  # a filter of Pillow
    normalization: Normalization

    @property
    def factor(self) -> int:
        """The side of an embedding, in pixels."""
        return self.patch_size * self.merge_size

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width, in pixels, to which an image is scaled. Raises ValueError for a long strip."""
        if max(height, width) > _MAX_ASPECT * min(height, width):
            raise ValueError(
                f"An image is {width} × {height}, but the longer side may be {_MAX_ASPECT} times the shorter at most."
            )
        factor = self.factor
        rows, columns = round(height / factor) * factor, round(width / factor) * factor
        if rows * columns > self.max_pixels:
            shrink = math.sqrt((height * width) / self.max_pixels)
            rows = max(factor, math.floor(height / shrink / factor) * factor)
            columns = max(factor, math.floor(width / shrink / factor) * factor)
        elif rows * columns < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
        return rows, columns

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the grid of an image of this size in pixels. Raises ValueError for a long strip."""
        scaled_height, scaled_width = self.size(height, width)
        return 1, scaled_height // self.patch_size, scaled_width // self.patch_size

    def tokens(self, height: int, width: int) -> int:
        """Return the embeddings of an image of this size in pixels. Raises ValueError for a long strip."""
        _, rows, columns = self.grid(height, width)
        return rows * columns // self.merge_size**2

    def clip_tokens(self, height: int, width: int) -> int:
        """Return the embeddings of as many frames of a video as a patch has. Raises ValueError for a long strip."""
        return self.tokens(height, width)

    @property
    def most_tokens(self) -> int:
        """An upper bound of the embeddings of an image; below 200 it is that of a strip one embedding high."""
        factor = self.factor
        strip = math.isqrt(_MAX_ASPECT * self.max_pixels) // factor
        # Both sides of what is scaled up to min_pixels are rounded up.
        longer = math.sqrt(_MAX_ASPECT * self.min_pixels) / factor
        scaled_up = math.floor(self.min_pixels / factor**2 + longer + longer / _MAX_ASPECT + 1)
        return max(self.max_pixels // factor**2, strip, scaled_up)

    def within(self, tokens: int) -> PatchSettings:
        """Return settings of which no image has more than ``tokens`` embeddings, but for strips that have one row.

        Raises ValueError if ``tokens`` is below 1.
        """
        if tokens < 1:
            raise ValueError(f"An image has at least 1 token, but {tokens} are allowed.")
        if self.most_tokens <= tokens:
            return self
        max_pixels = min(self.max_pixels, tokens * self.factor**2)
        # What is scaled up is rounded up; far below the upper limit it stays within it.
        return dataclasses.replace(self, max_pixels=max_pixels, min_pixels=min(self.min_pixels, max_pixels // 4))

    def process(self, image: Image) -> ProcessedImage:
        """Raises ValueError for a long strip."""
        return self.process_clip(Clip((image,), (image.height, image.width)))

    def process_clip(self, clip: Clip) -> ProcessedImage:
        """The last of fewer frames than a patch has is repeated. Raises ValueError for a long strip."""
        _, rows, columns = grid = self.grid(*clip.size)
        patch, merge, count = self.patch_size, self.merge_size, self.temporal_size
        patches = np.empty(
            (rows // merge, columns // merge, merge, merge, _CHANNELS, count, patch, patch), dtype=np.float32
        )
        for index, frame in enumerate(clip.frames):
            scaled = _resize(_to_pillow(frame), rows * patch, columns * patch, self.resample)
            values = self.normalization.apply(np.asarray(scaled))
            split = values.reshape(_CHANNELS, rows // merge, merge, patch, columns // merge, merge, patch)
            last = count if index + 1 == len(clip.frames) else index + 1
            patches[:, :, :, :, :, index:last] = split.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
        return ProcessedImage(patches.reshape(rows * columns, -1), grid, rows * columns // merge**2)


ImageSettings = TileSettings | PatchSettings


def preprocess(picture: Image | Clip, settings: ImageSettings) -> ProcessedImage:
    """Return it as the encoder takes it. Raises ValueError for a shape that the model's processor refuses."""
    return settings.process_clip(picture) if isinstance(picture, Clip) else settings.process(picture)


def num_tokens(picture: Image | Clip, settings: ImageSettings) -> int:
    """Return its embeddings. Raises ValueError for a shape that the model's processor refuses."""
    count = settings.clip_tokens if isinstance(picture, Clip) else settings.tokens
    return count(picture.height, picture.width)


def read_settings(directory: Path) -> ImageSettings:
    """Return the settings in ``PREPROCESSOR_FILES`` of a checkpoint.

    Raises CheckpointError if neither file is there or one has values of other types, UnsupportedModelError for another
    processor or a step that is switched off.
    """
    preprocessor, processor = (read_json(directory / name, required=False) for name in PREPROCESSOR_FILES)
    nested = Fields(processor, PREPROCESSOR_FILES[1]).table("image_processor")  # as transformers 5 saves it
    if not preprocessor and not nested:
        raise CheckpointError(
            f"{directory} has no {PREPROCESSOR_FILES[0]}, which says how images are prepared; copy it from the model's "
            "repository."
        )
    return settings_of(preprocessor or nested or {}, processor)


def settings_of(preprocessor: Mapping[str, Any], processor: Mapping[str, Any]) -> ImageSettings:
    """Return the settings of the contents of ``PREPROCESSOR_FILES``. Raises what ``read_settings`` raises."""
    fields = Fields(preprocessor, PREPROCESSOR_FILES[0])
    name = fields.text("image_processor_type")
    kind = name.removesuffix("Fast").removesuffix("Pil")
    if kind not in _READERS:
        raise UnsupportedModelError(f"The image processor is {name}; known are {', '.join(_READERS)}.")
    for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not fields.flag(step, True):
            raise UnsupportedModelError(f"{PREPROCESSOR_FILES[0]} has {step}=false, which is not implemented.")
    return _READERS[kind](fields, Fields(processor, PREPROCESSOR_FILES[1]))


def _read_tiles(fields: Fields, processor: Fields) -> TileSettings:
    if "image_seq_len" not in processor:
        raise CheckpointError(
            f"The checkpoint has no {PREPROCESSOR_FILES[1]} with image_seq_len, the tokens of a tile; copy this file "
            "from the model's repository."
        )
    return TileSettings(
        longest_edge=_part(fields, "size").whole("longest_edge", 4 * 364),
        tile_size=_part(fields, "max_image_size").whole("longest_edge", 364),
        tile_tokens=processor.whole("image_seq_len"),
        split=fields.flag("do_image_splitting", True),
        resample=_filter(fields, _LANCZOS),
        normalization=_normalization(fields, (0.5,) * 3, (0.5,) * 3),
    )


def _read_patches(fields: Fields, _processor: Fields) -> PatchSettings:
    size = _part(fields, "size")
    limits = {}
    for limit, edge, default in (
        ("min_pixels", "shortest_edge", 56 * 56),
        ("max_pixels", "longest_edge", 28 * 28 * 1280),
    ):
        if limit in fields:
            limits[limit] = fields.whole(limit)
        else:
            limits[limit] = size.whole(edge if edge in size else limit, default)
    return PatchSettings(
        patch_size=fields.whole("patch_size", 14),
        merge_size=fields.whole("merge_size", 2),
        temporal_size=fields.whole("temporal_patch_size", 2),
        resample=_filter(fields, _BICUBIC),
        normalization=_normalization(fields, _CLIP_MEAN, _CLIP_STD),
        **limits,
    )


_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_READERS: dict[str, Callable[[Fields, Fields], ImageSettings]] = {
    "Idefics3ImageProcessor": _read_tiles,
    "SmolVLMImageProcessor": _read_tiles,
    "Qwen2VLImageProcessor": _read_patches,
    "Qwen3VLImageProcessor": _read_patches,
}


def _part(fields: Fields, name: str) -> Fields:
    return Fields(fields.table(name) or {}, f"{name} of {PREPROCESSOR_FILES[0]}")


def _filter(fields: Fields, default: int) -> int:
    number = fields.count("resample", default)
    if number not in _FILTERS:
        fields.refuse("resample", "the number of a filter of Pillow")
    return number


def _normalization(fields: Fields, mean: tuple[float, ...], std: tuple[float, ...]) -> Normalization:
    values = [_triple(fields, name, default) for name, default in (("image_mean", mean), ("image_std", std))]
    return Normalization(values[0], values[1], fields.number("rescale_factor", 1 / 255))


def _triple(fields: Fields, name: str, default: tuple[float, ...]) -> tuple[float, float, float]:
    red, green, blue = fields.numbers(name, default, _CHANNELS)
    return red, green, blue


def _to_pillow(image: Image) -> PillowImage.Image:
    from PIL import Image as PillowImage  # the settings, a part of every ModelSpec, do without it

    return PillowImage.fromarray(image.pixels)


def _resize(image: PillowImage.Image, height: int, width: int, resample: int) -> PillowImage.Image:
    return image.resize((width, height), resample)


def _scaled(height: int, width: int, longest: int) -> tuple[int, int]:
    """Return height and width with a longer edge of ``longest``, or of ``_MAX_TILED_EDGE`` if that is less."""
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        height, width = longest, int(longest * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > _MAX_TILED_EDGE:
        width, height = _MAX_TILED_EDGE, int(_MAX_TILED_EDGE / aspect)
    elif height > width and height > _MAX_TILED_EDGE:
        height, width = _MAX_TILED_EDGE, int(_MAX_TILED_EDGE * aspect)
    return max(height, 1), max(width, 1)


def _multiple_of_tile(height: int, width: int, tile: int) -> tuple[int, int]:
    """Return height and width rounded up to whole tiles, the shorter edge after that of the longer one."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return height, width
