"""Llama 2 and 3, and what has their architecture (SmolLM2, TinyLlama; Mistral, as GGUF); ``LlamaConfig``."""

from engine_core.models.families.family import Family

FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    max_position=2048,
    head_dim_nullable=True,
    eos_token_id=2,
    gguf="llama",
    gguf_pairs_rows=True,
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
)
