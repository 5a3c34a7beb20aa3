"""What a checkpoint's architecture is, as data: one ModelSpec, read from config.json, that every graph writer walks.

The six families differ in names and traits, not in structure: pre-norm decoder layers of grouped-query attention with
RoPE and a gated MLP. A trait this description has no word for is refused rather than dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from engine_core.errors import CheckpointError, UnsupportedModelError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.manifest import ModelGeometry
from engine_core.models.families import family_of
from engine_core.models.families.family import FULL, SLIDING, Family, never
from engine_core.models.fields import Fields
from engine_core.models.rope import RopeSpec

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
_MOST_LAYERS = 10_000
_BLOCK_VALUES = 4 << 20


@dataclass(frozen=True)
class LinearSpec:
    """y = x Wᵀ + b. ``parts``: checkpoint tensors [n_i, in_features], stacked along their rows; ``biases`` likewise."""

    parts: tuple[str, ...]
    biases: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer; "" = this architecture has no such norm."""

    input_norm: str
    qkv: LinearSpec  # rows: all of Q, then K, then V
    q_norm: str  # per head, before RoPE
    k_norm: str
    output: LinearSpec
    post_attention_norm: str  # on the attention's output, before the residual sum (Gemma)
    mlp_norm: str
    gate_up: LinearSpec  # rows: all of gate, then up
    down: LinearSpec
    post_mlp_norm: str
    window: int  # tokens a query sees, itself included; 0 = all
    rope: int  # index into ModelSpec.ropes


@dataclass(frozen=True)
class ModelSpec:
    architecture: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float
    norm_offset: float  # added to every norm's weight (Gemma: 1)
    activation: str  # silu or gelu_tanh
    attention_scale: float
    attention_softcap: float  # 0 = none
    logits_softcap: float  # 0 = none
    embedding_scale: float
    embedding: str
    head: str  # the embedding's name when the two are tied
    final_norm: str
    ropes: tuple[RopeSpec, ...]
    layers: tuple[LayerSpec, ...]

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
        """What the checkpoint has to hold: tensor name → shape; a stack's parts share their rows as they like."""
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

    def geometry(self, num_parameters: int) -> ModelGeometry:
        return ModelGeometry(
            architecture=self.architecture,
            num_layers=len(self.layers),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_position=self.max_position,
            num_parameters=num_parameters,
        )


def check_tensors(spec: ModelSpec, checkpoint: Checkpoint) -> int:
    """The number of parameters. Raises CheckpointError naming the first tensor that is missing or misshapen."""
    total = 0
    for name, expected in spec.shapes().items():
        found = checkpoint.shape(name)
        if found != expected:
            raise CheckpointError(f"The tensor {name!r} has the shape {list(found)}, expected {list(expected)}.")
        total += int(np.prod(expected, dtype=np.int64))
    return total


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """Raises UnsupportedModelError for an architecture or trait that is not implemented, CheckpointError for a
    config.json with a field that is missing, of the wrong type or out of range."""
    family = family_of(checkpoint.config)
    for trait in ("use_bidirectional_attention", "head_dim_per_layer", "per_layer_config"):
        if checkpoint.config.get(trait):
            raise UnsupportedModelError(f"The checkpoint sets {trait!r}, which is not supported; use plain weights.")
    return _Reader(checkpoint, family).spec()


