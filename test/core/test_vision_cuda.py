"""Models that see on the CUDA backend, its own logic on a driver in host memory, held against transformers.

That the kernels are right, and how fast, only test/gpu can show.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import vision_checkpoints
from engine_core.backends.cuda.build import build_cuda
from engine_core.backends.cuda.toolkit import engine_bytes, plan_for
from engine_core.backends.toolkit import Size
from engine_core.config import EngineConfig
from engine_core.formats.manifest import read_manifest
from engine_core.request import ChatMessage, FinishReason
from engine_core.serving.engine import CancelToken
from engine_core.vision.preprocess import preprocess
from engine_core.vision.prompt import PlacedImage
from vision_cases import CONVERSATIONS, HUGE, SMALL, TALL, USER, add, open_engine, request_of
from vision_checkpoints import IMAGE_TOKEN, Reference, picture

TOLERANCE = 0.02  # of the spread of logits and features, for a model in 16 bits
LAYERS = vision_checkpoints.VISION["num_hidden_layers"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(engine directory, the checkpoint in transformers); its text model is in fp16."""
    directory = vision_checkpoints.write(tmp_path_factory.mktemp("smolvlm"))
    build_cuda(directory, directory / "engine", max_context=512)
    return directory / "engine", Reference.of(directory)


@pytest.fixture
def load(built, driver):
    """Opens engines and closes them."""
    engines = []

    def make(**config):
        engines.append(open_engine(built[0], tune_kernels=False, **config))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def features_of(engine, image, start: int, stop: int) -> np.ndarray:
    """float32 [stop - start, hidden]."""
    backend = engine._backend
    placed = PlacedImage(image, np.arange(stop, dtype=np.int32))
    rows = np.concatenate([rows for _, _, rows in backend.encoder.rows(placed, start, stop)])
    return backend._device.download(backend._work["features"])[rows]


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()


def logits_of(engine) -> np.ndarray:
    """float32 [slots, vocab]."""
    found = engine._backend._device.download(engine._backend._work["logits"])
    return found.reshape(engine._backend.num_slots, -1)


@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_features_are_those_of_transformers(built, load, use_cuda_graph):
    engine = load(use_cuda_graph=use_cuda_graph)
    for image in (SMALL, TALL, HUGE):
        expected = built[1].features(image)
        assert_close(features_of(engine, image, 0, len(expected)), expected)


@pytest.mark.parametrize(
    "config", [dict(), dict(prefill_chunk=32, max_batch=2), dict(use_cuda_graph=False, session_memory=4)], ids=str
)
def test_logits_and_greedy_tokens_are_those_of_transformers(built, load, config):
    engine = load(**config)
    for messages, images in CONVERSATIONS.values():
        engine.answer(request_of(messages, images))
        expected = built[1].logits(messages, images)
        assert min(np.abs(row - expected).max() for row in logits_of(engine)) < TOLERANCE * expected.std()
        answer = engine.answer(request_of(messages, images, 6))
        assert list(answer.token_ids) == built[1].greedy(messages, images, 6)
        ids = built[1].inputs(messages, images)["input_ids"][0].tolist()
        assert answer.image_tokens == ids.count(IMAGE_TOKEN)


@pytest.mark.parametrize(
    "sizes", [dict(hidden_size=40, num_attention_heads=2), dict(intermediate_size=90), dict(hidden_act="gelu")]
)
def test_sizes_that_are_filled_up_and_the_exact_gelu(driver, tmp_path, sizes):
    """Heads of 20 are filled up to 32, 90 values to 96."""
    directory = vision_checkpoints.write(tmp_path, "idefics3", **sizes)
    build_cuda(directory, directory / "engine", max_context=256)
    engine, reference = open_engine(directory / "engine", tune_kernels=False), Reference.of(directory)
    try:
        expected = reference.features(TALL)
        assert_close(features_of(engine, TALL, 0, len(expected)), expected)
    finally:
        engine.close()


