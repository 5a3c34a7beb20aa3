"""Reads a ModelSpec from a checkpoint's config.json, by the defaults and traits of its family.

A trait that a ModelSpec has no word for is refused rather than dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine_core.errors import CheckpointError, UnsupportedModelError
from engine_core.models.families import decoder_config, family_of
from engine_core.models.families.family import CONVOLUTION, FULL, SLIDING, Family, never
from engine_core.models.fields import Fields
from engine_core.models.rope import RopeSpec
from engine_core.models.spec import LayerSpec, ModelSpec
from engine_core.models.vision import VisionSpec
from engine_core.vision.preprocess import read_settings

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
_MOST_LAYERS = 10_000
_BLOCK_VALUES = 4 << 20


class ConfigSource(Protocol):
    """The methods of a checkpoint that the reader calls: of ``formats.checkpoint.Checkpoint``, or a stand-in."""

    config: dict[str, Any]
    has_tensors: bool  # False: nobody knows which are stored

    @property
    def config_name(self) -> str:
        """The name, in messages, of what the configuration is read from."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, rows: slice = ...) -> np.ndarray: ...

    @property
    def processor_directory(self) -> Path | None:
        """The directory with the files of the image processor of a model that sees; None: there are none."""


def check_tensors(spec: ModelSpec, checkpoint: ConfigSource) -> None:
    """Raises CheckpointError naming the first tensor that is missing or misshapen."""
    for name, expected in spec.shapes().items():
        found = checkpoint.shape(name)
        if found != expected:
            raise CheckpointError(f"The tensor {name!r} has the shape {list(found)}, expected {list(expected)}.")


def read_spec(checkpoint: ConfigSource) -> ModelSpec:
    """Raises UnsupportedModelError for an architecture or trait that is not implemented, CheckpointError for a
    config.json with a field that is missing, of the wrong type or out of range."""
    family = family_of(checkpoint.config)
    for trait in ("use_bidirectional_attention", "head_dim_per_layer", "per_layer_config"):
        if checkpoint.config.get(trait):
            raise UnsupportedModelError(f"The checkpoint sets {trait!r}, which is not supported; use plain weights.")
    return _Reader(checkpoint, family).spec()


