"""Models that see, held against transformers: features, prompts, logits, greedy tokens; and what their caches do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import onnxruntime as ort

import vision_checkpoints
from engine_core import cli
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.errors import ConfigurationError, InvalidImageError, InvalidSessionError
from engine_core.request import ChatMessage, FinishReason, GenerationRequest, SamplingParams
from engine_core.serving.engine import CancelToken
from engine_core.serving.session_files import SavedSession, save_session
from engine_core.vision.encoder_inputs import tile_positions
from engine_core.vision.prompt import PlacedImage
from vision_cases import ANSWER, CONVERSATIONS, HUGE, SMALL, TALL, USER, WIDE, add, open_engine, request_of
from vision_checkpoints import IMAGE_TOKEN, QwenReference, Reference, picture

MAX_ERROR = 1e-4


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(directory of the fp32 engine, the checkpoint in transformers)."""
    return build_case(tmp_path_factory.mktemp("smolvlm"), "smolvlm")


def build_case(directory, model_type):
    vision_checkpoints.write(directory, model_type)
    build_engine(directory, directory / "engine", quantization="fp32", max_context=512, report=lambda line: None)
    return directory / "engine", Reference.of(directory)


@pytest.fixture(scope="module")
def engine(case):
    engine = open_engine(case[0], session_memory=4)
    yield engine
    engine.close()


class TestAgainstTransformers:
    @pytest.mark.parametrize("image", [SMALL, TALL, HUGE], ids=["small", "tall", "huge"])
    def test_features(self, case, engine, image):
        expected = case[1].features(image)
        encoder, count = engine._backend.encoder, len(expected)
        found = np.empty_like(expected)
        placed = PlacedImage(image, np.arange(count, dtype=np.int32))
        encoder.take(placed, 3, count, found[3:], ort.RunOptions())
        encoder.take(placed, 0, 3, found[:3], ort.RunOptions())
        assert np.abs(found - expected).max() < MAX_ERROR

    @pytest.mark.parametrize("name", CONVERSATIONS)
    def test_prompts_logits_and_greedy_tokens(self, case, engine, name):
        messages, images = CONVERSATIONS[name]
        ids = case[1].inputs(messages, images)["input_ids"][0].tolist()
        assert engine.prepare(request_of(messages, images)).token_ids.tolist() == ids
        assert engine.answer(request_of(messages, images)).prompt_tokens == len(ids)
        expected = case[1].logits(messages, images)
        assert np.abs(engine._backend._session.logits[0] - expected).max() < MAX_ERROR
        answer = engine.answer(request_of(messages, images, 12))
        assert list(answer.token_ids) == case[1].greedy(messages, images, 12)
        assert answer.image_tokens == ids.count(IMAGE_TOKEN)

    @pytest.mark.parametrize("config", [dict(prefill_chunk=5), dict(max_batch=2), dict(kv_cache_type="fp16")], ids=str)
    def test_chunks_slots_and_caches(self, case, config):
        """Images that are cut by chunks and whose sequences run side by side."""
        engine, names = open_engine(case[0], **config), ("two", "turns")
        try:
            for name in names:
                messages, images = CONVERSATIONS[name]
                engine.answer(request_of(messages, images))
                expected = case[1].logits(messages, images)
                most = 0.02 if "kv_cache_type" in config else MAX_ERROR
                found = engine._backend._session.logits
                assert min(np.abs(row - expected).max() for row in found) < most
        finally:
            engine.close()


@pytest.fixture(scope="module")
def shared(case):
    """An engine with two slots."""
    engine = open_engine(case[0], max_batch=2)
    yield engine
    engine.close()


