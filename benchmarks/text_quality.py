"""Measure the perplexity of a real model on public texts: every weight format and KV cache type of a backend.

    python benchmarks/text_quality.py MODEL.gguf --work /tmp/quality --backend cuda
    python benchmarks/text_quality.py MODEL.gguf --work /tmp/quality --backend onnxruntime --windows 4
    python benchmarks/text_quality.py MODEL.gguf --work /tmp/quality --texts texts.json   # for two machines

MODEL is a GGUF file or a checkpoint directory. The texts (``public_texts.py``) are licences, documentation and source
code; ``--windows`` windows of ``--window`` tokens are scored, all but the first token of each, which are 20,460 tokens
unless told otherwise. Two rows compare only if their ``texts`` are the same: a hash of the tokens.

transformers computes what the file stands for in fp32, the reference of every ``ratio``, and in bf16, on the GPU if
torch finds one. Engines are built side by side and kept in ``--work``. int4_awq is calibrated first, on other texts of
the same kind, which takes minutes: leave it out with ``--formats``, or begin with it alone and ``--build-only``.
``rounding_error``: the mean relative error of the matrices that a GGUF file has quantized and that were rounded anew.

Each row is appended to benchmarks/results/quality.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.public_texts import kept_texts, other_texts  # noqa: E402
from engine_core.backends import backend_class  # noqa: E402
from engine_core.backends.capabilities import capabilities_of  # noqa: E402
from engine_core.backends.toolkit import BuildRequest, toolkit_of  # noqa: E402
from engine_core.config import EngineConfig  # noqa: E402
from engine_core.formats.checkpoint import Checkpoint  # noqa: E402
from engine_core.formats.manifest import read_manifest  # noqa: E402
from engine_core.formats.weight_formats import weight_format  # noqa: E402
from engine_core.quantize import quantize_checkpoint  # noqa: E402
from engine_core.text.tokenizer import Tokenizer  # noqa: E402
from tools.result_rows import run_head, write_run  # noqa: E402

_TARGET = ROOT / "benchmarks" / "results" / "quality.jsonl"
_REFERENCE = "transformers"
_SAMPLES = 32  # pieces of 256 tokens that int4_awq is calibrated on
_BLOCK = 256  # rows of logits that the reference normalizes at once


def windows(tokenizer: Tokenizer, texts: Iterable[str], size: int, count: int) -> list[np.ndarray]:
    """Return ``count`` windows, int32 [size]: the first of each text, then the second of each, and so on.

    Raises SystemExit if the texts have fewer.
    """
    parts = [np.split(ids, range(size, len(ids), size)) for ids in map(tokenizer.encode, texts)]
    depth = max(map(len, parts))
    found = [each[i] for i in range(depth) for each in parts if i < len(each) and len(each[i]) == size]
    if len(found) < count:
        raise SystemExit(f"The texts have {len(found)} windows of {size} tokens; ask for no more with --windows.")
    return [np.asarray(ids, dtype=np.int32) for ids in found[:count]]


def scores(logs: Sequence[np.ndarray]) -> dict:
    """Return the perplexity of natural logarithms of probabilities; -inf is a token that the LM head lacks."""
    found = np.concatenate(logs)
    covered = np.isfinite(found)
    return {
        "perplexity": round(math.exp(-found[covered].mean()), 5),
        "scored_tokens": int(covered.sum()),
        "lost_tokens": int((~covered).sum()),
    }


@dataclass(frozen=True)
class Job:
    """One weight format, which a process of its own builds and measures."""

    model: Path
    work: Path
    backend: str
    weight_format: str
    kv_cache_types: tuple[str, ...]
    size: int  # tokens of a window
    count: int
    texts: tuple[str, ...]
    build_only: bool

    @property
    def directory(self) -> Path:
        return self.work / f"{self.backend}-{self.weight_format}-{self.size}"

    def build(self) -> None:
        if (self.directory / "engine.json").is_file():
            return
        checkpoint = self.model
        if weight_format(self.weight_format).needs_calibration:
            checkpoint = self.work / "checkpoints" / self.weight_format
            if not (checkpoint / "config.json").is_file():
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                quantize_checkpoint(
                    *(self.model, checkpoint),
                    method=self.weight_format,
                    calibration=self._calibration(),
                    num_samples=_SAMPLES,
                )
        more: dict[str, Any] = {}
        if "int8" in self.kv_cache_types:  # whose scales a backend may have to choose beforehand
            declines = "calibration" in capabilities_of(self.backend).declined_options
            more = {"kv_cache_type": "int8", "calibration": None if declines else self._calibration()}
        request = BuildRequest(checkpoint, self.directory, self.weight_format, max_context=self.size, **more)
        toolkit_of(self.backend).build(request, lambda line: None)

    def _calibration(self) -> Path:
        path = self.work / f"calibration-{self.weight_format}.txt"
        path.write_text("\n\n".join(other_texts()), encoding="utf-8")
        return path

    def rows(self) -> list[dict]:
        """Build what is not there and return a row for each KV cache type."""
        start = time.perf_counter()
        self.build()
        built = time.perf_counter() - start
        return [] if self.build_only else [self._row(kind, built) for kind in self.kv_cache_types]

    def _row(self, kv_cache_type: str, build_s: float) -> dict:
        start = time.perf_counter()
        manifest = read_manifest(self.directory, verify_hashes=False)
        config = EngineConfig(  # what takes time to prepare is left out
            self.directory,
            kv_cache_type=kv_cache_type,
            use_cuda_graph=False,
            tune_kernels=False,
            prompt_cache_entries=0,
        )
        tokenizer = Tokenizer(self.directory)
        backend = backend_class(self.backend).load(self.directory, manifest, config)
        try:
            scored = windows(tokenizer, self.texts, self.size, self.count)
            found = scores([backend.log_probabilities(ids, 1) for ids in scored])
        finally:
            backend.close()
        errors = (manifest.options.get("rounding_errors") or {}).values()
        return {
            "backend": self.backend,
            "variant": self.weight_format,
            "vocab_size": manifest.model.vocab_size,
            "kv_cache_type": kv_cache_type,
            **found,
            **({"rounding_error": round(sum(errors) / len(errors), 5)} if errors else {}),
            "build_s": round(build_s, 1),
            "score_s": round(time.perf_counter() - start, 1),
        }


def reference_rows(checkpoint: Checkpoint, scored: Sequence[np.ndarray], types: Sequence[str]) -> Iterator[dict]:
    """Yield a row of transformers for each of ``types``, names of torch's types."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.AutoConfig.for_model(**checkpoint.config)
    with torch.device(device):
        reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():  # of tied ones the first
            parameter.copy_(torch.from_numpy(checkpoint.read(name)))
    for kind in types:
        reference, start, logs = reference.to(getattr(torch, kind)), time.perf_counter(), []
        for ids in scored:
            tokens = torch.from_numpy(ids.astype(np.int64)).to(device)
            with torch.inference_mode():
                logits = reference(tokens[None], use_cache=False).logits[0, :-1]
                parts = zip(logits.split(_BLOCK), tokens[1:].split(_BLOCK), strict=True)
                found = [part.double().log_softmax(dim=-1).gather(1, asked[:, None])[:, 0] for part, asked in parts]
                logs.append(torch.cat(found).cpu().numpy())
        yield {
            "backend": f"{_REFERENCE}, {torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}",
            "variant": kind,
            "vocab_size": config.vocab_size,
            "kv_cache_type": kind,
            **scores(logs),
            "score_s": round(time.perf_counter() - start, 1),
        }


