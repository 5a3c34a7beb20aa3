"""Checkpoints of the shapes of models that see, with random weights, a tokenizer of bytes and the processor's files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.vision_template import QWEN_TEMPLATE, TEMPLATE
from engine_core.measure.random_checkpoint import write_random_checkpoint

_FIRST_SPECIAL = 256  # tokens before are bytes


@dataclass(frozen=True)
class VisionShape:
    """A published model. ``config``: its config.json; ``files``: the processor's, by name."""

    name: str
    config: dict[str, Any]
    special: tuple[str, ...]  # tokens from 256 on; the second one ends an answer
    placeholder: str  # the one that features replace
    template: str
    files: dict[str, dict[str, Any]]
    image_tokens: int  # of a picture at most, unless told otherwise

    def write(self, directory: Path) -> None:
        """Write the checkpoint."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        directory.mkdir(parents=True, exist_ok=True)
        for name, values in self.files.items():
            (directory / name).write_text(json.dumps(values), encoding="utf-8")
        vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in self.special])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=self.special[1])
        tokenizer.chat_template = self.template
        tokenizer.save_pretrained(str(directory))
        write_random_checkpoint(directory, self.config)


TILE, TILE_TOKENS = 512, 64
_TILE_SPECIAL = (
    "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)  # fmt: skip
_SMOLVLM = VisionShape(
    name="SmolVLM-256M shape",
    config={
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "image_token_id": _FIRST_SPECIAL + _TILE_SPECIAL.index("<image>"),
        "scale_factor": 4,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "eos_token_id": 257,
        },
        "vision_config": {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": TILE, "patch_size": 16,
        },
    },
    special=_TILE_SPECIAL,
    placeholder="<image>",
    template=TEMPLATE,
    files={
        "preprocessor_config.json": {
            "image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 4 * TILE},
            "max_image_size": {"longest_edge": TILE},
        },
        "processor_config.json": {"image_seq_len": TILE_TOKENS},
    },
    image_tokens=TILE_TOKENS,
)  # fmt: skip
PATCHES = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 65536, "max_pixels": 16777216}
_PATCH_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
_QWEN3_VL = VisionShape(
    name="Qwen3-VL-2B shape",
    config={
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": _FIRST_SPECIAL + _PATCH_SPECIAL.index("<|image_pad|>"),
        "video_token_id": _FIRST_SPECIAL + _PATCH_SPECIAL.index("<|video_pad|>"),
        "vision_start_token_id": _FIRST_SPECIAL + _PATCH_SPECIAL.index("<|vision_start|>"),
        "vision_end_token_id": _FIRST_SPECIAL + _PATCH_SPECIAL.index("<|vision_end|>"),
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "eos_token_id": 257, "tie_word_embeddings": True,
            "rope_theta": 5000000.0,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        "vision_config": {
            "model_type": "qwen3_vl", "depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096,
            "out_hidden_size": 2048, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
            "hidden_act": "gelu_pytorch_tanh",
        },
    },
    special=_PATCH_SPECIAL,
    placeholder="<|image_pad|>",
    template=QWEN_TEMPLATE,
    files={"preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessorFast", **PATCHES}},
    image_tokens=300,
)  # fmt: skip
SHAPES = {"smolvlm-256m": _SMOLVLM, "qwen3-vl-2b": _QWEN3_VL}
