"""Checkpoints that other tools quantized, on the cuda backend: logits against the model they stand for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from gpu_bench import error
from test_cuda_models import TOLERANCE, check_greedy, load, logits_of, use_weights_of

import float_checkpoints
import quantized_checkpoints
from device_steps import GREEDY
from engine_core.backends.cuda.build import build_cuda
from engine_core.backends.cuda.layout import CudaSpec
from engine_core.config import EngineConfig
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.manifest import MANIFEST_NAME
from engine_core.measure.steps import begin, prefill
from quantized_checkpoints import Scheme

pytestmark = pytest.mark.gpu
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

SIZES = dict(
    vocab_size=1008,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    initializer_range=0.06,
    tie_word_embeddings=False,
)


SCHEMES = {
    "gptq": Scheme("gptq"),
    "gptq groups of 32": Scheme("gptq", group_size=32),
    "gptq asymmetric": Scheme("gptq", group_size=64, asymmetric=True),
    "gptq by the row": Scheme("gptq", group_size=0),
    "awq": Scheme("awq"),
    "awq asymmetric": Scheme("awq", asymmetric=True),
    "awq asymmetric groups of 32": Scheme("awq", group_size=32, asymmetric=True),
    "gptq int8": Scheme("gptq", bits=8),
    "gptq act-order": Scheme("gptq", act_order=True),
    "gptq act-order asymmetric": Scheme("gptq", group_size=32, asymmetric=True, act_order=True),
    "gptq int8 asymmetric groups of 32": Scheme("gptq", bits=8, group_size=32, asymmetric=True),
}


def write(directory, scheme: Scheme):
    """A random Llama whose linears are quantized by rounding; returns it in transformers, as it was before."""
    torch.manual_seed(11)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    tensors = {name: values.numpy() for name, values in model.state_dict().items()}
    config = model.config.to_dict() | {"dtype": "float16", "architectures": ["LlamaForCausalLM"]}
    quantized_checkpoints.write(directory, tensors, config, scheme)
    return model


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for i, name in enumerate(SCHEMES) for dtype in (("fp16", "bf16"), ("bf16",))[i % 2]],
)
def test_logits_are_those_of_the_dequantized_model(tmp_path, name, dtype):
    """The checkpoint's values, scales and zero points are kept; the engine's weights are then the measure."""
    scheme = SCHEMES[name]
    model = write(tmp_path / "checkpoint", scheme)
    quantization = "int8" if scheme.bits == 8 else "int4_awq"
    manifest = build_cuda(
        tmp_path / "checkpoint", tmp_path / "engine", quantization=quantization, max_context=256, dtype=dtype
    )
    with torch.no_grad():
        for name in ("embed_tokens", "norm"):
            parameter = getattr(model.model, name).weight
            parameter.copy_(parameter.half().float())
    use_weights_of(tmp_path / "engine", model, CudaSpec.create(manifest, EngineConfig(tmp_path)).weight_format)
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            np.testing.assert_array_equal(parameter.detach().numpy(), checkpoint.read(name))
    assert manifest.options["requantized"] == 0 and len(manifest.options["ordered"]) == (4 if scheme.act_order else 0)
    check_greedy(tmp_path / "engine", model)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", float_checkpoints.KINDS)
def test_logits_of_fp8_and_nvfp4_are_those_of_the_dequantized_model(tmp_path, kind, dtype):
    directory, engine = float_checkpoints.write(tmp_path / "checkpoint", kind), tmp_path / "engine"
    quantization = float_checkpoints.KINDS[kind][2]
    manifest = build_cuda(directory, engine, quantization=quantization, max_context=256, dtype=dtype)
    assert manifest.options["requantized"] == 0
    checkpoint, values = Checkpoint(directory), dict(float_checkpoints.CONFIG)
    config = transformers.LlamaConfig(**{name: value for name, value in values.items() if name != "architectures"})
    model = transformers.LlamaForCausalLM(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(checkpoint.read(name)))
    stored_as = CudaSpec.create(manifest, EngineConfig(engine)).weight_format.kind
    use_weights_of(engine, model, stored_as)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            np.testing.assert_allclose(parameter.detach().numpy(), checkpoint.read(name), rtol=1e-6)
    if manifest.options["fp8_activations"]:
        check_rounded_activations(engine, model, dtype)
        path = engine / MANIFEST_NAME
        text = path.read_text()
        path.write_text(text.replace('"fp8_activations": true', '"fp8_activations": false'))
        assert path.read_text() != text
    check_greedy(engine, model)


def round_input(_module, inputs):
    """Round each row to fp8 with a scale of its own."""
    (rows,) = inputs
    scales = rows.float().abs().amax(-1, keepdim=True) / 448
    return (((rows.float() / scales).to(torch.float8_e4m3fn).float() * scales).to(rows.dtype),)


def last_logits(model, prompts) -> list[np.ndarray]:
    with torch.no_grad():
        return [model(torch.tensor(prompt[None])).logits[0, -1].double().numpy() for prompt in prompts]


def check_rounded_activations(engine, model, dtype: str):
    """The logits of prompts are those of ``model`` with what its layers' matrices meet rounded to fp8.

    A value whose 16 bits differ may be rounded to the next fp8 value, which is 6 to 12 % away. So they are compared
    with what transformers itself loses in the same 16-bit type, in the mean of several prompts.
    """
    rng = np.random.default_rng(8)
    prompts = [rng.integers(0, model.config.vocab_size, 200).astype(np.int32) for _ in range(6)]
    backend, found = load(engine), []
    try:
        for prompt in prompts:
            begin(backend, GREEDY, prompt)
            prefill(backend, prompt, 0).result()
            found.append(logits_of(backend))
    finally:
        backend.close()
    exact, small = copy.deepcopy(model), copy.deepcopy(model).to({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
    small.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    for each in (exact, small):
        for name, module in each.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(round_input)
    expected = last_logits(exact, prompts)
    lost = np.mean([*map(error, found, expected)])
    assert lost < TOLERANCE * np.mean([*map(error, last_logits(small, prompts), expected)])
    assert np.mean([*map(error, last_logits(model, prompts), found)]) > lost  # and not those without rounding
