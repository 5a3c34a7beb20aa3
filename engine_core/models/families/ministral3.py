"""Ministral 3; ``Ministral3Config``. YaRN, and queries that are scaled beyond the positions before it."""

from engine_core.models.families.family import Family, always

FAMILY = Family(
    architecture="Ministral3ForCausalLM",
    model_type="ministral3",
    max_position=262144,
    norm_eps=1e-5,
    num_kv_heads=8,
    kv_heads_nullable=False,
    head_dim=128,
    eos_token_id=2,
    layer_kinds=always,
    default_rope={
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
    scales_queries=True,
)
