"""The weights of a vision encoder, laid out for the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine_core.backends.cuda.encoder_layout import PREFIX, EncoderLayout
from engine_core.formats.number_formats import to_16_bit
from engine_core.formats.weights import Tensors
from engine_core.models.padding import Axis
from engine_core.models.vision import EncoderLayerNames
from engine_core.vision.encoder_inputs import tile_positions


def encoder_tensors(tensors: Tensors, layout: EncoderLayout) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, values) of the arrays of ``EncoderLayout.weights``, in their order: float32 or fp16.

    What a GEMM adds to the residual stream comes without its bias, which is a constant there: the norms that follow
    add all of them. Raises CheckpointError, or BuildError for values that fp16 cannot hold.
    """
    spec = layout.spec
    dtypes = {name: dtype for name, (_, dtype) in layout.weights().items()}

    def named(name: str, values: np.ndarray) -> tuple[str, np.ndarray]:
        is_float = dtypes[PREFIX + name] == "fp32"
        return PREFIX + name, values.astype(np.float32) if is_float else to_16_bit(values, "fp16")

    def norm(name: str, shift: np.ndarray) -> np.ndarray:
        return np.stack([tensors.read(f"{name}.weight"), tensors.read(f"{name}.bias"), shift])

    patches = tensors.read(f"{spec.patch_embedding}.weight").reshape(spec.hidden_size, spec.patch_values)
    yield named("patches", _filled(patches, 1, layout.patch_values))
    places = tile_positions(spec.side, spec.positions)
    yield named(
        "positions", tensors.read(spec.position_embedding)[places] + tensors.read(f"{spec.patch_embedding}.bias")
    )
    shift = np.zeros(spec.hidden_size, dtype=np.float32)
    for index in range(spec.num_layers):
        names = spec.layer(index)
        layer = {"norm": norm(names.norm, shift)}
        layer |= _attention(tensors, layout, names)
        shift = shift + tensors.read(f"{names.output}.bias")
        layer["mlp_norm"] = norm(names.mlp_norm, shift)
        layer["up"] = _filled(tensors.read(f"{names.up}.weight"), 0, layout.inner)
        layer["up_bias"] = _filled(tensors.read(f"{names.up}.bias"), 0, layout.inner)
        layer["down"] = _filled(tensors.read(f"{names.down}.weight"), 1, layout.inner)
        shift = shift + tensors.read(f"{names.down}.bias")
        for name, values in layer.items():
            yield named(f"layers.{index}.{name}", values)
    yield named("final_norm", norm(spec.final_norm, shift))
    yield named("projector", _filled(tensors.read(f"{spec.projector}.weight"), 0, layout.out))


def _attention(tensors: Tensors, layout: EncoderLayout, names: EncoderLayerNames) -> dict[str, np.ndarray]:
    """Return what stands between the norm of a layer and the residual stream, heads filled up."""
    heads = layout.head.repeated(layout.spec.num_heads)
    all_heads = layout.head.repeated(3 * layout.spec.num_heads)
    weight, bias = (
        np.concatenate([tensors.read(f"{part}.{kind}") for part in names.qkv]) for kind in ("weight", "bias")
    )
    return {
        "qkv": all_heads.spread(weight, 0),
        "qkv_bias": all_heads.spread(bias, 0),
        "o": heads.spread(tensors.read(f"{names.output}.weight"), 1),
    }


def _filled(values: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Return ``values`` with zeros at the end of ``axis``, up to ``size``."""
    return Axis(np.arange(values.shape[axis]), size).spread(values, axis)
