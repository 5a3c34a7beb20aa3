"""Measure the time to the first token of long prompts, beside that of another source tree in the same call.

    python3 benchmarks/gpu_prefill.py [--against DIR] [--shape llama-3.1-8b] [--weights fp16 int8 int4 fp8 fp8+]
        [--prompts 2048 8192] [--output benchmarks/results/gpu_prefill.jsonl]

Random weights of a published shape on the GPU that is there; fp8+ is fp8 with activations in fp8. ``--against`` names
the root of another checkout of this project. Each tree runs in processes of its own, in turns. Prints a table of
milliseconds (medians) and their ratios, then a JSON line for each of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ("fp16", "int8", "int4", "fp8", "fp8+")
_RUNS = {2048: 7, 8192: 4}  # timed prompts of these lengths
_GENERATED = 4


def measure_here(tree: Path, shape: str, weights: str, prompts: list[int]) -> dict[int, float] | None:
    """Return prompt's length → ms to its first token with the code of ``tree``; None where it lacks the weights."""
    sys.path.insert(0, str(tree))
    from benchmarks import gpu_decode
    from engine_core.backends.cuda.layout import CudaSpec

    assert Path(gpu_decode.__file__).resolve().is_relative_to(tree.resolve()), gpu_decode.__file__
    chooses = "chooses_chunk" in {field.name for field in dataclasses.fields(CudaSpec)}
    length = max(prompts) + gpu_decode.GENERATED
    spec = gpu_decode.make_spec(gpu_decode.SHAPES[shape], length, 0 if chooses else 512, weights.rstrip("+"))
    if weights.endswith("+"):
        if not hasattr(spec, "fp8_activations"):
            return None
        spec = dataclasses.replace(spec, fp8_activations=True)
    backend = gpu_decode.open_backend(spec)
    found = {}
    for prompt in prompts:
        runs = [gpu_decode.measure(backend, prompt, _GENERATED)[0] for _ in range(1 + _RUNS.get(prompt, 5))]
        found[prompt] = round(1e3 * statistics.median(runs[1:]), 3)
    backend.close()
    return found


def run_head() -> dict[str, str]:
    """Return what every row says of its run."""
    sys.path.insert(0, str(ROOT))
    from engine_core.cuda.gpu_info import find_gpus
    from tools.result_rows import commit, now

    return {"date": now(), "commit": commit(), "gpu": find_gpus().gpus[0].name}


def _in_process(tree: Path, options: argparse.Namespace, weights: str) -> dict[int, float] | None:
    lengths = [str(length) for length in options.prompts]
    command = [sys.executable, __file__, "--tree", str(tree), "--shape", options.shape, "--weights", weights]
    done = subprocess.run([*command, "--prompts", *lengths], check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return None if found is None else {int(length): ms for length, ms in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="root of another checkout")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=WEIGHTS)
    parser.add_argument("--prompts", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)  # measure this one here
    options = parser.parse_args()
    if options.tree is not None:
        print(json.dumps(measure_here(options.tree, options.shape, options.weights[0], options.prompts)))
        return
    trees = {"now": ROOT, **({"before": options.against} if options.against else {})}
    start, rows, first = time.monotonic(), [], {}
    head = run_head()
    print(f"{'weights':<9}{'prompt':>7}{'before ms':>11}{'now ms':>9}{'now/before':>12}{'of fp16 now':>13}", flush=True)
    for weights in options.weights:
        found = {name: _in_process(tree, options, weights) for name, tree in trees.items()}
        for length in options.prompts:
            times = {name: ms[length] for name, ms in found.items() if ms is not None}
            now, before = times["now"], times.get("before")
            first.setdefault(length, now)
            ratio, shown = ("", "") if before is None else (f"{now / before:.3f}", f"{before:.2f}")
            share = f"{now / first[length]:.3f}" if options.weights[0] == "fp16" else ""
            print(f"{weights:<9}{length:>7}{shown:>11}{now:>9.2f}{ratio:>12}{share:>13}", flush=True)
            row = {"shape": options.shape, "weights": weights, "prompt_tokens": length, "ttft_ms": times}
            rows.append(head | row)
    print(f"{time.monotonic() - start:.0f} s")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    print(lines, end="")
    if options.output:
        with open(options.output, "a", encoding="utf-8") as file:
            file.write(lines)


if __name__ == "__main__":
    main()
