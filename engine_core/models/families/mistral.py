"""Mistral; ``MistralConfig``. A window of 4,096 tokens unless config.json says null."""

from engine_core.models.families.family import Family, always

FAMILY = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    max_position=131072,
    num_kv_heads=8,
    kv_heads_nullable=False,
    head_dim_nullable=True,
    eos_token_id=2,
    sliding_window=4096,
    layer_kinds=always,
)
