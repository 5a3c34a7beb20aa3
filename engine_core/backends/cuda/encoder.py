"""The vision encoder on our own kernels, and the features of the images that it saw last, in device memory.

The residual stream is float32, other activations are fp16, whatever the model's type is; sums are float32. A piece of
the work is a few layers of one part, so that others' steps need not wait for all of them. Between two pieces only the
residual stream is kept: the rest of the scratch is that of a prompt's chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from engine_core.backends.cuda.encoder_layout import DTYPE, PREFIX, EncoderLayout, array_bytes
from engine_core.backends.cuda.layout import CudaSpec
from engine_core.cuda.driver import Device, DeviceArray, Event, Launch, PinnedArray, Stream
from engine_core.cuda.graphs import GraphKey, GraphRunner
from engine_core.cuda.kernels import Kernels, attention, linear, vision
from engine_core.cuda.kernels.blas import Blas
from engine_core.vision.part_encoder import Part, PartEncoder

Work = Callable[[Stream], None]


class EncoderModel:
    """The launches of an encoder: ``start``, then every layer, then ``finish``."""

    def __init__(
        self,
        kernels: Kernels,
        blas: Blas,
        layout: EncoderLayout,
        weights: Mapping[str, DeviceArray],
        work: Mapping[str, DeviceArray],
    ) -> None:
        """``weights``, ``work``: arrays of the whole model. ``kernels``: of DTYPE."""
        assert kernels.dtype == DTYPE
        self._kernels, self._blas, self.layout = kernels, blas, layout
        self._weights = {name[len(PREFIX) :]: array for name, array in weights.items() if name.startswith(PREFIX)}
        self._hidden, self._chunk = work["vision_hidden"], work["vision_chunk"]
        self._scratch = {
            name: dict(_placed(arrays, work["hidden"].address)) for name, arrays in layout.scratch().items()
        }

    @property
    def pixels(self) -> DeviceArray:
        """A part's pixels, for the time of ``start``."""
        return self._scratch["patches"]["pixels"]

    @property
    def features(self) -> DeviceArray:
        """What ``finish`` leaves for the time of a piece: float32 [tokens, out]."""
        return self._scratch["projector"]["features"]

    def pieces(self, num_layers: int) -> list[tuple[range, list[Work]]]:
        """Return (layers, launches) of each piece of ``num_layers`` layers.

        The first one starts, the last one finishes. Raises KernelCompileError or DeviceError.
        """
        total = self.layout.spec.num_layers
        found = []
        for first in range(0, total, num_layers):
            layers = range(first, min(first + num_layers, total))
            works = [*(self._start() if first == 0 else []), *(work for i in layers for work in self._layer(i))]
            found.append((layers, works + (self._finish() if layers.stop == total else [])))
        return found

    def _start(self) -> list[Work]:
        """Return what makes the residual stream of the pixels."""
        layout, scratch, positions = self.layout, self._scratch["patches"], self._weights["positions"]
        row_bytes = positions.nbytes // positions.shape[0]
        copy = (self._hidden.address, row_bytes, positions.address, row_bytes, row_bytes, positions.shape[0])
        cut = vision.patches(self._kernels, scratch["pixels"], scratch["rows"], layout.spec.patch_values, layout.tile)
        return [cut, lambda stream: stream.copy_rows(*copy), self._gemm(scratch["rows"], "patches", self._hidden, True)]

    def _layer(self, index: int) -> list[Work]:
        """Return what adds attention and MLP to the residual stream."""
        kernels, shape, rows, stem = self._kernels, self.layout.attention, self.layout.rows, f"layers.{index}."
        first, second, weights = self._scratch["attention"], self._scratch["mlp"], self._weights
        qkv, cache, attended, inner = first["qkv"], first["cache"], first["attended"], second["inner"]
        bias = weights[f"{stem}qkv_bias"]
        attend = attention.attention_prefill(kernels, shape, qkv, cache, attended, self._chunk, [rows], causal=False)
        return [
            self._norm(f"{stem}norm", first["normed"]),
            self._gemm(first["normed"], f"{stem}qkv", qkv),
            attention.rope_append(kernels, shape, qkv, cache, self._hidden, self._chunk, bias=bias),
            partial(attend, rows=rows),
            self._gemm(attended, f"{stem}o", self._hidden, True),
            self._norm(f"{stem}mlp_norm", second["normed"]),
            self._gemm(second["normed"], f"{stem}up", inner),
            linear.bias_gelu(kernels, inner, weights[f"{stem}up_bias"], exact=self.layout.spec.activation == "gelu"),
            self._gemm(inner, f"{stem}down", self._hidden, True),
        ]

    def _finish(self) -> list[Work]:
        """Return what makes features of the residual stream."""
        spec, scratch = self.layout.spec, self._scratch["projector"]
        return [
            self._norm("final_norm", scratch["merged"], (spec.merge, spec.side)),
            self._gemm(scratch["merged"], "projector", scratch["features"]),
        ]

    def _norm(self, name: str, output: DeviceArray, merged: tuple[int, int] | None = None) -> Launch:
        eps = self.layout.spec.norm_eps
        return vision.layer_norm(self._kernels, self._hidden, self._weights[name], output, eps, merged)

    def _gemm(self, rows: DeviceArray, name: str, output: DeviceArray, accumulate: bool = False) -> Work:
        weight, count = self._weights[name], rows.shape[0]
        return lambda _: self._blas.matmul(rows, weight, output, count, accumulate)


