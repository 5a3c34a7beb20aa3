"""OLMo 2; ``Olmo2Config``. Norms follow attention and MLP, none precedes them; those of Q and K are over all heads."""

from engine_core.models.families.family import Family

FAMILY = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    max_position=2048,
    norm_eps=1e-5,
    eos_token_id=50279,
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    wide_qk_norm=True,
    pre_norms=False,
    outer_norms=True,
)
