"""Measure the quality of each variant: perplexity and exact-match plans of the demo model, on the CPU.

``text_quality.py`` measures a real model on public texts, on every backend.

    python benchmarks/quality.py --work /tmp/quality          # measures, then the table and the plot
    python benchmarks/quality.py --variants ""                # table and plot of what was measured before
    python benchmarks/quality.py --work /tmp/quality --differences

For every variant × vocabulary (full, reduced) × KV cache type: perplexity of the last answers of held-out
conversations, the share of those that greedy decoding writes byte for byte (tools/demo_model/evaluate.py), the bytes of
weights a decode step reads, and tokens per second on one thread. Weights, vocabulary and scales are chosen with
conversations of the training kind; none of the held-out ones has a part in them. All int8 and int4 variants have the
LM head and the embedding in int8.

fp8 and nvfp4 have no fast form on a CPU: their rows are the quantized weights, dequantized to fp32, so quality is
theirs and speed is not (no bytes, no tok_s). fp16 is the checkpoint itself, computed in fp32: its speed is left out,
too. Each row is appended to benchmarks/results/quality.jsonl; benchmarks/results/quality.svg shows the last of each.

``--differences`` asks how far a variant is from the checkpoint rather than from the text: the mean magnitude of the
difference of ln p of the answers' tokens, where perplexity and exact match are ruled by the few answers in doubt.

``--outliers 32`` measures the same model with what large ones have and small ones have not: a few channels of the
activations many times larger than the others (Dettmers et al. 2022, arXiv 2208.07339). The norms in front of the
linears make them larger and the columns behind take it back, by a power of two, so that the function stays the same.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import shutil
import sys
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine_core.backends.onnxruntime.build import build_engine  # noqa: E402
from engine_core.config import EngineConfig  # noqa: E402
from engine_core.formats.number_formats import to_16_bit  # noqa: E402
from engine_core.formats.safetensors_file import SafetensorsFile, SafetensorsWriter  # noqa: E402
from engine_core.measure.bench import Benchmark  # noqa: E402
from engine_core.quantize import quantize_checkpoint  # noqa: E402
from engine_core.reduce_vocab.reduce import reduce_vocab  # noqa: E402
from engine_core.request import ChatMessage, GenerationRequest, SamplingParams  # noqa: E402
from engine_core.serving.engine import CancelToken, Engine  # noqa: E402
from engine_core.text.documents import Document  # noqa: E402
from tools.demo_model.evaluate import held_out_examples  # noqa: E402
from tools.demo_model.grammar import Example, Generator  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TRAINING_SEED = 777  # of conversations of the training kind
NUM_TRAINING = 3000


@dataclass(frozen=True)
class Variant:
    """``method``: of edgellm quantize, "" = the checkpoint as it is. ``build``: of edgellm build."""

    method: str
    build: str
    options: dict
    runs_on_cpu: bool = True


VARIANTS: dict[str, Variant] = {
    "fp16": Variant("", "fp32", {}, runs_on_cpu=False),
    "int8": Variant("int8", "int8", {}),
    "int8_smoothquant": Variant("int8_smoothquant", "int8", {}),
    "fp8": Variant("fp8", "fp32", {}, runs_on_cpu=False),
    "int4 g32": Variant("int4", "int4", {"group_size": 32}),
    "int4_awq g32": Variant("int4_awq", "int4_awq", {"group_size": 32}),
    "int4 g128": Variant("int4", "int4", {"group_size": 128}),
    "int4_awq g128": Variant("int4_awq", "int4_awq", {"group_size": 128}),
    "nvfp4": Variant("nvfp4", "fp32", {}, runs_on_cpu=False),
}
KV_CACHE_TYPES = ("fp32", "fp16", "int8")


def model_name(options: argparse.Namespace) -> str:
    return options.checkpoint.name + (f", outliers x{options.outliers}" if options.outliers > 1 else "")


def write_chats(path: Path, examples: Many[Example]) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        for example in examples:
            messages = [{"role": role, "content": content} for role, content in example.messages]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def with_outliers(checkpoint: Path, directory: Path, factor: int) -> Path:
    """Write a copy of ``checkpoint`` with outliers.

    Every 64th channel behind a norm is ``factor`` (a power of two) times as large, its columns of the linears that much
    smaller.
    """
    weights = "model.safetensors"
    if (directory / "config.json").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    file = SafetensorsFile(checkpoint / weights)
    header = {name: (file.dtype(name), file.shape(name)) for name in file.names()}
    with SafetensorsWriter(directory / weights, header) as writer:
        for name in file.names():
            values = file.read(name)  # float32
            if name.endswith("layernorm.weight"):
                values[::64] *= factor
            elif name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                values[:, ::64] /= factor
            writer.write(name, to_16_bit(values, {"BF16": "bf16", "F16": "fp16"}[file.dtype(name)]))
    # Last: an interrupted copy has no config.json.
    shutil.copytree(checkpoint, directory, ignore=shutil.ignore_patterns(weights), dirs_exist_ok=True)
    return directory


class Grid:
    """Builds what is measured, each engine once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work: Path = options.work
        self.checkpoint: Path = options.checkpoint
        self.model = model_name(options)
        if options.outliers > 1:  # another model, with engines of its own
            self.work /= f"outliers_{options.outliers}"
            self.checkpoint = with_outliers(options.checkpoint, self.work / "checkpoint", options.outliers)
        self.work.mkdir(parents=True, exist_ok=True)
        generator = Generator(TRAINING_SEED)
        self.training = write_chats(
            self.work / "training.jsonl", [generator.conversation() for _ in range(NUM_TRAINING)]
        )
        self.examples = [e for kind in held_out_examples(options.examples).values() for e in kind]
        self.vocab = reduce_vocab(
            self.checkpoint, self.work / "vocab", method="frequency", texts=[self.training], coverage=options.coverage
        )

    def engine(self, name: str, reduced: bool) -> Path:
        directory = self.work / "engines" / f"{name.replace(' ', '_')}{'_reduced' if reduced else ''}"
        if (directory / "engine.json").is_file():
            return directory
        variant = VARIANTS[name]
        checkpoint = self.checkpoint
        if variant.method:
            checkpoint = self.work / "checkpoints" / name.replace(" ", "_")
            if not (checkpoint / "config.json").is_file():
                checkpoint.parent.mkdir(exist_ok=True)
                quantize_checkpoint(self.checkpoint, checkpoint, method=variant.method, **variant.options)
        build_engine(
            checkpoint,
            directory,
            quantization=variant.build,
            vocab_map=self.vocab.map_path if reduced else None,
            kv_cache_type="int8",
        )
        return directory


