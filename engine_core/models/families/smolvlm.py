"""SmolVLM 2 (``SmolVLMConfig``): a SigLIP encoder and a Llama."""

from functools import partial

from engine_core.models.families.family import Family
from engine_core.models.vision import SMOLVLM_VIDEO, read_siglip

FAMILY = Family(
    architecture="SmolVLMForConditionalGeneration",
    model_type="smolvlm",
    max_position=2048,
    head_dim_nullable=True,
    eos_token_id=2,
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    text_type="llama",
    prefix="model.text_model.",
    vision=partial(read_siglip, image_token_id=128257, video=SMOLVLM_VIDEO),
)
