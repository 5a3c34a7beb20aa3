"""Hold what is built from a GGUF file against transformers, which reads the same file, and against llama.cpp.

    python benchmarks/gguf_quality.py MODEL.gguf --work /tmp/gguf
    python benchmarks/gguf_quality.py MODEL.gguf --work /tmp/gguf --variants int8 --prompts 16
    python benchmarks/gguf_quality.py MODEL.gguf --work /tmp/gguf --variants int8 --chunk 2048 --prompts 0
    python benchmarks/gguf_quality.py MODEL.gguf --work /tmp/gguf --chunks 0  # no perplexity

Perplexity is over the first chunks of public texts that Debian and Python bring: licences, documentation, source code.
The CPU backend's variants are built from the file, each once; transformers computes in fp32 what the file stands for.
Greedy answers are the first 32 tokens after pieces of the same texts. llama.cpp runs where its Python binding is
installed; it computes with the file's own blocks and int8 activations.

Each row is appended to benchmarks/results/quality.jsonl, those of transformers and llama.cpp too. Of ``examples``
prompts, ``exact_match`` is the percentage of which the greedy answer is what transformers finds likeliest token by
token, and ``same_as_llama_cpp`` of which it is llama.cpp's. ``rounding_error`` is the mean relative error of the
matrices that were rounded anew. ``tok_s`` is the median speed of decoding after a prompt, of turns that all engines
take one after another, so that other work on the machine meets them alike.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.cpu_engines import LlamaCppRunner, OursRunner, Runner  # noqa: E402
from benchmarks.llama_cpp_model import LlamaCpp  # noqa: E402
from benchmarks.public_texts import texts  # noqa: E402
from engine_core.backends.onnxruntime.backend import OnnxRuntimeBackend  # noqa: E402
from engine_core.backends.onnxruntime.build import build_engine  # noqa: E402
from engine_core.config import EngineConfig  # noqa: E402
from engine_core.formats.manifest import read_manifest  # noqa: E402
from engine_core.measure.steps import begin, decode, prefill  # noqa: E402
from engine_core.request import SamplingParams  # noqa: E402
from engine_core.text.tokenizer import Tokenizer  # noqa: E402

_TARGET = ROOT / "benchmarks" / "results" / "quality.jsonl"
_PROMPT, _ANSWER = 24, 32  # tokens
_TIMED_PROMPT, _TIMED_ANSWER, _TURNS = 64, 33, 7


def chunks(tokenizer: Tokenizer, size: int, count: int) -> list[np.ndarray]:
    """Return int32 [size] of the start of each text, with what the tokenizer puts before a text."""
    found = [tokenizer.encode(text)[:size] for text in texts()]
    return [np.asarray(ids, dtype=np.int32) for ids in found if len(ids) == size][:count]


def prompts(tokenizer: Tokenizer, count: int) -> list[np.ndarray]:
    """Return int32 [_PROMPT] of places in the texts that lie evenly."""
    sources = texts()
    each = -(-count // len(sources))
    starts = [text[at * len(text) // each :][:1000] for text in sources for at in range(each)]
    return [np.asarray(tokenizer.encode(text)[:_PROMPT], dtype=np.int32) for text in starts][:count]


class Reference:
    """transformers on the same file, in fp32."""

    def __init__(self, path: Path) -> None:
        import torch
        import transformers

        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()
        self.vocab_size: int = self._model.config.vocab_size

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return float32 [n, vocabulary]."""
        with self._torch.inference_mode():
            return self._model(self._torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()

    def log_probabilities(self, ids: np.ndarray) -> np.ndarray:
        """Return float64 [n - 1] of every token but the first."""
        logits = self.logits(ids)[:-1].astype(np.float64)
        top = logits.max(axis=1)
        return logits[np.arange(len(logits)), ids[1:]] - top - np.log(np.exp(logits - top[:, None]).sum(axis=1))

    def agrees(self, prompt: np.ndarray, answer: list[int]) -> bool:
        """Return True if each token of the answer is the likeliest after those before it."""
        best = self.logits(np.concatenate([prompt, np.asarray(answer, dtype=np.int32)])).argmax(axis=1)
        return best[len(prompt) - 1 : -1].tolist() == answer


def greedy(backend: OnnxRuntimeBackend, prompt: np.ndarray, ends: Collection[int]) -> list[int]:
    """Return _ANSWER tokens, or fewer if one of ``ends`` comes first."""
    begin(backend, SamplingParams(seed=0), prompt)
    found = [prefill(backend, prompt).result()]
    while len(found) < _ANSWER and found[-1] not in ends:
        found.append(decode(backend).result())
    return found


def greedy_of_llama_cpp(model: LlamaCpp, prompt: np.ndarray, ends: Collection[int]) -> list[int]:
    """Return what ``greedy`` returns, by llama.cpp."""
    model.clear()
    found = [model.feed(prompt.tolist())]
    while len(found) < _ANSWER and found[-1] not in ends:
        found.append(model.feed(found[-1:]))
    return found


def kept(path: Path, items: Sequence, make: Callable) -> list:
    """Return what ``make`` returns for each of ``items``. ``path`` keeps it: an interrupted run goes on."""
    found = json.loads(path.read_text()) if path.is_file() else []
    for item in items[len(found) :]:
        found.append(make(item))
        path.write_text(json.dumps(found))
    return found[: len(items)]


def share(count: int, total: int) -> float | None:
    return round(100 * count / total, 2) if total else None


def perplexity(logs: list[np.ndarray]) -> dict:
    if not logs:
        return {"perplexity": None, "scored_tokens": 0, "lost_tokens": 0}
    found = np.concatenate(logs)
    return {"perplexity": round(math.exp(-found.mean()), 5), "scored_tokens": len(found), "lost_tokens": 0}


def speeds(directories: Mapping[str, Path], llama: LlamaCpp | None, threads: int) -> dict[str, float]:
    """Return the tokens a second of each engine directory, and of llama.cpp."""
    with ExitStack() as opened:
        runners: dict[str, Runner] = {} if llama is None else {"llama.cpp": LlamaCppRunner(llama)}
        for name, directory in directories.items():
            config = EngineConfig(directory, kv_cache_type="fp32", num_threads=threads)
            manifest = read_manifest(directory, verify_hashes=False)
            backend = opened.enter_context(closing(OnnxRuntimeBackend.load(directory, manifest, config)))
            runners[name] = OursRunner(backend)
        prompt = np.arange(100, 100 + _TIMED_PROMPT, dtype=np.int32)
        times: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(_TURNS):
            for name, runner in runners.items():
                times[name].append(runner.generate(prompt, _TIMED_ANSWER)[1])
    return {name: round(1 / statistics.median(found), 2) for name, found in times.items()}


def variant(path: Path, options: argparse.Namespace, name: str) -> tuple[dict, list[list[int]]]:
    """Return the row of one of our variants, and its answers; the row has no comparison yet."""
    directory = options.work / name
    needed = max(options.chunk, _PROMPT + _ANSWER, _TIMED_PROMPT + _TIMED_ANSWER)
    if not (directory / "engine.json").is_file() or read_manifest(directory, verify_hashes=False).max_context < needed:
        build_engine(path, directory, quantization=name, max_context=needed, report=print)
    manifest = read_manifest(directory, verify_hashes=False)
    config = EngineConfig(directory, kv_cache_type="fp32", num_threads=options.threads)
    tokenizer = Tokenizer(directory)
    backend = OnnxRuntimeBackend.load(directory, manifest, config)
    try:
        logs = [backend.log_probabilities(ids, 1) for ids in chunks(tokenizer, options.chunk, options.chunks)]
        ends = manifest.eos_token_ids
        path = options.work / f"answers-{name}.json"
        answers = kept(path, prompts(tokenizer, options.prompts), lambda ids: greedy(backend, ids, ends))
    finally:
        backend.close()
    errors = manifest.options["rounding_errors"].values()
    loss = {"rounding_error": round(sum(errors) / len(errors), 5)} if errors else {}
    return {
        "variant": name,
        "vocab_size": manifest.model.vocab_size,
        "kv_cache_type": "fp32",
        **perplexity(logs),
        **loss,
    }, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--work", type=Path, required=True, help="where the engines are built, and kept")
    parser.add_argument("--variants", nargs="*", default=["fp32", "int8", "int4"])
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a text")
    parser.add_argument("--chunks", type=int, default=10, help="texts")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--results", type=Path, default=_TARGET, help="the file that the rows are appended to")
    parser.add_argument("--threads", type=int, default=1, help="llama.cpp's wait busily: no more than idle cores")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    found = []
    for name in options.variants:
        found.append(variant(options.model, options, name))
        print(json.dumps(found[-1][0]), flush=True)  # before the slow part
    tokenizer = Tokenizer(options.work / options.variants[0])
    ends = read_manifest(options.work / options.variants[0], verify_hashes=False).eos_token_ids
    starts = prompts(tokenizer, options.prompts)
    reference = Reference(options.model)
    logs = [reference.log_probabilities(ids) for ids in chunks(tokenizer, options.chunk, options.chunks)]
    whole = {"vocab_size": reference.vocab_size, "kv_cache_type": "fp32"}
    found.append(({"variant": "transformers, fp32", **whole, **perplexity(logs)}, []))
    peer: list[list[int]] = []
    version: dict[str, str] = {}
    llama = None
    try:
        llama = LlamaCpp(options.model, options.threads, max_context=512)
        version = {"llama_cpp_python": llama.version}
        path, running = options.work / "answers-llama.cpp.json", llama
        peer = kept(path, starts, lambda ids: greedy_of_llama_cpp(running, ids, ends))
        found.append(({"variant": "llama.cpp", **whole, **perplexity([])}, peer))
    except ImportError:
        print("llama.cpp is not installed; nothing is compared with it.")
    tok_s = speeds({name: options.work / name for name in options.variants}, llama, options.threads)
    head = {
        "date": datetime.date.today().isoformat(),
        "versions": {p: importlib.metadata.version(p) for p in ("onnxruntime", "numpy", "transformers", "gguf")}
        | version,
        "model": options.model.stem,
    }
    for row, answers in found:
        path = options.work / f"agreed-{row['variant']}.json"
        right = sum(kept(path, list(zip(starts, answers)), lambda pair: reference.agrees(*pair)))
        compared = {"exact_match": share(right, len(answers)), "examples": len(answers)}
        if peer and answers:
            same = sum(answer == other for answer, other in zip(answers, peer))
            compared["same_as_llama_cpp"] = share(same, len(answers))
        line = json.dumps({**head, **row, **compared, "bytes_per_step": None, "tok_s": tok_s.get(row["variant"])})
        print(line, flush=True)
        with open(options.results, "a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
