"""The vision encoder on the CPU, and the features of the images that it saw last, in memory of a fixed size."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from engine_core.backends.onnxruntime.files import ENCODER_DATA_NAME, ENCODER_NAME
from engine_core.backends.onnxruntime.mapped_weights import copy_mapped, held_still
from engine_core.backends.onnxruntime.session import session_options
from engine_core.errors import EngineDirectoryError
from engine_core.models.vision import SIGLIP, VisionSpec
from engine_core.vision.encoder_inputs import encoder_inputs, largest_part
from engine_core.vision.images import Clip, Image
from engine_core.vision.preprocess import ProcessedImage, preprocess
from engine_core.vision.prompt import PlacedImage

BLOCK_TOKENS = 16  # of the features of a part; the last block may be filled in part
_Key = tuple[bytes, int]  # digest of the image, part of it


def cache_blocks(spec: VisionSpec, max_images: int) -> int:
    """Return the blocks that hold the features of ``max_images`` of the largest images."""
    size = spec.part_tokens(spec.most_tokens)
    return max_images * -(-spec.most_tokens // size) * -(-size // BLOCK_TOKENS)


def encoder_options(threads: int, *, is_int8: bool) -> ort.SessionOptions:
    """Return the options of the session of an encoder."""
    options = session_options(threads, packed=is_int8)
    # Without VNNI the sums of two products of u8 and s8 can overflow; the runtime takes slower kernels then.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


@dataclass
class _Progress:
    """A part of an image that the encoder is working on."""

    key: _Key
    num_tokens: int  # of the part
    inputs: dict[str, np.ndarray]
    layer: int = 0  # the next one


class Encoder:
    """Gives the features of images, part by part: only those of the tokens that are asked for are computed.

    A part is what the encoder works on at once, a tile or a whole image, layer by layer. Features are kept by the hash
    of the image, the least recently used are dropped. For one thread; ``runs`` and ``seconds`` count the parts since
    the start and the work on them.
    """

    def __init__(self, variant_dir: Path, spec: VisionSpec, max_images: int, options: ort.SessionOptions) -> None:
        """``spec``: with the settings of the processor that the engine uses. Raises EngineDirectoryError."""
        self.spec = spec
        data = variant_dir / ENCODER_DATA_NAME
        with held_still(data) as fd:
            self._session = ort.InferenceSession(
                str(variant_dir / ENCODER_NAME), options, providers=["CPUExecutionProvider"]
            )
            copy_mapped(data, fd)
        if not any(each.name == "layer" for each in self._session.get_inputs()):
            raise EngineDirectoryError(
                f"{variant_dir / ENCODER_NAME} runs all of its layers at once, as older versions wrote it; build the "
                "engine again."
            )
        blocks = cache_blocks(spec, max_images)
        self._rows = np.zeros((blocks * BLOCK_TOKENS, spec.feature_size), dtype=np.float32)
        self._free = list(range(blocks))
        self._kept: OrderedDict[_Key, list[int]] = OrderedDict()  # blocks of a part, least recently used first
        self._features = np.zeros(spec.part_tokens(spec.most_tokens) * spec.feature_size, dtype=np.float32)
        # Of one part: what a layer reads and what it writes, in turns.
        self._hidden = np.zeros((2, spec.most_patches * spec.hidden_size), dtype=np.float32)
        self._layer = np.zeros((), dtype=np.int64)
        self._binding = self._session.io_binding()
        self._prepared: tuple[bytes, ProcessedImage] | None = None  # the image whose parts are being encoded
        self._progress: _Progress | None = None
        self.runs = 0
        self.seconds = 0.0

    def take(self, placed: PlacedImage, start: int, stop: int, out: np.ndarray, options: ort.RunOptions) -> None:
        """Copy the features of the tokens ``start`` to ``stop`` of an image to ``out``, float32 [stop - start, size].

        What is not there yet is computed. ``options``: those by which another thread may end a run.
        """
        size = self.spec.part_tokens(placed.num_tokens)
        for part in range(start // size, -(-stop // size)):
            first, last = max(start, part * size), min(stop, (part + 1) * size)
            while not self._encode_part(placed, part, options):
                pass
            rows = _rows_of(self._kept[placed.image.digest, part])[first - part * size : last - part * size]
            np.take(self._rows, rows, axis=0, out=out[first - start : last - start])

    def encode(self, placed: PlacedImage, start: int, stop: int, options: ort.RunOptions) -> bool:
        """Do one piece of the work on these features: prepare the image, or compute one layer of one part.

        Returns whether all of them are there: then nothing was done. Another part begins anew what is under way.
        """
        size = self.spec.part_tokens(placed.num_tokens)
        for part in range(start // size, -(-stop // size)):
            was_there = (placed.image.digest, part) in self._kept
            self._encode_part(placed, part, options)
            if not was_there:
                return False
        return True

    def warm_up(self) -> None:
        """Run the encoder once, so that its scratch memory is taken."""
        largest = largest_part(self.spec)
        progress = _Progress((b"", 0), largest.tokens, encoder_inputs(self.spec, largest, 0))
        while progress.layer < self.spec.num_layers:
            self._run_layer(progress, ort.RunOptions())
        blocks = self._keep(progress)
        self._kept.clear()
        self._free += blocks

    def _encode_part(self, placed: PlacedImage, part: int, options: ort.RunOptions) -> bool:
        """Do one piece of the work on a part of an image; return whether its features are there."""
        key = (placed.image.digest, part)
        if key in self._kept:
            self._kept.move_to_end(key)
            return True
        begin = time.perf_counter()
        progress, count = self._progress, self.spec.part_tokens(placed.num_tokens)
        if progress is None or progress.key != key:
            self._progress = None  # before the next image is made
            inputs = encoder_inputs(self.spec, self._processed(placed.image), part)
            self._progress = _Progress(key, count, {n: np.ascontiguousarray(array) for n, array in inputs.items()})
        else:
            self._run_layer(progress, options)
            if progress.layer == self.spec.num_layers:
                self._keep(progress)
                self._progress = None
                self.runs += 1
                if (part + 1) * count >= placed.num_tokens:
                    self._prepared = None
        self.seconds += time.perf_counter() - begin
        return key in self._kept

    def _processed(self, image: Image | Clip) -> ProcessedImage:
        if self._prepared is None or self._prepared[0] != image.digest:
            self._prepared = None  # before the next one is made
            self._prepared = (image.digest, preprocess(image, self.spec.processor))
        return self._prepared[1]

    def _run_layer(self, progress: _Progress, options: ort.RunOptions) -> None:
        """Compute the next layer of a part. One that is ended by ``options`` raises, and can be computed again."""
        spec, index, count = self.spec, progress.layer, progress.num_tokens
        patches = count * spec.merge**2 if spec.kind != SIGLIP else spec.side**2
        shape = (1, patches, spec.hidden_size)
        size = patches * spec.hidden_size
        inputs = progress.inputs | {"hidden": self._hidden[index % 2, :size].reshape(shape), "layer": self._layer}
        self._layer[...] = index
        for name, array in inputs.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        outputs = {
            "next_hidden": self._hidden[1 - index % 2, :size].reshape(shape),
            "features": self._features_after(index, count),
        }
        for name, array in outputs.items():
            self._binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(self._binding, options)
        progress.layer += 1

    def _features_after(self, layer: int, count: int) -> np.ndarray:
        """Return the place of the features that a layer gives of ``count`` tokens, float32 [count, values].

        Those of one layer lie behind those of the layers before.
        """
        width = self.spec.out_size
        before = sum(len(self.spec.features_after(each)) for each in range(layer)) * count * width
        values = len(self.spec.features_after(layer)) * width
        if not values:
            return self._features[:0].reshape(0, width)
        return self._features[before : before + count * values].reshape(count, values)

    def _keep(self, progress: _Progress) -> list[int]:
        """Keep the features of a part whose layers have been computed; return their blocks."""
        spec, count, width = self.spec, progress.num_tokens, self.spec.out_size
        self._kept[progress.key] = blocks = self._blocks(-(-count // BLOCK_TOKENS))
        rows = _rows_of(blocks)[:count]
        for layer in range(spec.num_layers):
            found = self._features_after(layer, count)
            for index, place in enumerate(spec.features_after(layer)):
                self._rows[rows, place * width : (place + 1) * width] = found[:, index * width : (index + 1) * width]
        return blocks

    def _blocks(self, count: int) -> list[int]:
        while len(self._free) < count:
            _, dropped = self._kept.popitem(last=False)
            self._free += dropped
        blocks, self._free = self._free[:count], self._free[count:]
        return blocks


def _rows_of(blocks: list[int]) -> np.ndarray:
    return (np.array(blocks)[:, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).reshape(-1)
