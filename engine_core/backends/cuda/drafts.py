"""The CUDA backend's steps that check a draft: their graphs, what a row of one reads, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine_core.backends import SequenceStep
from engine_core.backends.cuda.batch_model import RowsModel
from engine_core.cuda.driver import Device, DeviceArray, PinnedArray, Stream
from engine_core.cuda.graphs import GraphKey, GraphRunner
from engine_core.cuda.kernels.sampling import PARAMS, RING, STATE

_TIMED_STEPS = 5


class DraftSteps:
    """Row i of a step samples what comes after the draft's first i tokens, as a step of one token would.

    Bit for bit so in an engine for several sequences, whose steps take the same kernels: their sums do not depend on
    the number of rows. The step of an engine for one sequence has others, which may round otherwise.

    A slot's pinned arrays are written when its step is queued and read when that has ended; a sequence has one such
    step on its way at most.
    """

    def __init__(
        self, own: Callable[[Any], Any], device: Device, stream: Stream, work: dict[str, DeviceArray], slots: int
    ) -> None:
        """``own`` takes what has to be closed; ``work``: the model's arrays; ``slots``: sequences."""
        self._stream = stream
        self._work = work
        count, words = work["draft_mask"].shape
        self.max_draft = count - 1  # tokens of a draft: a step also feeds the last sampled token
        self._states = own(PinnedArray(device, (slots, count, STATE.itemsize), "uint8"))
        self._params = own(PinnedArray(device, (slots, count, PARAMS.itemsize), "uint8"))
        self._slots = own(PinnedArray(device, (slots, count), "int32"))
        self._masks = own(PinnedArray(device, (slots, count, words), "uint32"))
        self._host_tokens = own(PinnedArray(device, (count, RING), "int32"))  # the sampler wants it; not read
        self._seconds: dict[int, float] = {}  # of a step, by its size

    def capture(self, graphs: GraphRunner, model: RowsModel, place: Callable[[int, int], None]) -> None:
        """Capture and time the steps of every size.

        ``place``: (size, position) → puts a chunk into ``prompt`` for slot 0.
        """
        values = np.zeros((), dtype=PARAMS)
        values["top_p"] = values["repetition_penalty"] = 1.0
        self._graphs = graphs
        position = max(0, min(1024, model.spec.max_context - self.max_draft - 1))
        for size in model.spec.draft_sizes:
            self._seconds[size] = 0.0
            rows = np.full(size, position), values, [None] * size
            place(size, position)
            self._upload(0, 0, *rows)
            graphs.add(self._key(size), model.draft_launches(size, self._host_tokens.device_address))
            times = []
            for _ in range(_TIMED_STEPS):
                start = time.perf_counter()
                place(size, position)
                self._upload(0, 0, *rows)
                self._run(0, size)
                self._stream.wait()
                times.append(time.perf_counter() - start)
            self._seconds[size] = min(times)

    def queue(self, number: int, step: SequenceStep, first: int, position: int, params: np.ndarray) -> None:
        """Queue the step of the chunk in ``prompt``.

        ``first``: the number of the step that samples after the last token, which is at ``position``; ``params``: the
        sequence's, PARAMS.
        """
        assert step.draft is not None
        size = 1 + len(step.draft.token_ids)
        masks: list[np.ndarray | None] = [step.mask]
        masks += [None] * (size - 1) if step.draft.masks is None else list(step.draft.masks)
        for row in np.flatnonzero(step.draft.forced):
            masks[row] = None  # what it samples is not read
        self._upload(number, first, position + np.arange(size), params, masks)
        self._run(number, size)

    def tokens(self, number: int) -> list[int]:
        """Return what the rows of a slot's last step have sampled, once that has ended."""
        return self._states.host[number].reshape(-1).view(STATE)["token"].tolist()

    def seconds(self, rows: Sequence[int]) -> float:
        """Return how long the steps take that feed so many tokens of a sequence each, 2 or more."""
        return sum(self._seconds[self._size(count)] for count in rows)

    def _key(self, size: int) -> GraphKey:
        return GraphKey(1, self._work["draft_state"].address, self._work["draft_logits"].address, rows=size)

    def _size(self, count: int) -> int:
        return next(size for size in self._seconds if count <= size)

    def _upload(
        self, number: int, first: int, positions: np.ndarray, params: np.ndarray, masks: Sequence[np.ndarray | None]
    ) -> None:
        """Queue what the rows of a step read, and that those behind them do nothing."""
        count = len(positions)
        states = self._states.host[number].reshape(-1).view(STATE)
        states[:] = 0
        states["position"][:count] = positions
        states["step"][:count] = first + np.arange(count)
        self._slots.host[number] = np.where(np.arange(len(states)) < count, number, -1)
        rows = self._params.host[number].reshape(-1).view(PARAMS)
        rows[:] = params
        rows["has_mask"] = rows["has_bias"] = 0
        rows["repetition_penalty"] = 1.0  # there is neither bias nor history for a row of its own
        for row, mask in enumerate(masks):
            if mask is not None:
                rows["has_mask"][row] = 1
                self._masks.host[number, row] = mask
        for name, pinned in (("state", self._states), ("params", self._params), ("slots", self._slots)):
            self._stream.upload(self._work[f"draft_{name}"], pinned, number * pinned.host[0].nbytes)
        if any(mask is not None for mask in masks):
            words = self._masks.host.shape[-1]
            part = DeviceArray(self._work["draft_mask"].address, (count, words), "uint32")
            self._stream.upload(part, self._masks, number * self._masks.host[0].nbytes)

    def _run(self, number: int, count: int) -> None:
        """Queue the step and the copy of what it samples."""
        self._graphs.run(self._key(self._size(count)))
        source, num_bytes = self._work["draft_state"].address, self._states.host[0].nbytes
        target = self._states.device_address + number * num_bytes
        self._stream.copy_rows(target, num_bytes, source, num_bytes, num_bytes, 1)
