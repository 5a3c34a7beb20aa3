"""GGUF files of the small random checkpoints, written as llama.cpp's converter does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from engine_core.formats.safetensors_file import SafetensorsFile

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
}


def write(path: Path, checkpoint: Path, kind: str = "F32", *, tokenizer: dict | None = None, **metadata) -> Path:
    """Write the checkpoint's model with its matrices in ``kind`` (where their rows are whole blocks, else F16).

    ``tokenizer``: values of tokenizer.ggml. ``metadata``: further values, dots as two underscores; None leaves one out.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    arch = ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(path, arch)
    values = configuration(config, arch) | {name.replace("__", "."): value for name, value in metadata.items()}
    for name, value in (values | {f"tokenizer.{key}": item for key, item in (tokenizer or {}).items()}).items():
        add(writer, name, value)
    for name, tensor in tensors(checkpoint, config, arch).items():
        wanted = kind if tensor.ndim > 1 else "F32"
        wanted = "F16" if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[wanted]][0] else wanted
        quantized = gguf.GGMLQuantizationType[wanted]
        writer.add_tensor(name, gguf.quantize(tensor, quantized), raw_dtype=quantized)
    return finish(writer, path)


def write_changed(path: Path, checkpoint: Path, change: Callable[[dict], dict]) -> Path:
    """Write the checkpoint's model with what ``change`` returns for its tensors, as they are."""
    config = json.loads((checkpoint / "config.json").read_text())
    arch = ARCHITECTURES[config["architectures"][0]]
    return write_values(path, arch, configuration(config, arch), change(tensors(checkpoint, config, arch)))


def write_values(path: Path, arch: str, values: dict, arrays: dict[str, np.ndarray]) -> Path:
    """Write entries of the metadata and tensors as they are."""
    writer = gguf.GGUFWriter(path, arch)
    for name, value in values.items():
        add(writer, name, value)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    return finish(writer, path)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, name: str, value) -> None:
    """Write an entry of the metadata with the type of ``value``; nothing for None."""
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def configuration(config: dict, arch: str) -> dict:
    """Metadata of a config.json as transformers 5 writes it."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    values: dict = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps", 1e-6),
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
    }
    if head_dim * heads != config["hidden_size"] or arch.startswith("gemma"):
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch in ("llama", "phi3"):
        values["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if arch in ("gemma2", "gemma3", "phi3") and config.get("sliding_window"):
        values["attention.sliding_window"] = config["sliding_window"]
    if arch == "gemma3":
        values["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config["layer_types"]]
    if arch == "gemma2":
        values["attn_logit_softcapping"] = config["attn_logit_softcapping"]
        values["final_logit_softcapping"] = config["final_logit_softcapping"]
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind in ("yarn", "longrope"):
        original = rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
        values["rope.scaling.original_context_length"] = original
    if kind == "longrope":
        stretch = config["max_position_embeddings"] / original
        values["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(stretch) / math.log(original))
    return {f"{arch}.{name}": value for name, value in values.items()}


def tensors(checkpoint: Path, config: dict, arch: str) -> dict[str, np.ndarray]:
    """GGUF's name → float32 values, under the names of the package's own table."""
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    file = SafetensorsFile(checkpoint / "model.safetensors")
    found = {}
    for name in file.names():
        values = file.read(name)
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(
            name.split(".")[-2]
        )
        if arch == "llama" and heads:
            halves = values.reshape(heads, 2, -1, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = values
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = llama3_factors(rope, head_dim)
    if rope.get("rope_type") == "longrope":
        found["rope_factors_long.weight"] = np.array(rope["long_factor"], dtype=np.float32)
        found["rope_factors_short.weight"] = np.array(rope["short_factor"], dtype=np.float32)
    return found


def llama3_factors(rope: dict, head_dim: int) -> np.ndarray:
    """float32 [head_dim / 2]: what each frequency is divided by."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)
