"""Writes the ONNX model a TensorRT engine is built from."""

from __future__ import annotations

from pathlib import Path

from engine_core.backends.tensorrt.native_exporter import TrtNativeExporter
from engine_core.backends.tensorrt.plain_exporter import TrtPlainExporter
from engine_core.formats.onnx_graph import write_decoder
from engine_core.formats.onnx_writer import GraphWriter
from engine_core.formats.weights import Weights

EXPORTERS = {"plain": TrtPlainExporter, "native": TrtNativeExporter}


def export_onnx(directory: Path, weights: Weights, max_context: int, *, exporter: str, dtype: str = "fp16") -> Path:
    """Writes model.onnx and its data file into ``directory``; the path of the former.

    ``exporter``: plain (TensorRT 8.6 to 10.14) or native (10.15 and later). ``max_context``: rows of the RoPE tables
    and, of the native exporter, positions of the cache. ``dtype``: fp16 or fp32. Raises BuildError or CheckpointError.
    """
    with GraphWriter(directory, weights.spec.architecture) as writer:
        write_decoder(weights.spec, EXPORTERS[exporter](writer, weights, max_context, dtype))
    return writer.model_path
