"""Checkpoints of models that also take images: their text model against transformers, by either names of tensors."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import checkpoints
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.backends.onnxruntime.session import OrtSession
from engine_core.errors import CheckpointError, UnsupportedModelError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.companions import eos_token_ids
from engine_core.formats.safetensors_file import SafetensorsFile, write_safetensors
from engine_core.models.reader import read_spec
from engine_core.models.shapes import spec_of

PROMPT = np.random.default_rng(3).integers(3, 320, size=40)
SIZES = dict(
    vocab_size=331, hidden_size=96, intermediate_size=208, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
GEMMA = dict(sliding_window=9, layer_types=["sliding_attention", "full_attention"])


def make(name: str):
    """Return a random model; its head is tied in gemma3, one of its own in the others."""
    import torch
    import transformers

    torch.manual_seed(5)
    if name == "gemma3":
        config = transformers.Gemma3Config(
            text_config={**SIZES, **GEMMA}, vision_config=VISION, mm_tokens_per_image=4, image_token_index=330,
            boi_token_index=328, eoi_token_index=329, eos_token_id=[1, 7],
        )  # fmt: skip
        return transformers.Gemma3ForConditionalGeneration(config).eval()
    vision = VISION | {"model_type": "pixtral"}
    config = transformers.Mistral3Config(
        text_config=SIZES | {"model_type": name}, vision_config=vision, tie_word_embeddings=False
    )
    return transformers.Mistral3ForConditionalGeneration(config).eval()


def rename_as_version_4(directory) -> None:
    file = SafetensorsFile(directory / "model.safetensors")
    tensors = {}
    for name in file.names():
        inside = name.replace("model.language_model.", "language_model.model.")
        inside = inside.replace("model.vision_tower.", "vision_tower.").replace("model.multi", "multi")
        tensors["language_model." + inside if name.startswith("lm_head") else inside] = file.read(name)
    write_safetensors(directory / "model.safetensors", tensors)


@pytest.mark.parametrize("name", ["gemma3", "ministral3"])
def test_logits_are_those_of_transformers(tmp_path, name):
    model = make(name)
    model.save_pretrained(tmp_path)
    expected = checkpoints.reference_logits(model, PROMPT)[-1]
    found = []
    for written in ("as version 5", "as version 4"):
        manifest = build_engine(tmp_path, tmp_path / "engine", max_context=64)
        session = OrtSession(tmp_path / "engine", manifest.model, 331, 64, 64, 1)
        session.prefill(PROMPT, 0)
        assert np.abs(session.logits - expected).max() < 1e-4, written
        found.append(session.logits.copy())
        rename_as_version_4(tmp_path)
    assert np.array_equal(*found)
    if name == "gemma3":
        assert eos_token_ids(Checkpoint(tmp_path)) == (1, 7)


def test_what_config_json_leaves_out_is_that_of_the_class():
    import transformers

    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": {}}
    spec, of_class = spec_of(config), transformers.Gemma3TextConfig()
    assert spec.architecture == "Gemma3ForCausalLM" and spec.tied
    sizes = ("hidden_size", "intermediate_size", "vocab_size", "head_dim")
    assert [getattr(spec, size) for size in sizes] == [getattr(of_class, size) for size in sizes]
    assert (spec.num_layers, spec.num_heads) == (of_class.num_hidden_layers, of_class.num_attention_heads)


def test_what_is_no_text_model_of_ours_is_refused(tmp_path):
    checkpoints.write(tmp_path, "llama3")
    original = json.loads((tmp_path / "config.json").read_text())
    cases = (
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, CheckpointError, "no text_config"),
        ({"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": "qwen2"}},
         UnsupportedModelError, "'qwen2'; mistral, ministral, ministral3"),
        ({"model_type": "exaone", "num_layers": 7}, CheckpointError, "num_layers=7 and num_hidden_layers=3"),
    )  # fmt: skip
    for changes, kind, text in cases:
        (tmp_path / "config.json").write_text(json.dumps(original | changes))
        with pytest.raises(kind, match=text):
            read_spec(Checkpoint(tmp_path))
