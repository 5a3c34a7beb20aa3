"""Measure what a decode step of several rows costs beside one of one row, in GPU time.

    python3 benchmarks/gpu_rows.py [--shapes NAME ...] [--weights int4 int8 fp16] [--kv-cache-type fp16] [--keys N ...]
        [--rows 1 4 8 16] [--rounds N] [--output benchmarks/results/gpu_rows.jsonl]

Models of published shapes with random weights on the GPU that is there. Rows 1 is a decode step of one sequence; 4, 8
and 16 are the steps that check a draft of as many tokens, each row with the K and V of ``--keys`` tokens before it. A
step is a CUDA graph that is timed between two events, so that neither the host nor copies count; a round times each
size once, and ``ratio_to_one`` is the median over the rounds of its time over that of one row in the same round. Prints
a table, then one JSON line per measurement, which --output appends to a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_decode import SHAPES, WEIGHTS, RandomWeights, gpu_name, make_spec, sweep, write_lines
from engine_core.backends.cuda.batch_model import RowsModel
from engine_core.backends.cuda.layout import DRAFT_SIZES, PROMPT_HEADER, CudaSpec, weight_arrays, work_arrays
from engine_core.backends.gpu_model import Work
from engine_core.cuda.driver import Arena, Device, DeviceArray, PinnedArray, Stream
from engine_core.cuda.kernels import Kernels
from engine_core.cuda.kernels.sampling import PARAMS, RING, STATE
from engine_core.cuda.kernels.tuning import EventTimer

SIZES = (1, *DRAFT_SIZES)
TOKEN = 5  # fed in every row


class Steps:
    """The steps of one model. A context manager.

    ``keys``: tokens whose K and V each step reads, zeros.
    """

    def __init__(self, device: Device, spec: CudaSpec) -> None:
        """``spec``: of one sequence, with drafts. Allocates and fills; nothing stays if it raises."""
        self._device, self._spec = device, spec
        with ExitStack() as undo:

            def own(resource: Any) -> Any:
                undo.callback(resource.close)
                return resource

            arrays = [*weight_arrays(spec).values(), *work_arrays(spec, device.num_sms).values()]
            self._stream = own(Stream(device))
            arena = own(Arena(device, sum(array.nbytes for array in arrays)))
            self._model = own(RowsModel(device, self._stream, arena, own(Kernels(device, spec.dtype)), spec))
            self._tokens = own(PinnedArray(device, (spec.draft_sizes[-1], RING), "int32"))
            work = self._model.work
            for array in work.values():
                self._stream.zero(array)
            self._stream.wait()
            angles = np.arange(spec.max_context)[:, None] * np.ones(spec.attention.head_dim // 2)
            rope = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
            self._model.fill(RandomWeights(device, spec), rope.reshape(spec.rope_shape))
            self._model.compile_ahead(self._tokens.device_address)
            self._timer = EventTimer(self._stream)
            self._resources = undo.pop_all()

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def seconds(self, rows: int, keys: int) -> float:
        """Return the GPU time of a step of ``rows``, of which each reads the K and V of ``keys`` tokens."""
        self._place(rows, keys)
        return self._timer(self._work(rows))

    def _work(self, rows: int) -> list[Work]:
        address = self._tokens.device_address
        return self._model.decode_launches(address) if rows == 1 else self._model.draft_launches(rows, address)

    def _place(self, rows: int, keys: int) -> None:
        """Upload what a step reads: tokens, positions, sampling parameters."""
        params = np.zeros(rows, dtype=PARAMS)
        params["top_p"] = params["repetition_penalty"] = 1.0
        state = np.zeros(rows, dtype=STATE)
        state["token"], state["position"] = TOKEN, keys + np.arange(rows)
        prefix = "" if rows == 1 else "draft_"
        for name, values in ((f"{prefix}params", params), (f"{prefix}state", state)):
            self._upload(name, values.view(np.uint8))
        if rows > 1:
            self._upload("draft_slots", np.zeros(rows, dtype=np.int32))
            chunk = np.full(PROMPT_HEADER + rows, TOKEN, dtype=np.int32)
            chunk[:PROMPT_HEADER] = keys, rows, 0, -1
            self._upload("prompt", chunk)
        self._stream.wait()

    def _upload(self, name: str, values: np.ndarray) -> None:
        """Upload ``values``, uint8 or int32, to the front of an array of the model."""
        dtype = "uint8" if values.dtype == np.uint8 else "int32"
        self._device.upload(DeviceArray(self._model.work[name].address, values.shape, dtype), values)


def bench(name: str, weights: str, kv_cache_type: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each number of rows and of keys."""
    most = max(options.keys) + DRAFT_SIZES[-1] + 16  # a step that is replayed goes on where it ended
    spec = dataclasses.replace(make_spec(SHAPES[name], most, 64, weights, kv_cache_type), drafts=True)
    device = Device()
    found = []
    try:
        with Steps(device, spec) as steps:
            for keys in options.keys:
                times: dict[int, list[float]] = {rows: [] for rows in options.rows}
                for number in range(options.rounds + 1):
                    for rows in options.rows:
                        seconds = steps.seconds(rows, keys)
                        if number:  # the first round warms up
                            times[rows].append(seconds)
                found += [row(name, weights, kv_cache_type, keys, rows, times) for rows in options.rows]
    finally:
        device.close()
    return found


def row(
    name: str, weights: str, kv_cache_type: str, keys: int, rows: int, times: dict[int, list[float]]
) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "shape": name,
        "weights": weights,
        "kv_cache_type": kv_cache_type,
        "keys": keys,
        "rows": rows,
        "us_per_step": round(1e6 * statistics.median(times[rows]), 1),
        "ratio_to_one": round(statistics.median(each / one for each, one in zip(times[rows], times[1])), 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ["llama-3.2-1b", "qwen3-0.6b", "llama-3.1-8b"]
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=sorted(SHAPES))
    parser.add_argument("--weights", nargs="+", default=["int4", "int8", "fp16"], choices=WEIGHTS)
    parser.add_argument("--kv-cache-type", nargs="+", default=["fp16"], choices=["fp16", "int8", "fp8"])
    parser.add_argument("--keys", nargs="+", type=int, default=[128], help="tokens before the step (default: 128)")
    parser.add_argument("--rows", nargs="+", type=int, default=list(SIZES), choices=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if min(options.keys) < 1 or options.rounds < 1:
        parser.error("--keys and --rounds are 1 or more")
    options.rows = sorted({1, *options.rows})
    gpu = gpu_name()
    print(f"{gpu}\n{'shape':<16}{'weights':<9}{'KV':<6}{'keys':>6}{'rows':>6}{'µs/step':>10}{'to one':>8}")
    found = []
    for each in sweep(bench, options):
        found.append(each)
        print(
            f"{each['shape']:<16}{each['weights']:<9}{each['kv_cache_type']:<6}{each['keys']:>6}{each['rows']:>6}"
            f"{each['us_per_step']:>10.1f}{each['ratio_to_one']:>8.2f}",
            flush=True,
        )
    write_lines(gpu, found, options.output)


if __name__ == "__main__":
    main()
