"""A model as data: one ``ModelSpec`` for each, read from a checkpoint's config.json (``reader``), stored in
the manifest of an engine directory, and read by every backend.

The families differ in names and traits, not in structure: decoder layers of a mixer of tokens and a gated MLP, with
norms before them, after them or both. The mixer is grouped-query attention with RoPE, or a gated short convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from engine_core.models.rope import RopeSpec
from engine_core.models.vision import VisionSpec

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
class StateSpec:
    """State of fixed size that a layer keeps of a sequence, beside KV or instead of it: float32 of ``shape``."""

    layer: int
    name: str  # of the kind
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LayerSpec:
    """The parts of one decoder layer. Its properties name the checkpoint's tensors; "" = there is no such norm."""

    index: int
    window: int = 0  # tokens a query sees, itself included; 0 = all
    rope: int = 0  # index into ModelSpec.ropes
    fused: bool = False  # the checkpoint has one tensor for Q, K and V, and one for gate and up
    qk_norm: bool = False  # norms of Q and K, before RoPE: of each head
    wide_qk_norm: bool = False  # those norms are over all heads (OLMo 2)
    pre_norms: bool = True  # norms on the inputs of attention and MLP
    outer_norms: bool = False  # norms on the outputs of attention and MLP, before the residual sums (Gemma)
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    prefix: str = "model."  # of the decoder's tensors
    conv_kernel: int = 0  # tokens that an output of a short convolution in attention's place sees; 0 = attention
    conv_bias: bool = False  # of the convolution and of the matrices around it
    num_experts: int = 0  # MLPs of which a router picks some for each token; 0 = there is one MLP

    @property
    def input_norm(self) -> str:
        return self._name("input_layernorm") if self.pre_norms else ""

    @property
    def qkv(self) -> LinearSpec:
        """Rows: all of Q, then K, then V; of a convolution the gate before it, the gate after it, and its input."""
        if self.conv_kernel:
            return self._linear("conv", ("in_proj",), self.conv_bias)
        names = ("qkv_proj",) if self.fused else ("q_proj", "k_proj", "v_proj")
        return self._linear("self_attn", names, self.qkv_bias)

    @property
    def q_norm(self) -> str:
        return self._name("self_attn.q_norm") if self.qk_norm and not self.conv_kernel else ""

    @property
    def k_norm(self) -> str:
        return self._name("self_attn.k_norm") if self.qk_norm and not self.conv_kernel else ""

    @property
    def output(self) -> LinearSpec:
        """The matrix behind attention or the convolution."""
        if self.conv_kernel:
            return self._linear("conv", ("out_proj",), self.conv_bias)
        return self._linear("self_attn", ("o_proj",), self.output_bias)

    @property
    def conv_weight(self) -> str:
        """The weights of the convolution, [hidden, 1, kernel]; "" = the layer has attention."""
        return self._name("conv.conv") if self.conv_kernel else ""

    @property
    def conv_bias_name(self) -> str:
        return self.conv_weight.removesuffix("weight") + "bias" if self.conv_kernel and self.conv_bias else ""

    @property
    def post_attention_norm(self) -> str:
        """The norm on the attention's output, before the residual sum."""
        return self._name("post_attention_layernorm") if self.outer_norms else ""

    @property
    def mlp_norm(self) -> str:
        if not self.pre_norms:
            return ""
        return self._name("pre_feedforward_layernorm" if self.outer_norms else "post_attention_layernorm")

    @property
    def gate_up(self) -> LinearSpec:
        """Rows: all of gate, then up; with experts, those of the first one, then those of the second one, and so on."""
        if self.num_experts:
            return self._linear("mlp", tuple(name for e in range(self.num_experts) for name in _expert(e)), False)
        return self._linear("mlp", ("gate_up_proj",) if self.fused else ("gate_proj", "up_proj"), self.mlp_bias)

    @property
    def down(self) -> LinearSpec:
        if self.num_experts:
            names = tuple(f"experts.{expert}.down_proj" for expert in range(self.num_experts))
            return self._linear("mlp", names, False)
        return self._linear("mlp", ("down_proj",), self.mlp_bias)

    @property
    def router(self) -> str:
        """The matrix whose product with a token's vector says which experts it gets; "" without experts."""
        return self._name("mlp.gate") if self.num_experts else ""

    def expert(self, index: int) -> tuple[LinearSpec, LinearSpec]:
        """Return gate_up and down of one expert."""
        gate_up = self._linear("mlp", _expert(index), False)
        return gate_up, self._linear("mlp", (f"experts.{index}.down_proj",), False)

    @property
    def post_mlp_norm(self) -> str:
        return self._name("post_feedforward_layernorm") if self.outer_norms else ""

    def _name(self, tensor: str) -> str:
        return f"{self.prefix}layers.{self.index}.{tensor}.weight"

    def _linear(self, block: str, names: tuple[str, ...], has_bias: bool) -> LinearSpec:
        stems = [f"{self.prefix}layers.{self.index}.{block}.{name}" for name in names]
        biases = tuple(f"{stem}.bias" for stem in stems) if has_bias else ()
        return LinearSpec(tuple(f"{stem}.weight" for stem in stems), biases)