def generated(engine: Engine, example: Example) -> str:
    messages = tuple(ChatMessage(role, content) for role, content in example.messages[:-1])
    request = GenerationRequest("quality", messages, sampling=SamplingParams(max_new_tokens=512))
    return "".join(piece.text for piece in engine.generate(engine.prepare(request), CancelToken()))


def answer_logs(engine: Engine, example: Example) -> np.ndarray:
    """float64 [tokens of the last answer, its stop token included]: ln p of each."""
    messages = tuple({"role": role, "content": content} for role, content in example.messages)
    *_, (prompt, answer) = Document("held out", messages=messages).turns(engine.tokenizer)
    return engine.log_probabilities(np.concatenate([prompt, answer]), len(prompt))


def score(engine: Engine, examples: Many[Example]) -> dict:
    """Perplexity of the last answers, and the percentage of those that greedy decoding writes byte for byte.

    An answer each of whose tokens has more than half of the probability is what greedy decoding writes; only the others
    have to be generated to know.
    """
    logs, right = [], 0
    for example in examples:
        found = answer_logs(engine, example)
        logs.append(found)
        right += bool((found > math.log(0.5)).all()) or generated(engine, example) == example.messages[-1][1]
    found = np.concatenate(logs)
    covered = np.isfinite(found)
    return {
        "perplexity": round(math.exp(-found[covered].mean()), 5),
        "scored_tokens": int(covered.sum()),
        "lost_tokens": int((~covered).sum()),
        "exact_match": round(100 * right / len(examples), 2),
        "examples": len(examples),
    }