@pytest.mark.parametrize("quantization", ["int4", "fp8"])
def test_packed_weights_keep_the_encoder_in_16_bits(built, driver, tmp_path, quantization):
    build_cuda(built[0].parent, tmp_path / "engine", quantization=quantization, max_context=256)
    engine = open_engine(tmp_path / "engine", tune_kernels=False)
    try:
        expected = built[1].features(TALL)
        assert_close(features_of(engine, TALL, 0, len(expected)), expected)
        messages, images = CONVERSATIONS["two"]
        engine.answer(request_of(messages, images))
        assert np.corrcoef(logits_of(engine)[0], built[1].logits(messages, images))[0, 1] > 0.9
    finally:
        engine.close()


class TestCaches:
    def test_a_second_question_needs_neither_encoder_nor_prefill(self, load):
        engine, frame = load(), picture(150, 110, 7)
        first = engine.answer(request_of([ChatMessage(USER, "What?", images=(0,))], [frame]))
        runs = engine._backend.encoder.runs
        second = engine.answer(request_of([ChatMessage(USER, "Which one?", images=(0,))], [frame]))
        assert engine._backend.encoder.runs == runs > 0
        assert second.cached_tokens > second.image_tokens == first.image_tokens
        again = engine.answer(request_of([ChatMessage(USER, "Say: what?", images=(5,))], [frame]))
        assert engine._backend.encoder.runs == runs and again.cached_tokens < again.prompt_tokens - again.image_tokens

    def test_another_image_of_the_same_size_is_not_the_same_prompt(self, built, load):
        engine, messages = load(), [ChatMessage(USER, "What is it?", images=(0,))]
        for seed in (9, 10, 9):
            answer = engine.answer(request_of(messages, [picture(40, 40, seed)], 8))
            assert list(answer.token_ids) == built[1].greedy(messages, [picture(40, 40, seed)], 8)

    def test_more_images_than_the_cache_holds(self, built, load, monkeypatch):
        engine = load(max_images=1, max_image_tokens=4)
        monkeypatch.setitem(built[1].processor.image_processor.size, "longest_edge", 60)
        for seed in (1, 2, 3, 2, 1):
            messages, images = [ChatMessage(USER, "Hm?", images=(0,))], [picture(50, 50, seed)]
            engine.answer(request_of(messages, images))
            assert_close(logits_of(engine)[0], built[1].logits(messages, images))
        assert len(engine._backend.encoder._kept) == 1

    def test_an_engine_without_an_encoder_takes_text_alone(self, built, load):
        engine = load(max_images=0)
        assert engine.plan.item("images") == engine.plan.item("frames") == 0 and engine._backend.encoder is None
        expected = built[1].greedy(*CONVERSATIONS["text"], 6)
        assert list(engine.answer(request_of(*CONVERSATIONS["text"], 6)).token_ids) == expected


