"""LFM2; ``Lfm2Config``. Most layers have a short convolution, those listed have attention."""

from engine_core.models.families.family import CONVOLUTION, FULL, Family
from engine_core.models.fields import Fields


def layer_kinds(fields: Fields, count: int) -> list[str]:
    """Return the kinds of ``count`` layers, of which all have attention unless some are listed."""
    attending = fields.counts("full_attn_idxs")
    return [FULL if attending is None or index in attending else CONVOLUTION for index in range(count)]


def intermediate_size(fields: Fields) -> int:
    """Return the size of the MLP: two thirds of what is written, rounded up, unless that is switched off."""
    size = fields.whole("block_ff_dim", fields.whole("intermediate_size", 12288))
    if not fields.flag("block_auto_adjust_ff_dim", True):
        return size
    size = int(2 * size / 3)
    multiplier = fields.number("block_ffn_dim_multiplier", 1.0, optional=True)
    if multiplier is None:
        return size
    step = fields.whole("block_multiple_of", 256)
    return -(-int(multiplier * size) // step) * step


FAMILY = Family(
    architecture="Lfm2ForCausalLM",
    model_type="lfm2",
    max_position=128000,
    field_names=(("norm_eps", "rms_norm_eps"), ("tie_embedding", "tie_word_embeddings")),
    tensor_names=(
        (r"^model\.embedding_norm\.", "model.norm."),
        (r"\.operator_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.self_attn\.q_layernorm\.", ".self_attn.q_norm."),
        (r"\.self_attn\.k_layernorm\.", ".self_attn.k_norm."),
        (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
        (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
        (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
        (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    ),
    norm_eps=1e-5,
    num_kv_heads=8,
    kv_heads_nullable=False,
    tied=True,
    eos_token_id=2,
    activation_field="",
    layer_kinds=layer_kinds,
    reads_layer_types=True,
    convolution_kernel=3,
    intermediate_size=intermediate_size,
    rope_theta=1e6,
    qk_norm=True,
)
