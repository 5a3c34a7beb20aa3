"""Measure one answer on the CPU against the peers: prefill and decode of the same shape on the same threads.

    python benchmarks/cpu_decode.py --shape qwen2.5-0.5b --threads 2
    python benchmarks/cpu_decode.py --shape llama-3.2-1b --engines ours-int4-head4,llama.cpp-q4_0

Weights are random, the shapes are the real ones. Each measurement runs in a process of its own, the engines one after
the other within each repeat; a figure is the median over the repeats. Prints a table, then a JSON line for each engine,
appended to benchmarks/results/cpu_decode.jsonl. Peers that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.cpu_engines import ENGINES, prepare  # noqa: E402

SHAPES: dict[str, dict] = {
    "qwen2.5-0.5b": dict(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        hidden_act="silu",
    ),
    "llama-3.2-1b": dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        hidden_act="silu",
    ),
}
DEFAULT_ENGINES = (
    "ours-int4-head4,ours-int4-g32-head4,ours-int4-g128-head4,ours-int4,ours-int8,"
    "llama.cpp-q4_0,llama.cpp-q8_0,transformers-fp32,genai-int4"
)
MAX_CONTEXT = 1024


def measure(options: argparse.Namespace) -> None:
    """Measure one engine with every prompt length in a child process; print one JSON object."""
    engine = ENGINES[options.child]
    with engine.open(Path(options.work) / options.shape, options.threads, MAX_CONTEXT) as runner:
        rng = np.random.default_rng(1)
        results = []
        for num_tokens in options.prompt_tokens:
            prompt = rng.integers(1000, 100000, size=num_tokens)
            runner.generate(prompt, 2)  # warm
            ttft, times = runner.generate(prompt, options.new_tokens)
            results.append({"prompt_tokens": num_tokens, "ttft_ms": ttft * 1e3, "ms_per_token": times * 1e3})
    print("RESULT " + json.dumps(results))


def run_child(options: argparse.Namespace, engine: str) -> list[dict] | None:
    command = [sys.executable, __file__, "--child", engine, "--shape", options.shape, "--threads", str(options.threads)]
    command += ["--work", str(options.work), "--new-tokens", str(options.new_tokens), "--prompt-tokens"]
    command += [str(count) for count in options.prompt_tokens]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[len("RESULT ") :])
    reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
    print(f"{engine} left out: {reason[:200]}")
    return None


def compare(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    directory = options.work / options.shape
    engines = []
    for name in options.engines.split(","):
        try:
            prepare(name, directory, SHAPES[options.shape], MAX_CONTEXT)
            engines.append(name)
        except ImportError as error:
            print(f"{name} left out: {error.name} is not installed")
    figures: dict[tuple[str, int], list[dict]] = {}
    for _repeat in range(options.repeats):
        for name in list(engines):
            results = run_child(options, name)
            if results is None:
                engines.remove(name)
            for result in results or ():
                figures.setdefault((name, result["prompt_tokens"]), []).append(result)
    report(options, figures)


def report(options: argparse.Namespace, figures: dict[tuple[str, int], list[dict]]) -> None:
    print(f"\n{options.shape}, {options.threads} threads, {options.repeats} repeats, {options.new_tokens} new tokens")
    print(f"{'engine':20} {'prompt':>7} {'first token':>12} {'per token':>10} {'tokens/s':>9}")
    lines = []
    for (name, num_tokens), results in sorted(figures.items(), key=lambda item: (item[0][1], item[0][0])):
        ttft, per_token = (statistics.median(r[key] for r in results) for key in ("ttft_ms", "ms_per_token"))
        print(f"{name:20} {num_tokens:7} {ttft:9.1f} ms {per_token:7.2f} ms {1e3 / per_token:9.1f}")
        lines.append(
            {
                "date": datetime.date.today().isoformat(),
                "versions": versions(ENGINES[name].packages),
                "cpu": cpu_name(),
                "shape": options.shape,
                "engine": name,
                "weights": ENGINES[name].weights,
                "threads": options.threads,
                "prompt_tokens": num_tokens,
                "ttft_ms": round(ttft, 2),
                "ms_per_token": round(per_token, 3),
                "repeats": len(results),
            }
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    print("\n" + text, end="")
    if options.save:
        target = ROOT / "benchmarks" / "results" / "cpu_decode.jsonl"
        target.parent.mkdir(exist_ok=True)
        with open(target, "a", encoding="utf-8") as file:
            file.write(text)


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--engines", default=DEFAULT_ENGINES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "benchmarks" / "work", help="checkpoints and engines; gigabytes"
    )
    parser.add_argument(
        "--save", action=argparse.BooleanOptionalAction, default=True, help="append to the results file"
    )
    parser.add_argument("--child", choices=sorted(ENGINES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    measure(options) if options.child else compare(options)


if __name__ == "__main__":
    main()
