"""Checkpoints that other tools quantized, on the cuda backend: logits against the model they stand for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_cuda_models import check_greedy, use_weights_of

import float_checkpoints
from engine_core.backends.cuda.build import build_cuda
from engine_core.backends.cuda.layout import CudaSpec
from engine_core.config import EngineConfig
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.safetensors_file import write_safetensors
from engine_core.formats.weight_formats import weight_format

pytestmark = pytest.mark.gpu
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

GROUP = 128
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # of the eight output channels of a word, as its GEMM version packs them
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


def words(quantized: np.ndarray, bits: int = 4) -> np.ndarray:
    """int32 words [...], the first value in the lowest bits; ``quantized``: [..., values of a word]."""
    places = np.arange(quantized.shape[-1], dtype=np.uint32) * np.uint32(bits)
    return np.bitwise_or.reduce(quantized.astype(np.uint32) << places, axis=-1).view(np.int32)


def awq(quantized: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
    """``quantized`` [rows, columns], ``scales`` and ``zeros`` [rows, groups]."""
    weights, packed_zeros = (words(x.T.reshape(x.shape[1], -1, 8)[:, :, AWQ_ORDER]) for x in (quantized, zeros))
    return {"qweight": weights, "qzeros": packed_zeros, "scales": scales.T.astype(np.float16)}


def gptq(quantized: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
    """Its first version, which stores zeros less one."""
    return gptq_of(4, quantized, scales, zeros)


def gptq_of(bits: int, quantized: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
    """Return GPTQ's tensors of a weight: ``quantized`` [rows, columns], ``scales`` and ``zeros`` [rows, groups]."""
    (rows, columns), per_word = quantized.shape, 32 // bits
    return {
        "qweight": words(np.moveaxis(quantized.T.reshape(-1, per_word, rows), 1, 2), bits),
        "qzeros": words((zeros.T - 1).reshape(zeros.shape[1], -1, per_word), bits),
        "scales": scales.T.astype(np.float16),
        "g_idx": (np.arange(columns) // GROUP).astype(np.int32),
    }


def gptq_int8(quantized: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
    """Return the tensors of a weight as GPTQ stores them in 8 bits."""
    return gptq_of(8, quantized, scales, zeros)


GPTQ = dict(group_size=GROUP, checkpoint_format="gptq", desc_act=False)
FORMATS = {
    "awq": (awq, dict(quant_method="awq", bits=4, group_size=GROUP, zero_point=True, version="gemm")),
    "gptq": (gptq, dict(quant_method="gptq", bits=4, **GPTQ)),
    "gptq_int8": (gptq_int8, dict(quant_method="gptq", bits=8, **GPTQ)),
}


def write(directory, kind: str, asymmetric: bool):
    """A random Llama whose linears are quantized by rounding; returns it in transformers, as it was before."""
    torch.manual_seed(11)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    pack, config = FORMATS[kind]
    zero, top = 1 << (config["bits"] - 1), (1 << config["bits"]) - 1
    random = np.random.default_rng(3)
    tensors: dict[str, np.ndarray] = {}
    for name, values in model.state_dict().items():
        values = values.numpy()
        if not name.endswith("_proj.weight"):
            tensors[name] = values.astype(np.float16)
            continue
        grouped = values.reshape(values.shape[0], -1, GROUP)
        scales = (np.abs(grouped).max(axis=2) / (zero - 1)).astype(np.float16).astype(np.float32)
        zeros = random.integers(zero - 2, zero + 2, scales.shape) if asymmetric else np.full(scales.shape, zero)
        quantized = np.clip(np.rint(grouped / scales[:, :, None]) + zeros[:, :, None], 0, top).astype(np.uint8)
        packed = pack(quantized.reshape(values.shape), scales, zeros.astype(np.uint8))
        tensors |= {f"{name.removesuffix('weight')}{key}": np.ascontiguousarray(x) for key, x in packed.items()}
    directory.mkdir()
    write_safetensors(directory / "model.safetensors", tensors)
    values = model.config.to_dict() | {"quantization_config": config, "dtype": "float16"}
    values["architectures"] = ["LlamaForCausalLM"]
    (directory / "config.json").write_text(json.dumps(values, default=str))
    return model


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("kind", "asymmetric"), [("gptq", False), ("awq", False), ("awq", True), ("gptq_int8", False)])
def test_logits_are_those_of_the_dequantized_model(tmp_path, kind, asymmetric, dtype):
    """Symmetric values are kept; what has zero points is rounded anew; the engine's weights are then the measure."""
    model = write(tmp_path / "checkpoint", kind, asymmetric)
    quantization = "int8" if kind == "gptq_int8" else "int4_awq"
    layout = weight_format(quantization).kind
    build_cuda(tmp_path / "checkpoint", tmp_path / "engine", quantization=quantization, max_context=256, dtype=dtype)
    with torch.no_grad():
        for name in ("embed_tokens", "norm"):
            parameter = getattr(model.model, name).weight
            parameter.copy_(parameter.half().float())
    use_weights_of(tmp_path / "engine", model, layout)
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            found, expected = parameter.detach().numpy(), checkpoint.read(name)
            if asymmetric or dtype == "bf16":  # fp16 scales do not all fit bf16
                off = np.linalg.norm(found - expected) / np.linalg.norm(expected)
                assert off < (0.12 if layout == "int4" else 0.01), name
            else:
                np.testing.assert_array_equal(found, expected)
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
    check_greedy(engine, model)
