"""Qwen2 and Qwen2.5; ``Qwen2Config``. Q, K and V always have biases; windows only if use_sliding_window says so."""

from engine_core.models.families.family import FULL, SLIDING, Family
from engine_core.models.fields import Fields


def layer_kinds(fields: Fields, count: int) -> list[str]:
    """Return the kinds of ``count`` layers, of which the first max_window_layers see all tokens."""
    first = fields.count("max_window_layers", 28)
    return [FULL if index < first else SLIDING for index in range(count)]


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    max_position=32768,
    num_kv_heads=32,
    sliding_window=4096,
    window_switch="use_sliding_window",
    layer_kinds=layer_kinds,
    reads_layer_types=True,
    qkv_bias=True,
    gguf="qwen2",
)
