"""Checkpoints in fp8 and nvfp4 as other tools write them, of random weights, with numpy alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fakes
from engine_core.formats.number_formats import E4M3, to_16_bit, to_minifloat
from engine_core.formats.safetensors_file import SafetensorsWriter
from engine_core.formats.weight_formats import weight_format
from engine_core.formats.weight_formats.base import Rounding
from engine_core.models.shapes import spec_of

CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=320,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    eos_token_id=2,
    dtype="float16",
)
Tensors = dict[str, tuple[str, np.ndarray]]  # the last part of a name → (safetensors type, values)


def fp8_codes(weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return to_minifloat(weights / scales, E4M3)


def per_channel(weights: np.ndarray) -> Tensors:
    scales = np.abs(weights).max(axis=1, keepdims=True) / 448
    scales = (to_16_bit(scales, "bf16").astype(np.uint32) << 16).view(np.float32)
    return {"weight": ("F8_E4M3", fp8_codes(weights, scales)), "weight_scale": ("BF16", to_16_bit(scales, "bf16"))}


def per_tensor(weights: np.ndarray) -> Tensors:
    scale = np.float32(np.abs(weights).max() / 448)
    return {"weight": ("F8_E4M3", fp8_codes(weights, scale)), "weight_scale": ("F32", np.array(scale))}


def with_input_scale(weights: np.ndarray) -> Tensors:
    return per_tensor(weights) | {"input_scale": ("F32", np.array([0.5], dtype=np.float32))}


def in_blocks(weights: np.ndarray, name: str = "weight_scale_inv") -> Tensors:
    """Return fp8 with a float32 scale for each block of 128 × 128."""
    rows, columns = weights.shape
    down, right = -(-rows // 128), -(-columns // 128)
    scales = np.array(
        [[np.abs(weights[128 * i :][:128, 128 * j :][:, :128]).max() / 448 for j in range(right)] for i in range(down)],
        dtype=np.float32,
    )
    each = np.repeat(np.repeat(scales, 128, axis=0), 128, axis=1)[:rows, :columns]
    return {"weight": ("F8_E4M3", fp8_codes(weights, each)), name: ("F32", scales)}


def in_blocks_of_compressed_tensors(weights: np.ndarray) -> Tensors:
    return in_blocks(weights, "weight_scale")


def nvfp4(weights: np.ndarray, of_modelopt: bool) -> Tensors:
    """Return the weight as ModelOpt stores it, or as compressed-tensors does, whose global scale is the inverse."""
    found = weight_format("nvfp4")
    rounded = found.quantize(weights, Rounding())
    packed, blocks = ("U8", found.pack(rounded.codes)), ("F8_E4M3", rounded.block_scales)
    if of_modelopt:
        scale = np.array(rounded.global_scale, dtype=np.float32)
        return {"weight": packed, "weight_scale": blocks, "weight_scale_2": ("F32", scale)} | {
            "input_scale": ("F32", np.array(0.01, dtype=np.float32))
        }
    factor = np.array([1 / rounded.global_scale], dtype=np.float32)
    return {"weight_packed": packed, "weight_scale": blocks, "weight_global_scale": ("F32", factor)}


def _compressed_tensors(layout: str, **weights) -> dict:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "type": "float", "dynamic": False, **weights}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


# name → (tensors of a weight, quantization_config, format). LM heads are not quantized.
KINDS: dict[str, tuple[Callable[[np.ndarray], Tensors], dict, str]] = {
    "compressed-tensors": (per_channel, _compressed_tensors("float-quantized", num_bits=8, strategy="channel"), "fp8"),
    "compressed-tensors-blocks": (
        in_blocks_of_compressed_tensors,
        _compressed_tensors("float-quantized", num_bits=8, strategy="block", block_structure=[128, 128]),
        "fp8",
    ),
    "modelopt": (with_input_scale, {"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
    "autofp8": (with_input_scale, {"quant_method": "fp8", "activation_scheme": "static"}, "fp8"),
    "deepseek": (in_blocks, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, "fp8"),
    "compressed-tensors-nvfp4": (
        lambda weights: nvfp4(weights, False),
        _compressed_tensors("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16),
        "nvfp4",
    ),
    "modelopt-nvfp4": (
        lambda weights: nvfp4(weights, True),
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "nvfp4",
    ),
}


def write(directory: Path, kind: str, *, side_file: bool = False, **changes) -> Path:
    """Writes a checkpoint of ``kind``; the weights and scales of every linear differ.

    ``side_file``: its quantization stands in hf_quant_config.json, as ModelOpt's may.
    """
    make, quantization, _ = KINDS[kind]
    config = {**CONFIG, **changes}
    random = np.random.default_rng(0)
    tensors: Tensors = {}
    for name, shape in spec_of(config).shapes().items():
        deviation = 0.1 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5
        values = (random.standard_normal(shape) * deviation * random.uniform(0.7, 1.4)).astype(np.float32)
        if "proj" in name:
            stem = name.removesuffix("weight")
            tensors |= {f"{stem}{key}": value for key, value in make(values).items()}
        else:
            tensors[name] = ("F16", (values + (len(shape) == 1)).astype(np.float16))
    directory.mkdir(parents=True)
    if side_file:
        side = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": quantization["quant_algo"]}}
        (directory / "hf_quant_config.json").write_text(json.dumps(side))
    else:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
    fakes.write_small_tokenizer(directory)
    with SafetensorsWriter(
        directory / "model.safetensors", {name: (dtype, values.shape) for name, (dtype, values) in tensors.items()}
    ) as writer:
        for name, (_, values) in tensors.items():
            writer.write(name, values)
    return directory