def measure(grid: Grid, name: str, reduced: bool, kv_cache_type: str) -> dict:
    config = EngineConfig(grid.engine(name, reduced), kv_cache_type=kv_cache_type, num_threads=1)
    with Benchmark(config) as bench:
        bytes_per_step, tok_s = bench.bytes_per_step, bench.measure(64, 64, 5).tokens_per_second
    engine = Engine.open(config, _quiet)
    try:
        scores = score(engine, grid.examples)
        vocab_size = engine.reduced_vocab_size
    finally:
        engine.close()
    runs = VARIANTS[name].runs_on_cpu
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {p: importlib.metadata.version(p) for p in ("onnxruntime", "numpy", "transformers")},
        "model": grid.model,
        "variant": name,
        "vocab_size": vocab_size,
        "kv_cache_type": kv_cache_type,
        **scores,
        "bytes_per_step": bytes_per_step if runs else None,
        "tok_s": round(tok_s, 1) if runs else None,
    }


def differences(grid: Grid, names: Many[str]) -> list[dict]:
    """Return the differences of each variant to fp16, full vocabulary, fp32 KV cache; of each AWQ variant also what it
    takes off that of the same without (a negative ``awq_change``), with a 95 % bootstrap interval over the answers."""
    logs = {}
    for name in dict.fromkeys(("fp16", *names)):
        engine = Engine.open(EngineConfig(grid.engine(name, False), kv_cache_type="fp32", num_threads=1), _quiet)
        try:
            logs[name] = [answer_logs(engine, example) for example in grid.examples]
        finally:
            engine.close()
    lengths = np.array([len(values) for values in logs["fp16"]])
    far = {  # of each answer, summed over its tokens
        name: np.array([np.abs(x - y).sum() for x, y in zip(values, logs["fp16"])]) for name, values in logs.items()
    }
    rows = []
    for name in far:
        if name == "fp16":
            continue
        row = {
            "date": datetime.date.today().isoformat(),
            "versions": {p: importlib.metadata.version(p) for p in ("onnxruntime", "numpy", "transformers")},
            "model": grid.model,
            "variant": name,
            "answers": len(lengths),
            "tokens": int(lengths.sum()),
            "mean_difference": round(float(far[name].sum() / lengths.sum()), 6),
        }
        plain = name.replace("_awq", "")
        if plain != name and plain in far:
            change = far[name] - far[plain]
            drawn = np.random.default_rng(0).integers(0, len(change), (2000, len(change)))
            means = change[drawn].sum(axis=1) / lengths[drawn].sum(axis=1)
            row["awq_change"] = round(float(change.sum() / lengths.sum()), 6)
            row["awq_change_95"] = [round(float(value), 6) for value in np.percentile(means, (2.5, 97.5))]
        rows.append(row)
    return rows


def _quiet(line: str) -> None:
    """Ignore what an engine reports when it is opened."""


def latest(path: Path, model: str) -> list[dict]:
    """Return the last row of each variant, vocabulary and KV cache type of ``model``, in the order of VARIANTS."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        row = json.loads(line)
        if row["model"] != model:
            continue
        rows[row["variant"], row["vocab_size"], row["kv_cache_type"]] = row
    order = [*VARIANTS]
    kinds = [*KV_CACHE_TYPES]
    return sorted(
        (row for row in rows.values() if row["variant"] in order),
        key=lambda r: (order.index(r["variant"]), -r["vocab_size"], kinds.index(r["kv_cache_type"])),
    )


_COLORS = ("#1b6ca8", "#d1495b", "#3b8f5a", "#8a5fbf", "#c98a1b", "#555555")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 560, 330, 64, 44, 96  # of one of the two panels


def draw(rows: list[dict], path: Path) -> None:
    """Two panels, perplexity and exact match, with a mark for each vocabulary and KV cache type."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    groups = list(dict.fromkeys((row["vocab_size"], row["kv_cache_type"]) for row in rows))
    parts = []
    for panel, (key, label) in enumerate((("perplexity", "perplexity"), ("exact_match", "exact match, %"))):
        parts += _panel(rows, names, groups, key, label, panel * _WIDTH)
    for index, (vocab_size, kv_cache_type) in enumerate(groups):
        x = _LEFT + index * 170
        parts.append(f'<circle cx="{x}" cy="14" r="4" fill="{_COLORS[index % len(_COLORS)]}"/>')
        parts.append(f'<text x="{x + 9}" y="18">{vocab_size} tokens, KV {kv_cache_type}</text>')
    width, height = 2 * _WIDTH, _HEIGHT + _BOTTOM
    text = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
    text += f'font-family="sans-serif" font-size="12"><rect width="{width}" height="{height}" fill="white"/>\n'
    path.write_text(text + "\n".join(parts) + "\n</svg>\n", encoding="utf-8")


