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
# What architectures have beside SIZES: every kind of layer, and fewer experts than the 128 of the class.
OWN = {
    "Lfm2ForCausalLM": dict(num_hidden_layers=2, full_attn_idxs=[1]),
    "Qwen3MoeForCausalLM": dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128),
}
# Of models that see, by the kind of the encoder: text_config beside SIZES, vision_config, and the processor's files.
EYES = {
    "siglip": (
        {},
        dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32,
            patch_size=8,
        ),
        {
            "preprocessor_config.json": {
                "image_processor_type": "SmolVLMImageProcessor",
                "size": {"longest_edge": 64},
                "max_image_size": {"longest_edge": 32},
            },
            "processor_config.json": {"image_seq_len": 4},
        },
    ),
    "qwen3_vl": (
        dict(
            num_hidden_layers=2,
            rope_scaling=dict(rope_type="default", mrope_section=[8, 4, 4], mrope_interleaved=True),
        ),
        dict(
            depth=1, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=128, patch_size=8,
            num_position_embeddings=16, deepstack_visual_indexes=[0],
        ),
        {
            "preprocessor_config.json": {
                "image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 8, "merge_size": 2,
                "min_pixels": 1024, "max_pixels": 4096,
            }
        },
    ),
}  # fmt: skip
ARCHITECTURES = tuple(family.architecture for family in FAMILIES)
# Those that have something the others have not, for what takes long.
DISTINCT = tuple(
    name for name in ARCHITECTURES if not name.startswith(("Exaone", "SmolLM3", "MinistralFor", "Granite"))
)


def write(directory: Path, architecture: str, **changes) -> Path:
    """Writes a checkpoint with the defaults of the architecture's configuration class for all but the sizes."""
    directory.mkdir(parents=True, exist_ok=True)
    config = SIZES | OWN.get(architecture, {}) | dict(architectures=[architecture], dtype="float16") | changes
    (family,) = (family for family in FAMILIES if family.architecture == architecture)
    if family.vision is not None:
        more, vision, files = EYES["qwen3_vl" if architecture.startswith("Qwen3VL") else "siglip"]
        text = {name: value for name, value in (config | more).items() if name != "architectures"}
        config = dict(
            architectures=[architecture], dtype="float16", image_token_id=7, text_config=text, vision_config=vision
        )
        for name, values in files.items():
            (directory / name).write_text(json.dumps(values))
    (directory / "config.json").write_text(json.dumps(config))
    spec = spec_of(config)
    rng = np.random.default_rng(7)
    tensors = {name: rng.normal(0, 0.05, shape).astype(np.float16) for name, shape in spec.shapes().items()}
    write_safetensors(directory / "model.safetensors", tensors)
    return directory
