"""Measure how fast the CUDA backend decodes, and how far that is from the memory limit.

    python3 benchmarks/gpu_decode.py [--shapes NAME ...] [--weights fp16 int8 int4 fp8 nvfp4]
        [--kv-cache-type fp16 int8] [--contexts N ...] [--transformers] [--output benchmarks/results/gpu_decode.jsonl]

Models of published shapes with random weights on the GPU that is there. The floor of a step is the bytes it has to
read (every weight but the embedding's rows, and the KV cache with its scales) over the read bandwidth measured in the
same run. Decode is timed as the engine drives it: one step queued ahead, each token read on the host. A turn is the
time to the first token after 32 more tokens, when the prompt is in the cache. Prints a table, then one JSON line per
measurement, which --output appends to a file; gpu_plot.py draws it.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine_core.backends.cuda.backend import CudaBackend
from engine_core.backends.cuda.build import to_tiles
from engine_core.backends.cuda.layout import PREFILL_CHUNK, CudaSpec, packed_shapes, round_rows, weight_arrays
from engine_core.cuda.bandwidth import read_bandwidth
from engine_core.cuda.driver import Device, DeviceArray
from engine_core.cuda.kernels.linear_packed import FLOAT_LAYOUTS
from engine_core.formats.weight_formats import weight_format
from engine_core.measure.steps import begin, decode, prefill
from engine_core.models.shapes import spec_of
from engine_core.models.spec import ModelSpec
from engine_core.request import SamplingParams

WEIGHTS = ("fp16", "int8", "int4", "fp8", "nvfp4")
GENERATED = 128
BLOCK = 1 << 24  # random values that a weight repeats
TURN = 32  # tokens of a turn of a conversation
GREEDY = SamplingParams(seed=1)


@dataclass(frozen=True)
class Shape:
    """The sizes of a published model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qk_norm: bool = False


SHAPES = {
    "tinyllama-1.1b": Shape(22, 2048, 5632, 32, 4, 64, 32000, False),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, True),
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, False),
    "qwen3-0.6b": Shape(28, 1024, 3072, 16, 8, 128, 151936, True, qk_norm=True),
    "qwen3-1.7b": Shape(28, 2048, 6144, 16, 8, 128, 151936, True, qk_norm=True),
    "qwen3-4b": Shape(36, 2560, 9728, 32, 8, 128, 151936, True, qk_norm=True),
    "qwen3-8b": Shape(36, 4096, 12288, 32, 8, 128, 151936, False, qk_norm=True),
}


def model_of(shape: Shape) -> ModelSpec:
    """A model of that shape without biases."""
    return spec_of(
        dict(
            architectures=["Qwen3ForCausalLM" if shape.qk_norm else "LlamaForCausalLM"],
            num_hidden_layers=shape.layers,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab,
            rms_norm_eps=1e-5,
            tie_word_embeddings=shape.tied,
        )
    )


def make_spec(
    shape: Shape,
    max_context: int,
    chunk: int = 0,
    weights: str = "fp16",
    kv_cache_type: str = "fp16",
    max_batch: int = 1,
) -> CudaSpec:
    """Return the spec of an engine; ``chunk``: 0 = what the backend chooses on the GPU."""
    return CudaSpec(
        model=model_of(shape),
        kv_int8=kv_cache_type == "int8",
        kv_fp8=kv_cache_type == "fp8",
        max_context=max_context,
        head_rows=shape.vocab,
        dtype="fp16",
        weight_format=weight_format(weights),
        chunk=round_rows(min(chunk or PREFILL_CHUNK, max_context)),
        pool_tokens=0,
        max_batch=max_batch,
        chooses_chunk=not chunk,
    )


def open_backend(spec: CudaSpec) -> CudaBackend:
    """Return a backend of random weights."""
    device, head_dim = Device(), spec.attention.head_dim
    spec = spec.on(device)
    angles = np.arange(spec.max_context)[:, None] * 500000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    rope = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    return CudaBackend(device, spec, RandomWeights(device, spec), rope)


