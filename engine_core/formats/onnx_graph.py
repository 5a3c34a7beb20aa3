"""The decoder as a graph: walks a ModelSpec and asks an exporter for each operation.

The operations of a layer stand here once; an exporter chooses the operators (ONNX Runtime's fused ones in
``backends/onnxruntime/exporter.py``). Values are names of graph tensors; activations are float [1, tokens, features].
"""

from __future__ import annotations

from typing import Protocol

from engine_core.models.spec import LayerSpec, LinearSpec, ModelSpec


class Dialect(Protocol):
    """The operations of a decoder in one runtime's operators. Every method adds nodes and names their result."""

    def begin(self) -> None:
        """Declares the inputs: token ids, positions, the KV cache."""

    def embed(self) -> str:
        """[1, tokens, hidden] of the input's token ids, scaled."""

    def norm(self, name: str, value: str, weight: str) -> str:
        """RMS norm with the weight of that checkpoint name."""

    def add_norm(self, name: str, residual: str, value: str, weight: str) -> tuple[str, str]:
        """(norm of residual + value, residual + value)."""

    def linear(self, name: str, value: str, linear: LinearSpec) -> str: ...

    def attention(self, index: int, qkv: str, layer: LayerSpec) -> str:
        """Head norms, RoPE, append to the cache, attention: [1, tokens, qkv_size] → [1, tokens, heads * head_dim]."""

    def gated(self, name: str, gate_up: str) -> str:
        """activation(gate) * up of the two halves of the last axis."""

    def last_token(self, name: str, value: str) -> str:
        """[1, tokens, n] → [1, n], the last of the tokens."""

    def head(self, value: str) -> None:
        """Logits, float32 [1, rows], as the graph's output."""

    def finish(self) -> None:
        """Writes what is left."""


def write_decoder(spec: ModelSpec, dialect: Dialect) -> None:
    """Writes the whole model. Only the last token of a call gets logits."""
    dialect.begin()
    residual = dialect.embed()
    pending = ""  # a block's output that is not in the residual yet: its sum is fused with the next norm
    for index, layer in enumerate(spec.layers):
        prefix = f"layer{index}"
        normed, residual = _norm_in(dialect, f"{prefix}/input_norm", residual, pending, layer.input_norm)
        attended = dialect.attention(index, dialect.linear(f"{prefix}/qkv", normed, layer.qkv), layer)
        attended = dialect.linear(f"{prefix}/output", attended, layer.output)
        if layer.post_attention_norm:
            attended = dialect.norm(f"{prefix}/post_attention_norm", attended, layer.post_attention_norm)
        normed, residual = _norm_in(dialect, f"{prefix}/mlp_norm", residual, attended, layer.mlp_norm)
        hidden = dialect.gated(f"{prefix}/gated", dialect.linear(f"{prefix}/gate_up", normed, layer.gate_up))
        pending = dialect.linear(f"{prefix}/down", hidden, layer.down)
        if layer.post_mlp_norm:
            pending = dialect.norm(f"{prefix}/post_mlp_norm", pending, layer.post_mlp_norm)
    residual = dialect.last_token("last_residual", residual)
    pending = dialect.last_token("last_output", pending)
    normed, _ = dialect.add_norm("final_norm", residual, pending, spec.final_norm)
    dialect.head(normed)
    dialect.finish()


def _norm_in(dialect: Dialect, name: str, residual: str, pending: str, weight: str) -> tuple[str, str]:
    if not pending:
        return dialect.norm(name, residual, weight), residual
    return dialect.add_norm(name, residual, pending, weight)
