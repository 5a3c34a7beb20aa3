"""KV caches in int8: the scales, found on calibration text, and the reference that the fused path is compared with.

int8 is symmetric with one float32 scale for each channel of each head, as ONNX Runtime's GroupQueryAttention has it.
Scales are static: what is larger than anything seen in calibration is clipped.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np

from engine_core.backends.onnxruntime.session import OrtSession
from engine_core.errors import BuildError
from engine_core.models.spec import ModelSpec

KVScales: TypeAlias = np.ndarray  # float32 [layers with a cache, 2 (K, V), kv_heads, head_dim]

INT8_MAX = 127  # -128 is not used
_CHUNK = 128  # tokens per step
_THREADS = 1  # so that the same build gives the same scales
MIN_TOKENS = 64  # fewer say nothing about the spread of a channel


def measure_peaks(directory: Path, model: ModelSpec, rows: int, sequences: Iterable[np.ndarray]) -> np.ndarray:
    """Return the largest magnitudes of K, after RoPE, and of V in the float32 cache of the engine in ``directory``.

    ``rows``: of its LM head. ``sequences``: token ids, int32 [n] each. float32, of the shape of ``KVScales``.
    Raises BuildError for fewer than MIN_TOKENS tokens.
    """
    sequences = [ids for ids in sequences if len(ids)]
    total = sum(map(len, sequences))
    if total < MIN_TOKENS:
        raise BuildError(
            f"The calibration text has {total} tokens, expected at least {MIN_TOKENS}; give more text of the kind the "
            "model will see."
        )
    longest = max(map(len, sequences))
    session = OrtSession(directory, model, rows, longest, min(_CHUNK, longest), _THREADS)
    cache = session.kv_cache[:, :, 0]  # [layers, 2, kv_heads, longest, head_dim]
    peaks = np.zeros(cache.shape[:3] + cache.shape[4:], dtype=np.float32)
    for ids in sequences:
        session.use_long_rope(0, 0 < model.rope_switch < len(ids))
        for start in range(0, len(ids), session.chunk):
            session.prefill(ids[start : start + session.chunk], start)
        np.maximum(peaks, np.abs(cache[..., : len(ids), :]).max(axis=3), out=peaks)
    return peaks


def int8_scales(peaks: np.ndarray) -> KVScales:
    """Return one scale per channel; a channel that was never anything but 0 gets the mean of the others."""
    scales = (peaks / np.float32(INT8_MAX)).astype(np.float32)
    scales[scales == 0] = scales.mean() or 1.0
    return scales


def quantize_int8(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return ``values``, float32 [..., head_dim], as int8, ties to even. ``scales`` can be broadcast to their shape."""
    return np.clip(np.rint(values / scales), -INT8_MAX, INT8_MAX).astype(np.int8)
