"""Measure the speed of a pruned LM head: decode steps at the shape of Qwen3-0.6B, on the CPU, random weights.

    python benchmarks/vocab_speed.py --work /tmp/vocab_speed

int8 and int4 with the head in int8, and int4 in groups of 128 with the head in int4, each with the full vocabulary
and with a quarter of it built in, and with each KV cache type. Every engine is opened once a round, so that a slow
moment of the machine meets all of them; the figure is the median over the rounds. Prints a table and appends JSON
lines to benchmarks/results/vocab_speed.jsonl. The tokenizer and the calibration text of the int8 KV cache are the demo
model's: the ids are in range, and what the scales are worth does not matter for speed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine_core.backends.onnxruntime.build import build_engine  # noqa: E402
from engine_core.config import EngineConfig  # noqa: E402
from engine_core.formats.vocab_map import write_vocab_map  # noqa: E402
from engine_core.hub.known_models import find_known  # noqa: E402
from engine_core.measure.bench import Benchmark  # noqa: E402
from engine_core.measure.random_checkpoint import write_random_checkpoint  # noqa: E402

_QWEN3 = find_known("Qwen3-0.6B")
assert _QWEN3 is not None
SHAPE = {**_QWEN3.config, "max_position_embeddings": 4096, "eos_token_id": 151645}
VARIANTS = {
    "int8": dict(quantization="int8"),
    "int4": dict(quantization="int4"),
    "int4 g128 head 4": dict(quantization="int4", group_size=128, head_bits=4),
}
QUARTER = SHAPE["vocab_size"] // 4
DEMO = ROOT / "models" / "demo"
MAX_CONTEXT = 1024  # tokens


class Engines:
    """Builds each engine once; all hold every KV cache type."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.checkpoint = work / "checkpoint"
        if not (self.checkpoint / "model.safetensors").is_file():
            write_random_checkpoint(self.checkpoint, SHAPE)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copyfile(DEMO / name, self.checkpoint / name)
            chats = (DEMO / "calibration.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (self.checkpoint / "calibration.jsonl").write_text("".join(chats[:4]), encoding="utf-8")
        self.map = work / "quarter.safetensors"
        kept = np.unique([*range(QUARTER - 1), SHAPE["eos_token_id"]]).astype(np.int32)
        write_vocab_map(self.map, kept, {})

    def directory(self, name: str, reduced: bool) -> Path:
        directory = self.work / f"{name.replace(' ', '_')}{'_quarter' if reduced else ''}"
        if not (directory / "engine.json").is_file():
            build_engine(
                self.checkpoint,
                directory,
                max_context=MAX_CONTEXT,
                vocab_map=self.map if reduced else None,
                model_name="Qwen3-0.6B shape, random weights",
                **VARIANTS[name],
            )
        return directory


def measure(directory: Path, kv_cache_type: str, options: argparse.Namespace) -> tuple[float, int, int, int]:
    """(seconds a step, bytes of weights a step reads, rows of the head, threads)."""
    config = EngineConfig(
        directory, kv_cache_type=kv_cache_type, num_threads=options.threads, prompt_cache_entries=0, verify_files=False
    )
    with Benchmark(config) as bench:
        timing = bench.measure(options.prompt_tokens, options.new_tokens, 1)
        return timing.per_token, bench.bytes_per_step, bench.backend.reduced_vocab_size, bench.threads


def table(rows: list[dict]) -> str:
    whole = [row for row in rows if row["vocab_size"] == SHAPE["vocab_size"]]
    full = {(row["variant"], row["kv_cache_type"]): row["tok_s"] for row in whole}
    lines = ["| variant | vocabulary | KV cache | bytes a step | tokens/s | against the full head |", "|---" * 6 + "|"]
    for row in rows:
        ratio = row["tok_s"] / full[row["variant"], row["kv_cache_type"]]
        lines.append(
            f"| {row['variant']} | {row['vocab_size']} | {row['kv_cache_type']} | "
            f"{row['bytes_per_step'] / 1e6:.0f} MB | {row['tok_s']:.1f} | {ratio:.2f}× |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work" / "speed", help="engines; kept")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--kv-cache-types", default="fp32,fp16,int8")
    parser.add_argument("--threads", type=int, default=0, help="0: the backend's choice")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--build-only", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    names, kinds = options.variants.split(","), options.kv_cache_types.split(",")
    engines = Engines(options.work)
    cases = [(name, reduced, kind) for name in names for reduced in (False, True) for kind in kinds]
    for name, reduced, _ in cases:
        engines.directory(name, reduced)
    if options.build_only:
        return
    found: dict[tuple, list] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for name, reduced, kind in cases:
            found[name, reduced, kind].append(measure(engines.directory(name, reduced), kind, options))
    rows = []
    for (name, _, kind), values in found.items():
        per_token, (_, bytes_per_step, head_rows, threads) = statistics.median(v[0] for v in values), values[0]
        rows.append(
            {
                "date": datetime.date.today().isoformat(),
                "versions": {package: importlib.metadata.version(package) for package in ("onnxruntime", "numpy")},
                "shape": "Qwen3-0.6B",
                "variant": name,
                "vocab_size": head_rows,
                "kv_cache_type": kind,
                "threads": threads,
                "cores": os.cpu_count(),
                "prompt_tokens": options.prompt_tokens,
                "generated_tokens": options.new_tokens,
                "rounds": options.rounds,
                "bytes_per_step": bytes_per_step,
                "tok_s": round(1 / per_token, 2),
            }
        )
    with open(ROOT / "benchmarks" / "results" / "vocab_speed.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(rows))


if __name__ == "__main__":
    main()
