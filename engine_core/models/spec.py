"""A model as data: one ``ModelSpec`` for each, read from a checkpoint's config.json (``reader``), stored in
the manifest of an engine directory, and read by every backend.

The families differ in names and traits, not in structure: pre-norm decoder layers of grouped-query attention with RoPE
and a gated MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from engine_core.models.rope import RopeSpec

ACTIVATIONS = ("silu", "gelu_tanh")
_SIZES = (
    "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "max_position"
)  # fmt: skip


@dataclass(frozen=True)
class LinearSpec:
    """y = x Wᵀ + b. ``parts``: checkpoint tensors [n_i, in_features], stacked along their rows; ``biases`` likewise."""

    parts: tuple[str, ...]
    biases: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerSpec:
    """The parts of one decoder layer. Its properties name the checkpoint's tensors; "" = there is no such norm."""

    index: int
    window: int = 0  # tokens a query sees, itself included; 0 = all
    rope: int = 0  # index into ModelSpec.ropes
    fused: bool = False  # the checkpoint has one tensor for Q, K and V, and one for gate and up
    qk_norm: bool = False  # a norm for each head of Q and K, before RoPE
    outer_norms: bool = False  # norms on the outputs of attention and MLP, before the residual sums (Gemma)
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    @property
    def input_norm(self) -> str:
        return self._name("input_layernorm")

    @property
    def qkv(self) -> LinearSpec:
        """Rows: all of Q, then K, then V."""
        names = ("qkv_proj",) if self.fused else ("q_proj", "k_proj", "v_proj")
        return self._linear("self_attn", names, self.qkv_bias)

    @property
    def q_norm(self) -> str:
        return self._name("self_attn.q_norm") if self.qk_norm else ""

    @property
    def k_norm(self) -> str:
        return self._name("self_attn.k_norm") if self.qk_norm else ""

    @property
    def output(self) -> LinearSpec:
        return self._linear("self_attn", ("o_proj",), self.output_bias)

    @property
    def post_attention_norm(self) -> str:
        """The norm on the attention's output, before the residual sum."""
        return self._name("post_attention_layernorm") if self.outer_norms else ""

    @property
    def mlp_norm(self) -> str:
        return self._name("pre_feedforward_layernorm" if self.outer_norms else "post_attention_layernorm")

    @property
    def gate_up(self) -> LinearSpec:
        """Rows: all of gate, then up."""
        return self._linear("mlp", ("gate_up_proj",) if self.fused else ("gate_proj", "up_proj"), self.mlp_bias)

    @property
    def down(self) -> LinearSpec:
        return self._linear("mlp", ("down_proj",), self.mlp_bias)

    @property
    def post_mlp_norm(self) -> str:
        return self._name("post_feedforward_layernorm") if self.outer_norms else ""

    def _name(self, tensor: str) -> str:
        return f"model.layers.{self.index}.{tensor}.weight"

    def _linear(self, block: str, names: tuple[str, ...], has_bias: bool) -> LinearSpec:
        stems = [f"model.layers.{self.index}.{block}.{name}" for name in names]
        biases = tuple(f"{stem}.bias" for stem in stems) if has_bias else ()
        return LinearSpec(tuple(f"{stem}.weight" for stem in stems), biases)


@dataclass(frozen=True)
class ModelSpec:
    """One model. The defaults are those of a plain Llama. Raises ValueError for numbers that no model can have."""

    architecture: str  # Hugging Face class name, for instance LlamaForCausalLM
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int  # positions the model was made for
    ropes: tuple[RopeSpec, ...]
    layers: tuple[LayerSpec, ...]
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to every norm's weight (Gemma: 1)
    activation: str = "silu"  # one of ACTIVATIONS
    attention_scale: float = 0.0  # 0 = head_dim^-1/2
    attention_softcap: float = 0.0  # 0 = none
    logits_softcap: float = 0.0  # 0 = none
    embedding_scale: float = 1.0
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"  # the embedding's name when the two are tied
    final_norm: str = "model.norm.weight"

    def __post_init__(self) -> None:
        if not self.attention_scale and self.head_dim > 0:
            object.__setattr__(self, "attention_scale", self.head_dim**-0.5)
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, not 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads is {self.num_heads}, not a multiple of {self.num_kv_heads} KV heads")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r:.60}, not one of {', '.join(ACTIVATIONS)}")
        if not self.layers or any(layer.rope >= len(self.ropes) for layer in self.layers):
            raise ValueError("a layer has no RoPE, or there is no layer")
        if any(not 0 < rope.dim <= self.head_dim for rope in self.ropes):
            raise ValueError("a RoPE does not fit the head")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def tied(self) -> bool:
        return self.head == self.embedding

    @property
    def default_position(self) -> int:
        """The longest context an engine is built for unless more is asked for.

        Not more than LongRoPE's original length: see ``notes``.
        """
        lengths = [rope.original_max_position for rope in self.ropes if rope.kind == "longrope"]
        return min(self.max_position, *lengths) if lengths else self.max_position

    def notes(self, max_context: int) -> tuple[str, ...]:
        """Return what the user of an engine for ``max_context`` tokens should know, a sentence each.

        LongRoPE has other factors beyond its original length. The keys in a cache are rotated already, so an engine for
        longer contexts takes the long factors for every prompt, where transformers takes the short ones at first.
        """
        original = self.default_position
        if original == self.max_position or max_context <= original:
            return ()
        return (
            f"max_context is {max_context}, but the model's RoPE has other factors up to {original} tokens: every "
            f"prompt gets those for longer ones, so that up to {original} tokens the answers differ from transformers "
            f"and may be worse; build with a max_context of {original} if that is enough.",
        )

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """Return (rows, columns) of each matrix of a layer: qkv, o, gate_up and down."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        return {
            "qkv": (self.qkv_size, hidden),
            "o": (hidden, self.num_heads * self.head_dim),
            "gate_up": (2 * intermediate, hidden),
            "down": (hidden, intermediate),
        }

    @cached_property
    def num_parameters(self) -> int:
        """Return the number of weights; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors of the checkpoint: name → shape; a stack's parts share their rows as they like."""
        hidden, matrices = self.hidden_size, self.layer_matrices
        shapes: dict[str, tuple[int, ...]] = {
            self.embedding: (self.vocab_size, hidden),
            self.head: (self.vocab_size, hidden),
            self.final_norm: (hidden,),
        }
        for layer in self.layers:
            for norm in (layer.input_norm, layer.post_attention_norm, layer.mlp_norm, layer.post_mlp_norm):
                shapes[norm] = (hidden,)
            shapes[layer.q_norm] = shapes[layer.k_norm] = (self.head_dim,)
            for linear, (rows, columns) in (
                (layer.qkv, matrices["qkv"]),
                (layer.output, matrices["o"]),
                (layer.gate_up, matrices["gate_up"]),
                (layer.down, matrices["down"]),
            ):
                for names, tail in ((linear.parts, (columns,)), (linear.biases, ())):
                    for name, part in zip(names, self._split(rows, linear, len(names))):
                        shapes[name] = (part, *tail)
        shapes.pop("", None)
        return shapes

    def _split(self, rows: int, linear: LinearSpec, count: int) -> tuple[int, ...]:
        if count == 3:
            kv = self.num_kv_heads * self.head_dim
            return self.num_heads * self.head_dim, kv, kv
        return (rows // max(1, count),) * count
