"""How much longer does a decode step take with a LoRA adapter?

    python3 benchmarks/lora.py [--shapes NAME ...] [--weights fp16 int4] [--ranks 16] [--batches 1 8] [--context N]
        [--rounds N] [--output benchmarks/results/lora.jsonl]
    python3 benchmarks/lora.py --backend onnxruntime --engine DIR [--ranks 16]

On cuda, models of published shapes with random weights on the GPU that is there; on onnxruntime, a built engine. Three
kinds of steps alternate in each round: those of an engine without adapters, those of an engine that has an adapter of
all linears but whose sequences name none, and those of sequences that name it. ``ratio_unused`` and ``ratio`` are the
medians over the rounds of the second and third kind's step time over the first kind's in the same round; a prompt is
compared in the same way. Prints a table, then one JSON line per measurement, which --output appends to a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_decode import GREEDY, SHAPES, WEIGHTS, gpu_name, make_spec, open_backend, write_lines
from engine_core.backends import Backend, SequenceStep
from engine_core.config import EngineConfig
from engine_core.formats.lora import LoraAdapter
from engine_core.formats.manifest import read_manifest
from engine_core.measure.random_checkpoint import write_random_adapter
from engine_core.measure.steps import seconds_per_step
from engine_core.models.spec import ModelSpec

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAME = "random"
GENERATED = 64  # timed steps of a run


def write_adapter(directory: Path, model: ModelSpec, rank: int) -> LoraAdapter:
    return LoraAdapter(NAME, write_random_adapter(directory, model, *MODULES, rank=rank, scale=0.01), model, rank)


def run(backend: Backend, count: int, context: int, adapter: str) -> tuple[float, float]:
    """(seconds of a prompt of ``context`` tokens, seconds of a step of ``count`` sequences), one step queued ahead."""
    prompts = []
    for slot in range(count):
        prompt = np.random.default_rng(slot).integers(3, backend.vocab_size, context).astype(np.int32)
        begin = time.perf_counter()
        backend.begin(slot, GREEDY, prompt, adapter)
        assert backend.step([SequenceStep(slot, prompt)])[0].result() is not None
        prompts.append(time.perf_counter() - begin)
    return statistics.median(prompts), seconds_per_step(backend, range(count), GENERATED)


def compare(bare: Backend, adapted: Backend, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the times and ratios of steps of ``count`` sequences."""
    kinds = ((bare, ""), (adapted, ""), (adapted, NAME))
    rounds = [
        [run(backend, count, options.context, name) for backend, name in kinds] for _ in range(options.rounds + 1)
    ]
    prompts, steps = (np.array(rounds[1:])[:, :, i] for i in (0, 1))  # [rounds, kinds]; the first round warms up
    middle: Callable[[np.ndarray], float] = lambda values: round(float(np.median(values)), 4)  # noqa: E731
    return {
        "batch": count,
        "prompt_tokens": options.context,
        "ms_per_step": middle(1e3 * steps[:, 0]),
        "ms_per_step_with_adapter": middle(1e3 * steps[:, 2]),
        "ratio_unused": middle(steps[:, 1] / steps[:, 0]),
        "ratio": middle(steps[:, 2] / steps[:, 0]),
        "prompt_ms": middle(1e3 * prompts[:, 0]),
        "prompt_ratio": middle(prompts[:, 2] / prompts[:, 0]),
    }


def bench_cuda(name: str, weights: str, rank: int, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    length = options.context + GENERATED + 8
    spec = make_spec(SHAPES[name], length, 512, weights)
    adapter, rows = write_adapter(folder / f"{name}-{rank}", spec.model, rank), []
    for count in options.batches:
        own = dataclasses.replace(spec, max_batch=count)
        bare, adapted = open_backend(own), open_backend(dataclasses.replace(own, adapters=(adapter,)))
        measured = compare(bare, adapted, count, options)
        bare.close()
        adapted.close()
        rows.append({"backend": "cuda", "shape": name, "weights": weights, "rank": rank, **measured})
    return rows


def bench_onnxruntime(engine: Path, rank: int, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    from engine_core.backends.onnxruntime.backend import OnnxRuntimeBackend

    manifest, rows = read_manifest(engine), []
    write_adapter(folder / f"engine-{rank}", manifest.model, rank)
    for count in options.batches:
        config = EngineConfig(engine, max_batch=count, lora_max_rank=rank)
        bare = OnnxRuntimeBackend.load(engine, manifest, config)
        with_adapter = dataclasses.replace(config, lora_adapters=(f"{NAME}:{folder / f'engine-{rank}'}",))
        adapted = OnnxRuntimeBackend.load(engine, manifest, with_adapter)
        measured = compare(bare, adapted, count, options)
        bare.close()
        adapted.close()
        model = {"shape": manifest.model_name, "weights": manifest.quantization}
        rows.append({"backend": "onnxruntime", **model, "rank": rank, **measured})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("cuda", "onnxruntime"), default="cuda")
    parser.add_argument("--engine", type=Path, help="of onnxruntime")
    parser.add_argument("--shapes", nargs="+", default=["llama-3.2-1b"], choices=SHAPES)
    parser.add_argument("--weights", nargs="+", default=["fp16", "int4"], choices=WEIGHTS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.backend == "onnxruntime" and options.engine is None:
        parser.error("--backend onnxruntime needs --engine")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in options.ranks:
            if options.backend == "onnxruntime":
                rows += bench_onnxruntime(options.engine, rank, Path(folder), options)
                continue
            for name in options.shapes:
                for weights in options.weights:
                    rows += bench_cuda(name, weights, rank, Path(folder), options)
    date = datetime.date.today().isoformat()
    rows = [{"date": date, **row} for row in rows]
    print(
        f"{'shape':16} {'weights':8} {'rank':>4} {'batch':>5} {'ms/step':>8} {'unused':>7} {'adapter':>7} {'prompt':>7}"
    )
    for row in rows:
        head = f"{row['shape']:16} {row['weights']:8} {row['rank']:4} {row['batch']:5} {row['ms_per_step']:8.3f}"
        print(f"{head} {row['ratio_unused']:7.3f} {row['ratio']:7.3f} {row['prompt_ratio']:7.3f}")
    if options.backend == "cuda":
        machine = gpu_name()
    else:
        machine = f"none; {os.cpu_count()} cores of {platform.processor() or platform.machine()}"
    write_lines(machine, rows, options.output)


if __name__ == "__main__":
    main()
