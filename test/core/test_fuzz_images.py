"""Picture files and raw images with anything in them: an image, or one sentence."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage

from engine_core.vision.encodings import ENCODINGS, decode_raw
from engine_core.vision.pictures import decode_picture
from engine_core.vision.preprocess import settings_of
from fuzzing import fuzz, refusal

PIXELS = np.random.default_rng(5).integers(0, 256, (9, 13, 3), np.uint8)
sizes = st.sampled_from([0, 1, 2, 3, 5, 8, 64, 2**31, 2**32 - 1])


def files() -> dict[str, bytes]:
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    found = {}
    for name, options in (("JPEG", {"exif": exif}), ("PNG", {}), ("progressive", {"progressive": True})):
        file = io.BytesIO()
        PillowImage.fromarray(PIXELS).save(file, "JPEG" if name == "progressive" else name, **options)
        found[name] = file.getvalue()
    return found


FILES = files()


@pytest.mark.parametrize("name", FILES)
@fuzz
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4), st.floats(0, 1))
def test_damaged_picture_files(name, changes, kept):
    data = bytearray(FILES[name])
    for place, value in changes:
        data[int(place * len(data))] = value
    refusal(decode_picture, data[: max(1, int(len(data) * kept**0.1))])


@fuzz
@given(st.sampled_from([*ENCODINGS, "rgb9", "16UC1", ""]), sizes, sizes, sizes, st.integers(0, 600), st.booleans())
def test_raw_images_of_any_size(encoding, width, height, step, num_bytes, is_bigendian):
    refusal(decode_raw, encoding, width, height, step, bytes(num_bytes), is_bigendian=is_bigendian)


values = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 2**40), st.floats(), st.text(max_size=3),
    st.lists(st.floats(), max_size=4),
    st.dictionaries(st.sampled_from(["longest_edge", "shortest_edge"]), st.integers(-5, 2**40) | st.none()),
)  # fmt: skip
fields = st.sampled_from(
    ["size", "max_image_size", "image_mean", "image_std", "resample", "rescale_factor", "patch_size", "merge_size",
     "min_pixels", "do_resize", "image_processor_type", "do_image_splitting"]
)  # fmt: skip


@fuzz
@given(st.sampled_from(["SmolVLMImageProcessor", "Qwen2VLImageProcessorFast"]), st.dictionaries(fields, values), values)
def test_settings_of_any_value(kind, preprocessor, seq_len):
    refusal(settings_of, {"image_processor_type": kind, **preprocessor}, {"image_seq_len": seq_len})
