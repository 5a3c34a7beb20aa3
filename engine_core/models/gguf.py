"""The configuration and the tensor names of a model that comes as GGUF, in Hugging Face's words.

A GGUF file names its architecture and has its sizes under keys that begin with that name; what they mean for a family
is what llama.cpp computes. Everything beyond is read by the family's own reader, as of a config.json.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from engine_core.errors import CheckpointError, UnsupportedModelError
from engine_core.models.families import FAMILIES
from engine_core.models.families.family import FULL, SLIDING, Family, never
from engine_core.models.fields import Fields

_ARCHITECTURE = "general.architecture"
# Parts of a model outside its layers: GGUF's name → ours.
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output.bias": "lm_head.bias",
    "output_norm.weight": "model.norm.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TWO_NORMS = {"ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED = {"ffn_up": "mlp.gate_up_proj"}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)")
# Tensors that are a part of the configuration.
FREQUENCIES = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_CONFIGURING = (FREQUENCIES, LONG_FACTORS, SHORT_FACTORS)
# What another computation would be needed for, unless it is 0.
_REFUSED = (
    "expert_count", "attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "logit_scale",
    "residual_scale", "embedding_scale", "use_parallel_residual", "attention.temperature_scale",
)  # fmt: skip
# llama.cpp scales the queries of these models by hidden_size / heads rather than the size of a head: architecture →
# layers of its largest model.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


class GgufSource(Protocol):
    """The contents of a GGUF file, or of several that are one model."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def label(self) -> str:
        """Its name in messages."""

    def __contains__(self, name: str) -> bool: ...

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str: ...

    def read(self, name: str) -> np.ndarray: ...


def family_of(source: GgufSource) -> Family:
    """Raises UnsupportedModelError for another architecture, CheckpointError without one."""
    architecture = Fields(source.metadata, source.label).text(_ARCHITECTURE)
    for family in FAMILIES:
        if family.gguf and family.gguf == architecture:
            return family
    raise UnsupportedModelError(
        f"{source.label} has the architecture {architecture[:60]!r}, which is not read from GGUF; "
        f"{', '.join(sorted(family.gguf for family in FAMILIES if family.gguf))} are."
    )


def tensor_names(source: GgufSource, family: Family) -> dict[str, str]:
    """Our name of each tensor → GGUF's. Raises UnsupportedModelError for a tensor that the family does not have."""
    layer = _LAYER | (_FOUR_NORMS if family.outer_norms else _TWO_NORMS) | (_FUSED if family.fused else {})
    found = {}
    for name in source.names():
        if name in _CONFIGURING:
            continue
        match = _LAYER_NAME.fullmatch(name)
        if name in _OUTSIDE:
            found[_OUTSIDE[name]] = name
        elif match is not None and match[2] in layer:
            found[f"model.layers.{match[1]}.{layer[match[2]]}.{match[3]}"] = name
        else:
            raise UnsupportedModelError(
                f"{source.label} has the tensor {name[:80]!r}, which {family.architecture} does not have; "
                "models with further parts, such as experts, are not read."
            )
    return found


def config_of(source: GgufSource, family: Family) -> dict[str, Any]:
    """Return the config.json of the model, for ``models.reader``. Raises CheckpointError or UnsupportedModelError."""
    return _Config(source, family).config()


