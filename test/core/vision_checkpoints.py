"""Small random models that see, as transformers writes them, with the processors that prepare their images."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import fakes
from benchmarks.vision_template import QWEN_TEMPLATE, TEMPLATE
from engine_core.request import ChatMessage
from engine_core.vision import Image

VOCAB = 320
# Some of the special tokens of SmolVLM.
TOKENS = (
    "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)  # fmt: skip
IMAGE_TOKEN = 259 + TOKENS.index("<image>")
TEXT = dict(
    model_type="llama", vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=256, eos_token_id=257,
    pad_token_id=258,
)  # fmt: skip
VISION = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3, image_size=60, patch_size=14
)
# 60 pixels are 4 patches, and a rest that no patch has, as in SmolVLM 2 of 2.2B.
TILES = dict(size={"longest_edge": 168}, max_image_size={"longest_edge": 60})
TILE_TOKENS = 4
CLASSES = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}
# Qwen3-VL, and its processor.
QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
QWEN_IMAGE_TOKEN = 259 + QWEN_TOKENS.index("<|image_pad|>")
QWEN_VIDEO_TOKEN = 259 + QWEN_TOKENS.index("<|video_pad|>")
QWEN_TEXT = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, head_dim=32, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=257,
    rope_parameters=dict(rope_type="default", rope_theta=500.0, mrope_section=[8, 4, 4], mrope_interleaved=True),
)  # fmt: skip
QWEN_VISION = dict(
    depth=3, hidden_size=48, num_heads=2, intermediate_size=80, out_hidden_size=64, patch_size=8,
    num_position_embeddings=49, deepstack_visual_indexes=[0, 2],
)  # fmt: skip
PATCHES = dict(patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=4 * 256, max_pixels=40 * 256)


def write(directory: Path, model_type: str = "smolvlm", **vision) -> Path:
    """Write a random checkpoint; norm weights and biases are random too. ``vision``: changes of the encoder."""
    import transformers

    name = CLASSES[model_type]
    config = getattr(transformers, f"{name}Config")(
        vision_config=VISION | vision, text_config=TEXT, scale_factor=2, image_token_id=IMAGE_TOKEN
    )
    _save_random(getattr(transformers, f"{name}ForConditionalGeneration")(config), directory)
    fakes.write_tokenizer(directory, more_tokens=TOKENS, template=TEMPLATE)
    values = {"image_processor_type": f"{name}ImageProcessor", **TILES}
    (directory / "preprocessor_config.json").write_text(json.dumps(values))
    (directory / "processor_config.json").write_text(json.dumps({"image_seq_len": TILE_TOKENS}))
    return directory


def write_qwen(directory: Path) -> Path:
    """Write a random Qwen3-VL."""
    import transformers

    config = transformers.Qwen3VLConfig(
        vision_config=QWEN_VISION, text_config=QWEN_TEXT, image_token_id=QWEN_IMAGE_TOKEN, tie_word_embeddings=True,
        video_token_id=QWEN_VIDEO_TOKEN,
    )  # fmt: skip
    _save_random(transformers.Qwen3VLForConditionalGeneration(config), directory)
    fakes.write_tokenizer(directory, more_tokens=QWEN_TOKENS, template=QWEN_TEMPLATE)
    values = {"image_processor_type": "Qwen2VLImageProcessorFast", **PATCHES}
    (directory / "preprocessor_config.json").write_text(json.dumps(values))
    return directory


def _save_random(model, directory: Path) -> None:
    import torch

    torch.manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = "norm" in parameter_name and parameter_name.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, 0.3 if parameter.dim() == 1 else 0.12)
    model.save_pretrained(str(directory))


def picture(height: int, width: int, seed: int = 0) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def in_parts(messages: Sequence[ChatMessage]) -> list[dict]:
    """Return a conversation as processors take it."""
    conversation = []
    for message in messages:
        parts, start = [], 0
        for place in (*message.images, len(message.content)):
            if text := message.content[start:place]:
                parts.append({"type": "text", "text": text})
            parts.append({"type": "image"})
            start = place
        conversation.append({"role": message.role, "content": parts[:-1]})
    return conversation


@dataclasses.dataclass
class Reference:
    """A checkpoint in transformers, float32, with its processor."""

    model: object
    processor: object

    @classmethod
    def of(cls, directory: Path) -> Reference:
        import torch
        import transformers
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        model = transformers.AutoModelForImageTextToText.from_pretrained(
            str(directory), dtype=torch.float32, attn_implementation="eager"
        )
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(directory))
        images = Idefics3ImageProcessorPil(**TILES)
        processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=TILE_TOKENS, chat_template=TEMPLATE)
        return cls(model.eval(), processor)

    def inputs(self, messages: Sequence[ChatMessage], images: Sequence[Image]):
        """Return what the processor makes of a conversation, as tensors."""
        text = self.processor.apply_chat_template(in_parts(messages), add_generation_prompt=True)
        pictures = {"images": [image.pixels for image in images]} if images else {}
        return self.processor(
            text=text, **pictures, images_kwargs={"input_data_format": "channels_last"}, return_tensors="pt"
        )

    def features(self, image: Image) -> np.ndarray:
        """float32 [tokens, hidden]."""
        import torch

        inputs = self.inputs([ChatMessage("user", "", images=(0,))], [image])
        with torch.no_grad():
            found = self.model.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"])
        # A tensor [tiles, tokens, hidden], or a tuple of one for each image: transformers 5.17 and 5.24 differ.
        return torch.cat(tuple(found.pooler_output)).numpy()

    def logits(self, messages, images) -> np.ndarray:
        """float32 [vocab], after the prompt."""
        import torch

        with torch.no_grad():
            return self.model(**self.inputs(messages, images)).logits[0, -1].numpy()

    def logits_of(self, messages, images, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [n, vocab], before each of ``token_ids`` of an answer."""
        import torch

        inputs = self.inputs(messages, images)
        added = torch.tensor([list(token_ids)[:-1]], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], added], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            return self.model(**inputs).logits[0, -len(token_ids) :].numpy()

    def greedy(self, messages, images, count: int) -> list[int]:
        import torch

        inputs = self.inputs(messages, images)
        with torch.no_grad():
            ids = self.model.generate(
                **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None
            )
        return ids[0, inputs["input_ids"].shape[1] :].tolist()


