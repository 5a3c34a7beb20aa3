"""Random checkpoints of every family's own traits, written with numpy alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from engine_core.formats.safetensors_file import write_safetensors
from engine_core.models.families import FAMILIES
from engine_core.models.shapes import spec_of

# Sizes that every backend's blocks divide.
SIZES = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=320,
    max_position_embeddings=256,
    eos_token_id=2,
)
ARCHITECTURES = tuple(family.architecture for family in FAMILIES)


def write(directory: Path, architecture: str, **changes) -> Path:
    """Writes a checkpoint with the defaults of the architecture's configuration class for all but the sizes."""
    directory.mkdir(parents=True, exist_ok=True)
    config = SIZES | dict(architectures=[architecture], dtype="float16") | changes
    (directory / "config.json").write_text(json.dumps(config))
    spec = spec_of(config)
    rng = np.random.default_rng(7)
    tensors = {name: rng.normal(0, 0.05, shape).astype(np.float16) for name, shape in spec.shapes().items()}
    write_safetensors(directory / "model.safetensors", tensors)
    return directory
