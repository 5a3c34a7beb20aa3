"""The files of a variant for ONNX Runtime: one file of weights, and a graph over it for each type of KV cache."""

from __future__ import annotations

from collections.abc import Collection

from engine_core.backends.onnxruntime.capabilities import CAPABILITIES
from engine_core.formats.onnx_graph import DATA_NAME as DATA_NAME
from engine_core.formats.onnx_graph import MODEL_NAME

# Of a model that sees: the encoder of its images, and its weights.
ENCODER_NAME, ENCODER_DATA_NAME = "encoder.onnx", "encoder.onnx.data"


def graph_name(kv_cache_type: str, *, window_before_1_24: bool = False) -> str:
    """Return the graph of a cache of that type.

    ``window_before_1_24``: the graph of a model with a sliding window for runtimes before 1.24, whose
    ``local_window_size`` leaves the query's own position out.
    """
    cache = "" if kv_cache_type == "fp32" else f".kv_{kv_cache_type}"
    window = ".window_before_1_24" if window_before_1_24 else ""
    stem, _, suffix = MODEL_NAME.partition(".")
    return f"{stem}{cache}{window}.{suffix}"


def held_types(files: Collection[str]) -> list[str]:
    """Return the KV cache types a variant with these files can be opened with."""
    return [kind for kind in CAPABILITIES.kv_cache_types if graph_name(kind) in files]
