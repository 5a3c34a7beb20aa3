"""Models that see on a GPU, small and random, against transformers: features, logits, greedy tokens, and the caches."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import vision_checkpoints
from engine_core.backends.cuda.build import build_cuda
from engine_core.request import ChatMessage, FinishReason
from engine_core.vision.prompt import PlacedImage
from vision_cases import CONVERSATIONS, HUGE, SMALL, TALL, USER, add, open_engine, request_of
from vision_checkpoints import Reference, picture

pytestmark = pytest.mark.gpu

TOLERANCE = 0.02  # of the spread of logits and features, in fp16


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(engine directory, the checkpoint in transformers)."""
    directory = vision_checkpoints.write(tmp_path_factory.mktemp("smolvlm"))
    build_cuda(directory, directory / "engine", max_context=512)
    return directory / "engine", Reference.of(directory)


@pytest.fixture(scope="module")
def load(case):
    """Return the engine of a configuration; each is opened once."""
    engines = {}

    def get(**config):
        key = tuple(sorted(config.items()))
        if key not in engines:
            engines[key] = open_engine(case[0], **config)
        return engines[key]

    yield get
    for engine in engines.values():
        engine.close()


def features_of(engine, image, count: int) -> np.ndarray:
    backend = engine._backend
    placed = PlacedImage(image, np.arange(count, dtype=np.int32))
    rows = np.concatenate([rows for _, _, rows in backend.encoder.rows(placed, 0, count)])
    return backend._device.download(backend._work["features"])[rows]


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    print(f"largest error {np.abs(found - expected).max() / expected.std():.2e} of the spread")
    assert np.abs(found - expected).max() < tolerance * expected.std()


def assert_greedy(reference: Reference, messages, images, token_ids) -> None:
    """Each token is the one with the largest logit in transformers, or as large within the rounding of fp16."""
    expected = reference.logits_of(messages, images, token_ids)
    lost = expected.max(axis=1) - expected[np.arange(len(token_ids)), list(token_ids)]
    assert (lost < TOLERANCE * expected.std(axis=1)).all(), (lost, token_ids)


def logits_of(engine) -> np.ndarray:
    found = engine._backend._device.download(engine._backend._work["logits"])
    return found.reshape(engine._backend.num_slots, -1)


def test_features_are_those_of_transformers_with_and_without_graphs(case, load):
    for image in (SMALL, TALL, HUGE):
        expected = case[1].features(image)
        found = [features_of(load(use_cuda_graph=graph), image, len(expected)) for graph in (True, False)]
        assert_close(found[0], expected)
        assert np.array_equal(*found)


@pytest.mark.parametrize("config", [dict(use_cuda_graph=True), dict(use_cuda_graph=False), dict(max_batch=3)], ids=str)
def test_logits_and_greedy_tokens_are_those_of_transformers(case, load, config):
    engine = load(**config)
    for name, (messages, images) in CONVERSATIONS.items():
        engine.answer(request_of(messages, images))
        expected = case[1].logits(messages, images)
        assert min(np.abs(row - expected).max() for row in logits_of(engine)) < TOLERANCE * expected.std(), name
        answer = engine.answer(request_of(messages, images, 12))
        assert len(answer.token_ids) == 12
        assert_greedy(case[1], messages, images, answer.token_ids)


def test_an_engine_in_bf16_and_int4_has_its_encoder_in_fp16(case, tmp_path):
    for quantization, least in (("fp16", 0.999), ("int4", 0.9)):
        out = tmp_path / quantization
        build_cuda(case[0].parent, out, quantization=quantization, dtype="bf16", max_context=512)
        engine = open_engine(out)
        try:
            expected = case[1].features(TALL)
            assert_close(features_of(engine, TALL, len(expected)), expected)
            messages, images = CONVERSATIONS["two"]
            engine.answer(request_of(messages, images))
            assert np.corrcoef(logits_of(engine)[0], case[1].logits(messages, images))[0, 1] > least
        finally:
            engine.close()


@pytest.mark.parametrize(
    "sizes",
    [
        dict(hidden_size=144, num_attention_heads=2),  # heads of 72, filled up to 80
        dict(hidden_size=128, num_attention_heads=2, image_size=64, patch_size=8, intermediate_size=90),
        dict(hidden_act="gelu"),
    ],
    ids=str,
)
def test_other_encoders(tmp_path, sizes, monkeypatch):
    if "image_size" in sizes:
        tiles = dict(size={"longest_edge": 128}, max_image_size={"longest_edge": 64})
        monkeypatch.setattr(vision_checkpoints, "TILES", tiles)
        monkeypatch.setattr(vision_checkpoints, "TILE_TOKENS", 16)
    directory = vision_checkpoints.write(tmp_path, "idefics3", **sizes)
    build_cuda(directory, directory / "engine", max_context=512)
    engine, reference = open_engine(directory / "engine"), Reference.of(directory)
    try:
        expected = reference.features(TALL)
        assert_close(features_of(engine, TALL, len(expected)), expected)
    finally:
        engine.close()


def test_a_second_question_on_the_same_frame_encodes_nothing(case, load):
    engine, frame = load(use_cuda_graph=True), picture(150, 110, 7)
    first = engine.answer(request_of([ChatMessage(USER, "What?", images=(0,))], [frame]))
    runs = engine._backend.encoder.runs
    messages = [ChatMessage(USER, "Which one?", images=(0,))]
    second = engine.answer(request_of(messages, [frame], 6))
    assert engine._backend.encoder.runs == runs > 0
    assert second.cached_tokens > second.image_tokens == first.image_tokens
    assert_greedy(case[1], messages, [frame], second.token_ids)


def test_sequences_with_and_without_images_in_one_batch(case, load, monkeypatch):
    """A text is answered while images of two others are encoded, a layer at a time, and their prompts are fed."""
    engine = load(max_batch=3)
    allocations = engine._backend._device.allocations
    text, answer = add(engine, request_of(*CONVERSATIONS["text"], 200))
    while not text.num_sampled:
        engine.step()
    wanted = [([ChatMessage(USER, "What?", images=(0,))], [picture(500, 400, seed)]) for seed in (21, 22)]
    seen = [add(engine, request_of(*each, 5))[1] for each in wanted]
    while not all(seen):
        engine.step()
    for (result,), each in zip(seen, wanted, strict=True):
        assert len(result.token_ids) == 5
        assert_greedy(case[1], *each, result.token_ids)
    text.cancel.cancel(FinishReason.CANCELLED)
    while not answer:
        engine.step()
    assert len(answer[0].token_ids) > 10
    assert_greedy(case[1], *CONVERSATIONS["text"], answer[0].token_ids)
    assert engine._backend._device.allocations == allocations
