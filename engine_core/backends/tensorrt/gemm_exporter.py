"""The GEMMs of a decoder layer as ONNX models whose weights are inputs: three plans serve every layer of a model."""

from __future__ import annotations

from pathlib import Path

from onnx import TensorProto

from engine_core.backends.cuda.layout import CudaSpec
from engine_core.backends.tensorrt.gemm_layout import GEMM_PLANS, weight_shapes
from engine_core.backends.tensorrt.plain_exporter import TrtPlainExporter
from engine_core.formats.onnx_writer import GraphWriter


def export_plan(directory: Path, name: str, spec: CudaSpec) -> Path:
    """Write the ONNX model of the plan ``name`` (of GEMM_PLANS) into ``directory``; return its path.

    ``input`` [tokens, columns], fp16, comes first, then the weights; ``output`` [tokens, rows] is fp16. Matrices are
    [rows, columns], as a checkpoint has them. ``mlp`` is down · (SiLU(gate) × up), the rows of gate before those of up.
    """
    assert name in GEMM_PLANS, name
    shapes = weight_shapes(spec)[name]
    with GraphWriter(directory, name) as writer:
        first = next(iter(shapes.values()))
        writer.input("input", TensorProto.FLOAT16, ["tokens", first[1]])
        for weight, shape in shapes.items():
            writer.input(weight, TensorProto.FLOAT16, shape)
        if name == "mlp":
            rows = spec.hidden
            both = writer.node("Gemm", ["input", "gate_up"], "gate_up_product", transB=1)
            writer.node("Split", [both], ["gate", "up"], axis=1)
            sigmoid = writer.node("Sigmoid", ["gate"], "sigmoid")
            active = writer.node("Mul", ["gate", sigmoid], "active")
            gated = writer.node("Mul", [active, "up"], "gated")
            writer.node("Gemm", [gated, "down"], "output", transB=1)
        else:
            rows = first[0]
            writer.node("Gemm", ["input", *shapes], "output", transB=1)
        writer.output("output", TensorProto.FLOAT16, ["tokens", rows])
        writer.save({"": TrtPlainExporter.opset}, ir_version=TrtPlainExporter.ir_version)
    return writer.model_path
