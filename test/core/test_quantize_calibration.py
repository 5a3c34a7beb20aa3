"""Calibration against transformers: the inputs of every linear, and scales that change nothing before rounding."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import checkpoints
from engine_core.errors import BuildError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.models.reader import read_spec
from engine_core.quantize.calibration import Tokens, linears_of, run_layers
from engine_core.quantize.output import changed_weights
from engine_core.quantize.scheme import make_scheme
from engine_core.quantize.search import change_of

LENGTHS = np.array([17, 30, 9])
RANDOM = np.random.default_rng(8)
# Cases whose traits matter here: biases, tied heads, offset norms, fused parts, several KV heads, windows.
SIZES = {"llama-tied-bias": {"num_key_value_heads": 1}}


def tokens() -> Tokens:
    ids = RANDOM.integers(3, 331, (3, 30))
    return Tokens(np.where(np.arange(30) < LENGTHS[:, None], ids, 0), LENGTHS)


@pytest.mark.parametrize("name", checkpoints.ALL_ATTENTION)
def test_inputs_are_those_of_the_model_as_a_whole(tmp_path, name):
    directory = checkpoints.write(tmp_path, name)
    texts, found = tokens(), {}
    checkpoint = Checkpoint(directory)
    spec = read_spec(checkpoint)
    run_layers(checkpoint, spec, texts, lambda index, activations: found.update(activations))
    model = checkpoints.reference(directory)
    inputs: dict[str, list] = {}
    for layer in spec.layers:
        for linear in linears_of(layer):
            module = model.get_submodule(linear.parts[0][: -len(".weight")])
            taken = inputs.setdefault(linear.parts[0], [])
            module.register_forward_pre_hook(lambda _, args, taken=taken: taken.append(args[0][0].numpy()))
    for row, length in zip(texts.ids, texts.lengths):
        checkpoints.reference_logits(model, row[:length])
    assert found.keys() == inputs.keys() and len(found) == 12
    for part, taken in inputs.items():
        expected = np.concatenate(taken)
        np.testing.assert_allclose(found[part].mean, np.abs(expected).mean(axis=0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found[part].peak, np.abs(expected).max(axis=0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found[part].kept, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "method", "reason"),
    [("olmo2", "int8_smoothquant", "norms before attention"), ("qwen3-moe", "int4_awq", "has experts")],
)
def test_what_cannot_be_calibrated_is_refused(tmp_path, name, method, reason):
    checkpoint = Checkpoint(checkpoints.write(tmp_path, name))
    spec, scheme = read_spec(checkpoint), make_scheme(method, 0, True, "bf16")
    with pytest.raises(BuildError, match=reason):
        run_layers(checkpoint, spec, tokens(), lambda index, found: change_of(checkpoint, spec, index, scheme, found))


@pytest.mark.parametrize("method", ["int4_awq", "int8_smoothquant"])
@pytest.mark.parametrize("name", ["llama3", "llama-tied-bias", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_folded_scales_change_nothing_but_the_rounding(tmp_path, name, method):
    directory = checkpoints.write(tmp_path, name, **SIZES.get(name, {}))
    checkpoint = Checkpoint(directory)
    spec = read_spec(checkpoint)
    # Groups of 8, which divide all of these models' sizes.
    scheme = make_scheme(method, 0, True, "bf16")
    scheme = dataclasses.replace(scheme, group_size=8) if method == "int4_awq" else scheme
    changes = {}

    def on_layer(index, activations):
        for each in activations.values():  # some inputs much larger than others, so that there is something to scale
            factors = np.where(np.arange(len(each.mean)) % 11 == 3, 30, 1).astype(np.float32)
            each.mean, each.peak, each.kept = each.mean * factors, each.peak * factors, each.kept * factors
        changes[index] = change_of(checkpoint, spec, index, scheme, activations)

    run_layers(checkpoint, spec, tokens(), on_layer)
    model = checkpoints.reference(directory)
    prompt = RANDOM.integers(3, 331, 25)
    before = checkpoints.reference_logits(model, prompt)
    parameters = dict(model.named_parameters())
    scaled = 0
    with torch.no_grad():
        for index, change in changes.items():
            for norm, values in change.norms.items():
                parameters[norm].copy_(torch.from_numpy(values))
            for linear in linears_of(spec.layers[index]):
                scaled += linear.parts[0] in change.columns
                for part, weights in zip(linear.parts, changed_weights(checkpoint, linear, change)):
                    parameters[part].copy_(torch.from_numpy(weights))
                row = 0
                for bias in linear.biases:
                    size = len(parameters[bias])
                    if linear.parts[0] in change.rows:
                        parameters[bias].mul_(torch.from_numpy(change.rows[linear.parts[0]][row : row + size]))
                    row += size
    assert scaled == (12 if method == "int4_awq" else 6)
    assert any(np.ptp(values) > 1 for change in changes.values() for values in change.columns.values())
    np.testing.assert_allclose(checkpoints.reference_logits(model, prompt), before, atol=2e-3 * before.std())