def _expert(index: int) -> tuple[str, str]:
    return f"experts.{index}.gate_proj", f"experts.{index}.up_proj"


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
    logits_scale: float = 1.0  # of the head's product
    experts_per_token: int = 0  # 0 = there are none
    norm_expert_weights: bool = False  # the weights of a token's experts are divided by their sum
    query_scale_position: int = 0  # from which on queries are scaled by their positions (Ministral 3); 0 = none are
    embedding_scale: float = 1.0
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"  # the embedding's name when the two are tied
    final_norm: str = "model.norm.weight"
    vision: VisionSpec | None = None  # of a model that sees

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
        if any(layer.conv_kernel and layer.num_experts for layer in self.layers):
            raise ValueError("a layer has a short convolution and experts")
        if not self.layers or any(layer.rope >= len(self.ropes) for layer in self.layers):
            raise ValueError("a layer has no RoPE, or there is no layer")
        if any(not 0 < rope.dim <= self.head_dim for rope in self.ropes):
            raise ValueError("a RoPE does not fit the head")
        if self.vision is not None and self.vision.out_size != self.hidden_size:
            raise ValueError(f"the encoder gives {self.vision.out_size} values, not {self.hidden_size}")
        if self.vision is not None and self.vision.image_token_id >= self.vocab_size:
            raise ValueError(f"the image token {self.vision.image_token_id} is beyond {self.vocab_size} tokens")
        if self.mrope and (len(self.mrope) != 3 or 2 * sum(self.mrope) != self.ropes[0].dim or len(self.ropes) > 1):
            raise ValueError(f"the axes {list(self.mrope)[:8]} of the positions do not fit the RoPE")
        if self.vision is not None and len(self.vision.deepstack) >= len(self.layers):
            raise ValueError("the encoder has features for more layers than there are")
        if len({layer.num_experts for layer in self.layers}) > 1:
            raise ValueError("some layers have other numbers of experts than others")
        if len(self._rope_switches) > 1 or (self._rope_switches and self.mrope):
            raise ValueError("the factors of its RoPEs change at different lengths, or with M-RoPE")
        if (self.num_experts > 0) != (self.experts_per_token > 0) or self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token is {self.experts_per_token} of {self.num_experts} experts")

    @property
    def num_experts(self) -> int:
        """Return the experts of a layer; ``intermediate_size`` is that of one of them. 0 = there are none."""
        return self.layers[0].num_experts

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """Return the layers that keep KV, those with attention."""
        return tuple(layer.index for layer in self.layers if not layer.conv_kernel)

    @cached_property
    def states(self) -> tuple[StateSpec, ...]:
        """Return what layers keep of a sequence beside KV: a convolution its last inputs, the oldest first."""
        return tuple(
            StateSpec(layer.index, "conv", (layer.conv_kernel - 1, self.hidden_size))
            for layer in self.layers
            if layer.conv_kernel > 1
        )

    @property
    def mrope(self) -> tuple[int, ...]:
        """The frequencies that each axis of the positions turns; () = they have one axis."""
        return () if self.vision is None else self.vision.mrope

    @property
    def tied(self) -> bool:
        return self.head == self.embedding

    @property
    def default_position(self) -> int:
        """The longest context an engine is built for unless more is asked for: not more than LongRoPE's original
        length, up to which a model answers best."""
        lengths = [rope.original_max_position for rope in self.ropes if rope.kind == "longrope"]
        lengths += [self.query_scale_position] if self.query_scale_position else []
        return min(self.max_position, *lengths) if lengths else self.max_position

    @property
    def rope_switch(self) -> int:
        """Return the ``switch`` of its RoPEs; 0: the frequencies of none depend on the length."""
        return max(self._rope_switches, default=0)

    def rope_switch_within(self, max_context: int) -> int:
        """Return ``rope_switch`` if a context of so many tokens reaches beyond it, else 0."""
        return self.rope_switch if self.rope_switch < max_context else 0

    @cached_property
    def _rope_switches(self) -> frozenset[int]:
        return frozenset(rope.switch for rope in self.ropes) - {0}

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """Return (rows, columns) of each matrix of a layer with attention: qkv, o, gate_up and down, with all experts'
        rows."""
        hidden, intermediate, experts = self.hidden_size, self.intermediate_size, max(1, self.num_experts)
        return {
            "qkv": (self.qkv_size, hidden),
            "o": (hidden, self.num_heads * self.head_dim),
            "gate_up": (experts * 2 * intermediate, hidden),
            "down": (experts * hidden, intermediate),
        }

    def matrices_of(self, layer: LayerSpec) -> dict[str, tuple[int, int]]:
        """Return ``layer_matrices`` of one layer."""
        if not layer.conv_kernel:
            return self.layer_matrices
        hidden = self.hidden_size
        return self.layer_matrices | {"qkv": (3 * hidden, hidden), "o": (hidden, hidden)}

    @property
    def head_norm_sizes(self) -> tuple[int, int]:
        """Return the values that a norm of Q and one of K are over, where there are such."""
        wide = self.layers[0].wide_qk_norm
        return self.head_dim * (self.num_heads if wide else 1), self.head_dim * (self.num_kv_heads if wide else 1)

    @cached_property
    def num_parameters(self) -> int:
        """Return the number of weights; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    @property
    def idle_experts(self) -> int:
        """Return the experts of a layer that a token is not given, whose weights it does not read."""
        return self.num_experts - self.experts_per_token

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors of the checkpoint: name → shape; a stack's parts share their rows as they like."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            self.embedding: (self.vocab_size, hidden),
            self.head: (self.vocab_size, hidden),
            self.final_norm: (hidden,),
        }
        for layer in self.layers:
            matrices = self.matrices_of(layer)
            shapes[layer.conv_weight] = (hidden, 1, layer.conv_kernel)
            shapes[layer.conv_bias_name] = (hidden,)
            for norm in (layer.input_norm, layer.post_attention_norm, layer.mlp_norm, layer.post_mlp_norm):
                shapes[norm] = (hidden,)
            shapes[layer.router] = (self.num_experts, hidden)
            shapes[layer.q_norm], shapes[layer.k_norm] = ((size,) for size in self.head_norm_sizes)
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
        return shapes | (self.vision.shapes() if self.vision is not None else {})

    def _split(self, rows: int, linear: LinearSpec, count: int) -> tuple[int, ...]:
        if linear.parts[0].endswith("q_proj.weight"):
            kv = self.num_kv_heads * self.head_dim
            return self.num_heads * self.head_dim, kv, kv
        return (rows // max(1, count),) * count