def _panel(rows: list[dict], names: list[str], groups: list[tuple], key: str, label: str, offset: int) -> list[str]:
    low, high = min(row[key] for row in rows), max(row[key] for row in rows)
    margin = 0.06 * (high - low or 1)
    low, high = low - margin, high + margin

    def y_of(value: float) -> float:
        return _HEIGHT - (value - low) / (high - low) * (_HEIGHT - _TOP)

    step = (_WIDTH - _LEFT - 20) / len(names)
    parts = [f'<text x="{offset + _LEFT}" y="{_TOP - 10}">{label}</text>']
    for tick in range(6):
        value = low + (high - low) * tick / 5
        y, digits = y_of(value), 4 if key == "perplexity" else 1
        right = offset + _WIDTH - 20
        parts.append(f'<line x1="{offset + _LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{offset + _LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.{digits}f}</text>')
    for place, name in enumerate(names):
        x = offset + _LEFT + (place + 0.5) * step
        turn = f'transform="rotate(-35 {x:.1f} {_HEIGHT + 18})"'
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT + 18}" text-anchor="end" {turn}>{name}</text>')
    for row in rows:
        group = groups.index((row["vocab_size"], row["kv_cache_type"]))
        shift = (group - (len(groups) - 1) / 2) * step / (len(groups) + 1)
        x = offset + _LEFT + (names.index(row["variant"]) + 0.5) * step + shift
        color = _COLORS[group % len(_COLORS)]
        parts.append(f'<circle cx="{x:.1f}" cy="{y_of(row[key]):.1f}" r="4" fill="{color}"/>')
    return parts


def table(rows: list[dict]) -> str:
    lines = [
        "| variant | vocabulary | KV cache | perplexity | lost tokens | exact match | bytes per step | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        step = "–" if row["bytes_per_step"] is None else f"{row['bytes_per_step'] / 1e6:.2f} MB"
        rate = "–" if row["tok_s"] is None else f"{row['tok_s']:.0f}"
        lines.append(
            f"| {row['variant']} | {row['vocab_size']} | {row['kv_cache_type']} | {row['perplexity']:.4f} | "
            f"{row['lost_tokens']} of {row['scored_tokens'] + row['lost_tokens']} | {row['exact_match']:.1f} % | "
            f"{step} | {rate} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "models" / "demo")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work" / "quality", help="engines; kept")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--examples", type=int, default=300, help="of each of the three kinds of held-out")
    parser.add_argument("--coverage", type=float, default=100, help="percent of training tokens the vocabulary keeps")
    parser.add_argument("--kv-cache-types", default=",".join(KV_CACHE_TYPES))
    parser.add_argument("--differences", action="store_true", help="only the differences of the variants to fp16")
    parser.add_argument("--outliers", type=int, default=1, metavar="FACTOR", help="give the model outlier channels")
    parser.add_argument("--fresh", action="store_true", help="remove the engines of an earlier run first")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(options.work, ignore_errors=True)
    if options.differences:
        for row in differences(Grid(options), [name for name in options.variants.split(",") if name]):
            print(json.dumps(row), flush=True)
            with open(RESULTS / "quality_differences.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return
    if options.variants:
        grid = Grid(options)
        for name in options.variants.split(","):
            for reduced in (False, True):
                for kv_cache_type in options.kv_cache_types.split(","):
                    line = json.dumps(measure(grid, name, reduced, kv_cache_type))
                    print(line, flush=True)
                    with open(RESULTS / "quality.jsonl", "a", encoding="utf-8") as file:
                        file.write(line + "\n")
    rows = latest(RESULTS / "quality.jsonl", model_name(options))
    print(table(rows))
    if options.outliers == 1:
        draw(rows, RESULTS / "quality.svg")


if __name__ == "__main__":
    main()
