"""Qwen3-VL (``Qwen3VLConfig``): an encoder for pictures of any size, and a Qwen3 with M-RoPE and DeepStack."""

import dataclasses

from engine_core.models.families import qwen3
from engine_core.models.families.family import never
from engine_core.models.vision import read_qwen3_vl

FAMILY = dataclasses.replace(
    qwen3.FAMILY,
    architecture="Qwen3VLForConditionalGeneration",
    model_type="qwen3_vl",
    max_position=128000,
    sliding_window=None,
    window_switch="",
    layer_kinds=never,
    reads_layer_types=False,
    rope_theta=500000.0,
    gguf="",
    text_type="qwen3_vl_text",
    prefix="model.language_model.",
    vision=read_qwen3_vl,
)
