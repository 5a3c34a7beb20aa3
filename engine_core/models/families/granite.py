"""Granite 3, dense; ``GraniteConfig``. A Llama with multipliers of embedding, attention, residual sums and logits."""

from engine_core.models.families.family import Family

FAMILY = Family(
    architecture="GraniteForCausalLM",
    model_type="granite",
    max_position=2048,
    eos_token_id=2,
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    has_multipliers=True,
)
