"""Measure the TensorRT backend with and without CUDA graphs, and where the time of a decode step goes.

    python3 benchmarks/gpu_trt.py [--shapes NAME ...] [--prompts N ...] [--max-context N] [--layers N]
        [--exporter NAME] [--level N] [--work DIR] [--profile] [--transformers] [--transformers-python PATH]
        [--output benchmarks/results/gpu_trt.jsonl]

Builds an engine of each shape with random weights (minutes for a 1 B model; --work keeps it for the next run), then
measures time to first token, time per token as the engine drives it (one step queued ahead, each token read on the
host), and the host's own part of it. The floor of a step is the bytes it has to read over the read bandwidth measured
in the same run. --transformers measures a static cache with torch.compile beside it, in this Python or, where torch and
TensorRT are not installed together, in the one --transformers-python names. --layers: fewer layers, while developing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_decode import (
    GENERATED,
    GREEDY,
    SHAPES,
    Shape,
    bench_transformers,
    make_spec,
    measure,
    median_of,
    read_bandwidth,
    step_bytes,
    write_lines,
)
from engine_core.cuda.driver import Device
from engine_core.measure.random_checkpoint import write_random_checkpoint
from engine_core.measure.steps import begin, decode, prefill

RUNS = 5
_MARK = "TRANSFORMERS "  # before the JSON line of the other Python


def model_config(shape: Shape, max_context: int) -> dict:
    """config.json of a shape."""
    return {
        "architectures": ["Qwen3ForCausalLM" if shape.qk_norm else "LlamaForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": max_context,
        "hidden_act": "silu",
    }


def build(name: str, shape: Shape, max_context: int, work: Path, exporter: str, level: int) -> tuple[Path, float]:
    """(engine directory, s it took to build; 0 if it was there)."""
    from engine_core.backends.tensorrt.build import build_tensorrt

    engine_dir = work / f"{name}-{shape.layers}-{max_context}-{exporter}-{level}"
    if (engine_dir / "engine.json").is_file():
        return engine_dir, 0.0
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        checkpoint = write_random_checkpoint(Path(temporary) / name, model_config(shape, max_context))
        start = time.perf_counter()
        options = dict(max_context=max_context, exporter=exporter, level=level)
        build_tensorrt(checkpoint, engine_dir, report=print, **options)
    return engine_dir, time.perf_counter() - start


def host_seconds(backend, prompt_tokens: int) -> float:
    """s the host spends in one ``decode`` call, the median; the device is never waited for in it."""
    import numpy as np

    prompt = np.zeros(prompt_tokens, dtype=np.int32)
    begin(backend, GREEDY, prompt)
    pending, spent = prefill(backend, prompt, 0), []
    for _ in range(64):
        start = time.perf_counter()
        ahead = decode(backend)
        spent.append(time.perf_counter() - start)
        pending.result()
        pending = ahead
    pending.result()
    return statistics.median(spent)


def slowest_layers(backend, count: int = 30) -> list[tuple[str, float]]:
    """(layer, ms) of one decode step's contexts outside a graph, the slowest first, by TensorRT's profiler.

    In the exporter gemm, of one layer's three contexts.
    """
    import tensorrt as trt

    times: dict[str, list[float]] = {}

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.setdefault(layer_name, []).append(ms)

    model = getattr(backend, "_model", None)
    if model is None:
        contexts = {"": backend._decode_engine}
    else:
        contexts = {f"{name}: ": context for name, context in model._decode.items()}
    profiler, medians = Profiler(), []
    for prefix, context in contexts.items():
        context._context.profiler = profiler
        times.clear()
        for _ in range(20):
            context(backend._stream)
            backend._stream.wait()
        medians += [(prefix + name, statistics.median(values)) for name, values in times.items()]
    return sorted(medians, key=lambda item: -item[1])[:count]


def bench_engine(
    engine_dir: Path, name: str, shape: Shape, options: argparse.Namespace, bandwidth: float
) -> list[dict]:
    from engine_core.backends.tensorrt.backend import TensorRTBackend
    from engine_core.config import EngineConfig
    from engine_core.formats.manifest import read_manifest

    manifest, rows = read_manifest(engine_dir, verify_hashes=False), []
    for graph in (True, False):
        config = EngineConfig(engine_dir, use_cuda_graph=graph, prompt_cache_entries=0)
        start = time.perf_counter()
        backend = TensorRTBackend.load(engine_dir, manifest, config)
        load_s = time.perf_counter() - start
        for prompt in options.prompts:
            measure(backend, prompt, 8)
            ttft, per_token = median_of([measure(backend, prompt, GENERATED) for _ in range(RUNS)])
            # A plan of the whole decoder is handed the whole cache, whatever part of it is filled.
            is_gemm = manifest.options["exporter"] == "gemm"
            read = prompt + GENERATED // 2 if is_gemm else manifest.max_context
            floor = step_bytes(make_spec(shape, manifest.max_context, 64), read) / bandwidth
            rows.append(
                record(
                    name, f"tensorrt {manifest.builder['tensorrt']}", graph, prompt, ttft, per_token, floor, bandwidth
                )
                | {
                    "host_us_per_token": round(1e6 * host_seconds(backend, prompt), 1),
                    "load_s": round(load_s, 2),
                    "exporter": manifest.options["exporter"],
                    "max_context": manifest.max_context,
                    "versions": manifest.builder,
                }
            )
        if options.profile and not graph:
            print("\nslowest layers of a decode step, ms:")
            for layer, ms in slowest_layers(backend):
                print(f"{ms:9.4f}  {layer}")
        backend.close()
    return rows


def record(
    shape: str, engine: str, graph: bool, prompt: int, ttft: float, per_token: float, floor: float, bandwidth: float
) -> dict:
    return {
        "date": datetime.date.today().isoformat(),
        "shape": shape,
        "dtype": "fp16",
        "engine": engine,
        "graph": graph,
        "prompt_tokens": prompt,
        "ttft_ms": round(1e3 * ttft, 3),
        "ms_per_token": round(1e3 * per_token, 4),
        "read_tb_s": round(bandwidth / 1e12, 3),
        "fraction": round(floor / per_token, 3),
    }


def transformers_rows(options: argparse.Namespace, bandwidth: float) -> list[dict]:
    """Measured here, or by the Python that has torch."""
    rows = []
    if options.transformers_python:
        command = [options.transformers_python, __file__, "--only-transformers", "--bandwidth", str(bandwidth)]
        command += ["--shapes", *options.shapes, "--prompts", *map(str, options.prompts)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        lines = [line for line in output.splitlines() if line.startswith(_MARK)]
        return [json.loads(line[len(_MARK) :]) for line in lines]
    for name in options.shapes:
        for row in bench_transformers(name, options.prompts, bandwidth):
            floor = 1e-3 * row["floor_ms"]
            ttft, per_token = 1e-3 * row["ttft_ms"], 1e-3 * row["ms_per_token"]
            rows.append(record(name, row["engine"], True, row["prompt_tokens"], ttft, per_token, floor, bandwidth))
    return rows


def show(rows: list[dict]) -> None:
    for row in rows:
        host = row.get("host_us_per_token", "")
        print(
            f"{row['shape']:<16}{row['engine']:<22}{'yes' if row['graph'] else 'no':<7}{row['prompt_tokens']:>7}"
            f"{row['ttft_ms']:>9.2f}{row['ms_per_token']:>10.4f}{1e3 / row['ms_per_token']:>8.1f}"
            f"{row['fraction']:>7.0%}{host:>9}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["tinyllama-1.1b", "llama-3.2-1b"], choices=sorted(SHAPES))
    parser.add_argument("--prompts", nargs="+", type=int, default=[32, 128, 512, 2048])
    parser.add_argument("--max-context", type=int, default=2304, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--exporter", default="auto", choices=["auto", "gemm", "plain", "native"])
    parser.add_argument("--level", type=int, default=3, help="how long TensorRT searches, 0 to 5")
    parser.add_argument("--work", type=Path, help="where engines are kept")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--transformers-python", default="")
    parser.add_argument("--only-transformers", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bandwidth", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.only_transformers:
        for row in transformers_rows(options, options.bandwidth):
            print(_MARK + json.dumps(row))
        return
    if max(options.prompts) + GENERATED + 2 > options.max_context:
        parser.error(f"--max-context {options.max_context} is too small for a prompt of {max(options.prompts)} tokens")
    device = Device()
    bandwidth, gpu = read_bandwidth(device), device.name
    device.close()
    print(f"{gpu}: reads {bandwidth / 1e12:.2f} TB/s")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for name in options.shapes:
            shape = dataclasses.replace(SHAPES[name], layers=options.layers or SHAPES[name].layers)
            engine_dir, build_s = build(name, shape, options.max_context, work, options.exporter, options.level)
            found = bench_engine(engine_dir, name, shape, options, bandwidth)
            rows += [row | {"layers": shape.layers, "build_s": round(build_s, 1)} for row in found]
    if options.transformers or options.transformers_python:
        rows += transformers_rows(options, bandwidth)
    titles = ("prompt", "TTFT ms", "ms/token", "tok/s", "floor", "host µs")
    print(f"{'shape':<16}{'engine':<22}{'graph':<7}" + "{:>7}{:>9}{:>10}{:>8}{:>7}{:>9}".format(*titles))
    show(rows)
    write_lines(gpu, rows, options.output)


if __name__ == "__main__":
    main()
