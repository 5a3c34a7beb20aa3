"""Configurations of models that see: what they become, and that damaged ones are refused in one sentence."""

from __future__ import annotations

import copy
import json

import pytest

import sample_checkpoints
from engine_core.errors import CheckpointError, EdgeLLMError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.manifest import Manifest, read_manifest, seal
from engine_core.models.reader import check_tensors, read_spec
from engine_core.models.shapes import spec_of
from engine_core.vision.preprocess import PatchSettings, TileSettings

NAMES = ("SmolVLMForConditionalGeneration", "Qwen3VLForConditionalGeneration")
WRONG = (None, "x", [[]], {"a": 1}, -1, 0, True, 3, 2**31 - 1, 1e300)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {name: sample_checkpoints.write(tmp_path_factory.mktemp("eyes") / name, name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_holds_the_encoder(directories, name, tmp_path):
    checkpoint = Checkpoint(directories[name])
    spec = read_spec(checkpoint)
    check_tensors(spec, checkpoint)
    assert isinstance(spec.vision.processor, TileSettings if name.startswith("Smol") else PatchSettings)
    assert spec.num_parameters > spec.vision.num_parameters > 0
    manifest = Manifest("eyes", spec, "onnxruntime", "int8", "fp32", 64, 1, ())
    seal(tmp_path, manifest)
    assert read_manifest(tmp_path).model == spec


@pytest.mark.parametrize("name", NAMES)
def test_wrong_values_are_refused_in_one_sentence(directories, name):
    checkpoint = Checkpoint(directories[name])
    original = copy.deepcopy(checkpoint.config)
    fields = [("vision_config", field) for field in original["vision_config"]]
    fields += [
        ("text_config", "rope_scaling"),
        ("text_config", "model_type"),
        ("", "text_config"),
        ("", "image_token_id"),
    ]
    fields += [("", "vision_config"), ("", "scale_factor")]
    for where, field in fields:
        for value in WRONG:
            checkpoint.config = copy.deepcopy(original)
            (checkpoint.config[where] if where else checkpoint.config)[field] = value
            try:
                read_spec(checkpoint)
            except EdgeLLMError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    "name, file, changes, words",
    [
        (NAMES[0], "processor_config.json", {"image_seq_len": 9}, "tiles have 4 tokens, not 9"),
        (NAMES[0], "preprocessor_config.json", {"max_image_size": {"longest_edge": 24}}, "multiple of 2 patches"),
        (NAMES[0], "config.json", {"image_token_id": 320}, "image token 320 is beyond 320 tokens"),
        (NAMES[1], "preprocessor_config.json", {"patch_size": 4}, "not those of the image processor"),
        (NAMES[1], "config.json", {"image_token_id": 321}, "image token 321"),
    ],
)
def test_parts_that_do_not_fit_are_refused(directories, name, file, changes, words):
    path = directories[name] / file
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | changes))
        with pytest.raises(CheckpointError, match=words):
            read_spec(Checkpoint(directories[name]))
    finally:
        path.write_text(before)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_alone_can_be_planned(directories, name):
    spec = spec_of(json.loads((directories[name] / "config.json").read_text()))
    assert spec.vision is not None and spec.vision.most_tokens > 4
