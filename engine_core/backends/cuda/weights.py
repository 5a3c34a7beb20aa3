"""The CUDA backend's weights file: what it has to hold, and an LM head that is cut to a vocab map while it is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from engine_core.backends.cuda.layout import CudaSpec, weight_arrays
from engine_core.config import EngineConfig
from engine_core.cuda.kernels.integer_layout import TILE
from engine_core.cuda.kernels.linear_packed import LAYOUTS, layout_of
from engine_core.errors import EngineDirectoryError
from engine_core.formats.manifest import Manifest
from engine_core.formats.safetensors_file import SafetensorsFile
from engine_core.formats.vocab_map import configured_vocab_map
from engine_core.formats.weight_formats.base import WeightFormat

WEIGHTS_NAME = "weights.safetensors"
ROPE_NAME = "rope"  # float32, CudaSpec.rope_shape with the manifest's max_context and rope_switch
# dtype of an array → as safetensors spells it
STORED_TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "uint8": "U8", "int32": "I32"}
_BLOCK = 16  # tiles along the rows that are cut at a time: 256 rows, from as many tiles at most


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A variant as a configuration asks for it."""

    stored: CudaSpec  # what the file holds
    spec: CudaSpec  # what runs
    vocab_map: np.ndarray | None  # int32 [spec.head_rows]; None with the full vocabulary


def resolve(variant_dir: Path, manifest: Manifest, config: EngineConfig) -> Resolved:
    """Raises ConfigurationError or EngineDirectoryError."""
    stored = CudaSpec.create(manifest, config)
    vocab_map, prunes_head = configured_vocab_map(variant_dir, manifest, config)
    if vocab_map is None or len(vocab_map) == stored.vocab_size:  # ids ascend: it is the identity
        return Resolved(stored, stored, None)
    if not prunes_head:
        return Resolved(stored, stored, vocab_map)
    return Resolved(stored, dataclasses.replace(stored, head_rows=len(vocab_map)), vocab_map)


class CudaWeights:
    """The weights of a variant, checked to be what the kernels read."""

    def __init__(self, variant_dir: Path, resolved: Resolved) -> None:
        """Raises EngineDirectoryError or CheckpointError."""
        stored = resolved.stored
        self._resolved = resolved
        self._file = file = SafetensorsFile(variant_dir / WEIGHTS_NAME)
        for name, array in weight_arrays(stored).items():
            expected = (STORED_TYPES[array.dtype], array.shape)
            found = (file.dtype(name), file.shape(name)) if name in file.names() else None
            if found != expected:
                raise EngineDirectoryError(
                    f"{name} of {file.path} is {found or 'missing'}, expected {expected}; build the engine again."
                )
        covered = file.shape(ROPE_NAME)[-3] if ROPE_NAME in file.names() else 0
        if covered < stored.attention.rope_length:
            positions = max(0, covered - stored.rope_switch)
            raise EngineDirectoryError(
                f"The RoPE table of {file.path} covers {positions} positions, but max_context is {stored.max_context}; "
                "configure less or build the engine for more."
            )

    def read(self, name: str) -> np.ndarray:
        """Return the bytes of one of ``weight_arrays(spec)`` on their way to the GPU; only the map's rows of the LM
        head."""
        stored, spec = self._resolved.stored, self._resolved.spec
        if name != "head" or stored.head_rows == spec.head_rows:
            return self._file.raw(name)
        whole = self._file.raw("head" if stored.has_head else "embed")
        return kept_rows(whole, self._resolved.vocab_map, spec.weight_format)

    def rope(self) -> np.ndarray:
        """Return float32, CudaSpec.rope_shape: cos and sin."""
        return self._file.raw(ROPE_NAME)[..., : self._resolved.spec.attention.rope_length, :, :]


def kept_rows(stored: np.ndarray, kept: np.ndarray, weight_format: WeightFormat) -> np.ndarray:
    """Return the rows ``kept``, int32 [n], of a matrix in the form it is stored in.

    ``stored``: [rows, cols] of a 16-bit type, or packed tiles of ``weight_format``.
    """
    if weight_format.kind not in LAYOUTS:
        return stored[kept]
    layout = layout_of(weight_format)
    cut = np.empty((-(-len(kept) // TILE), *stored.shape[1:]), dtype=np.uint8)
    for start in range(0, len(cut), _BLOCK):
        rows = kept[start * TILE : (start + _BLOCK) * TILE]
        tiles, place = np.unique(rows // TILE, return_inverse=True)
        own = place * TILE + rows % TILE
        cut[start : start + _BLOCK] = layout.pack(*(part[own] for part in layout.unpack(stored[tiles])))
    return cut
