"""The vision encoder on the CPU, and the features of the images that it saw last, in memory of a fixed size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from engine_core.backends.onnxruntime.files import ENCODER_DATA_NAME, ENCODER_NAME
from engine_core.backends.onnxruntime.mapped_weights import copy_mapped, held_still
from engine_core.backends.onnxruntime.session import session_options
from engine_core.errors import EngineDirectoryError
from engine_core.models.vision import VisionSpec
from engine_core.vision.encoder_inputs import encoder_inputs, largest_part
from engine_core.vision.part_encoder import BLOCK_TOKENS, Part, PartEncoder, cache_blocks
from engine_core.vision.prompt import PlacedImage


def encoder_options(threads: int, *, is_int8: bool) -> ort.SessionOptions:
    """Return the options of the session of an encoder."""
    options = session_options(threads, packed=is_int8)
    # Without VNNI the sums of two products of u8 and s8 can overflow; the runtime takes slower kernels then.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


class Encoder(PartEncoder):
    """Computes parts layer by layer with ONNX Runtime. The hooks' ``options`` are those by which another thread may end
    a run."""

    def __init__(self, variant_dir: Path, spec: VisionSpec, max_images: int, options: ort.SessionOptions) -> None:
        """``spec``: with the settings of the processor that the engine uses. Raises EngineDirectoryError."""
        super().__init__(spec, max_images)
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
        self._rows = np.zeros((cache_blocks(spec, max_images) * BLOCK_TOKENS, spec.feature_size), dtype=np.float32)
        self._features = np.zeros(spec.part_tokens(spec.most_tokens) * spec.feature_size, dtype=np.float32)
        # Of one part: what a layer reads and what it writes, in turns.
        self._hidden = np.zeros((2, spec.most_patches * spec.hidden_size), dtype=np.float32)
        self._layer = np.zeros((), dtype=np.int64)
        self._binding = self._session.io_binding()

    def take(self, placed: PlacedImage, start: int, stop: int, out: np.ndarray, options: ort.RunOptions) -> None:
        """Copy the features of the tokens ``start`` to ``stop`` of an image to ``out``, float32 [stop - start, size].

        What is not there yet is computed. ``options``: those by which another thread may end a run.
        """
        for first, last, rows in self.rows(placed, start, stop, options):
            np.take(self._rows, rows, axis=0, out=out[first - start : last - start])

    def warm_up(self) -> None:
        """Run the encoder once, so that its scratch memory is taken."""
        largest = largest_part(self.spec)
        part = Part((b"", 0), largest.tokens, encoder_inputs(self.spec, largest, 0))
        while part.layer < self.spec.num_layers:
            self._run_layer(part, ort.RunOptions())
        self._keep(part)
        self._drop_all()

    def _advance(self, part: Part, options: ort.RunOptions) -> None:
        self._run_layer(part, options)

    def _run_layer(self, part: Part, options: ort.RunOptions) -> None:
        """Compute the next layer of a part. One that is ended by ``options`` raises, and can be computed again."""
        spec, index, count = self.spec, part.layer, part.num_tokens
        patches = part.num_patches(spec)
        shape = (1, patches, spec.hidden_size)
        size = patches * spec.hidden_size
        inputs = part.inputs | {"hidden": self._hidden[index % 2, :size].reshape(shape), "layer": self._layer}
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
        part.layer += 1

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

    def _store(self, part: Part, rows: np.ndarray) -> None:
        spec, width = self.spec, self.spec.out_size
        for layer in range(spec.num_layers):
            found = self._features_after(layer, part.num_tokens)
            for index, place in enumerate(spec.features_after(layer)):
                self._rows[rows, place * width : (place + 1) * width] = found[:, index * width : (index + 1) * width]
