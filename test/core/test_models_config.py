"""How config.json is read, against transformers: defaults, RoPE's spellings, tied heads, wrong types."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import checkpoints
import fakes
import sample_checkpoints
from engine_core.backends.capabilities import capabilities_of
from engine_core.backends.onnxruntime.build import build_engine
from engine_core.backends.onnxruntime.session import OrtSession
from engine_core.config import EngineConfig
from engine_core.errors import CheckpointError, EdgeLLMError, UnsupportedModelError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.companions import eos_token_ids, notes
from engine_core.models.families import FAMILIES, family_of
from engine_core.models.reader import check_tensors, read_spec
from engine_core.models.shapes import spec_of
from engine_core.serving.engine import Engine

PROMPT = np.random.default_rng(3).integers(3, 331, size=45)


def change(directory, remove=(), **values):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in remove}))


def assert_same_logits(directory, prompt=PROMPT, max_context=64):
    manifest = build_engine(directory, directory / "engine", max_context=max_context)
    session = OrtSession(directory / "engine", manifest.model, manifest.model.vocab_size, max_context, max_context, 1)
    session.use_long_rope(0, 0 < manifest.model.rope_switch < len(prompt))
    session.prefill(prompt, 0)
    expected = checkpoints.reference_logits(checkpoints.reference(directory), prompt)[-1]
    assert np.abs(session.logits - expected).max() < 1e-4


def test_a_top_level_rope_theta_beside_rope_parameters(tmp_path):
    checkpoints.write(tmp_path, "qwen2")
    change(tmp_path, rope_parameters={"rope_type": "default"}, rope_theta=300.0)
    assert_same_logits(tmp_path)


@pytest.mark.parametrize("equal", [False, True])
def test_a_tied_checkpoint_with_a_head_of_its_own(tmp_path, equal):
    checkpoints.write(tmp_path, "llama-yarn")
    if equal:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    change(tmp_path, tie_word_embeddings=True)
    assert read_spec(Checkpoint(tmp_path)).tied == equal
    assert_same_logits(tmp_path)


@pytest.mark.parametrize(("length", "max_context"), [(45, 64), (45, 96), (64, 96), (65, 96)])
def test_longrope_takes_the_factors_of_transformers(tmp_path, length, max_context):
    checkpoints.write(tmp_path, "phi3-longrope")
    assert read_spec(Checkpoint(tmp_path)).default_position == 64
    assert_same_logits(tmp_path, np.random.default_rng(4).integers(3, 331, size=length), max_context)


def test_an_engine_with_long_factors_for_short_prompts_says_so(tmp_path, caplog):
    from engine_core.backends.cuda.build import build_cuda
    from engine_core.planning.devices import named
    from engine_core.planning.estimates import CheckpointEstimate
    from engine_core.planning.plan import Asked, plan_checkpoint

    checkpoints.write(tmp_path, "phi3-longrope")
    fakes.write_tokenizer(tmp_path)
    short = build_cuda(tmp_path, tmp_path / "short")
    assert short.max_context == 64 and not short.notes and not caplog.records
    long = build_cuda(tmp_path, tmp_path / "long", max_context=96)  # has the factors of each prompt's length
    told: list[str] = []
    engine = build_engine(tmp_path, tmp_path / "cpu", max_context=96)  # and so has this
    Engine.open(EngineConfig(tmp_path / "cpu"), report=told.append).close()
    assert not (engine.notes or long.notes or caplog.records) and not any("factors" in line for line in told)
    spec = read_spec(Checkpoint(tmp_path))
    (note,) = notes(capabilities_of("tensorrt"), spec, 128)
    assert "128" in note and "64" in note and "tensorrt" in note and caplog.messages == [note]
    assert note.endswith("or for cuda or onnxruntime.")
    estimate, device = CheckpointEstimate(tmp_path), named("orin-nano-8gb")
    for backend, contexts, told_notes in (
        *(("tensorrt", (64, 128), [(), (note,)]), ("cuda", (64, 96), [(), ()])),
        ("onnxruntime", (96,), [()]),
    ):
        rows = plan_checkpoint(estimate, device, Asked(contexts, backend=backend, quantization=engine.quantization))
        rows = rows or plan_checkpoint(estimate, device, Asked(contexts, backend=backend))
        assert [row.notes for row in rows if row.quantization == rows[0].quantization] == told_notes
    checkpoints.write(tmp_path / "other", "llama3")
    assert capabilities_of("cuda").notes(read_spec(Checkpoint(tmp_path / "other")), 256) == ()


def test_defaults_are_those_of_the_configuration_classes():
    from transformers import CONFIG_MAPPING, AutoConfig

    for family in FAMILIES:
        if family.model_type not in CONFIG_MAPPING:  # an earlier version of transformers
            continue
        whole = AutoConfig.for_model(family.model_type)
        config = whole.get_text_config() if family.text_type else whole
        if family.text_type:  # a decoder that config.json does not describe at all is another one
            config = type(config)()
            assert config.model_type == family.text_type, family
        assert config.max_position_embeddings == family.max_position, family
        own = {name: own for own, name in family.field_names}
        assert getattr(config, own.get("rms_norm_eps", "rms_norm_eps")) == family.norm_eps, family
        assert config.num_key_value_heads == (family.num_kv_heads or config.num_attention_heads), family
        assert (
            whole.tie_word_embeddings == family.tied and getattr(config, "eos_token_id", None) == family.eos_token_id
        ), family
        if family.sliding_window and not family.window_switch:
            assert config.sliding_window == family.sliding_window, family
        assert family_of({"model_type": family.model_type}) is family


def test_what_a_known_model_has_that_is_not_run_is_named():
    with pytest.raises(UnsupportedModelError, match="Qwen3_5ForCausalLM has gated delta nets, .* is not supported; "):
        family_of({"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"})


def test_mistral_without_a_window_has_that_of_its_class(tmp_path):
    checkpoints.write(tmp_path, "mistral-window")
    change(tmp_path, remove=("sliding_window",))
    assert {layer.window for layer in read_spec(Checkpoint(tmp_path)).layers} == {4096}
    change(tmp_path, sliding_window=None)
    assert {layer.window for layer in read_spec(Checkpoint(tmp_path)).layers} == {0}


def add_tensor(directory, name, shape):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    tensors[name] = np.ones(shape, np.float32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_what_transformers_leaves_out_is_refused(tmp_path):
    """A bias of the head, caps that Gemma 3 does not apply, layer types of families that have none."""
    for name in ("llama-yarn", "qwen3"):  # untied and tied
        checkpoints.write(tmp_path / name, name)
        add_tensor(tmp_path / name, "lm_head.bias", 331)
        with pytest.raises(UnsupportedModelError, match="lm_head.bias"):
            read_spec(Checkpoint(tmp_path / name))
    checkpoints.write(tmp_path / "gemma3", "gemma3")
    change(tmp_path / "gemma3", attn_logit_softcapping=2.0)
    with pytest.raises(UnsupportedModelError, match="attn_logit_softcapping=2"):
        read_spec(Checkpoint(tmp_path / "gemma3"))
    checkpoints.write(tmp_path / "mistral", "mistral-window")
    for kinds, fits in ((["sliding_attention"] * 3, True), (["full_attention"] * 3, False), ([], False)):
        change(tmp_path / "mistral", layer_types=kinds)
        if fits:
            assert_same_logits(tmp_path / "mistral")
        else:
            with pytest.raises(UnsupportedModelError, match="layer_types"):
                read_spec(Checkpoint(tmp_path / "mistral"))


def test_a_head_that_is_neither_stored_nor_tied_is_refused(tmp_path):
    checkpoints.write(tmp_path, "qwen3")
    change(tmp_path, remove=("tie_word_embeddings",))
    with pytest.raises(CheckpointError, match="set it to true"):
        read_spec(Checkpoint(tmp_path))
    change(tmp_path, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match="lm_head.weight"):
        check_tensors(read_spec(Checkpoint(tmp_path)), Checkpoint(tmp_path))
    change(tmp_path, tie_word_embeddings=True)
    assert_same_logits(tmp_path)
    checkpoints.write(tmp_path / "gemma", "gemma2")  # tied by its class
    change(tmp_path / "gemma", remove=("tie_word_embeddings",))
    assert_same_logits(tmp_path / "gemma")


WRONG = ("x", [[]], {"a": 1}, -1, True, float("nan"), 1e300, 0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope_theta": "x", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "has rope_theta='x'"),
        (
            {"rope_theta": -1, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_theta=-1",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0}}, "'attention_factor' = 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": -1.5}}, "'attention_factor' = -1.5"),
    ],
)
def test_a_wrong_value_that_another_one_hides_is_refused(fields, message):
    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        spec_of(sample_checkpoints.SIZES | {"architectures": ["LlamaForCausalLM"]} | fields)


def test_wrong_values_are_refused_in_one_sentence(tmp_path):
    """Every field of every case, each with each wrong value: a reading or one line, never another exception."""
    for name in ("llama3", "gemma3", "phi3-longrope", "qwen2-window"):
        directory = tmp_path / name
        checkpoints.write(directory, name)
        checkpoint = Checkpoint(directory)
        original = dict(checkpoint.config)
        for field in (*original, "rope_scaling", "rope_theta", "head_dim"):
            for value in (None, *WRONG):
                checkpoint.config = original | {field: value}
                try:
                    read_spec(checkpoint)
                except EdgeLLMError as error:
                    assert "\n" not in str(error)
        for field, value in (("rope_theta", "x"), ("hidden_size", None), ("architectures", [[]])):
            checkpoint.config = {k: v for k, v in original.items() if k != "rope_parameters"} | {field: value}
            if name == "llama3":
                with pytest.raises(CheckpointError, match=field):
                    read_spec(checkpoint)


def test_the_end_of_sequence_token_of_the_tokenizer_is_taken(tmp_path):
    checkpoints.write(tmp_path, "llama-yarn")
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    change(tmp_path, remove=("eos_token_id",))
    assert eos_token_ids(Checkpoint(tmp_path)) == (2,)  # of the class
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 7, "content": "<|end|>"}]}))
    assert eos_token_ids(Checkpoint(tmp_path)) == (7,)
    change(tmp_path, eos_token_id=[3, 5])
    assert eos_token_ids(Checkpoint(tmp_path)) == (3, 5, 7)
    change(tmp_path, eos_token_id="x")
    with pytest.raises(CheckpointError, match="eos_token_id"):
        eos_token_ids(Checkpoint(tmp_path))