class _Reader:
    """Reads one config.json by the defaults and traits of its family."""

    def __init__(self, checkpoint: ConfigSource, family: Family) -> None:
        self.checkpoint = checkpoint
        self.family = family
        self.where = checkpoint.config_name
        self.fields = fields = Fields(self._decoder_config(), self.where)
        self.num_heads = self._size("num_attention_heads")
        self.hidden_size = self._size("hidden_size")
        self.num_layers = self._size("num_hidden_layers")
        if self.num_layers > _MOST_LAYERS:
            fields.refuse("num_hidden_layers", f"at most {_MOST_LAYERS}")
        self.max_position = fields.whole("max_position_embeddings", family.max_position)
        self.head_dim = self._head_dim()
        self.num_experts = family.experts(fields, self.num_layers) if family.experts else 0

    def _decoder_config(self) -> Mapping[str, Any]:
        """Return the fields of the decoder. Raises UnsupportedModelError for another decoder than the family's."""
        config, expected = self.checkpoint.config, self.family.text_type
        if not expected:
            return config
        nested = Fields(config, self.where).table("text_config") or {}
        found = Fields(nested, f"text_config of {self.where}").text("model_type", expected)
        if found != expected:
            raise UnsupportedModelError(
                f"The decoder is a {found[:60]!r}, which is not supported for {self.family.architecture}; "
                f"{expected} is."
            )
        return decoder_config({**config, "text_config": nested})

    def spec(self) -> ModelSpec:
        family, fields = self.family, self.fields
        kv_heads = fields.whole("num_key_value_heads", family.num_kv_heads, optional=family.kv_heads_nullable)
        kv_heads = kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise CheckpointError(f"{self.where} has {self.num_heads} heads for {kv_heads} KV heads: not a multiple.")
        activation = family.activation
        if family.activation_field:
            activation = fields.text(family.activation_field, activation)
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
        ropes, rope_of = self._ropes(kinds)
        residual, embedded = 1.0, self.hidden_size**0.5 if family.scaled_embedding else 1.0
        attention_scale, logits_scale = float(scalar) ** -0.5, 1.0
        if family.has_multipliers:
            residual, embedded, attention_scale = (
                fields.number(f"{name}_multiplier", 1.0) for name in ("residual", "embedding", "attention")
            )
            logits_scale = 1 / fields.number("logits_scaling", 1.0)
        return self._spec(
            architecture=family.architecture,
            hidden_size=self.hidden_size,
            intermediate_size=self._intermediate_size(),
            experts_per_token=fields.whole("num_experts_per_tok", 8) if self.num_experts else 0,
            norm_expert_weights=self.num_experts > 0 and fields.flag("norm_topk_prob", False),
            num_heads=self.num_heads,
            num_kv_heads=kv_heads,
            head_dim=self.head_dim,
            vocab_size=self._size("vocab_size"),
            max_position=self.max_position,
            # The residual stream is kept divided by the multiplier of what is added to it: norms take that away again.
            norm_eps=norm_eps / residual**2,
            norm_offset=family.norm_offset,
            activation=_ACTIVATIONS[activation],
            attention_scale=attention_scale,
            attention_softcap=self._attention_softcap(),
            logits_softcap=self._softcap("final_logit_softcapping", family.logits_softcap),
            logits_scale=logits_scale,
            query_scale_position=self._query_scale_position(ropes[0]),
            embedding_scale=embedded / residual,
            embedding=embedding,
            head=head,
            final_norm=f"{family.prefix}norm.weight",
            vision=self._vision(),
            ropes=ropes,
            layers=tuple(self._layer(i, kind, rope) for i, (kind, rope) in enumerate(zip(kinds, rope_of, strict=True))),
        )

    def _spec(self, **values: Any) -> ModelSpec:
        """Return a spec, whose checks find what two parts of a configuration have of each other."""
        try:
            return ModelSpec(**values)
        except ValueError as error:
            raise CheckpointError(f"{self.where} describes no model: {error}.") from None

    # --- parts ------------------------------------------------------------------------------------

    def _size(self, name: str) -> int:
        if name in self.family.sizes:
            return self.fields.whole(name, self.family.sizes[name])
        return self.fields.whole(name)

    def _intermediate_size(self) -> int:
        if self.family.intermediate_size is not None:
            return self.family.intermediate_size(self.fields)
        return self._size("moe_intermediate_size" if self.num_experts else "intermediate_size")

    def _vision(self) -> VisionSpec | None:
        if self.family.vision is None:
            return None
        directory = self.checkpoint.processor_directory
        settings = None if directory is None else read_settings(directory)
        return self.family.vision(self.checkpoint.config, self.where, self.hidden_size, settings)

    def _head_dim(self) -> int:
        family, fields = self.family, self.fields
        if family.head_dim_needed:
            return fields.whole("head_dim")
        head_dim = fields.whole(
            "head_dim", family.head_dim, optional=family.head_dim_nullable or "head_dim" not in fields
        )
        if head_dim is None and self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"{self.where} has hidden_size={self.hidden_size} for {self.num_heads} heads and no head_dim: "
                "not a multiple."
            )
        return head_dim or self.hidden_size // self.num_heads

    def _embedding_and_head(self) -> tuple[str, str]:
        """Their tensors' names: one where they are tied, which needs both stored equal or only one stored."""
        embedding, head = f"{self.family.prefix}embed_tokens.weight", "lm_head.weight"
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
        """Return True if two stored matrices have the same values; read in blocks, up to the first difference."""
        shape = self.checkpoint.shape(one)
        if self.checkpoint.shape(other) != shape or len(shape) != 2:
            return False
        step = max(1, _BLOCK_VALUES // max(1, shape[1]))
        blocks = (slice(start, start + step) for start in range(0, shape[0], step))
        return all(
            np.array_equal(self.checkpoint.read(one, rows), self.checkpoint.read(other, rows)) for rows in blocks
        )

    def _layer(self, index: int, kind: str, rope: int) -> LayerSpec:
        family = self.family
        if kind == CONVOLUTION:
            return LayerSpec(
                index=index,
                conv_kernel=self.fields.whole("conv_L_cache", family.convolution_kernel),
                conv_bias=self.fields.flag("conv_bias", False),
                prefix=family.prefix,
            )
        return LayerSpec(
            index=index,
            window=self._window() or 0 if kind == SLIDING else 0,
            rope=rope,
            fused=family.fused,
            qk_norm=family.qk_norm or family.wide_qk_norm,
            wide_qk_norm=family.wide_qk_norm,
            pre_norms=family.pre_norms,
            outer_norms=family.outer_norms,
            qkv_bias=self._has(family.qkv_bias),
            output_bias=self._has(family.output_bias),
            mlp_bias=self._has(family.mlp_bias),
            prefix=family.prefix,
            num_experts=self.num_experts,
        )

    def _has(self, bias: str | bool) -> bool:
        return self.fields.flag(bias, False) if isinstance(bias, str) else bias

    def _layer_kinds(self) -> list[str]:
        family, fields, window = self.family, self.fields, self._window()
        given = fields.texts("layer_types")
        kinds = given if family.reads_layer_types else None
        if kinds is None:
            has_none = window is None and (family.window_switch or not family.reads_layer_types)
            kinds = [FULL] * self.num_layers if has_none else family.layer_kinds(fields, self.num_layers)
        if given is not None and given != kinds:  # what it means elsewhere depends on more than the model
            raise UnsupportedModelError(
                f"{self.where} has layer_types other than {sorted(set(kinds))} for all its {self.num_layers} layers, "
                f"which is not supported for {family.architecture}; leave them out."
            )
        known = (FULL, CONVOLUTION if family.convolution_kernel else SLIDING)
        if len(kinds) != self.num_layers or not set(kinds) <= set(known):
            raise UnsupportedModelError(
                f"{self.where} has the layer types {sorted(set(kinds))} for {self.num_layers} layers; "
                f"one of {known[0]} and {known[1]} for each is supported."
            )
        if window is None and SLIDING in kinds:
            raise CheckpointError(f"{self.where} has layers of the type {SLIDING}, but no sliding_window for them.")
        return kinds

    def _window(self) -> int | None:
        """Tokens a layer with a window sees; None: there is no such layer."""
        family, fields = self.family, self.fields
        window = fields.whole("sliding_window", family.sliding_window, optional=True)
        if family.window_switch and not fields.flag(family.window_switch, False):
            return None
        return window if family.layer_kinds is not never else None

    def _ropes(self, kinds: list[str]) -> tuple[tuple[RopeSpec, ...], list[int]]:
        """Return the RoPEs, and the index of each layer's: of its kind where the family has one for each kind."""
        rope_kinds = [FULL, SLIDING] if self.family.local_rope_theta else [FULL]
        ropes = [self._rope(kind) for kind in rope_kinds]
        of_layers = [rope_kinds.index(kind) if kind in rope_kinds else 0 for kind in kinds]
        without = self.family.unrotated(self.fields, kinds)
        if any(without):  # a RoPE that turns nothing
            ropes = [] if all(without) else ropes
            of_layers = [len(ropes) if none else rope for none, rope in zip(without, of_layers, strict=True)]
            ropes.append(RopeSpec(self.head_dim, self.family.rope_theta, "none"))
        return tuple(ropes), of_layers

    def _query_scale_position(self, rope: RopeSpec) -> int:
        """Return the first position whose queries are scaled, and those after it; 0 = none are."""
        if not self.family.scales_queries:
            return 0
        own = Fields(self._rope_values(FULL), f"The RoPE of {self.where}")
        own.whole("original_max_position_embeddings")
        return rope.original_max_position if own.number("llama_4_scaling_beta", zero=True) else 0

    def _rope(self, kind: str) -> RopeSpec:
        family, fields = self.family, self.fields
        values = self._rope_values(kind)
        own = Fields(values, f"The RoPE of {self.where}")
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
                f"{self.where} has partial_rotary_factor={partial:g} of heads of {self.head_dim} values, which is not "
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
            nested = Fields(parameters or {}, f"The rope_parameters of {self.where}")
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
            values = dict(scaling or ((family.default_rope or {}) if parameters is None else parameters))
            if any(isinstance(value, dict) for value in values.values()):
                fields.refuse("rope_scaling" if scaling else "rope_parameters", "one RoPE for all layers")
            name, default = "rope_theta", family.rope_theta
        is_given = "rope_theta" in values
        theta = fields.number(name, default, optional=is_given)  # read in any case: a wrong type is told
        if not is_given:
            values["rope_theta"] = theta
        return values

    def _attention_softcap(self) -> float:
        value = self._softcap("attn_logit_softcapping", self.family.attention_softcap)
        if value and not self.family.caps_attention:
            raise UnsupportedModelError(
                f"{self.where} has attn_logit_softcapping={value:g}, which {self.family.architecture} does not apply "
                "in transformers; set it to null to do the same."
            )
        return value

    def _softcap(self, name: str, default: float | None) -> float:
        if not self.family.has_softcaps:
            return 0.0
        return self.fields.number(name, default, optional=True) or 0.0