class TestBesideOthers:
    """A text is answered in one slot while an image of ten tiles is seen in the other."""

    def test_a_running_answer_waits_for_one_layer_at_most(self, shared, case, monkeypatch):
        encoder, layers = shared._backend.encoder, []
        run = encoder._run_layer
        monkeypatch.setattr(encoder, "_run_layer", lambda *given: (layers.append(given), run(*given)))
        text, answer = add(shared, request_of(*CONVERSATIONS["text"], 400))
        while not text.num_sampled:
            shared.step()
        messages, images = [ChatMessage(USER, "What?", images=(0,))], [picture(500, 400, 21)]
        image, seen = add(shared, request_of(messages, images, 3))
        while not image.num_sampled:
            before, tokens = len(layers), text.num_sampled
            shared.step()
            assert text.num_sampled == tokens + 1  # no step without a token of the other
            assert len(layers) - before <= 2  # those of two steps: one is queued ahead
        assert len(layers) == 10 * vision_checkpoints.VISION["num_hidden_layers"]
        while not seen:
            shared.step()
        assert list(seen[0].token_ids) == case[1].greedy(messages, images, 3)
        text.cancel.cancel(FinishReason.CANCELLED)
        while not answer:
            shared.step()

    def test_a_text_does_not_wait_for_the_images_before_it(self, shared, case):
        """Nor do two images: their tiles are encoded in turns, none of them twice."""
        encoder = shared._backend.encoder
        messages, images = [ChatMessage(USER, "What?", images=(0,))], [picture(500, 400, 23)]
        first, seen = add(shared, request_of(messages, images, 3))
        for _ in range(4):
            shared.step()
        text, answer = add(shared, request_of(*CONVERSATIONS["text"], 2))
        while not answer:
            shared.step()
        assert not first.num_sampled and not seen
        runs, others = encoder.runs, [picture(500, 400, 24)]
        second, also = add(shared, request_of(messages, others, 3))
        while not (seen and also):
            shared.step()
        assert encoder.runs - runs <= 20
        for result, shown in ((seen[0], images), (also[0], others)):
            assert list(result.token_ids) == case[1].greedy(messages, shown, 3)

    def test_an_image_that_is_cancelled_between_its_layers(self, shared, case):
        messages, images = [ChatMessage(USER, "What?", images=(0,))], [picture(500, 400, 22)]
        sequence, results = add(shared, request_of(messages, images, 3))
        for _ in range(5):
            shared.step()
        sequence.cancel.cancel(FinishReason.TIMEOUT)
        shared.step()
        shared.step()
        assert results[0].finish_reason is FinishReason.TIMEOUT and not results[0].token_ids
        again = shared.answer(request_of(messages, images, 3))
        assert list(again.token_ids) == case[1].greedy(messages, images, 3)


def test_the_first_smolvlm_and_idefics3(tmp_path):
    """They differ in their names alone."""
    directory, reference = build_case(tmp_path, "idefics3")
    engine = open_engine(directory)
    try:
        messages, images = CONVERSATIONS["two"]
        assert list(engine.answer(request_of(messages, images, 6)).token_ids) == reference.greedy(messages, images, 6)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """(engine, the checkpoint in transformers) of a Qwen3-VL."""
    directory = vision_checkpoints.write_qwen(tmp_path_factory.mktemp("qwen"))
    build_engine(directory, directory / "engine", quantization="fp32", max_context=512, report=lambda line: None)
    engine = open_engine(directory / "engine", prefill_chunk=24)
    yield engine, QwenReference.of(directory)
    engine.close()


class TestQwen:
    @pytest.mark.parametrize("image", [SMALL, TALL, HUGE], ids=["small", "tall", "huge"])
    def test_features(self, qwen, image):
        engine, reference = qwen
        expected = reference.features(image)
        found, positions = np.empty_like(expected), np.arange(len(expected), dtype=np.int32)
        engine._backend.encoder.take(PlacedImage(image, positions), 0, len(expected), found, ort.RunOptions())
        assert np.abs(found - expected).max() < MAX_ERROR

    @pytest.mark.parametrize("name", CONVERSATIONS)
    def test_prompts_logits_and_greedy_tokens(self, qwen, name):
        """M-RoPE and DeepStack across chunks, and text behind images."""
        engine, reference = qwen
        messages, images = CONVERSATIONS[name]
        ids = reference.inputs(messages, images)["input_ids"][0].tolist()
        assert engine.prepare(request_of(messages, images)).token_ids.tolist() == ids
        engine.answer(request_of(messages, images))
        assert np.abs(engine._backend._session.logits[0] - reference.logits(messages, images)).max() < MAX_ERROR
        answer = engine.answer(request_of(messages, images, 4))
        assert list(answer.token_ids) == reference.greedy(messages, images, 4)

    @pytest.mark.parametrize("config", [dict(max_batch=2, session_memory=1), dict(kv_cache_type="fp16")], ids=str)
    def test_slots_that_return_to_text(self, qwen, config):
        """Sequences with and without images, one after another in the same slots and from the pool."""
        engine, reference = open_engine(qwen[0].config.engine_dir, **config), qwen[1]
        try:
            for name in ("two", "text", "turns", "two"):
                messages, images = CONVERSATIONS[name]
                engine.answer(request_of(messages, images))
                most = 0.02 if "kv_cache_type" in config else MAX_ERROR
                expected = reference.logits(messages, images)
                assert min(np.abs(row - expected).max() for row in engine._backend._session.logits) < most, name
        finally:
            engine.close()


