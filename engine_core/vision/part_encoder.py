"""Work on the features of images, part by part and in pieces, and which features are kept; for every backend."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine_core.models.vision import SIGLIP, VisionSpec
from engine_core.vision.encoder_inputs import encoder_inputs
from engine_core.vision.images import Clip, Image
from engine_core.vision.preprocess import ProcessedImage, preprocess
from engine_core.vision.prompt import PlacedImage

BLOCK_TOKENS = 16  # of the features of a part; the last block may be filled in part
_PREPARE_WAIT = 1e-3  # seconds that a piece of work waits for an image that is being prepared
_Key = tuple[bytes, int]  # digest of the image, part of it


def cache_blocks(spec: VisionSpec, max_images: int) -> int:
    """Return the blocks that hold the features of ``max_images`` of the largest images."""
    size = spec.part_tokens(spec.most_tokens)
    return max_images * -(-spec.most_tokens // size) * -(-size // BLOCK_TOKENS)


def images_within(images: Sequence[PlacedImage], position: int, count: int) -> Iterator[tuple[PlacedImage, int, int]]:
    """Yield the images of ``count`` tokens from ``position`` on: (image, first of its tokens there, their end)."""
    for placed in images:
        start, stop = np.searchsorted(placed.positions, (position, position + count)).tolist()
        if start < stop:
            yield placed, start, stop


@dataclass
class Part:
    """A part of an image that the encoder is working on."""

    key: _Key
    num_tokens: int
    inputs: dict[str, np.ndarray]  # of ``encoder_inputs``, contiguous
    layer: int = 0  # the next one

    def num_patches(self, spec: VisionSpec) -> int:
        return spec.side**2 if spec.kind == SIGLIP else self.num_tokens * spec.merge**2


class PartEncoder:
    """Gives the features of images, part by part: only those of the tokens that are asked for are computed.

    A part is what the encoder works on at once, a tile or a whole image. Features are kept by the hash of the image,
    in rows of a table of the backend's; the least recently used are dropped. For one thread, beside which another one
    prepares an image: scales, cuts and normalizes it. ``runs`` and ``seconds`` count the parts since the start and the
    host's time on them.

    A subclass has the hooks ``_start``, ``_advance`` and ``_store``.
    """

    pauses_at_parts = True  # making the inputs of any part is a piece of work; else only preparing an image is

    def __init__(self, spec: VisionSpec, max_images: int) -> None:
        """``spec``: with the settings of the processor that the engine uses."""
        self.spec = spec
        self._free = list(range(cache_blocks(spec, max_images)))
        self._kept: OrderedDict[_Key, list[int]] = OrderedDict()  # blocks of a part, least recently used first
        # The image whose parts are being encoded; there is one at a time.
        self._prepared: tuple[bytes, Future[ProcessedImage]] | None = None
        self._preparer = ThreadPoolExecutor(1, "prepare_images")
        self._progress: Part | None = None
        self.runs = 0
        self.seconds = 0.0

    # --- hooks ----------------------------------------------------------------------------------------

    def _start(self, part: Part) -> None:
        """Takes the inputs of a part, whose layers follow."""

    def _advance(self, part: Part, options: Any) -> None:
        """Computes the next layer, or several, and moves ``part.layer`` on."""
        raise NotImplementedError

    def _store(self, part: Part, rows: np.ndarray) -> None:
        """Writes the features of a part whose layers have been computed to ``rows``, int64 [tokens], of the table."""
        raise NotImplementedError

    # --- use ------------------------------------------------------------------------------------------

    def encode(self, placed: PlacedImage, start: int, stop: int, options: Any = None) -> bool:
        """Do one piece of the work on the features of tokens ``start`` to ``stop``: wait a little while for the image
        to be prepared, or compute.

        Returns whether all of them are there: then nothing was done. Another part begins anew what is under way.
        ``options``: for the hooks.
        """
        for part in self._parts(placed, start, stop):
            was_there = (placed.image.digest, part) in self._kept
            self._encode_part(placed, part, options)
            if not was_there:
                return False
        return True

    def has(self, placed: PlacedImage, start: int, stop: int) -> bool:
        """Return whether the features of tokens ``start`` to ``stop`` are there."""
        return all((placed.image.digest, part) in self._kept for part in self._parts(placed, start, stop))

    def is_prepared(self, image: Image | Clip) -> bool:
        """Return whether ``image`` is the one that was prepared last, and some of its parts are not encoded yet."""
        return self._prepared is not None and self._prepared[0] == image.digest and self._prepared[1].done()

    def close(self) -> None:
        """End the thread that prepares images."""
        self._drop_prepared()
        self._preparer.shutdown()

    def rows(
        self, placed: PlacedImage, start: int, stop: int, options: Any = None
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield the rows of the table with the features of tokens ``start`` to ``stop``, part by part.

        Each is (first token, end, int64 [end - first]). What is not there yet is computed.
        """
        size = self.spec.part_tokens(placed.num_tokens)
        for part in self._parts(placed, start, stop):
            first, last = max(start, part * size), min(stop, (part + 1) * size)
            while not self._encode_part(placed, part, options):
                pass
            yield first, last, _rows_of(self._kept[placed.image.digest, part])[first - part * size : last - part * size]

    # --- helpers --------------------------------------------------------------------------------------

    def _parts(self, placed: PlacedImage, start: int, stop: int) -> range:
        """Return the parts that have tokens ``start`` to ``stop`` of an image."""
        size = self.spec.part_tokens(placed.num_tokens)
        return range(start // size, -(-stop // size))

    def _encode_part(self, placed: PlacedImage, part: int, options: Any) -> bool:
        """Do one piece of the work on a part of an image; return whether its features are there."""
        key = (placed.image.digest, part)
        if key in self._kept:
            self._kept.move_to_end(key)
            return True
        begin = time.perf_counter()
        progress, count, pauses = self._progress, self.spec.part_tokens(placed.num_tokens), False
        if progress is None or progress.key != key:
            self._progress = None  # before the next image is made
            pauses = self.pauses_at_parts or not self.is_prepared(placed.image)
            processed = self._processed(placed.image)
            if processed is None:
                self.seconds += time.perf_counter() - begin
                return False
            inputs = encoder_inputs(self.spec, processed, part)
            progress = Part(key, count, {name: np.ascontiguousarray(array) for name, array in inputs.items()})
            self._start(progress)
            self._progress = progress
        if not pauses:
            self._advance(progress, options)
            if progress.layer == self.spec.num_layers:
                self._keep(progress)
                self._progress = None
                self.runs += 1
                if (part + 1) * count >= placed.num_tokens:
                    self._prepared = None
        self.seconds += time.perf_counter() - begin
        return key in self._kept

    def _processed(self, image: Image | Clip) -> ProcessedImage | None:
        """Return an image as the encoder takes it; None: it is still being prepared.

        Raises what ``preprocess`` raises.
        """
        if self._prepared is None or self._prepared[0] != image.digest:
            self._drop_prepared()  # before the next one is made
            self._prepared = (image.digest, self._preparer.submit(preprocess, image, self.spec.processor))
        future = self._prepared[1]
        if not wait([future], _PREPARE_WAIT).done:
            return None
        try:
            return future.result()
        except BaseException:
            self._prepared = None
            raise

    def _drop_prepared(self) -> None:
        if self._prepared is not None:
            self._prepared[1].cancel()
        self._prepared = None

    def _keep(self, part: Part) -> None:
        """Keep the features of a part whose layers have been computed."""
        self._kept[part.key] = blocks = self._blocks(-(-part.num_tokens // BLOCK_TOKENS))
        self._store(part, _rows_of(blocks)[: part.num_tokens])

    def _drop_all(self) -> None:
        """Forget every part; their blocks are free."""
        while self._kept:
            self._free += self._kept.popitem()[1]

    def _blocks(self, count: int) -> list[int]:
        while len(self._free) < count:
            _, dropped = self._kept.popitem(last=False)
            self._free += dropped
        blocks, self._free = self._free[:count], self._free[count:]
        return blocks


def _rows_of(blocks: list[int]) -> np.ndarray:
    return (np.array(blocks)[:, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).reshape(-1)
