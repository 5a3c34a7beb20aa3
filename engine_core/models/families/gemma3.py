"""Gemma 3's text model; ``Gemma3TextConfig``. Layers with a window have their own RoPE."""

from engine_core.models.families.family import FULL, SLIDING, Family
from engine_core.models.fields import Fields


def layer_kinds(fields: Fields, count: int) -> list[str]:
    """Return the kinds of ``count`` layers, of which each sliding_window_pattern-th sees all tokens."""
    pattern = fields.whole("sliding_window_pattern", 6)
    return [SLIDING if (index + 1) % pattern else FULL for index in range(count)]


FAMILY = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    max_position=131072,
    sizes={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
    },
    num_kv_heads=4,
    kv_heads_nullable=False,
    head_dim=256,
    tied=True,
    eos_token_id=1,
    activation_field="hidden_activation",
    activation="gelu_pytorch_tanh",
    sliding_window=4096,
    layer_kinds=layer_kinds,
    reads_layer_types=True,
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    rope_theta=1e6,
    local_rope_theta=10000.0,
    gguf="gemma3",
    qk_norm=True,
    outer_norms=True,
    norm_offset=1.0,
    scaled_embedding=True,
    attention_scalar=256,
    has_softcaps=True,
)