def test_an_int8_engine_sees_nearly_the_same(case):
    directory = case[0].parent
    build_engine(directory, directory / "int8", quantization="int8", max_context=512, report=lambda line: None)
    engine = open_engine(directory / "int8")
    try:
        expected = case[1].features(TALL)
        features = np.empty_like(expected)
        places = np.arange(len(expected), dtype=np.int32)
        engine._backend.encoder.take(PlacedImage(TALL, places), 0, len(expected), features, ort.RunOptions())
        assert np.linalg.norm(features - expected) < 0.05 * np.linalg.norm(expected)
        messages, images = CONVERSATIONS["two"]
        engine.answer(request_of(messages, images))
        found, expected = engine._backend._session.logits[0], case[1].logits(messages, images)
        assert np.corrcoef(found, expected)[0, 1] > 0.99
    finally:
        engine.close()


class TestCaches:
    def test_a_second_question_needs_neither_encoder_nor_prefill(self, engine):
        frame = picture(150, 110, 7)
        first = engine.answer(request_of([ChatMessage(USER, "What?", images=(0,))], [frame]))
        runs = engine._backend.encoder.runs
        second = engine.answer(request_of([ChatMessage(USER, "Which one?", images=(0,))], [frame]))
        assert engine._backend.encoder.runs == runs > 0
        assert second.cached_tokens > second.image_tokens == first.image_tokens

    def test_features_are_kept_where_the_kv_is_not(self, engine):
        frame = picture(30, 30, 8)
        engine.answer(request_of([ChatMessage(USER, "What?", images=(0,))], [frame]))
        runs = engine._backend.encoder.runs
        again = engine.answer(request_of([ChatMessage(USER, "Say: what?", images=(5,))], [frame]))
        assert engine._backend.encoder.runs == runs and again.cached_tokens < again.prompt_tokens - again.image_tokens

    def test_another_image_of_the_same_size_is_not_the_same_prompt(self, case, engine):
        messages = [ChatMessage(USER, "What is it?", images=(0,))]
        one, other = picture(40, 40, 9), picture(40, 40, 10)
        ids = engine.answer(request_of(messages, [one], 8)).token_ids
        answer = engine.answer(request_of(messages, [other], 8))
        assert list(answer.token_ids) == case[1].greedy(messages, [other], 8) != list(ids)
        assert answer.cached_tokens <= engine.prepare(request_of(messages, [one])).token_ids.tolist().index(IMAGE_TOKEN)

    def test_a_request_that_is_cancelled_while_its_image_is_encoded(self, case, engine, monkeypatch):
        encoder, cancel = engine._backend.encoder, CancelToken()
        runs = encoder.runs
        messages, images = [ChatMessage(USER, "Stop?", images=(0,))], [picture(130, 90, 11)]
        with monkeypatch.context() as patch:
            run = encoder._run_layer
            patch.setattr(encoder, "_run_layer", lambda *given: (cancel.cancel(FinishReason.CANCELLED), run(*given)))
            result = engine.answer(request_of(messages, images), cancel=cancel)
        assert result.finish_reason is FinishReason.CANCELLED and not result.token_ids
        assert encoder.runs == runs  # it was ended within its run
        engine.answer(request_of(messages, images))
        assert np.abs(engine._backend._session.logits[0] - case[1].logits(messages, images)).max() < MAX_ERROR

    def test_more_images_than_the_cache_holds(self, case, monkeypatch):
        engine = open_engine(case[0], max_images=1, max_image_tokens=4)
        monkeypatch.setitem(case[1].processor.image_processor.size, "longest_edge", 60)
        try:
            for seed in (1, 2, 3, 2, 1):
                messages, images = [ChatMessage(USER, "Hm?", images=(0,))], [picture(50, 50, seed)]
                engine.answer(request_of(messages, images))
                found = engine._backend._session.logits[0]
                assert np.abs(found - case[1].logits(messages, images)).max() < MAX_ERROR
            assert len(engine._backend.encoder._kept) == 1
        finally:
            engine.close()

    def test_a_session_keeps_its_images(self, case, engine, tmp_path):
        letters = tuple((token_id, 100.0) for token_id in range(ord("a"), ord("z")))
        first = request_of([ChatMessage(USER, "This?", images=(0,))], [SMALL], session="eyes")
        first = first.replace(sampling=SamplingParams(max_new_tokens=5, logit_bias=letters))
        history = [*first.messages, ChatMessage("assistant", engine.answer(first).text)]
        assert len(history[-1].content) == 5
        second = request_of([ChatMessage(USER, "Or this?", images=(0,))], [TALL], session="eyes")
        answer = engine.answer(second)
        expected = case[1].logits([*history, *second.messages], [SMALL, TALL])
        assert np.abs(engine._backend._session.logits[0] - expected).max() < MAX_ERROR
        assert answer.image_tokens == 17 * 4 and answer.cached_tokens > 40
        with pytest.raises(InvalidSessionError, match="images, which are not saved"):
            save_session(tmp_path, "eyes", SavedSession(engine.reset_session("eyes").messages, 2, 1), engine.hash)

    def test_the_oldest_turns_and_their_images_are_left_out(self, engine):
        messages = [m for _ in range(6) for m in (ChatMessage(USER, "And this?", images=(0,)), ANSWER)]
        images = [picture(20, 20, seed) for seed in range(7)]
        request = request_of([*messages, ChatMessage(USER, "Now?", images=(0,))], images)
        with pytest.raises(InvalidImageError, match="7 images.*at most 4"):
            engine.prepare(request)
        prepared = engine.prepare(request.replace(context_policy="drop_oldest"))
        assert prepared.num_dropped >= 3
        assert [placed.image for placed in prepared.images] == images[prepared.num_dropped :]


