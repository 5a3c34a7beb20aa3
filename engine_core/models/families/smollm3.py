"""SmolLM3; ``SmolLM3Config``. Every fourth layer has no RoPE unless no_rope_layers says otherwise."""

from engine_core.models.families.family import FULL, SLIDING, Family
from engine_core.models.fields import Fields


def layer_kinds(fields: Fields, count: int) -> list[str]:
    """Return the kinds of ``count`` layers, of which those without RoPE have the window."""
    return [SLIDING if without else FULL for without in unrotated(fields, [FULL] * count)]


def unrotated(fields: Fields, kinds: list[str]) -> list[bool]:
    """Return which layers have no RoPE."""
    given = fields.counts("no_rope_layers")
    if given is None:
        interval = fields.whole("no_rope_layer_interval", 4)
        return [(index + 1) % interval == 0 for index in range(len(kinds))]
    if len(given) < len(kinds):
        fields.refuse("no_rope_layers", f"{len(kinds)} numbers at least, one for each layer")
    return [not has_rope for has_rope in given[: len(kinds)]]


FAMILY = Family(
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    max_position=32768,
    num_kv_heads=4,
    tied=True,
    eos_token_id=128001,
    window_switch="use_sliding_window",
    layer_kinds=layer_kinds,
    reads_layer_types=True,
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    rope_theta=2e6,
    unrotated=unrotated,
)