def gpu_names() -> dict[str, str]:
    """Return the name of the GPU, for a row."""
    from engine_core.cuda.driver import Device

    device = Device()
    try:
        return {"gpu": device.name}
    finally:
        device.close()


def jobs(options: argparse.Namespace, texts: Sequence[str]) -> list[Job]:
    """Return a job for each weight format asked for, the slowest to build first."""
    able = capabilities_of(options.backend)
    found = []
    for name in options.formats or able.weight_formats:
        kinds = tuple(
            kind
            for kind in able.kv_cache_types_for(None, name)
            if not options.kv_cache_types or kind in options.kv_cache_types
        )
        common = (options.model, options.work, options.backend, name, kinds)
        found.append(Job(*common, options.window, options.windows, tuple(texts), options.build_only))
    return sorted(found, key=lambda job: weight_format(job.weight_format).needs_calibration, reverse=True)


def measure(found: Sequence[Job], workers: int, meanwhile: Callable[[], list[dict]]) -> list[dict]:
    """Return what ``meanwhile`` returns and the rows of each job, in ``workers`` processes or, if that is 1, in this
    one."""
    if workers == 1:
        return [*meanwhile(), *(row for job in found for row in job.rows())]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = [pool.submit(job.rows) for job in found]
        return [*meanwhile(), *(row for each in results for row in each.result())]


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file or a checkpoint directory")
    parser.add_argument("--work", type=Path, required=True, help="where the engines are built, and kept")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--formats", nargs="+", default=[], help="weight formats; all of the backend unless given")
    parser.add_argument("--kv-cache-types", nargs="+", default=[], help="all of the backend unless given")
    parser.add_argument("--window", type=int, default=1024, help="tokens scored together")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--texts", type=Path, help="a file of the texts: read if it is there, else written")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 = what suits the backend")
    parser.add_argument("--reference", nargs="*", default=["float32", "bfloat16"], help="transformers' types")
    parser.add_argument("--build-only", action="store_true", help="build the engines and measure nothing")
    parser.add_argument("--results", type=Path, default=_TARGET, help="the file that the rows are appended to")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    texts, on_gpu = kept_texts(options.texts), capabilities_of(options.backend).on_gpu
    todo = jobs(options, texts)
    workers = options.workers or (min(len(todo), max(1, (os.cpu_count() or 1) // 2)) if on_gpu else 1)
    head = {**run_head(), **(gpu_names() if on_gpu and not options.build_only else {})}
    head["model"] = options.model.stem
    checkpoint = Checkpoint(options.model)
    scored = windows(Tokenizer(checkpoint.directory), texts, options.window, options.windows)
    head["texts"] = hashlib.sha256(np.concatenate(scored).tobytes()).hexdigest()[:12]
    types = [] if options.build_only else options.reference
    found = measure(todo, workers, lambda: list(reference_rows(checkpoint, scored, types)) if types else [])
    if options.build_only:
        return []
    base = next((row["perplexity"] for row in found if row["backend"].startswith(_REFERENCE)), None)
    rows = [{**head, **row, "ratio": base and round(row["perplexity"] / base, 5)} for row in found]
    write_run(options.results, rows)
    print(table(rows))
    return rows


def table(rows: Iterable[dict]) -> str:
    lines = ["| backend | weights | KV cache | perplexity | to fp32 | tokens |", "|---|---|---|---|---|---|"]
    for row in rows:
        ratio = "–" if row["ratio"] is None else f"{100 * (row['ratio'] - 1):+.2f} %"
        lines.append(
            f"| {row['backend']} | {row['variant']} | {row['kv_cache_type']} | {row['perplexity']:.4f} | {ratio} | "
            f"{row['scored_tokens']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
