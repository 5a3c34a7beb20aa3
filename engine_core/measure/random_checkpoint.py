"""Write checkpoints and LoRA adapters with random weights, with numpy alone: to measure, and for tests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.lora import CONFIG_NAME, WEIGHTS_NAME
from engine_core.formats.safetensors_file import SafetensorsWriter, write_safetensors
from engine_core.models.reader import read_spec
from engine_core.models.spec import ModelSpec

_BLOCK = 1 << 24  # values drawn; larger tensors repeat them, from another place each


def write_random_checkpoint(directory: Path, config: dict, *, scale: float = 0.02, seed: int = 0) -> Path:
    """``config``: what config.json holds. Weights are normal with deviation ``scale``, norms are near one."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # Whether there is a head decides what the reader makes of the model, so that it comes first, empty.
    head = [] if config.get("tie_word_embeddings") else ["lm_head.weight"]
    path = directory / "model.safetensors"
    write_safetensors(path, {name: np.zeros(0, dtype=np.float16) for name in head})
    spec = read_spec(Checkpoint(directory))
    shapes = spec.shapes()
    random = np.random.default_rng(seed)
    count = min(_BLOCK, max(map(math.prod, shapes.values())))
    block = (scale * random.standard_normal(count, dtype=np.float32)).astype(np.float16)
    with SafetensorsWriter(path, {name: ("F16", shape) for name, shape in shapes.items()}) as writer:
        for name, shape in shapes.items():
            values = np.resize(np.roll(block, -int(random.integers(count))), shape)
            if "norm" in name and not name.endswith("bias"):
                values = (1.0 - spec.norm_offset + values).astype(np.float16)
            writer.write(name, values)
    return directory


def write_random_adapter(
    directory: Path,
    spec: ModelSpec,
    *modules: str,
    rank: int = 3,
    seed: int = 0,
    scale: float = 0.2,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    **config: Any,
) -> Path:
    """Write a LoRA adapter of the linears that end in ``modules``, float32 with deviation ``scale``, as peft does.

    ``tensors``: further ones, or None for those to leave out; ``config``: other entries of adapter_config.json.
    """
    random = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray | None] = {}
    for name, shape in spec.shapes().items():
        if len(shape) == 2 and name.split(".")[-2] in modules:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            for half, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                arrays[f"{stem}.lora_{half}.weight"] = random.normal(0, scale, size).astype(np.float32)
    arrays |= tensors or {}
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / WEIGHTS_NAME, {name: array for name, array in arrays.items() if array is not None})
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    values |= {"target_modules": list(modules), "base_model_name_or_path": "someone/base", **config}
    (directory / CONFIG_NAME).write_text(json.dumps(values), encoding="utf-8")
    return directory