class TestPlaces:
    def test_images_without_places_come_before_the_last_users_text(self, engine):
        messages = [ChatMessage(USER, "Hi."), ANSWER, ChatMessage(USER, "See?")]
        placed = [*messages[:2], ChatMessage(USER, "See?", images=(0, 0))]
        found = engine.prepare(request_of(messages, [SMALL, WIDE]))
        assert np.array_equal(found.token_ids, engine.prepare(request_of(placed, [SMALL, WIDE])).token_ids)
        assert [placed.image for placed in found.images] == [SMALL, WIDE]

    @pytest.mark.parametrize("allow_special", [False, True])
    def test_a_placeholder_that_a_user_types_is_text(self, engine, allow_special):
        messages = [ChatMessage(USER, "<image> or <image>?", images=(3,))]
        prepared = engine.prepare(request_of(messages, [SMALL], allow_special=allow_special))
        assert prepared.token_ids.tolist().count(IMAGE_TOKEN) == 10 * vision_checkpoints.TILE_TOKENS
        assert "age> or <image>?<end_of_utterance>" in "".join(engine.token_texts(prepared.token_ids))

    def test_a_raw_prompt_has_a_placeholder_for_each_image(self, engine):
        sampling = SamplingParams(max_new_tokens=1)
        request = GenerationRequest("1", prompt="Look <image> and <image>!", images=(SMALL, TALL), sampling=sampling)
        prepared = engine.prepare(request)
        assert [len(placed.positions) for placed in prepared.images] == [4 * 10, 4 * 7]
        with pytest.raises(InvalidImageError, match="2 placeholders '<image>' for 1 images"):
            engine.prepare(request.replace(images=(SMALL,)))
        with pytest.raises(InvalidImageError, match="1 placeholders '<image>' for 0 images"):
            engine.prepare(request.replace(prompt="<image>", images=()))

    def test_bad_places_are_refused(self, engine):
        for message, images, reason in (
            (ChatMessage(USER, "a", images=(2,)), [SMALL], "ascend from 0 to the 1"),
            (ChatMessage(USER, "abc", images=(2, 1)), [SMALL, SMALL], "ascend"),
            (ChatMessage(USER, "a", images=(0, 1)), [SMALL], "2 images, but the request has 1"),
            (ChatMessage("system", "a", images=(0,)), [SMALL], "only a user's message"),
        ):
            with pytest.raises(InvalidImageError, match=reason):
                engine.prepare(request_of([message, ChatMessage(USER, "b")], images))


