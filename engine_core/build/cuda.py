"""Builds an engine directory for the CUDA backend: the checkpoint's 16-bit weights, fused and laid out for the kernels.

Nothing is compiled here: one directory serves every NVIDIA GPU. Needs numpy only.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engine_core.backends.cuda_layout import CudaSpec, options_of, weight_arrays
from engine_core.build.checkpoint import Checkpoint
from engine_core.build.model import LayerSpec, LinearSpec, ModelSpec, check_tensors, read_spec
from engine_core.build.tensor_writer import TensorWriter
from engine_core.config import EngineConfig
from engine_core.errors import BuildError, UnsupportedModelError
from engine_core.manifest import Manifest, seal, write_variant

WEIGHTS_NAME, ROPE_NAME = "weights.safetensors", "rope"
# What the tokenizer and the chat template may need; copied where the checkpoint has it.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_STORED = {"fp16": "F16", "bf16": "BF16"}


def build_cuda(checkpoint_dir: Path, engine_dir: Path, *, max_context: int = 0, dtype: str = "auto") -> Manifest:
    """Writes the variant ``engine_dir`` from a Hugging Face checkpoint directory.

    ``dtype``: fp16, bf16, or auto for the checkpoint's own. ``max_context``: 0 = the model's, at most 8192.
    Raises CheckpointError, UnsupportedModelError or BuildError; nothing half-written is left behind.
    """
    checkpoint = Checkpoint(checkpoint_dir)
    spec = read_spec(checkpoint)
    max_context = max_context or min(spec.max_position, 8192)
    check_supported(spec, max_context)
    if dtype == "auto":
        stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
        dtype = "bf16" if stored == "bfloat16" else "fp16"
    if dtype not in _STORED:
        raise BuildError(f"The weight type {dtype!r} is unknown; it is one of auto, fp16, bf16.")
    manifest = Manifest(
        model_name=checkpoint.config.get("_name_or_path") or Path(checkpoint_dir).resolve().name,
        geometry=spec.geometry(check_tensors(spec, checkpoint)),
        backend="cuda",
        quantization="fp16",
        kv_cache_type="fp16",
        max_context=max_context,
        max_batch=1,
        eos_token_ids=_eos_token_ids(checkpoint),
        use_cuda_graph=True,
        builder={"numpy": np.__version__},
        options=model_options(spec, dtype),
    )
    with write_variant(Path(engine_dir)) as directory:
        for name in _COMPANIONS:
            if (checkpoint.directory / name).is_file():
                shutil.copyfile(checkpoint.directory / name, directory / name)
        _write_weights(directory / WEIGHTS_NAME, checkpoint, spec, manifest)
        manifest = seal(directory, manifest)
    return manifest


def check_supported(spec: ModelSpec, max_context: int) -> None:
    """Raises UnsupportedModelError naming the first trait the kernels lack."""
    has_window = any(0 < layer.window < max_context for layer in spec.layers)
    lacking = {
        "norms with an offset": spec.norm_offset != 0,
        f"the activation {spec.activation}": spec.activation != "silu",
        "soft capping": spec.attention_softcap != 0 or spec.logits_softcap != 0,
        "a scaled embedding": spec.embedding_scale != 1,
        "an attention scale of its own": not np.isclose(spec.attention_scale, spec.head_dim**-0.5),
        "a bias of the head": bool(spec.head_bias),
        "several RoPE tables": len(spec.ropes) != 1,
        "a partly rotated head": spec.ropes[0].dim != spec.head_dim,
        "a sliding window shorter than max_context": has_window,
        "norms after attention or MLP": any(x.post_attention_norm or x.post_mlp_norm for x in spec.layers),
        "biases outside QKV": any(x.output.biases or x.gate_up.biases or x.down.biases for x in spec.layers),
        "a hidden or intermediate size that is not a multiple of 8": bool(
            spec.hidden_size % 8 or spec.intermediate_size % 8
        ),
        "a head size that is not a multiple of 16 up to 256": bool(spec.head_dim % 16) or spec.head_dim > 256,
        "more than 8 query heads for a KV head": spec.num_heads // spec.num_kv_heads > 8,
    }
    for trait, is_lacking in lacking.items():
        if is_lacking:
            raise UnsupportedModelError(
                f"{spec.architecture} has {trait}, which the cuda backend does not run; use the backend onnxruntime."
            )


def model_options(spec: ModelSpec, dtype: str) -> dict:
    return options_of(
        dtype=dtype,
        norm_eps=spec.norm_eps,
        qk_norm=bool(spec.layers[0].q_norm),
        qkv_bias=bool(spec.layers[0].qkv.biases),
        tied=spec.tied,
    )


def fused_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> Iterator[tuple[str, np.ndarray]]:
    """(name in the engine's weights file, float32 values), one after the other, in the order of ``weight_arrays``."""
    yield "embed", checkpoint.read(spec.embedding)
    yield "norm", checkpoint.read(spec.final_norm)
    if not spec.tied:
        yield "head", checkpoint.read(spec.head)
    for i, layer in enumerate(spec.layers):
        for name, values in _layer_tensors(checkpoint, layer):
            yield f"layers.{i}.{name}", values


def _layer_tensors(checkpoint: Checkpoint, layer: LayerSpec) -> Iterator[tuple[str, np.ndarray]]:
    yield "input_norm", checkpoint.read(layer.input_norm)
    yield "qkv", _stack(checkpoint, layer.qkv)
    yield "o", _stack(checkpoint, layer.output)
    yield "post_norm", checkpoint.read(layer.mlp_norm)
    # One CTA computes both rows of a pair, and so the activation.
    gate_up = _stack(checkpoint, layer.gate_up)
    yield "gate_up", gate_up.reshape(2, -1, gate_up.shape[1]).swapaxes(0, 1).reshape(gate_up.shape)
    yield "down", _stack(checkpoint, layer.down)
    if layer.qkv.biases:
        yield "qkv_bias", np.concatenate([checkpoint.read(name) for name in layer.qkv.biases])
    if layer.q_norm:
        yield "q_norm", checkpoint.read(layer.q_norm)
        yield "k_norm", checkpoint.read(layer.k_norm)


def _stack(checkpoint: Checkpoint, linear: LinearSpec) -> np.ndarray:
    parts = [checkpoint.read(name) for name in linear.parts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def rope_table(spec: ModelSpec, max_context: int) -> np.ndarray:
    """float32 [max_context, head_dim / 2, 2]: cos and sin."""
    return np.stack(spec.ropes[0].table(max_context), axis=-1)


def to_16_bit(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 to fp16, or to bf16 carried as uint16, rounded to nearest even. Raises BuildError on overflow."""
    if dtype == "bf16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        result = values.astype(np.float16)
    if np.isinf(result).any():
        raise BuildError("A weight is too large for fp16; build with the type bf16.")
    return result


def _write_weights(path: Path, checkpoint: Checkpoint, spec: ModelSpec, manifest: Manifest) -> None:
    cuda_spec = CudaSpec.create(manifest, EngineConfig(engine_dir=path.parent, max_context=manifest.max_context))
    dtype = cuda_spec.dtype
    tensors = {name: (_STORED[dtype], array.shape) for name, array in weight_arrays(cuda_spec).items()}
    table = rope_table(spec, manifest.max_context)
    writer = TensorWriter(path, {**tensors, ROPE_NAME: ("F32", table.shape)})
    try:
        for name, values in fused_tensors(checkpoint, spec):
            writer.write(name, to_16_bit(values, dtype))
        writer.write(ROPE_NAME, table)
    except BaseException:
        writer.abandon()
        raise
    writer.close()


def _eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    found: set[int] = set()
    for config in (checkpoint.config, checkpoint.generation_config):
        value = config.get("eos_token_id")
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(found))