class QwenReference(Reference):
    """A Qwen3-VL. Its own processor needs torchvision for videos, so what it does with images is done here."""

    @classmethod
    def of(cls, directory: Path) -> QwenReference:
        import torch
        import transformers
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        model = transformers.AutoModelForImageTextToText.from_pretrained(
            str(directory), dtype=torch.float32, attn_implementation="eager"
        )
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(directory))
        return cls(model.eval(), (Qwen2VLImageProcessorPil(**PATCHES), tokenizer))

    def inputs(self, messages, images):
        import torch

        processor, tokenizer = self.processor
        pieces = tokenizer.apply_chat_template(in_parts(messages), add_generation_prompt=True, tokenize=False)
        first, *rest = pieces.split("<|image_pad|>")
        found, text = {}, first
        if images:
            pixels = [image.pixels for image in images]
            found = dict(processor(pixels, input_data_format="channels_last", return_tensors="pt"))
            for grid, piece in zip(found["image_grid_thw"], rest):
                text += "<|image_pad|>" * int(grid.prod() // 4) + piece
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        return found | {"input_ids": ids, "mm_token_type_ids": (ids == QWEN_IMAGE_TOKEN).long()}

    def features(self, image: Image) -> np.ndarray:
        """float32 [tokens, hidden * (1 + DeepStack)]."""
        import torch

        inputs = self.inputs([ChatMessage("user", "", images=(0,))], [image])
        with torch.no_grad():
            found = self.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        deep = [each[0] if isinstance(each, (list, tuple)) else each for each in found.deepstack_features]
        return torch.cat([found.pooler_output[0], *deep], dim=1).numpy()

    def logits(self, messages, images, more: Sequence[int] = ()) -> np.ndarray:
        import torch

        inputs = self.inputs(messages, images)
        added = torch.tensor([list(more)], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], added], dim=1)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], added * 0], dim=1)
        with torch.no_grad():
            self.model.model.rope_deltas = None
            return self.model(**inputs).logits[0, -1].numpy()

    def greedy(self, messages, images, count: int) -> list[int]:
        ids: list[int] = []
        for _ in range(count):
            ids.append(int(self.logits(messages, images, ids).argmax()))
        return ids