class _Config:
    def __init__(self, source: GgufSource, family: Family) -> None:
        self.source = source
        self.family = family
        self.fields = Fields(source.metadata, source.label)
        self.num_layers = self.fields.whole(self.key("block_count"))
        self.num_heads = self.fields.whole(self.key("attention.head_count"))
        self.hidden_size = self.fields.whole(self.key("embedding_length"))
        self.head_dim = self._head_dim()

    def key(self, name: str) -> str:
        return f"{self.family.gguf}.{name}"

    def config(self) -> dict[str, Any]:
        fields, family, key = self.fields, self.family, self.key
        for name in _REFUSED:
            if np.any(self.source.metadata.get(key(name), 0)):
                raise UnsupportedModelError(
                    f"{self.source.label} has {key(name)}={str(self.source.metadata[key(name)])[:60]}, which is not "
                    f"supported for {family.architecture}."
                )
        embedding = self.source.shape("token_embd.weight") if "token_embd.weight" in self.source else (0,)
        config: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": fields.whole(key("feed_forward_length")),
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": fields.whole(key("attention.head_count_kv"), self.num_heads),
            "head_dim": self.head_dim,
            "vocab_size": embedding[0],
            "max_position_embeddings": fields.whole(key("context_length")),
            "rms_norm_eps": fields.number(key("attention.layer_norm_rms_epsilon"), zero=True),
            "tie_word_embeddings": "output.weight" not in self.source,
            "torch_dtype": self._dtype(),
        }
        for ours, name in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
            if f"tokenizer.ggml.{name}_token_id" in fields:
                config[ours] = fields.count(f"tokenizer.ggml.{name}_token_id")
        for flag, part in (
            (family.qkv_bias, "attn_q"), (family.output_bias, "attn_output"), (family.mlp_bias, "ffn_gate"),
        ):  # fmt: skip
            if isinstance(flag, str):
                has_bias = f"blk.0.{part}.bias" in self.source
                if config.setdefault(flag, has_bias) != has_bias:
                    raise UnsupportedModelError(
                        f"{self.source.label} has biases in some of the matrices of attention, which is not supported "
                        f"for {family.architecture}."
                    )
        return config | self._attention() | self._rope()

    def _head_dim(self) -> int:
        size = self.fields.whole(self.key("attention.key_length"), None, optional=True)
        value_size = self.fields.whole(self.key("attention.value_length"), size, optional=True)
        if size != value_size:
            raise UnsupportedModelError(
                f"{self.source.label} has heads of {size} values in K and of {value_size} in V; equal sizes are "
                "supported."
            )
        if size is None and self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"{self.source.label} has {self.key('embedding_length')}={self.hidden_size} for {self.num_heads} heads "
                f"and no {self.key('attention.key_length')}: not a multiple."
            )
        return size or self.hidden_size // self.num_heads

    def _dtype(self) -> str:
        """Return the type of 16-bit engines: bfloat16 where it is stored, or where values need its range."""
        is_bf16 = any(self.source.dtype(name) == "BF16" for name in self.source.names())
        return "bfloat16" if is_bf16 or self.family.scaled_embedding else "float16"

    def _attention(self) -> dict[str, Any]:
        """Windows, the scale of the queries, and soft caps."""
        fields, family, key = self.fields, self.family, self.key
        found: dict[str, Any] = {}
        if family.attention_scalar is not None:
            by_width = _SCALED_BY_WIDTH.get(family.gguf) == self.num_layers
            found["query_pre_attn_scalar"] = self.hidden_size // self.num_heads if by_width else self.head_dim
        for ours, name in (("attn_logit_softcapping", "attn_logit_softcapping"),
                           ("final_logit_softcapping", "final_logit_softcapping")):  # fmt: skip
            if key(name) in fields:
                found[ours] = fields.number(key(name), zero=True) or None
        window = fields.count(key("attention.sliding_window"), 0)
        if family.window_switch or family.layer_kinds is never:
            if window:
                raise UnsupportedModelError(
                    f"{self.source.label} has {key('attention.sliding_window')}={window}, which llama.cpp does not "
                    f"apply to {family.gguf} either; take it out of the metadata."
                )
        elif window or key("attention.sliding_window") in fields or not family.reads_layer_types:
            found["sliding_window"] = window or None
        pattern = self.source.metadata.get(key("attention.sliding_window_pattern"))
        if isinstance(pattern, list):
            found["layer_types"] = [SLIDING if windowed else FULL for windowed in pattern]
        elif pattern is not None and family.reads_layer_types:
            found["sliding_window_pattern"] = fields.whole(key("attention.sliding_window_pattern"))
        return found

    # --- RoPE -----------------------------------------------------------------------------------------

    def _rope(self) -> dict[str, Any]:
        fields, family, key = self.fields, self.family, self.key
        found: dict[str, Any] = {"rope_theta": fields.number(key("rope.freq_base"), family.rope_theta)}
        if family.local_rope_theta:
            local = fields.number(key("rope.freq_base_swa"), family.local_rope_theta)
            found["rope_local_base_freq"] = local
        rotated = fields.whole(key("rope.dimension_count"), self.head_dim)
        if rotated != self.head_dim:
            found["partial_rotary_factor"] = self._part_of_head(rotated)
        scaling = self._scaling()
        if scaling is not None:
            found["rope_scaling"] = scaling
        original = fields.whole(key("rope.scaling.original_context_length"), None, optional=True)
        if original is not None and family.original_max_position is not None:
            found["original_max_position_embeddings"] = original
        return found

    def _part_of_head(self, rotated: int) -> float:
        """Return a factor that gives ``rotated`` values of a head again, rounded down."""
        if rotated > self.head_dim:
            raise CheckpointError(
                f"{self.source.label} has {self.key('rope.dimension_count')}={rotated} for heads of {self.head_dim}."
            )
        factor = rotated / self.head_dim
        return factor if int(self.head_dim * factor) == rotated else math.nextafter(factor, 1)

    def _scaling(self) -> dict[str, Any] | None:
        """rope_scaling, or None. Factors of single frequencies are what ``longrope`` has."""
        fields, key = self.fields, self.key
        kind = fields.text(key("rope.scaling.type"), "none")
        attention = fields.number(key("rope.scaling.attn_factor"), 1.0)
        if LONG_FACTORS in self.source or SHORT_FACTORS in self.source:
            return self._long_rope(kind)
        if FREQUENCIES in self.source:
            if kind != "none":
                raise UnsupportedModelError(
                    f"{self.source.label} has both {FREQUENCIES} and the RoPE scaling {kind!r}; one is supported."
                )
            factors = self._factors(FREQUENCIES)
            if all(factor == 1 for factor in factors):
                return None
            length = fields.whole(key("context_length"))
            return {
                "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
                "original_max_position_embeddings": length,
            }  # fmt: skip
        factor = fields.number(key("rope.scaling.factor"), fields.number(key("rope.scale_linear"), 1.0, zero=True),
                               zero=True)  # fmt: skip
        if kind == "none" and key("rope.scaling.type") not in fields and factor not in (0, 1):
            kind = "linear"
        if kind == "none" or (kind == "linear" and factor in (0, 1)):
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind != "yarn":
            raise UnsupportedModelError(
                f"{self.source.label} has the RoPE scaling {kind[:60]!r}, which is not read; none, linear, yarn and "
                "factors in tensors are."
            )
        values: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
        if key("rope.scaling.original_context_length") in fields:
            values["original_max_position_embeddings"] = fields.whole(key("rope.scaling.original_context_length"))
        for ours in ("beta_fast", "beta_slow"):
            if key(f"rope.scaling.yarn_{ours}") in fields:
                values[ours] = fields.number(key(f"rope.scaling.yarn_{ours}"))
        if attention != 1.0:  # llama.cpp multiplies YaRN's own factor by it
            values["attention_factor"] = attention * (0.1 * math.log(max(factor, 1.0)) + 1.0)
        return values

    def _long_rope(self, kind: str) -> dict[str, Any]:
        fields, key = self.fields, self.key
        if kind not in ("none", "longrope", "yarn", "linear"):
            raise UnsupportedModelError(f"{self.source.label} has the RoPE scaling {kind[:60]!r}, which is not read.")
        for name in (LONG_FACTORS, SHORT_FACTORS):
            if name not in self.source:
                raise CheckpointError(f"{self.source.label} has no {name}, but the other one of the two.")
        found: dict[str, Any] = {
            "rope_type": "longrope",
            "short_factor": self._factors(SHORT_FACTORS),
            "long_factor": self._factors(LONG_FACTORS),
        }
        if key("rope.scaling.attn_factor") in fields:
            found["attention_factor"] = fields.number(key("rope.scaling.attn_factor"))
        return found

    def _factors(self, name: str) -> list[float]:
        shape = self.source.shape(name)
        if len(shape) != 1 or shape[0] > self.head_dim:
            raise CheckpointError(
                f"{self.source.label} has {name} of the shape {list(shape)}, not one for a frequency."
            )
        return [float(value) for value in self.source.read(name)]
