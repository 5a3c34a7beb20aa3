"""Qwen3 with experts; ``Qwen3MoeConfig``. A router picks a few of many MLPs for each token."""

from engine_core.errors import UnsupportedModelError
from engine_core.models.families.family import Family, always
from engine_core.models.fields import Fields


def experts(fields: Fields, count: int) -> int:
    """Return the experts of each of ``count`` layers. Raises UnsupportedModelError where some layers have none."""
    step, without = fields.whole("decoder_sparse_step", 1), fields.counts("mlp_only_layers") or []
    if step != 1 or any(layer < count for layer in without):
        raise UnsupportedModelError(
            f"Some layers have no experts (decoder_sparse_step={step}, mlp_only_layers={without[:4]}), which is not "
            "supported for Qwen3MoeForCausalLM; all layers with experts are."
        )
    number, own = fields.whole("num_experts", 128), fields.whole("num_experts_per_tok", 8)
    if own > number:
        fields.refuse("num_experts_per_tok", f"at most {number}, the number of experts")
    return number


FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    max_position=32768,
    num_kv_heads=4,
    kv_heads_nullable=False,
    field_names=(("num_local_experts", "num_experts"),),
    sizes={"moe_intermediate_size": 768},
    sliding_window=4096,
    window_switch="use_sliding_window",
    layer_kinds=always,
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    qk_norm=True,
    experts=experts,
)
