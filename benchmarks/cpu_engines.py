"""The engines cpu_decode.py compares: how each one's files are made from the checkpoint, and how it generates.

Greedy in all of them, and timed alike: the first token is on the host, then every further one is.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from benchmarks.llama_cpp_model import LlamaCpp
from engine_core.formats.safetensors_file import SafetensorsFile, write_safetensors


class Runner(Protocol):
    """An open engine that is timed."""

    def generate(self, prompt: np.ndarray, count: int) -> tuple[float, float]:
        """(seconds to the first token, seconds per further token) of ``count`` tokens after ``prompt``."""


@dataclass(frozen=True)
class Engine:
    """One way to run a model, and what it needs."""

    weights: str
    packages: tuple[str, ...]
    prepare: object  # (directory, config, max_context) -> None
    open: object  # (directory, threads, max_context) -> context manager of a Runner


def prepare(name: str, directory: Path, config: dict, max_context: int) -> None:
    """Makes the checkpoint and what engine ``name`` makes of it, unless they are there."""
    _write_checkpoint(directory / "checkpoint", config)
    ENGINES[name].prepare(directory, config, max_context)


def _write_checkpoint(directory: Path, config: dict) -> None:
    """Random fp16 weights of the shape ``config``."""
    if (directory / "config.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    write_safetensors(
        directory / "model.safetensors", {name: _random(rng, name, shape) for name, shape in _shapes(config)}
    )
    (directory / "config.json").write_text(json.dumps(config))


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if "norm" in name:
        return np.ones(shape, dtype=np.float16)
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= 0.02
    return values.astype(np.float16)


def _shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
            if config["model_type"] == "qwen2":
                yield f"{prefix}self_attn.{name}_proj.bias", (rows,)
        yield prefix + "self_attn.o_proj.weight", (hidden, q)
        yield prefix + "mlp.gate_proj.weight", (inner, hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)


# --- ours -----------------------------------------------------------------------------------------


def _ours(weights: str, **options) -> Engine:
    folder = "ours-" + weights.replace(" ", "-")

    def make(directory: Path, config: dict, max_context: int) -> None:
        from engine_core.backends.onnxruntime.build import build_engine

        if not (directory / folder / "engine.json").is_file():
            build_engine(directory / "checkpoint", directory / folder, max_context=max_context, **options)

    @contextlib.contextmanager
    def open_(directory: Path, threads: int, max_context: int) -> Iterator[Runner]:
        from engine_core.backends.onnxruntime.backend import OnnxRuntimeBackend
        from engine_core.config import EngineConfig
        from engine_core.formats.manifest import read_manifest

        config = EngineConfig(directory / folder, num_threads=threads, max_context=max_context)
        manifest = read_manifest(directory / folder, verify_hashes=False)
        backend = OnnxRuntimeBackend.load(directory / folder, manifest, config)
        try:
            yield OursRunner(backend)
        finally:
            backend.close()

    return Engine(weights, ("onnxruntime", "numpy"), make, open_)


class OursRunner:
    """Implements ``Runner`` with the CPU backend; the prompt is prefilled from its start."""

    def __init__(self, backend) -> None:
        self._backend = backend

    def generate(self, prompt: np.ndarray, count: int) -> tuple[float, float]:
        from engine_core.measure.steps import begin, decode, prefill
        from engine_core.request import SamplingParams

        backend = self._backend
        ids = prompt.astype(np.int32)
        start = time.perf_counter()
        begin(backend, SamplingParams(seed=0), ids)
        prefill(backend, ids, 0).result()
        first = time.perf_counter()
        pending = decode(backend)
        for _ in range(count - 2):  # as the engine does: the next step is queued before the token is read
            ahead = decode(backend)
            pending.result()
            pending = ahead
        pending.result()
        return first - start, (time.perf_counter() - first) / (count - 1)


# --- llama.cpp ------------------------------------------------------------------------------------


def _llama_cpp(weights: str) -> Engine:
    def make(directory: Path, config: dict, max_context: int) -> None:
        import gguf
        import llama_cpp  # noqa: F401

        path = directory / f"{weights}.gguf"
        if not path.is_file():
            _write_gguf(gguf, path, directory / "checkpoint", config, getattr(gguf.GGMLQuantizationType, weights))

    @contextlib.contextmanager
    def open_(directory: Path, threads: int, max_context: int) -> Iterator[Runner]:
        yield LlamaCppRunner(LlamaCpp(directory / f"{weights}.gguf", threads, max_context))

    return Engine(weights, ("llama_cpp_python", "gguf"), make, open_)


def _write_gguf(gguf, path: Path, checkpoint: Path, config: dict, kind) -> None:
    arch = config["model_type"]
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.QWEN2 if arch == "qwen2" else gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"]
    )
    file = SafetensorsFile(checkpoint / "model.safetensors")
    for name in file.names():
        values = file.read(name)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if values.ndim == 1:
            writer.add_tensor(target, values)
        else:
            writer.add_tensor(target, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCppRunner:
    """Implements ``Runner`` with llama.cpp."""

    def __init__(self, model: LlamaCpp) -> None:
        self._model = model

    def generate(self, prompt: np.ndarray, count: int) -> tuple[float, float]:
        self._model.clear()
        start = time.perf_counter()
        token = self._model.feed(prompt.tolist())
        first = time.perf_counter()
        for _ in range(count - 1):
            token = self._model.feed([token])
        return first - start, (time.perf_counter() - first) / (count - 1)


# --- transformers ---------------------------------------------------------------------------------


def _prepare_transformers(directory: Path, config: dict, max_context: int) -> None:
    import torch  # noqa: F401
    import transformers  # noqa: F401


@contextlib.contextmanager
def _open_transformers(directory: Path, threads: int, max_context: int) -> Iterator[Runner]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(directory / "checkpoint"), dtype=torch.float32)
    yield _TransformersRunner(model.eval())


class _TransformersRunner:
    def __init__(self, model) -> None:
        self._model = model

    def generate(self, prompt: np.ndarray, count: int) -> tuple[float, float]:
        import torch

        with torch.inference_mode():
            start = time.perf_counter()
            out = self._model(torch.from_numpy(prompt)[None], use_cache=True, logits_to_keep=1)
            token = out.logits[0, -1].argmax().view(1, 1)
            token.item()
            first = time.perf_counter()
            for _ in range(count - 1):
                out = self._model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[0, -1].argmax().view(1, 1)
                token.item()
        return first - start, (time.perf_counter() - first) / (count - 1)


# --- onnxruntime-genai ----------------------------------------------------------------------------


def _prepare_genai(directory: Path, config: dict, max_context: int) -> None:
    """Its own model builder makes its files; where that cannot read the checkpoint, the child says so."""
    import onnxruntime_genai  # noqa: F401

    target = directory / "genai-int4"
    if not (target / "genai_config.json").is_file():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(directory / "checkpoint")]
        command += ["-o", str(target), "-p", "int4", "-e", "cpu", "-c", str(directory / "cache")]
        command += ["--extra_options", "int4_accuracy_level=4", "int4_block_size=32"]
        subprocess.run(command, capture_output=True, text=True)


@contextlib.contextmanager
def _open_genai(directory: Path, threads: int, max_context: int) -> Iterator[Runner]:
    import onnxruntime_genai as genai

    path = directory / "genai-int4" / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config))
    yield _GenaiRunner(genai, genai.Model(str(path.parent)), max_context)


class _GenaiRunner:
    def __init__(self, genai, model, max_context: int) -> None:
        self._genai, self._model, self._max_context = genai, model, max_context

    def generate(self, prompt: np.ndarray, count: int) -> tuple[float, float]:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=self._max_context)
        generator = self._genai.Generator(self._model, params)
        start = time.perf_counter()
        generator.append_tokens(prompt.astype(np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(count - 1):
            generator.generate_next_token()
        return first - start, (time.perf_counter() - first) / (count - 1)


ENGINES: dict[str, Engine] = {
    "ours-fp32": _ours("fp32", quantization="fp32"),
    "ours-int8": _ours("int8 g32", quantization="int8", group_size=32),
    "ours-int4": _ours("int4 g64", quantization="int4", group_size=64),
    "ours-int4-head4": _ours("int4 g64 head4", quantization="int4", group_size=64, head_bits=4),
    "ours-int4-g32-head4": _ours("int4 g32 head4", quantization="int4", group_size=32, head_bits=4),
    "ours-int4-g128-head4": _ours("int4 g128 head4", quantization="int4", group_size=128, head_bits=4),
    "llama.cpp-q4_0": _llama_cpp("Q4_0"),
    "llama.cpp-q8_0": _llama_cpp("Q8_0"),
    "transformers-fp32": Engine("fp32", ("transformers", "torch"), _prepare_transformers, _open_transformers),
    "genai-int4": Engine("int4", ("onnxruntime-genai", "onnxruntime"), _prepare_genai, _open_genai),
}