class DeviceEncoder(PartEncoder):
    """Queues the work on parts. It is done when the stream has come that far; a row of ``features`` may be named to
    what is queued later."""

    pauses_at_parts = False

    def __init__(
        self,
        own: Callable[[Any], Any],
        device: Device,
        stream: Stream,
        model: EncoderModel,
        work: Mapping[str, DeviceArray],
        spec: CudaSpec,
    ) -> None:
        """``own`` takes what has to be closed."""
        assert spec.images is not None
        super().__init__(spec.images.spec, spec.images.max_images)
        own(self)
        self._device, self._stream, self._model, self._work = device, stream, model, work
        self._layers = spec.encoder_layers  # of a piece
        self._pixels = [own(PinnedArray(device, model.pixels.shape, "float32")) for _ in range(2)]
        self._copied = [own(Event(device)) for _ in range(2)]
        self._num_copies = 0
        self._keys: list[tuple[range, GraphKey]] = []

    def capture(self, kernels: Kernels, graphs: GraphRunner) -> None:
        """Compile, run once and capture every piece. Raises KernelCompileError or DeviceError."""
        kernels.compile_ahead(lambda: self._model.pieces(self._layers))
        self._device.upload(self._work["vision_chunk"], np.array([0, self._model.layout.rows], dtype=np.int32))
        self._stream.zero(self._model.pixels)
        for layers, works in self._model.pieces(self._layers):
            addresses = self._work["vision_hidden"].address, self._model.features.address
            key = GraphKey(1, *addresses, rows=self._model.layout.rows, layers=(layers.start, layers.stop))
            graphs.add(key, works)
            self._keys.append((layers, key))
        self._graphs = graphs

    def _advance(self, part: Part, options: Any) -> None:
        """Queue the next piece; at most two parts are ahead of the device."""
        if part.layer == 0:
            self._upload(part.inputs["pixels"])
        layers, key = self._keys[part.layer // self._layers]
        assert layers.start == part.layer
        self._graphs.run(key)
        part.layer = layers.stop

    def _upload(self, pixels: np.ndarray) -> None:
        """Queue the copy of a part's pixels to the scratch, where nothing else may be queued before they are read."""
        place = self._num_copies % 2
        self._copied[place].wait()
        np.copyto(self._pixels[place].host, pixels.reshape(self._model.pixels.shape))
        self._stream.upload(self._model.pixels, self._pixels[place])
        self._copied[place].record(self._stream)
        self._num_copies += 1

    def _store(self, part: Part, rows: np.ndarray) -> None:
        """Queue the copies of the features of a part to ``rows`` of the table, which ascend in runs."""
        table, source = self._work["features"], self._model.features
        row_bytes = table.nbytes // table.shape[0]
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1).tolist()
        for first, last in zip(starts, [*starts[1:], len(rows)]):
            target = table.address + int(rows[first]) * row_bytes
            begin = source.address + first * row_bytes
            self._stream.copy_rows(target, row_bytes, begin, row_bytes, row_bytes, last - first)


def _placed(arrays: Mapping[str, tuple[tuple[int, ...], str]], address: int) -> list[tuple[str, DeviceArray]]:
    """Return (name, array) of arrays side by side from ``address`` on."""
    found = []
    for name, array in arrays.items():
        found.append((name, DeviceArray(address, *array)))
        address += array_bytes(array)
    return found