class RandomWeights:
    """A weight source: norms are one, the rest repeats one block of normal values."""

    def __init__(self, device: Device, spec: CudaSpec) -> None:
        self._device = device
        self._spec = spec
        self._block = (0.01 * np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32)).astype(np.float16)

    def __call__(self, name: str, array: DeviceArray) -> None:
        if array.dtype == "uint8" and self._spec.weight_format.kind in FLOAT_LAYOUTS:
            self._repeat(array, self._strips(packed_shapes(self._spec)[name.split(".")[-1]][1]))
            return
        if array.dtype == "uint8":
            # Any bits are 4- or 8-bit weights, and the block's values small scales.
            array = DeviceArray(array.address, (array.nbytes // 2,), "fp16")
        count = array.nbytes // 2
        if name.endswith("norm"):
            self._device.upload(array, np.ones(count, dtype=np.float16))
            return
        self._repeat(array, self._block[:count])

    def _strips(self, cols: int) -> np.ndarray:
        """Sixteen strips of packed tiles of small floats, in bytes: some of those are no numbers."""
        rows = self._block[: 256 * cols].astype(np.float32).reshape(256, cols)
        return to_tiles(rows, self._spec.weight_format, "fp16").reshape(-1).view(np.float16)

    def _repeat(self, array: DeviceArray, block: np.ndarray) -> None:
        """Fill ``array`` with ``block``, fp16 [n], over and over."""
        count = array.nbytes // 2
        done = min(count, len(block))
        self._device.upload(DeviceArray(array.address, (done,), "fp16"), block[:done])
        while done < count:  # doubling, on the device; whole blocks at a time
            step = min(done, count - done)
            self._device.call("cuMemcpyDtoD", array.address + 2 * done, array.address, 2 * step)
            done += step


def step_bytes(spec: CudaSpec, context: int) -> int:
    """Return the bytes that one decode step has to read with ``context`` tokens in the KV cache."""
    weights = sum(array.nbytes for name, array in weight_arrays(spec).items() if name != "embed" or not spec.has_head)
    attention = spec.attention
    item = attention.head_dim + 2 if attention.kv_scaled else attention.head_dim * 2
    return weights + spec.num_layers * 2 * attention.num_kv_heads * item * context


def measure(backend: CudaBackend, prompt_tokens: int, generated: int) -> tuple[float, float]:
    """(s to the first token, s per token after it), driven as Engine.generate drives it."""
    prompt = np.random.default_rng(1).integers(0, backend.vocab_size, prompt_tokens).astype(np.int32)
    begin(backend, GREEDY, prompt)
    start = time.perf_counter()
    pending = prefill(backend, prompt, 0)
    ahead = decode(backend)
    assert pending.result() is not None
    first = time.perf_counter()
    for _ in range(generated - 1):
        pending, ahead = ahead, decode(backend)
        assert pending.result() is not None
    end = time.perf_counter()
    ahead.result()
    return first - start, (end - first) / (generated - 1)


def measure_turn(backend: CudaBackend, context: int) -> float:
    """s to the first token after ``TURN`` more, where ``context`` tokens are in the cache."""
    prompt = np.random.default_rng(2).integers(0, backend.vocab_size, context + TURN).astype(np.int32)
    begin(backend, GREEDY, prompt)
    start = time.perf_counter()
    assert prefill(backend, prompt[context:], context).result() is not None
    return time.perf_counter() - start


def median_of(runs: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(a for a, _ in runs), statistics.median(b for _, b in runs)


def bench_ours(name: str, weights: str, kv_cache_type: str, contexts: list[int], bandwidth: float) -> list[dict]:
    shape = SHAPES[name]
    spec = make_spec(shape, max(contexts) + GENERATED + 2, weights=weights, kv_cache_type=kv_cache_type)
    start = time.perf_counter()
    backend = open_backend(spec)
    load = time.perf_counter() - start
    rows = []
    for context in contexts:
        measure(backend, context, 8)
        ttft, per_token = median_of([measure(backend, context, GENERATED) for _ in range(5)])
        turn = statistics.median(measure_turn(backend, context) for _ in range(5))
        num_bytes = step_bytes(spec, context + GENERATED // 2)
        rows.append(
            record(name, "cuda", weights, kv_cache_type, context, ttft, per_token, num_bytes, bandwidth)
            | {"load_s": round(load, 2), "turn_ms": round(1e3 * turn, 3)}
        )
    backend.close()
    return rows


def bench_transformers(name: str, contexts: list[int], bandwidth: float) -> list[dict]:
    """transformers with a static cache, its decode step compiled into CUDA graphs."""
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=max(contexts) + GENERATED + 2,
    )
    torch.set_grad_enabled(False)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.float16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    spec = make_spec(shape, max(contexts) + GENERATED + 2)
    rows = []
    for context in contexts:
        runs = []
        for run in range(4):
            cache = StaticCache(config, max_cache_len=context + GENERATED + 2)
            prompt = torch.randint(0, shape.vocab, (1, context), device="cuda")
            torch.cuda.synchronize()
            start = time.perf_counter()
            logits = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            token.item()
            first = time.perf_counter()
            position = torch.tensor([context], device="cuda")
            for _ in range(GENERATED - 1):
                out = step(
                    token, past_key_values=cache, cache_position=position, position_ids=position[None], use_cache=True
                )
                token = out.logits[:, -1].argmax(-1, keepdim=True).clone()
                position = position + 1
            token.item()
            if run:
                runs.append((first - start, (time.perf_counter() - first) / (GENERATED - 1)))
        num_bytes = step_bytes(spec, context + GENERATED // 2)
        engine = f"transformers {transformers.__version__}"
        rows.append(record(name, engine, "fp16", "fp16", context, *median_of(runs), num_bytes, bandwidth))
    return rows


def record(
    shape: str,
    engine: str,
    weights: str,
    kv_cache_type: str,
    context: int,
    ttft: float,
    per_token: float,
    num_bytes: int,
    bandwidth: float,
) -> dict:
    """A line of gpu_decode.jsonl: the keys of gpu_trt.jsonl and what else tells the runs apart."""
    return {
        "date": datetime.date.today().isoformat(),
        "shape": shape,
        "dtype": "fp16",
        "weights": weights,
        "kv_cache_type": kv_cache_type,
        "engine": engine,
        "graph": True,
        "prompt_tokens": context,
        "generated_tokens": GENERATED,
        "ttft_ms": round(1e3 * ttft, 3),
        "ms_per_token": round(1e3 * per_token, 4),
        "step_bytes": num_bytes,
        "floor_ms": round(1e3 * num_bytes / bandwidth, 4),
        "read_tb_s": round(bandwidth / 1e12, 3),
        "fraction": round(num_bytes / bandwidth / per_token, 3),
    }


def gpu_name() -> str:
    device = Device()
    try:
        return device.name
    finally:
        device.close()


def sweep(bench: Callable[..., Iterable[dict]], options: argparse.Namespace) -> Iterator[dict]:
    """Yield the rows of ``bench`` for each of the shapes, weights and types of KV cache that are asked for."""
    for name, weights, kv_cache_type in itertools.product(options.shapes, options.weights, options.kv_cache_type):
        yield from bench(name, weights, kv_cache_type, options)


def write_lines(gpu: str, rows: list[dict], output: Path | None) -> None:
    """Print a JSON line of each measurement with the GPU's name; append them to ``output``, too."""
    lines = "".join(json.dumps({"gpu": gpu, **row}) + "\n" for row in rows)
    print(lines, end="")
    if output:
        with open(output, "a", encoding="utf-8") as file:
            file.write(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-3.2-1b", "llama-3.1-8b"], choices=sorted(SHAPES))
    parser.add_argument("--weights", nargs="+", default=["fp16", "int4"], choices=WEIGHTS)
    parser.add_argument("--kv-cache-type", nargs="+", default=["fp16"], choices=["fp16", "int8", "fp8"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[32, 512, 2048, 8192])
    parser.add_argument("--transformers", action="store_true", help="measure transformers beside it")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = Device()
    bandwidth, gpu = read_bandwidth(device), device.name
    device.close()
    print(f"{gpu}: reads {bandwidth / 1e12:.3f} TB/s")
    print(
        f"{'shape':<16}{'engine':<22}{'weights':<9}{'KV':<6}{'prompt':>7}{'TTFT ms':>9}{'ms/token':>10}{'tok/s':>8}"
        f"{'floor':>7}{'turn ms':>9}"
    )
    rows = []
    for name in options.shapes:
        found = []
        for weights in options.weights:
            for kv_cache_type in options.kv_cache_type:
                found += bench_ours(name, weights, kv_cache_type, options.contexts, bandwidth)
        if options.transformers:
            found += bench_transformers(name, options.contexts, bandwidth)
        for row in found:
            print(
                f"{row['shape']:<16}{row['engine']:<22}{row['weights']:<9}{row['kv_cache_type']:<6}"
                f"{row['prompt_tokens']:>7}{row['ttft_ms']:>9.2f}{row['ms_per_token']:>10.4f}"
                f"{1e3 / row['ms_per_token']:>8.1f}{row['fraction']:>7.0%}{row.get('turn_ms', ''):>9}"
            )
        rows += found
    write_lines(gpu, rows, options.output)


if __name__ == "__main__":
    main()