class TestBesideOthers:
    """A text is answered in one slot while an image of ten tiles is seen in the other."""

    @pytest.mark.parametrize("layers", [1, LAYERS])
    def test_a_running_answer_waits_for_one_piece_at_most(self, built, load, monkeypatch, layers):
        monkeypatch.setattr("engine_core.backends.cuda.layout.CudaSpec.encoder_layers", layers)
        engine, pieces = load(max_batch=2), []
        encoder = engine._backend.encoder
        advance = encoder._advance
        monkeypatch.setattr(encoder, "_advance", lambda *given: (pieces.append(given), advance(*given)))
        text, answer = add(engine, request_of(*CONVERSATIONS["text"], 400))
        while not text.num_sampled:
            engine.step()
        messages, images = [ChatMessage(USER, "What?", images=(0,))], [picture(500, 400, 21)]
        image, seen = add(engine, request_of(messages, images, 3))
        while not image.num_sampled:
            before, tokens = len(pieces), text.num_sampled
            engine.step()
            assert text.num_sampled == tokens + 1  # no step without a token of the other
            assert len(pieces) - before <= 1
        assert len(pieces) == 10 * LAYERS // layers and encoder.runs == 10
        while not seen:
            engine.step()
        assert list(seen[0].token_ids) == built[1].greedy(messages, images, 3)
        text.cancel.cancel(FinishReason.CANCELLED)
        while not answer:
            engine.step()
        expected = built[1].greedy(*CONVERSATIONS["text"], len(answer[0].token_ids))
        assert list(answer[0].token_ids) == expected

    def test_a_prompt_that_is_fed_while_another_is_encoded(self, built, load, monkeypatch):
        """A chunk overwrites the scratch of the encoder between two of its layers."""
        monkeypatch.setattr("engine_core.backends.cuda.layout.CudaSpec.encoder_layers", 1)
        engine = load(max_batch=3)
        messages, images = [ChatMessage(USER, "What?", images=(0,))], [picture(500, 400, 23)]
        _, seen = add(engine, request_of(messages, images, 3))
        others = []
        while not seen:
            if len(others) < 6:
                others.append(add(engine, request_of(*CONVERSATIONS["text"], 2))[1])
            engine.step()
        assert list(seen[0].token_ids) == built[1].greedy(messages, images, 3)
        while not all(others):
            engine.step()
        assert all(list(each[0].token_ids) == built[1].greedy(*CONVERSATIONS["text"], 2) for each in others)

    def test_a_running_answer_goes_on_while_an_image_is_prepared(self, built, load, monkeypatch):
        engine, may_end, threads = load(max_batch=2), threading.Event(), []

        def slow(image, settings):
            threads.append(threading.current_thread())
            assert may_end.wait(60)
            return preprocess(image, settings)

        monkeypatch.setattr("engine_core.vision.part_encoder.preprocess", slow)
        text, answer = add(engine, request_of(*CONVERSATIONS["text"], 200))
        messages, images = [ChatMessage(USER, "What?", images=(0,))], [picture(500, 400, 25)]
        _, seen = add(engine, request_of(messages, images, 3))
        while text.num_sampled < 20:
            engine.step()
        assert len(threads) == 1 and threads[0] is not threading.current_thread()
        assert engine._backend.encoder.runs == 0 and not seen
        may_end.set()
        while not seen:
            engine.step()
        assert len(threads) == 1 and list(seen[0].token_ids) == built[1].greedy(messages, images, 3)
        text.cancel.cancel(FinishReason.CANCELLED)
        while not answer:
            engine.step()
        engine.close()
        assert not threads[0].is_alive()

    def test_an_image_that_is_cancelled_between_its_layers(self, built, load):
        engine = load(max_batch=2)
        messages, images = [ChatMessage(USER, "What?", images=(0,))], [picture(500, 400, 22)]
        sequence, results = add(engine, request_of(messages, images, 3))
        for _ in range(5):
            engine.step()
        sequence.cancel.cancel(FinishReason.TIMEOUT)
        engine.step()
        engine.step()
        assert results[0].finish_reason is FinishReason.TIMEOUT and not results[0].token_ids
        again = engine.answer(request_of(messages, images, 3))
        assert list(again.token_ids) == built[1].greedy(messages, images, 3)


def test_a_prompt_that_is_interrupted_while_its_image_is_encoded(built, load, monkeypatch):
    engine, cancel = load(), CancelToken()
    encoder = engine._backend.encoder
    with monkeypatch.context() as patch:
        advance = encoder._advance
        patch.setattr(encoder, "_advance", lambda *given: (cancel.cancel(FinishReason.CANCELLED), advance(*given)))
        result = engine.answer(request_of([ChatMessage(USER, "Stop?", images=(0,))], [HUGE]), cancel=cancel)
    assert result.finish_reason is FinishReason.CANCELLED and not result.token_ids
    assert encoder.runs <= 1  # of ten tiles
    messages, images = CONVERSATIONS["behind"]
    engine.answer(request_of(messages, images))
    assert_close(logits_of(engine)[0], built[1].logits(messages, images))


def test_the_plan_is_what_is_taken(built, load, driver):
    manifest = read_manifest(built[0])
    for config in (dict(), dict(max_images=2, prefill_chunk=32), dict(max_batch=2, session_memory=4)):
        engine = load(**config)
        spec, plan = engine._backend._spec, engine.plan
        taken = engine_bytes(built[0], manifest, EngineConfig(built[0], **config), 8)
        assert sum(taken.values()) == plan.total and taken["images"] > 0
        assert plan.item("images") == taken["images"] + spec.encoder.host_bytes
        assert plan.item("frames") == engine.config.image_frames_memory << 20
        before = driver.used, engine._backend._device.allocations
        engine.answer(request_of(*CONVERSATIONS["two"], 3))
        assert (driver.used, engine._backend._device.allocations) == before
    planned = plan_for(manifest.model, "fp16", Size(512), 8)
    assert planned["images"] == engine_bytes(built[0], manifest, EngineConfig(built[0]), 8)["images"]
