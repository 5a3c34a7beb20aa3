"""Checkpoints with random fp16 weights, of any size, written with numpy alone: for machines without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.safetensors_file import SafetensorsWriter, write_safetensors
from engine_core.models.reader import read_spec

_BLOCK = 1 << 24  # values drawn; larger tensors repeat them, from another place each


def write_random_checkpoint(directory: Path, config: dict, *, scale: float = 0.02, seed: int = 0) -> Path:
    """``config``: what config.json holds. Weights are normal with deviation ``scale``, norms are near one.

    A checkpoint for Qwen2ForCausalLM gets the biases of Q, K and V.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # Which optional tensors there are decides what the reader makes of the model, so they come first, empty.
    optional = [] if config.get("tie_word_embeddings") else ["lm_head.weight"]
    if config["architectures"] == ["Qwen2ForCausalLM"]:
        layers = range(config["num_hidden_layers"])
        optional += [f"model.layers.{i}.self_attn.{kind}_proj.bias" for i in layers for kind in "qkv"]
    path = directory / "model.safetensors"
    write_safetensors(path, {name: np.zeros(0, dtype=np.float16) for name in optional})
    spec = read_spec(Checkpoint(directory))
    shapes = spec.shapes()
    random = np.random.default_rng(seed)
    count = min(_BLOCK, max(map(math.prod, shapes.values())))
    block = (scale * random.standard_normal(count, dtype=np.float32)).astype(np.float16)
    with SafetensorsWriter(path, {name: ("F16", shape) for name, shape in shapes.items()}) as writer:
        for name, shape in shapes.items():
            values = np.resize(np.roll(block, -int(random.integers(count))), shape)
            if "norm" in name:
                values = (1.0 - spec.norm_offset + values).astype(np.float16)
            writer.write(name, values)
    return directory
