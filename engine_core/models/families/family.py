"""A model family as data: the defaults of its configuration class and the traits of its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine_core.models.fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"


def never(fields: Fields, count: int) -> list[str]:
    """Return the kinds of ``count`` layers that all see every token."""
    return [FULL] * count


def always(fields: Fields, count: int) -> list[str]:
    """Return the kinds of ``count`` layers that all have the window."""
    return [SLIDING] * count


@dataclass(frozen=True)
class Family:
    """Defaults are those of the family's configuration class in transformers, for fields that config.json lacks."""

    architecture: str
    model_type: str
    max_position: int
    norm_eps: float = 1e-6
    num_kv_heads: int | None = None  # None: as many as heads
    kv_heads_nullable: bool = True
    head_dim: int | None = None  # None: hidden_size / heads
    head_dim_nullable: bool = False
    tied: bool = False
    eos_token_id: int | None = None
    activation_field: str = "hidden_act"
    activation: str = "silu"
    # Windows
    sliding_window: int | None = None
    window_switch: str = ""  # the flag without which there is no window
    layer_kinds: Callable[[Fields, int], list[str]] = never  # without layer_types
    reads_layer_types: bool = False
    # Biases: a flag of config.json, or whether the family has them
    qkv_bias: str | bool = False
    output_bias: str | bool = False
    mlp_bias: str | bool = False
    # RoPE
    rope_theta: float = 10000.0
    local_rope_theta: float = 0.0  # of layers with a window, where they have their own
    partial_rotary: bool = False
    original_max_position: int | None = None  # default of a field beside the RoPE's own, which it overrides
    rope_kinds: tuple[str, ...] = ("default", "linear", "llama3", "yarn", "longrope")
    rope_names: tuple[tuple[str, str], ...] = ()  # earlier names
    # GGUF
    gguf: str = ""  # the architecture that such files name; "" = none does
    gguf_pairs_rows: bool = (
        False  # rows of Q and K that RoPE turns together lie side by side there, not half a head apart
    )
    # Layers
    fused: bool = False  # one tensor for Q, K and V, one for gate and up
    qk_norm: bool = False
    outer_norms: bool = False  # after attention and after the MLP, too
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    attention_scalar: int | None = None  # default of query_pre_attn_scalar; None: the head size
    has_softcaps: bool = False
    caps_attention: bool = False  # has_softcaps of the logits does not say so
    attention_softcap: float | None = None
    logits_softcap: float | None = None
