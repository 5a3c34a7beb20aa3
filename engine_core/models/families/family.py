"""A model family as data: the defaults of its configuration class and the traits of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from engine_core.models.fields import Fields

if TYPE_CHECKING:
    from engine_core.models.vision import VisionSpec
    from engine_core.vision.preprocess import ImageSettings

FULL, SLIDING, CONVOLUTION = "full_attention", "sliding_attention", "conv"


def never(fields: Fields, count: int) -> list[str]:
    """Return the kinds of ``count`` layers that all see every token."""
    return [FULL] * count


def always(fields: Fields, count: int) -> list[str]:
    """Return the kinds of ``count`` layers that all have the window."""
    return [SLIDING] * count


def rotated(fields: Fields, kinds: list[str]) -> list[bool]:
    """Return that no layer is without RoPE."""
    return [False] * len(kinds)


class VisionReader(Protocol):
    """Reads the encoder of a model that sees from its config.json; ``out_size``: of the decoder's hidden states."""

    def __call__(
        self, config: Mapping[str, Any], where: str, out_size: int, settings: ImageSettings | None
    ) -> VisionSpec: ...


@dataclass(frozen=True)
class Family:
    """Defaults are those of the family's configuration class in transformers, for fields that config.json lacks."""

    architecture: str
    model_type: str
    max_position: int
    written_as: str = ""  # the architecture that transformers writes beside model_type, where it is another
    sizes: Mapping[str, int] = field(default_factory=dict)  # fields that real checkpoints leave to the class
    field_names: tuple[tuple[str, str], ...] = ()  # its own names of fields, and those of other families
    tensor_names: tuple[tuple[str, str], ...] = ()  # patterns of its own names of tensors, and what takes their place
    norm_eps: float = 1e-6
    num_kv_heads: int | None = None  # None: as many as heads
    kv_heads_nullable: bool = True
    head_dim: int | None = None  # None: hidden_size / heads
    head_dim_nullable: bool = False
    head_dim_needed: bool = False  # transformers has no head size where config.json has none
    tied: bool = False
    eos_token_id: int | None = None
    activation_field: str = "hidden_act"  # "": no field says it
    activation: str = "silu"
    # Windows
    sliding_window: int | None = None
    window_switch: str = ""  # the flag without which there is no window
    layer_kinds: Callable[[Fields, int], list[str]] = never  # without layer_types
    reads_layer_types: bool = False
    convolution_kernel: int = 0  # default of conv_L_cache, where some layers have a short convolution; 0 = none has
    intermediate_size: Callable[[Fields], int] | None = None  # where the field does not say it by itself
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
    default_rope: Mapping[str, Any] | None = None  # rope_parameters where config.json has none
    unrotated: Callable[[Fields, list[str]], list[bool]] = rotated  # the layers without RoPE, from the kinds of all
    scales_queries: bool = False  # by their positions, as rope_parameters say
    # GGUF
    gguf: str = ""  # the architecture that such files name; "" = none does
    gguf_pairs_rows: bool = (
        False  # rows of Q and K that RoPE turns together lie side by side there, not half a head apart
    )
    # Models that see
    text_type: str = (
        ""  # the model_type of text_config, in which the decoder's fields stand; "" = in config.json itself
    )
    prefix: str = "model."  # of the decoder's tensors
    vision: VisionReader | None = None
    # Layers
    fused: bool = False  # one tensor for Q, K and V, one for gate and up
    qk_norm: bool = False
    wide_qk_norm: bool = False  # the norms of Q and K are over all heads
    pre_norms: bool = True  # before attention and before the MLP
    outer_norms: bool = False  # after attention and after the MLP
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    attention_scalar: int | None = None  # default of query_pre_attn_scalar; None: the head size
    has_softcaps: bool = False
    caps_attention: bool = False  # has_softcaps of the logits does not say so
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    experts: Callable[[Fields, int], int] | None = None  # of the layers, of which there are so many; None: none has any
    has_multipliers: bool = False  # of embedding, attention, residual sums and logits


@dataclass(frozen=True)
class TextPart:
    """A model that also takes images, of which the text model is run: ``text_config`` in its config.json."""

    architecture: str
    model_type: str
    text_types: tuple[str, ...]  # model types that the text model may have; the first where it names none