class _Reader:
    """Reads one config.json by the defaults and traits of its family."""

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        self.checkpoint = checkpoint
        self.family = family
        self.fields = fields = Fields(checkpoint.config)
        self.num_heads = fields.whole("num_attention_heads")
        self.hidden_size = fields.whole("hidden_size")
        self.num_layers = fields.whole("num_hidden_layers")
        if self.num_layers > _MOST_LAYERS:
            fields.refuse("num_hidden_layers", f"at most {_MOST_LAYERS}")
        self.max_position = fields.whole("max_position_embeddings", family.max_position)
        self.head_dim = self._head_dim()

    def spec(self) -> ModelSpec:
        family, fields = self.family, self.fields
        kv_heads = fields.whole("num_key_value_heads", family.num_kv_heads, optional=family.kv_heads_nullable)
        kv_heads = kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise CheckpointError(f"config.json has {self.num_heads} heads for {kv_heads} KV heads: not a multiple.")
        activation = fields.text(family.activation_field, family.activation)
        if activation not in _ACTIVATIONS:
            raise UnsupportedModelError(
                f"The activation {activation!r} is not supported; {', '.join(sorted(_ACTIVATIONS))} are."
            )
        norm_eps = fields.number("rms_norm_eps", family.norm_eps, zero=True)
        if norm_eps >= 1:
            fields.refuse("rms_norm_eps", "a number below 1")
        scalar = self.head_dim
        if family.attention_scalar is not None:
            scalar = fields.number("query_pre_attn_scalar", family.attention_scalar)
        embedding, head = self._embedding_and_head()
        kinds = self._layer_kinds()
        rope_kinds = [FULL, SLIDING] if family.local_rope_theta else [FULL]
        return ModelSpec(
            architecture=family.architecture,
            hidden_size=self.hidden_size,
            intermediate_size=fields.whole("intermediate_size"),
            num_heads=self.num_heads,
            num_kv_heads=kv_heads,
            head_dim=self.head_dim,
            vocab_size=fields.whole("vocab_size"),
            max_position=self.max_position,
            norm_eps=norm_eps,
            norm_offset=family.norm_offset,
            activation=_ACTIVATIONS[activation],
            attention_scale=float(scalar) ** -0.5,
            attention_softcap=self._attention_softcap(),
            logits_softcap=self._softcap("final_logit_softcapping", family.logits_softcap),
            embedding_scale=self.hidden_size**0.5 if family.scaled_embedding else 1.0,
            embedding=embedding,
            head=head,
            final_norm="model.norm.weight",
            ropes=tuple(self._rope(kind) for kind in rope_kinds),
            layers=tuple(self._layer(i, kind, rope_kinds) for i, kind in enumerate(kinds)),
        )

    # --- parts ------------------------------------------------------------------------------------

    def _head_dim(self) -> int:
        family, fields = self.family, self.fields
        head_dim = fields.whole(
            "head_dim", family.head_dim, optional=family.head_dim_nullable or "head_dim" not in fields
        )
        if head_dim is None and self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"config.json has hidden_size={self.hidden_size} for {self.num_heads} heads and no head_dim: "
                "not a multiple."
            )
        return head_dim or self.hidden_size // self.num_heads

    def _embedding_and_head(self) -> tuple[str, str]:
        """Their tensors' names: one where they are tied, which needs both stored equal or only one stored."""
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        if "lm_head.bias" in self.checkpoint:
            raise UnsupportedModelError(
                f"The checkpoint has an lm_head.bias, which {self.family.architecture} does not have: transformers "
                "leaves it out; take it away from the checkpoint to do the same."
            )
        if not self.fields.flag("tie_word_embeddings", self.family.tied):
            lacks_head = self.checkpoint.has_tensors and head not in self.checkpoint
            if lacks_head and "tie_word_embeddings" not in self.fields:
                raise CheckpointError(
                    f"The checkpoint has no {head} and its config.json no tie_word_embeddings, which means false for "
                    f"{self.family.architecture}; set it to true there if the embedding is the LM head."
                )
            return embedding, head
        if head not in self.checkpoint:
            return embedding, embedding
        if embedding not in self.checkpoint:
            return head, head
        return embedding, embedding if self._equal(embedding, head) else head

    def _equal(self, one: str, other: str) -> bool:
        """Whether two stored matrices have the same values; read in blocks, up to the first difference."""
        shape = self.checkpoint.shape(one)
        if self.checkpoint.shape(other) != shape or len(shape) != 2:
            return False
        step = max(1, _BLOCK_VALUES // max(1, shape[1]))
        blocks = (slice(start, start + step) for start in range(0, shape[0], step))
        return all(
            np.array_equal(self.checkpoint.read(one, rows), self.checkpoint.read(other, rows)) for rows in blocks
        )

    def _layer(self, index: int, kind: str, rope_kinds: list[str]) -> LayerSpec:
        family = self.family
        prefix = f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv = ("qkv_proj",) if family.fused else ("q_proj", "k_proj", "v_proj")
        return LayerSpec(
            input_norm=prefix + "input_layernorm.weight",
            qkv=self._linear(attention, qkv, family.qkv_bias),
            q_norm=attention + "q_norm.weight" if family.qk_norm else "",
            k_norm=attention + "k_norm.weight" if family.qk_norm else "",
            output=self._linear(attention, ("o_proj",), family.output_bias),
            post_attention_norm=prefix + "post_attention_layernorm.weight" if family.outer_norms else "",
            mlp_norm=prefix + ("pre_feedforward" if family.outer_norms else "post_attention") + "_layernorm.weight",
            gate_up=self._linear(mlp, ("gate_up_proj",) if family.fused else ("gate_proj", "up_proj"), family.mlp_bias),
            down=self._linear(mlp, ("down_proj",), family.mlp_bias),
            post_mlp_norm=prefix + "post_feedforward_layernorm.weight" if family.outer_norms else "",
            window=self._window() or 0 if kind == SLIDING else 0,
            rope=rope_kinds.index(kind) if kind in rope_kinds else 0,
        )

    def _linear(self, prefix: str, names: tuple[str, ...], bias: str | bool) -> LinearSpec:
        has_bias = self.fields.flag(bias, False) if isinstance(bias, str) else bias
        biases = tuple(f"{prefix}{name}.bias" for name in names) if has_bias else ()
        return LinearSpec(tuple(f"{prefix}{name}.weight" for name in names), biases)

    def _layer_kinds(self) -> list[str]:
        family, fields, window = self.family, self.fields, self._window()
        given = fields.texts("layer_types")
        kinds = given if family.reads_layer_types else None
        if kinds is None:
            has_none = window is None and (family.window_switch or not family.reads_layer_types)
            kinds = [FULL] * self.num_layers if has_none else family.layer_kinds(fields, self.num_layers)
        if given is not None and given != kinds:  # what it means elsewhere depends on more than the model
            raise UnsupportedModelError(
                f"config.json has layer_types other than {sorted(set(kinds))} for all its {self.num_layers} layers, "
                f"which is not supported for {family.architecture}; leave them out."
            )
        if len(kinds) != self.num_layers or not set(kinds) <= {FULL, SLIDING}:
            raise UnsupportedModelError(
                f"config.json has the layer types {sorted(set(kinds))} for {self.num_layers} layers; "
                f"one of {FULL} and {SLIDING} for each is supported."
            )
        if window is None and SLIDING in kinds:
            raise CheckpointError(f"config.json has layers of the type {SLIDING}, but no sliding_window for them.")
        return kinds

    def _window(self) -> int | None:
        """Tokens a layer with a window sees; None: there is no such layer."""
        family, fields = self.family, self.fields
        window = fields.whole("sliding_window", family.sliding_window, optional=True)
        if family.window_switch and not fields.flag(family.window_switch, False):
            return None
        return window if family.layer_kinds is not never else None

    def _rope(self, kind: str) -> RopeSpec:
        family, fields = self.family, self.fields
        values = self._rope_values(kind)
        own = Fields(values, "config.json's RoPE parameters")
        name = "rope_type" if "rope_type" in own else "type"
        scaling = own.text(name, "default")
        scaling = dict(family.rope_names).get(scaling, scaling)
        if scaling not in family.rope_kinds:
            raise UnsupportedModelError(
                f"The RoPE scaling {scaling!r} is not implemented for {family.architecture}; "
                f"{', '.join(family.rope_kinds)} are."
            )
        partial = fields.number("partial_rotary_factor", 1.0, optional=not family.partial_rotary)
        partial = own.number("partial_rotary_factor", 1.0 if partial is None else partial)
        dim = int(self.head_dim * partial)
        if (partial != 1 and not family.partial_rotary) or not 0 < dim <= self.head_dim or dim % 2:
            raise UnsupportedModelError(
                f"config.json has partial_rotary_factor={partial:g} of heads of {self.head_dim} values, which is not "
                f"supported for {family.architecture}; an even number of values, and all but in Phi-3, are rotated."
            )
        original = None
        if not family.local_rope_theta:  # beside the RoPE's own, and it goes first
            original = fields.whole("original_max_position_embeddings", family.original_max_position, optional=True)
            if original is None and "original_max_position_embeddings" in fields:
                fields.refuse("original_max_position_embeddings", "a whole number above 0")
        if original is None:
            original = own.whole("original_max_position_embeddings", self.max_position)
        spec = RopeSpec(
            dim=dim,
            theta=own.number("rope_theta", family.rope_theta),
            kind=scaling,
            original_max_position=original,
            max_position=self.max_position,
            parameters={
                **{name: value for name, value in values.items() if value is not None},
                "original_max_position_embeddings": original,
            },
        )
        spec.check()  # refuses what is not implemented
        return spec

    def _rope_values(self, kind: str) -> dict:
        """theta and scaling of layers of ``kind``, as transformers 5 (rope_parameters) or 4 (the others) spells it."""
        fields, family = self.fields, self.family
        scaling, parameters = fields.table("rope_scaling"), fields.table("rope_parameters")
        if family.local_rope_theta:
            nested = Fields(parameters or {}, "config.json's rope_parameters")
            if parameters and not ({FULL, SLIDING} & parameters.keys()):
                fields.refuse("rope_parameters", f"an object with {FULL} and {SLIDING}")
            values = dict(nested.table(kind) or {})
            if kind == FULL and scaling is not None:
                if parameters and nested.table(kind) is None:
                    fields.refuse("rope_scaling", f"rope_parameters with {FULL} beside it")
                values.update(scaling)
            name = "rope_theta" if kind == FULL else "rope_local_base_freq"
            default = family.rope_theta if kind == FULL else family.local_rope_theta
        else:
            values = dict(scaling or parameters or {})
            if any(isinstance(value, dict) for value in values.values()):
                fields.refuse("rope_scaling" if scaling else "rope_parameters", "one RoPE for all layers")
            name, default = "rope_theta", family.rope_theta
        if "rope_theta" not in values:
            values["rope_theta"] = fields.number(name, default)
        return values

    def _attention_softcap(self) -> float:
        value = self._softcap("attn_logit_softcapping", self.family.attention_softcap)
        if value and not self.family.caps_attention:
            raise UnsupportedModelError(
                f"config.json has attn_logit_softcapping={value:g}, which {self.family.architecture} does not apply in "
                "transformers; set it to null to do the same."
            )
        return value

    def _softcap(self, name: str, default: float | None) -> float:
        if not self.family.has_softcaps:
            return 0.0
        return self.fields.number(name, default, optional=True) or 0.0