class TestLimits:
    def test_a_picture_that_is_too_large_is_refused(self, engine):
        large = dataclasses.replace(SMALL, pixels=np.broadcast_to(np.uint8(0), (6000, 6000, 3)))
        with pytest.raises(InvalidImageError, match="6000 × 6000, but at most 33554432"):
            engine.prepare(request_of([ChatMessage(USER, "a")], [large]))

    def test_an_engine_without_an_encoder_takes_text_alone(self, case):
        engine = open_engine(case[0], max_images=0)
        try:
            with pytest.raises(InvalidImageError, match="max_images is 0"):
                engine.prepare(request_of(*CONVERSATIONS["one"]))
            assert engine.plan.item("images") == 0
            expected = case[1].greedy(*CONVERSATIONS["text"], 8)
            assert list(engine.answer(request_of(*CONVERSATIONS["text"], 8)).token_ids) == expected
        finally:
            engine.close()

    def test_fewer_tokens_are_what_a_smaller_processor_gives(self, case, monkeypatch):
        engine = open_engine(case[0], max_image_tokens=20)
        try:
            monkeypatch.setitem(case[1].processor.image_processor.size, "longest_edge", 120)
            messages, images = CONVERSATIONS["behind"]
            engine.answer(request_of(messages, images))
            assert np.abs(engine._backend._session.logits[0] - case[1].logits(messages, images)).max() < MAX_ERROR
        finally:
            engine.close()
        with pytest.raises(ConfigurationError, match="at least 4 tokens"):
            open_engine(case[0], max_image_tokens=3)


def test_the_command_line_takes_pictures(case, tmp_path, capsys):
    from PIL import Image as PillowImage

    PillowImage.fromarray(SMALL.pixels).save(tmp_path / "small.png")
    options = ["--max-image-tokens", "4", "--max-new-tokens", "2", "--stats"]
    assert cli.main(["generate", str(case[0]), "What?", "--image", str(tmp_path / "small.png"), *options]) == 0
    tokens = len("User:What?\nAssistant:") + 2 + 3 + 4  # the turn's markers, those of the image, and its own
    assert f"{tokens} prompt tokens" in capsys.readouterr().err
    assert cli.main(["generate", str(case[0]), "What?", "--image", str(tmp_path / "none.png")]) == 1


@pytest.mark.parametrize("positions", [4, 16, 24, 26, 27, 32, 37])
def test_positions_are_those_of_transformers(positions):
    import torch
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

    config = SmolVLMVisionConfig(hidden_size=1, num_attention_heads=1, image_size=2 * positions, patch_size=2)
    module = SmolVLMVisionEmbeddings(config)
    for side in (positions, positions // 2, 2 * positions):
        with torch.no_grad():
            module.patch_embedding.weight.zero_()
            module.patch_embedding.bias.zero_()
            module.position_embedding.weight.copy_(torch.arange(positions**2).float()[:, None])
            mask = torch.ones(1, side, side, dtype=torch.bool)
            expected = module(torch.zeros(1, 3, 2 * side, 2 * side), mask)[0, :, 0].numpy().astype(int)
        assert np.array_equal(tile_positions(side, positions), expected), side
