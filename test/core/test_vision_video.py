"""Frames of a video, held against transformers: prompts, pixels, logits and greedy tokens of both families.

Its video processors need torchvision, so what they do with pixels is done here with its image processors, frame by
frame; the texts are those of its processors' own methods.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import torch
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize
from transformers.models.smolvlm import processing_smolvlm
from transformers.video_utils import VideoMetadata

import vision_checkpoints
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.config import EngineConfig
from engine_core.errors import InvalidImageError
from engine_core.request import ChatMessage, GenerationRequest, SamplingParams
from engine_core.serving.engine import Engine
from engine_core.vision import Image
from engine_core.vision.images import Clip
from engine_core.vision.preprocess import preprocess, settings_of
from engine_core.vision.video import number_word
from vision_checkpoints import PATCHES, QWEN_VIDEO_TOKEN, TILE_TOKENS, QwenReference, Reference, in_parts, picture

MAX_ERROR = 1e-4
QUESTION = "What happens?"
TIMES = (0.0, 1.5, 61.0, 62.5, 65.0)
FPS = 2.0  # of which the times are multiples


def frames(count: int, height: int = 50, width: int = 70) -> list[Image]:
    return [Image(picture(height, width, seed).pixels, TIMES[seed]) for seed in range(count)]


def metadata(count: int) -> VideoMetadata:
    indices = [round(time * FPS) for time in TIMES[:count]]
    return VideoMetadata(indices[-1] + 1, fps=FPS, frames_indices=indices)


def request_of(images, count: int = 1, text: str = QUESTION, **changes) -> GenerationRequest:
    sampling = SamplingParams(max_new_tokens=count, ignore_eos=True)
    messages = (ChatMessage("user", text),)
    return GenerationRequest("1", messages, images=tuple(images), sampling=sampling, **changes)


def built(directory) -> Engine:
    """Return an engine of a checkpoint."""
    build_engine(directory, directory / "engine", quantization="fp32", max_context=512, report=lambda line: None)
    return Engine.open(EngineConfig(directory / "engine", max_images=5), report=lambda line: None)


def greedy(model, inputs: dict, count: int) -> tuple[np.ndarray, list[int]]:
    """Return the logits after the prompt, and the tokens that follow."""
    ids, kinds, found, first = inputs["input_ids"], inputs.get("mm_token_type_ids"), [], None
    for _ in range(count):
        if kinds is not None:
            model.model.rope_deltas = None
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(found)))
        inputs["input_ids"] = torch.cat([ids, torch.tensor([found], dtype=torch.long)], dim=1)
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1].numpy()
        first = logits if first is None else first
        found.append(int(logits.argmax()))
    return first, found


def check(engine: Engine, reference, inputs: dict, images) -> None:
    prepared = engine.prepare(request_of(images))
    assert prepared.token_ids.tolist() == inputs["input_ids"][0].tolist()
    logits, tokens = greedy(reference.model, inputs, 4)
    assert list(engine.answer(request_of(images, 4)).token_ids) == tokens
    engine.answer(request_of(images))
    assert np.abs(engine._backend._session.logits[0] - logits).max() < MAX_ERROR


class TestSmolVlm:
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, tmp_path_factory):
        directory = vision_checkpoints.write(tmp_path_factory.mktemp("smolvlm"))
        with closing(built(directory)) as engine:
            yield engine, Reference.of(directory)

    @staticmethod
    def inputs(reference, images, monkeypatch) -> dict:
        monkeypatch.setattr(processing_smolvlm, "num2words", number_word)
        tokens = dict(
            image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>"
        )
        processor = SimpleNamespace(image_seq_len=TILE_TOKENS, **tokens)
        found = reference.processor.image_processor(
            [image.pixels for image in images], do_image_splitting=False, input_data_format="channels_last",
            return_tensors="pt",
        )  # fmt: skip
        values = {"pixel_values": found["pixel_values"], "video_metadata": [metadata(len(images))]}
        text = processing_smolvlm.SmolVLMProcessor.replace_video_token(processor, values, 0)
        conversation = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
        prompt = reference.processor.tokenizer.apply_chat_template(
            conversation, chat_template=processing_smolvlm.DEFAULT_CHAT_TEMPLATE, add_generation_prompt=True,
            tokenize=False,
        )  # fmt: skip
        ids = reference.processor.tokenizer.encode(prompt.replace("<video>", text), add_special_tokens=False)
        return dict(found) | {"input_ids": torch.tensor([ids])}

    @pytest.mark.parametrize("count", [1, 4])
    def test_prompts_logits_and_greedy_tokens(self, case, count, monkeypatch):
        engine, reference = case
        images = frames(count)
        check(engine, reference, self.inputs(reference, images, monkeypatch), images)

    def test_a_frame_is_one_tile_and_is_known_again(self, case):
        engine, runs = case[0], case[0]._backend.encoder.runs
        images = [Image(picture(100, 130, seed).pixels, float(seed)) for seed in range(3)]
        answer = engine.answer(request_of(images[:2]))
        assert answer.image_tokens == 2 * TILE_TOKENS
        later = [Image(image.pixels, (image.seconds or 0.0) - 1.0) for image in images[1:]]
        engine.answer(request_of(later))
        assert engine._backend.encoder.runs == runs + 3  # the second frame is seen once

    def test_frames_beside_images(self, case):
        """Two videos and an image between the words of a message."""
        engine = case[0]
        images = [*frames(2), *frames(1), picture(20, 20, 9)]
        message = ChatMessage("user", "First: then: last: what?", images=(7, 7, 13, 19))
        prepared = engine.prepare(request_of(images).replace(messages=(message,)))
        text = "".join(engine.tokenizer.token_texts(prepared.token_ids))
        assert text.count("You are provided") == 2 and "series of one frames" in text
        assert text.index("First:") < text.index("two frames") < text.index("then:") < text.index("one frames")
        assert text.rindex("<global-img>") > text.index("last:")
        assert [type(placed.image) for placed in prepared.images] == [Clip, Clip, Clip, Image]

    def test_frames_in_a_raw_prompt_are_images(self, case):
        request = GenerationRequest("1", prompt="<image> and <image>?", images=tuple(frames(2)))
        assert [type(placed.image) for placed in case[0].prepare(request).images] == [Image, Image]

    def test_more_frames_than_images_of_a_prompt(self, case):
        with pytest.raises(InvalidImageError, match="6 images.*at most 5"):
            case[0].prepare(request_of([Image(picture(8, 8, seed).pixels, float(seed)) for seed in range(6)]))


class TestQwen:
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, tmp_path_factory):
        directory = vision_checkpoints.write_qwen(tmp_path_factory.mktemp("qwen"))
        with closing(built(directory)) as engine:
            yield engine, QwenReference.of(directory)

    @staticmethod
    def inputs(reference, images) -> dict:
        processor, tokenizer = reference.processor
        pixels = [image.pixels for image in images]
        found = processor(pixels, input_data_format="channels_last", return_tensors="pt")
        grid = found["image_grid_thw"][0]
        each = found["pixel_values"].reshape(len(images), int(grid.prod()), 3, 2, -1)
        each = torch.cat([each, each[-1:].repeat(len(images) % 2, 1, 1, 1, 1)])
        pairs = torch.stack([each[0::2, :, :, 0], each[1::2, :, :, 0]], dim=3)
        video_grid = torch.stack([torch.tensor([len(pairs), int(grid[1]), int(grid[2])])])
        itself = SimpleNamespace(
            video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2), video_token="<|video_pad|>",
            vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
            _calculate_timestamps=partial(Qwen3VLProcessor._calculate_timestamps, None),
        )  # fmt: skip
        values = {"video_grid_thw": video_grid, "video_metadata": [metadata(len(images))]}
        text = Qwen3VLProcessor.replace_video_token(itself, values, 0)
        parts = in_parts([ChatMessage("user", QUESTION, images=(0,))])
        prompt = tokenizer.apply_chat_template(parts, add_generation_prompt=True, tokenize=False)
        # As the processors before 5 have it: the markers of the place are those of the first frame.
        prompt = prompt.replace("<|vision_start|><|image_pad|><|vision_end|>", text)
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
        return {
            "pixel_values_videos": pairs.reshape(-1, pairs.shape[2] * pairs.shape[3] * pairs.shape[4]),
            "video_grid_thw": video_grid,
            "input_ids": ids,
            "mm_token_type_ids": (ids == QWEN_VIDEO_TOKEN).long() * 2,
        }

    @pytest.mark.parametrize("count", [4, 5])
    def test_prompts_logits_and_greedy_tokens(self, case, count):
        engine, reference = case
        check(engine, reference, self.inputs(reference, frames(count)), frames(count))

    def test_sizes_are_those_of_the_video_processor(self):
        """With the pixels of all frames that a limit for each of them gives."""
        settings = settings_of({"image_processor_type": "Qwen2VLImageProcessorFast", **PATCHES}, {})
        for height, width in ((50, 70), (480, 640), (90, 700), (33, 33)):
            expected = smart_resize(4, height, width, 2, 16, 4 * settings.min_pixels, 4 * settings.max_pixels)
            assert settings.size(height, width) == expected
            clip = Clip(tuple(picture(height, width, seed) for seed in range(2)), (height, width))
            assert len(preprocess(clip, settings).pixels) == expected[0] * expected[1] // 64

    def test_frames_of_another_size_are_brought_to_that_of_the_first(self, case):
        images = [Image(picture(50, 70).pixels, 0.0), Image(picture(90, 40).pixels, 1.0)]
        (placed,) = case[0].prepare(request_of(images)).images
        assert placed.num_tokens == case[0].images.spec.processor.tokens(50, 70)


def test_numbers_are_words():
    words = [number_word(number) for number in (1, 4, 12, 20, 21, 32, 64)]
    assert words == ["one", "four", "twelve", "twenty", "twenty-one", "thirty-two", "sixty-four"]
