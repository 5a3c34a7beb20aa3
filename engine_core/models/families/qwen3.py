"""Qwen3; ``Qwen3Config``. Heads of 128 values unless config.json says otherwise, with norms of Q and K."""

from engine_core.models.families.family import Family
from engine_core.models.families.qwen2 import layer_kinds

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    max_position=32768,
    num_kv_heads=32,
    head_dim=128,
    sliding_window=4096,
    window_switch="use_sliding_window",
    layer_kinds=layer_kinds,
    reads_layer_types=True,
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    qk_norm=True,
    gguf="qwen3",
)
