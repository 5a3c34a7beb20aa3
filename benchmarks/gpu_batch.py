"""Measure how fast the CUDA backend decodes several sequences at a time.

    python3 benchmarks/gpu_batch.py [--shapes NAME ...] [--weights int4 fp16 int8] [--kv-cache-type fp16] [--context N]
        [--batches 1 2 4 8 16] [--rounds N] [--output benchmarks/results/gpu_batch.jsonl]

Models of published shapes with random weights on the GPU that is there. Two engines of each model are open at the same
time: one for a single sequence (max_batch 1) and one for as many as --batches says. Each round times a run of the
first, then one of each batch of the second; ``ratio_to_one`` is the median over the rounds of tokens per second of the
batch over those of the single engine in the same round. A newcomer's first token is timed while the others of the batch
decode, as the engine drives it (a chunk of its prompt in each step), and alone in the same engine. Prints a table, then
one JSON line per measurement, which --output appends to a file.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_decode import GREEDY, SHAPES, WEIGHTS, gpu_name, make_spec, open_backend, sweep, write_lines
from engine_core.backends import SequenceStep
from engine_core.backends.cuda.backend import CudaBackend
from engine_core.measure.steps import seconds_per_step

GENERATED = 96  # timed steps of a run
NEWCOMER = 512  # tokens of a newcomer's prompt


def prompt_of(backend: CudaBackend, slot: int, length: int) -> np.ndarray:
    return np.random.default_rng(slot).integers(0, backend.vocab_size, length).astype(np.int32)


def start(backend: CudaBackend, slots: list[int], context: int) -> None:
    for slot in slots:
        prompt = prompt_of(backend, slot, context)
        backend.begin(slot, GREEDY, prompt)
        assert backend.step([SequenceStep(slot, prompt)])[0].result() is not None


def decode_seconds(backend: CudaBackend, count: int, context: int) -> float:
    """Return the seconds of a decode step of ``count`` sequences with ``context`` tokens each."""
    start(backend, list(range(count)), context)
    return seconds_per_step(backend, range(count), GENERATED)


def first_token(backend: CudaBackend, others: int, context: int) -> tuple[float, float]:
    """(seconds to the first token of a newcomer, longest gap between two tokens of the others meanwhile)."""
    slots, new = list(range(others)), others
    start(backend, slots, context)
    prompt, running = prompt_of(backend, new, NEWCOMER), [SequenceStep(slot) for slot in slots]
    pending = backend.step(running) if running else []
    begin = last = time.perf_counter()
    gap, token, queued = 0.0, None, []
    backend.begin(new, GREEDY, prompt)
    places = list(range(0, len(prompt), backend.prefill_chunk))
    while token is None:
        steps = list(running)
        if places:
            place = places.pop(0)
            part = prompt[place : place + backend.prefill_chunk]
            steps.append(SequenceStep(new, part, place, samples=not places))
        ahead = backend.step(steps)
        for each in pending:
            each.result()
        gap, last = max(gap, time.perf_counter() - last), time.perf_counter()
        for each in queued:
            token = each.result()
        queued, pending = ahead[len(running) :], ahead[: len(running)]
        if not running:
            for each in queued:
                token = each.result()
    first = time.perf_counter() - begin
    for each in pending:
        each.result()
    return first, gap


def bench(name: str, weights: str, kv_cache_type: str, options: argparse.Namespace) -> list[dict]:
    context, most = options.context, max(options.batches)
    length = max(context + GENERATED, NEWCOMER) + 8
    make = lambda max_batch: make_spec(SHAPES[name], length, 512, weights, kv_cache_type, max_batch)  # noqa: E731
    one, many = open_backend(make(1)), open_backend(make(most))
    single: list[float] = []
    batches: dict[int, list[float]] = {count: [] for count in options.batches}
    for round_number in range(options.rounds + 1):
        single_time = decode_seconds(one, 1, context)
        times = {count: decode_seconds(many, count, context) for count in options.batches}
        if round_number:  # the first one warms up
            single.append(single_time)
            for count, seconds in times.items():
                batches[count].append(seconds)
    rows = [row(name, weights, kv_cache_type, context, 1, 1, single, single)]
    for count, seconds in batches.items():
        rows.append(row(name, weights, kv_cache_type, context, most, count, seconds, single))
        if count == 1:
            continue
        pairs = [(first_token(many, 0, context)[0], first_token(many, count - 1, context)) for _ in range(5)]
        rows[-1] |= {
            "newcomer_tokens": NEWCOMER,
            "newcomer_ttft_ms": round(1e3 * statistics.median(first for _, (first, _) in pairs), 3),
            "newcomer_ratio_to_alone": round(statistics.median(first / alone for alone, (first, _) in pairs), 3),
            "longest_gap_ms": round(1e3 * max(gap for _, (_, gap) in pairs), 3),
        }
    one.close()
    many.close()
    return rows


def row(
    name: str,
    weights: str,
    kv_cache_type: str,
    context: int,
    max_batch: int,
    count: int,
    seconds: list[float],
    single: list[float],
) -> dict:
    step = statistics.median(seconds)
    return {
        "date": datetime.date.today().isoformat(),
        "shape": name,
        "weights": weights,
        "kv_cache_type": kv_cache_type,
        "prompt_tokens": context,
        "max_batch": max_batch,
        "batch": count,
        "ms_per_step": round(1e3 * step, 4),
        "tok_s": round(count / step, 1),
        "ratio_to_one": round(statistics.median(count * alone / each for alone, each in zip(single, seconds)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-3.1-8b", "qwen3-1.7b"], choices=sorted(SHAPES))
    parser.add_argument("--weights", nargs="+", default=["int4", "fp16"], choices=WEIGHTS)
    parser.add_argument("--kv-cache-type", nargs="+", default=["fp16"], choices=["fp16", "int8", "fp8"])
    parser.add_argument("--context", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not 2 <= max(options.batches) <= 16 or min(options.batches) < 1:
        parser.error("--batches are 1 to 16, with one above 1")
    gpu = gpu_name()
    print(f"{gpu}, {options.context} tokens a prompt")
    print(f"{'shape':<14}{'weights':<9}{'KV':<6}{'max':>4}{'batch':>6}{'ms/step':>10}{'tok/s':>9}{'ratio':>7}", end="")
    print(f"{'newcomer ms':>13}{'to alone':>10}{'gap ms':>8}")
    rows = []
    for found in sweep(bench, options):
        rows.append(found)
        print(
            f"{found['shape']:<14}{found['weights']:<9}{found['kv_cache_type']:<6}{found['max_batch']:>4}"
            f"{found['batch']:>6}{found['ms_per_step']:>10.4f}{found['tok_s']:>9.1f}{found['ratio_to_one']:>7.2f}"
            f"{found.get('newcomer_ttft_ms', ''):>13}{found.get('newcomer_ratio_to_alone', ''):>10}"
            f"{found.get('longest_gap_ms', ''):>8}",
            flush=True,
        )
    write_lines(gpu, rows, options.output)


if __name__ == "__main__":
    main()
