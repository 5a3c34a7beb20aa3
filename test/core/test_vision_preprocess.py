"""Preprocessed images against transformers' PIL processors, and the settings as checkpoints have them."""

import dataclasses
import json

import numpy as np
import pytest

from engine_core.errors import CheckpointError, UnsupportedModelError
from engine_core.vision import Image
from engine_core.vision.preprocess import PatchSettings, TileSettings, preprocess, read_settings, settings_of

SMOLVLM = {
    "image_processor_type": "SmolVLMImageProcessor", "do_image_splitting": True, "resample": 1,
    "size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32},
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
QWEN2 = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 20}
QWEN3 = {
    "image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
    "size": {"longest_edge": 20 * 1024, "shortest_edge": 4 * 1024}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
SIZES = [(1, 1), (7, 300), (300, 7), (32, 32), (33, 95), (96, 96), (120, 160), (101, 55), (31, 32)]


def picture(height: int, width: int) -> Image:
    return Image(np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("changes", [{}, {"do_image_splitting": False}, {"size": {"longest_edge": 31}}], ids=str)
def test_tiles_are_those_of_transformers(changes):
    processors = pytest.importorskip("transformers.models.smolvlm.image_processing_pil_smolvlm")
    values = SMOLVLM | changes
    reference = processors.SmolVLMImageProcessorPil(**{k: v for k, v in values.items() if k != "image_processor_type"})
    settings = settings_of(values, {"image_seq_len": 4})
    for size in SIZES:
        image = picture(*size)
        expected = reference(
            image.pixels, input_data_format="channels_last", return_row_col_info=True, return_tensors="np"
        )
        found = preprocess(image, settings)
        tiles = expected["pixel_values"][0]
        np.testing.assert_array_equal(found.pixels, tiles, err_msg=str(size))
        assert found.pixels.dtype == np.float32
        assert found.grid == (len(tiles), expected["rows"][0][0], expected["cols"][0][0])
        assert found.grid == settings.grid(*size)
        assert found.tokens == settings.tokens(*size) == 4 * len(tiles)


@pytest.mark.parametrize("values", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_patches_are_those_of_transformers(values):
    processors = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    reference = processors.Qwen2VLImageProcessorPil(**{k: v for k, v in values.items() if k != "image_processor_type"})
    settings = settings_of(values, {})
    for size in SIZES:
        image = picture(*size)
        expected = reference(image.pixels, input_data_format="channels_last", return_tensors="np")
        found = preprocess(image, settings)
        np.testing.assert_array_equal(found.pixels, expected["pixel_values"], err_msg=str(size))
        assert found.grid == tuple(expected["image_grid_thw"][0]) == settings.grid(*size)
        assert found.tokens == settings.tokens(*size) == len(found.pixels) // 4


@pytest.mark.parametrize("tokens, longest_edge, most", [(64, 512, 64), (320, 1024, 320), (1000, 1536, 640)])
def test_fewer_tiles_are_cut_within_a_number_of_tokens(tokens, longest_edge, most):
    values = SMOLVLM | {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    settings = settings_of(values, {"image_seq_len": 64})
    assert settings.most_tokens == 17 * 64 and settings.within(17 * 64) is settings
    within = settings.within(tokens)
    assert (within.longest_edge, within.most_tokens) == (longest_edge, most)
    with pytest.raises(ValueError, match="at least 64 tokens, but 63"):
        settings.within(63)


@pytest.mark.parametrize("name, tokens", [("tiles", 12), ("tiles", 5), ("odd tiles", 5), ("patches", 210)])
def test_no_image_has_more_tokens_than_the_most(name, tokens):
    if name == "patches":
        settings = settings_of(QWEN3 | {"size": {"longest_edge": 1 << 24, "shortest_edge": 1 << 16}}, {})
    else:
        tile = 31 if name == "odd tiles" else 32
        settings = settings_of(SMOLVLM | {"max_image_size": {"longest_edge": tile}}, {"image_seq_len": 1})
    within = settings.within(tokens)
    sizes = [(h, w) for h in (*range(1, 200, 7), 480, 1080) for w in (*range(1, 200, 9), 640, 1920)]
    counts = [within.tokens(h, w) for h, w in sizes if max(h, w) <= 200 * min(h, w)]
    assert max(counts) <= within.most_tokens <= tokens
    assert max(counts) > tokens // 3


def test_a_long_strip_is_refused():
    with pytest.raises(ValueError, match="201 × 1, but the longer side may be 200 times"):
        preprocess(picture(1, 201), settings_of(QWEN3, {}))


@pytest.mark.parametrize("nested", [False, True])
def test_settings_are_read_from_the_files_of_a_checkpoint(tmp_path, nested):
    files = {"preprocessor_config.json": SMOLVLM, "processor_config.json": {"image_seq_len": 64}}
    if nested:  # as transformers 5 saves a processor
        files = {"processor_config.json": {"image_seq_len": 64, "image_processor": SMOLVLM}}
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    settings = read_settings(tmp_path)
    assert isinstance(settings, TileSettings)
    assert (settings.longest_edge, settings.tile_size, settings.tile_tokens, settings.split) == (96, 32, 64, True)
    assert dataclasses.replace(settings) == settings and settings.normalization.mean == (0.5, 0.5, 0.5)


def test_limits_of_pixels_have_two_spellings():
    one, two = settings_of(QWEN2, {}), settings_of({**QWEN2, "min_pixels": 1, "max_pixels": 2}, {})
    three = settings_of(
        {"image_processor_type": "Qwen2VLImageProcessor", "size": {"min_pixels": 1, "max_pixels": 2}}, {}
    )
    assert isinstance(one, PatchSettings) and (one.min_pixels, one.max_pixels) == (3136, 15680)
    assert (two.min_pixels, two.max_pixels) == (three.min_pixels, three.max_pixels) == (1, 2)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"image_processor_type": "ViTImageProcessor"}, UnsupportedModelError, "ViTImageProcessor; known are"),
        ({"do_normalize": False}, UnsupportedModelError, "do_normalize=false"),
        ({"image_mean": [0.5]}, CheckpointError, "image_mean.*3 numbers"),
        ({"resample": 9}, CheckpointError, "resample=9"),
        ({"size": {"longest_edge": 0}}, CheckpointError, "size of preprocessor_config.json has longest_edge=0"),
    ],
)
def test_other_settings_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        settings_of(SMOLVLM | changes, {"image_seq_len": 4})


def test_settings_of_no_processor_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no preprocessor_config.json"):
        read_settings(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SMOLVLM))
    with pytest.raises(CheckpointError, match="no processor_config.json with image_seq_len"):
        read_settings(tmp_path)
