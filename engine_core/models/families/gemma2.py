"""Gemma 2; ``Gemma2Config``. Every second layer sees all tokens; attention and logits are soft-capped."""

from engine_core.models.families.family import FULL, SLIDING, Family
from engine_core.models.fields import Fields


def layer_kinds(fields: Fields, count: int) -> list[str]:
    """Return the kinds of ``count`` layers: a window, all tokens, a window, and so on."""
    return [FULL if index % 2 else SLIDING for index in range(count)]


FAMILY = Family(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    max_position=8192,
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
    gguf="gemma2",
    outer_norms=True,
    norm_offset=1.0,
    scaled_embedding=True,
    attention_scalar=256,
    has_softcaps=True,
    caps_attention=True,
    attention_softcap=50.0,
    logits_softcap=30.0,
)
