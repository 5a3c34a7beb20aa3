"""What a checkpoint's architecture is, as data: one ModelSpec, read from config.json, that every graph writer walks.

The six families differ in names and traits, not in structure: pre-norm decoder layers of grouped-query attention with
RoPE and a gated MLP. A trait this description has no word for is refused rather than dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine_core.errors import CheckpointError, UnsupportedModelError
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.manifest import ModelGeometry
from engine_core.models.rope import RopeSpec

FULL, SLIDING = "full_attention", "sliding_attention"
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}


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
    head_bias: str
    final_norm: str
    ropes: tuple[RopeSpec, ...]
    layers: tuple[LayerSpec, ...]

    @property
    def tied(self) -> bool:
        return self.head == self.embedding

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What the checkpoint has to hold: tensor name → shape; a stack's parts share their rows as they like."""
        hidden, heads = self.hidden_size, self.num_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            self.embedding: (self.vocab_size, hidden),
            self.head: (self.vocab_size, hidden),
            self.final_norm: (hidden,),
        }
        for layer in self.layers:
            for norm in (layer.input_norm, layer.post_attention_norm, layer.mlp_norm, layer.post_mlp_norm):
                shapes[norm] = (hidden,)
            shapes[layer.q_norm] = shapes[layer.k_norm] = (self.head_dim,)
            for linear, rows, columns in (
                (layer.qkv, self.qkv_size, hidden),
                (layer.output, hidden, heads),
                (layer.gate_up, 2 * self.intermediate_size, hidden),
                (layer.down, hidden, self.intermediate_size),
            ):
                for names, tail in ((linear.parts, (columns,)), (linear.biases, ())):
                    for name, part in zip(names, self._split(rows, linear, len(names))):
                        shapes[name] = (part, *tail)
        if self.head_bias:
            shapes[self.head_bias] = (self.vocab_size,)
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
    config.json that lacks a number."""
    config = checkpoint.config
    architecture = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"The architecture {architecture} is not supported; supported are {', '.join(sorted(_ARCHITECTURES))}."
        )
    for trait in ("use_bidirectional_attention", "head_dim_per_layer"):
        if config.get(trait):
            raise UnsupportedModelError(f"The checkpoint sets {trait!r}, which is not supported; use plain weights.")
    return _Reader(checkpoint, architecture).spec()


_ARCHITECTURES = {
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
}


class _Reader:
    """Reads one config.json; the families' differences are the conditions below."""

    def __init__(self, checkpoint: Checkpoint, architecture: str) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.architecture = architecture
        self.gemma = architecture.startswith("Gemma")
        self.num_heads = self._int("num_attention_heads")
        self.hidden_size = self._int("hidden_size")
        self.head_dim = self._int("head_dim", 256 if self.gemma else self.hidden_size // self.num_heads)
        self.num_layers = self._int("num_hidden_layers")
        self.max_position = self._int("max_position_embeddings", 8192 if self.gemma else 2048)

    def spec(self) -> ModelSpec:
        config, gemma = self.config, self.gemma
        kv_heads = self._int("num_key_value_heads", self.num_heads)
        if self.num_heads % kv_heads:
            raise CheckpointError(f"config.json has {self.num_heads} heads for {kv_heads} KV heads: not a multiple.")
        activation = config.get("hidden_activation") or config.get("hidden_act")
        if gemma and activation in (None, "gelu"):
            activation = "gelu_pytorch_tanh"  # what transformers makes of Gemma's early configurations
        if (activation or "silu") not in _ACTIVATIONS:
            raise UnsupportedModelError(f"The activation {activation!r} is not supported; silu and gelu_tanh are.")
        embedding = "model.embed_tokens.weight"
        tied = config.get("tie_word_embeddings", gemma) or "lm_head.weight" not in self.checkpoint
        kinds = self._layer_kinds()
        rope_kinds = [FULL, SLIDING] if self.architecture == "Gemma3ForCausalLM" else [FULL]
        return ModelSpec(
            architecture=self.architecture,
            hidden_size=self.hidden_size,
            intermediate_size=self._int("intermediate_size"),
            num_heads=self.num_heads,
            num_kv_heads=kv_heads,
            head_dim=self.head_dim,
            vocab_size=self._int("vocab_size"),
            max_position=self.max_position,
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            norm_offset=1.0 if gemma else 0.0,
            activation=_ACTIVATIONS[activation or "silu"],
            attention_scale=float(config.get("query_pre_attn_scalar", 256) if gemma else self.head_dim) ** -0.5,
            attention_softcap=self._softcap("attn_logit_softcapping", 50.0),
            logits_softcap=self._softcap("final_logit_softcapping", 30.0),
            embedding_scale=self.hidden_size**0.5 if gemma else 1.0,
            embedding=embedding,
            head=embedding if tied else "lm_head.weight",
            head_bias="lm_head.bias" if "lm_head.bias" in self.checkpoint and not tied else "",
            final_norm="model.norm.weight",
            ropes=tuple(self._rope(kind) for kind in rope_kinds),
            layers=tuple(self._layer(i, kind, rope_kinds) for i, kind in enumerate(kinds)),
        )

    # --- parts ------------------------------------------------------------------------------------

    def _layer(self, index: int, kind: str, rope_kinds: list[str]) -> LayerSpec:
        prefix = f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        fused = self.architecture == "Phi3ForCausalLM"
        normed = self.architecture in ("Qwen3ForCausalLM", "Gemma3ForCausalLM")
        gemma = self.gemma
        return LayerSpec(
            input_norm=prefix + "input_layernorm.weight",
            qkv=self._linear(attention, ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj")),
            q_norm=attention + "q_norm.weight" if normed else "",
            k_norm=attention + "k_norm.weight" if normed else "",
            output=self._linear(attention, ("o_proj",)),
            post_attention_norm=prefix + "post_attention_layernorm.weight" if gemma else "",
            mlp_norm=prefix + ("pre_feedforward" if gemma else "post_attention") + "_layernorm.weight",
            gate_up=self._linear(mlp, ("gate_up_proj",) if fused else ("gate_proj", "up_proj")),
            down=self._linear(mlp, ("down_proj",)),
            post_mlp_norm=prefix + "post_feedforward_layernorm.weight" if gemma else "",
            window=self._window() if kind == SLIDING else 0,
            rope=rope_kinds.index(kind) if kind in rope_kinds else 0,
        )

    def _linear(self, prefix: str, names: tuple[str, ...]) -> LinearSpec:
        biases = tuple(f"{prefix}{name}.bias" for name in names)
        present = [bias in self.checkpoint for bias in biases]
        if any(present) and not all(present):
            raise CheckpointError(f"The checkpoint has some of the biases {', '.join(biases)}, but not all.")
        return LinearSpec(tuple(f"{prefix}{name}.weight" for name in names), biases if all(present) else ())

    def _layer_kinds(self) -> list[str]:
        config = self.config
        if self._window() == 0:
            return [FULL] * self.num_layers
        kinds = config.get("layer_types")
        if kinds is None:
            first = int(config.get("max_window_layers", 0)) if self.architecture.startswith("Qwen") else 0
            pattern = {"Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": 6}.get(self.architecture, 0)
            if self.architecture == "Gemma3ForCausalLM":
                pattern = int(config.get("sliding_window_pattern") or pattern)
            full = [bool(pattern and (i + 1) % pattern == 0) or i < first for i in range(self.num_layers)]
            kinds = [FULL if is_full else SLIDING for is_full in full]
        if len(kinds) != self.num_layers or not set(kinds) <= {FULL, SLIDING}:
            raise UnsupportedModelError(
                f"config.json has the layer types {sorted(set(map(str, kinds)))} for {self.num_layers} layers; "
                f"one of {FULL} and {SLIDING} for each is supported."
            )
        return list(kinds)

    def _window(self) -> int:
        config = self.config
        if self.architecture in ("LlamaForCausalLM",):
            return 0
        if self.architecture.startswith("Qwen") and not config.get("use_sliding_window", False):
            return 0
        default = 4096 if self.gemma else None
        return int(config.get("sliding_window", default) or 0)

    def _rope(self, kind: str) -> RopeSpec:
        values = self._rope_values(kind)
        scaling = str(values.get("rope_type") or values.get("type") or "default")
        if self.architecture == "Phi3ForCausalLM" and scaling in ("su", "yarn"):
            scaling = "longrope"  # the names it had in the first Phi-3 releases
        partial = values.get("partial_rotary_factor", self.config.get("partial_rotary_factor", 1.0))
        original = self.config.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
        values = dict(values, original_max_position_embeddings=original or self.max_position)
        spec = RopeSpec(
            dim=int(self.head_dim * float(partial)),
            theta=float(values.get("rope_theta") or 10000.0),
            kind=scaling,
            original_max_position=int(original or self.max_position),
            max_position=self.max_position,
            parameters={name: value for name, value in values.items() if value is not None},
        )
        spec.table(1)  # refuses what is not implemented
        return spec

    def _rope_values(self, kind: str) -> dict:
        """theta and scaling of layers of ``kind``, as rope_parameters or as rope_theta and rope_scaling."""
        config = self.config
        values = config.get("rope_parameters")
        if values:
            nested = values.get(kind)
            return dict(nested) if isinstance(nested, dict) else dict(values)
        if self.architecture == "Gemma3ForCausalLM" and kind == SLIDING:
            return {"rope_theta": config.get("rope_local_base_freq", 10000.0)}
        theta = config.get("rope_theta", 1e6 if self.architecture == "Gemma3ForCausalLM" else 10000.0)
        return {"rope_theta": theta, **(config.get("rope_scaling") or {})}

    def _softcap(self, name: str, default: float) -> float:
        if not self.gemma:
            return 0.0
        return float(self.config.get(name, default if self.architecture == "Gemma2ForCausalLM" else None) or 0.0)

    def _int(self, name: str, default: int | None = None) -> int:
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or value <= 0:
            raise CheckpointError(f"config.json has {name}={value!r}, expected a whole number above 0.")
        return value
