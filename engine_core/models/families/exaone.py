"""EXAONE 3.0, 3.5 and Deep; ``ExaoneConfig``. A Llama with names of its own."""

from engine_core.models.families.family import Family

FAMILY = Family(
    architecture="ExaoneForCausalLM",
    model_type="exaone",
    written_as="LlamaForCausalLM",
    max_position=4096,
    norm_eps=1e-5,
    num_kv_heads=8,
    head_dim_nullable=True,
    eos_token_id=361,
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    rope_theta=5e5,
    field_names=(
        ("num_layers", "num_hidden_layers"),
        ("layer_norm_epsilon", "rms_norm_eps"),
        ("activation_function", "hidden_act"),
    ),
    tensor_names=(
        (r"transformer\.wte\.", "model.embed_tokens."),
        (r"transformer\.h\.", "model.layers."),
        (r"transformer\.ln_f\.", "model.norm."),
        (r"\.attn\.attention\.out_proj\.", ".self_attn.o_proj."),
        (r"\.attn\.attention\.", ".self_attn."),
        (r"\.ln_1\.", ".input_layernorm."),
        (r"\.ln_2\.", ".post_attention_layernorm."),
        (r"\.mlp\.c_fc_0\.", ".mlp.gate_proj."),
        (r"\.mlp\.c_fc_1\.", ".mlp.up_proj."),
        (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
    ),
)
