"""The decoder as a graph: walks a ModelSpec and asks an exporter for each operation.

The operations of a layer stand here once; an exporter chooses the operators (ONNX Runtime's fused ones in
``backends/onnxruntime/exporter.py``). Values are names of graph tensors; activations are float [1, tokens, features].
"""

from __future__ import annotations

from typing import Protocol

from engine_core.models.spec import LayerSpec, LinearSpec, ModelSpec
from engine_core.progress import Progress, untold

MODEL_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"  # the weights, which the graph names


class Exporter(Protocol):
    """The operations of a decoder in one runtime's operators. Every method adds nodes and names their result."""

    def begin(self) -> None:
        """Declares the inputs: token ids, positions, the KV cache."""

    def embed(self) -> str:
        """Add the lookup of the input's token ids, scaled, with the features of images in their places: [1, tokens,
        hidden]."""

    def norm(self, name: str, value: str, weight: str) -> str:
        """Add the RMSNorm of ``value`` with the checkpoint's tensor ``weight``."""

    def add_norm(self, name: str, residual: str, value: str, weight: str) -> tuple[str, str]:
        """Add residual + value and its norm; return (norm, sum)."""

    def add(self, name: str, residual: str, value: str) -> str:
        """Add residual + value."""

    def linear(self, name: str, value: str, linear: LinearSpec) -> str: ...

    def attention(self, index: int, qkv: str, layer: LayerSpec) -> str:
        """Add head norms, RoPE, the append to the cache and attention: [1, tokens, qkv_size] → [1, tokens, heads *
        head_dim]."""

    def short_convolution(self, index: int, value: str, layer: LayerSpec) -> str:
        """Add gate_2 * conv(gate_1 * x) of [1, tokens, 3 * hidden], which is gate_1, gate_2 and x, and the state of the
        inputs that the next call's tokens see: [1, tokens, hidden]."""

    def gated(self, name: str, gate_up: str) -> str:
        """Add activation(gate) * up of the two halves of the last axis."""

    def add_features(self, index: int, value: str) -> str:
        """Add to the output of layer ``index`` what the encoder of images has for it, if anything."""

    def experts(self, name: str, value: str, layer: LayerSpec) -> str:
        """Add the router, and the sum of what the experts that it picks make of each token: [1, tokens, hidden]."""

    def wanted_tokens(self, name: str, value: str) -> str:
        """Add [1, tokens, n] → [rows, n], the rows of the tokens whose logits are wanted; the last one at least."""

    def head(self, value: str) -> None:
        """Add the LM head; its logits, float32 [rows, LM head rows], are the graph's output."""

    def finish(self) -> None:
        """Writes what is left."""


def write_decoder(spec: ModelSpec, exporter: Exporter, progress: Progress = untold) -> None:
    """Writes the whole model. Only the wanted tokens of a call get logits."""
    count = len(spec.layers) + 2  # embedding and head take about as long as a layer each
    exporter.begin()
    residual = exporter.embed()
    pending = ""  # a block's output that is not in the residual yet: its sum is fused with the next norm
    for index, layer in enumerate(spec.layers):
        progress((index + 1) / count)
        prefix = f"layer{index}"
        normed, residual = _norm_in(exporter, f"{prefix}/input_norm", residual, pending, layer.input_norm)
        mix = exporter.short_convolution if layer.conv_kernel else exporter.attention
        attended = mix(index, exporter.linear(f"{prefix}/qkv", normed, layer.qkv), layer)
        attended = exporter.linear(f"{prefix}/output", attended, layer.output)
        if layer.post_attention_norm:
            attended = exporter.norm(f"{prefix}/post_attention_norm", attended, layer.post_attention_norm)
        normed, residual = _norm_in(exporter, f"{prefix}/mlp_norm", residual, attended, layer.mlp_norm)
        if layer.num_experts:
            pending = exporter.experts(f"{prefix}/experts", normed, layer)
        else:
            hidden = exporter.gated(f"{prefix}/gated", exporter.linear(f"{prefix}/gate_up", normed, layer.gate_up))
            pending = exporter.linear(f"{prefix}/down", hidden, layer.down)
        if layer.post_mlp_norm:
            pending = exporter.norm(f"{prefix}/post_mlp_norm", pending, layer.post_mlp_norm)
        pending = exporter.add_features(index, pending)
    progress((count - 1) / count)
    residual = exporter.wanted_tokens("last_residual", residual)
    pending = exporter.wanted_tokens("last_output", pending)
    normed, _ = exporter.add_norm("final_norm", residual, pending, spec.final_norm)
    exporter.head(normed)
    exporter.finish()
    progress(1.0)


def _norm_in(exporter: Exporter, name: str, residual: str, pending: str, weight: str) -> tuple[str, str]:
    """Return (what attention or MLP reads, the residual with ``pending``); "" = no norm, nothing pending."""
    if not weight:
        total = exporter.add(name, residual, pending) if pending else residual
        return total, total
    if not pending:
        return exporter.norm(name, residual, weight), residual
    return exporter.add_norm(name, residual, pending, weight)
