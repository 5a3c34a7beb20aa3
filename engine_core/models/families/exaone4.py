"""EXAONE 4; ``Exaone4Config``. Norms follow attention and MLP, none precedes them; heads of Q and K have norms.

Where layers have windows, those that see every token have no RoPE.
"""

from engine_core.models.families.family import FULL, SLIDING, Family
from engine_core.models.fields import Fields


def layer_kinds(fields: Fields, count: int) -> list[str]:
    """Return the kinds of ``count`` layers, of which each sliding_window_pattern-th sees all tokens."""
    if fields.whole("sliding_window", 4096, optional=True) is None:
        fields.refuse("sliding_window", "layer_types beside it")
    pattern = fields.whole("sliding_window_pattern", 4)
    return [SLIDING if (index + 1) % pattern else FULL for index in range(count)]


def unrotated(fields: Fields, kinds: list[str]) -> list[bool]:
    """Return which layers have no RoPE."""
    has_windows = fields.whole("sliding_window", 4096, optional=True) is not None
    return [has_windows and kind == FULL for kind in kinds]


FAMILY = Family(
    architecture="Exaone4ForCausalLM",
    model_type="exaone4",
    max_position=2048,
    norm_eps=1e-5,
    num_kv_heads=32,
    kv_heads_nullable=False,
    eos_token_id=2,
    sliding_window=4096,
    layer_kinds=layer_kinds,
    reads_layer_types=True,
    unrotated=unrotated,
    qk_norm=True,
    pre_norms=False,
    outer_norms=True,
)
