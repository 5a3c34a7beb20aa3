"""Phi-3 and Phi-4-mini; ``Phi3Config``. Q, K, V and gate, up are stored as one tensor each; heads may rotate partly."""

from engine_core.models.families.family import Family, always

FAMILY = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    max_position=4096,
    norm_eps=1e-5,
    eos_token_id=32000,
    layer_kinds=always,
    partial_rotary=True,
    original_max_position=4096,
    rope_kinds=("default", "longrope"),
    rope_names=(("su", "longrope"), ("yarn", "longrope")),
    gguf="phi3",
    fused=True,
)
