"""Small random checkpoints of each architecture, with the odd sizes and traits that real ones have."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SIZES = dict(vocab_size=331, hidden_size=96, intermediate_size=208, num_hidden_layers=3, max_position_embeddings=256)
SIZES |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def _rope(kind: str = "default", theta: float = 10000.0, **values) -> dict:
    return {"rope_type": kind, "rope_theta": theta, **values}


_LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
_FACTORS = [1.0 + 0.3 * i for i in range(16)]

# name → (architecture, config class, config values). head_dim is never hidden_size / heads where the family allows it.
CASES: dict[str, tuple[str, str, dict]] = {
    "llama3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        dict(
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            rope_parameters=_rope("llama3", 500.0, **_LLAMA3),
        ),
    ),
    "llama-tied-bias": (
        "LlamaForCausalLM",
        "LlamaConfig",
        dict(
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=16,
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=_rope("linear", factor=4.0),
        ),
    ),
    "llama-yarn": (
        "LlamaForCausalLM",
        "LlamaConfig",
        dict(
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=48,
            rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=64),
        ),
    ),
    "mistral-window": (
        "MistralForCausalLM",
        "MistralConfig",
        dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=11),
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        dict(num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=_rope(theta=1e6)),
    ),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        dict(
            num_attention_heads=6,
            num_key_value_heads=1,
            use_sliding_window=True,
            sliding_window=9,
            max_window_layers=1,
        ),
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        dict(num_attention_heads=5, num_key_value_heads=1, head_dim=24, tie_word_embeddings=True),
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            sliding_window=10,
            query_pre_attn_scalar=40,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=2.0,
        ),
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        dict(
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=48,
            sliding_window=8,
            query_pre_attn_scalar=48,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": _rope("linear", 1e6, factor=8.0),
                "sliding_attention": _rope(theta=10000.0),
            },
        ),
    ),
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        dict(num_attention_heads=6, num_key_value_heads=3, sliding_window=13, original_max_position_embeddings=256),
    ),
    "phi3-longrope": (
        "Phi3ForCausalLM",
        "Phi3Config",
        dict(
            hidden_size=128,
            num_attention_heads=2,
            num_key_value_heads=1,
            original_max_position_embeddings=64,
            rope_parameters=_rope(
                "longrope",
                short_factor=_FACTORS,
                long_factor=[2 * f for f in _FACTORS],
                partial_rotary_factor=0.5,
            ),
        ),
    ),
    "smollm3": (
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        dict(
            num_attention_heads=6,
            num_key_value_heads=2,
            no_rope_layers=[1, 0, 1],
            use_sliding_window=True,
            sliding_window=12,
            attention_bias=True,
        ),
    ),
    "olmo2": (
        "Olmo2ForCausalLM",
        "Olmo2Config",
        dict(num_attention_heads=4, num_key_value_heads=2, rope_parameters=_rope(theta=5e5)),
    ),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        dict(
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            embedding_multiplier=12.0,
            attention_multiplier=0.3,
            residual_multiplier=0.22,
            logits_scaling=0.7,
            mlp_bias=True,
        ),
    ),
    "exaone4": (
        "Exaone4ForCausalLM",
        "Exaone4Config",
        dict(num_attention_heads=6, num_key_value_heads=3, sliding_window=10, sliding_window_pattern=2),
    ),
    "exaone": (
        "LlamaForCausalLM",
        "ExaoneConfig",
        dict(num_attention_heads=6, num_key_value_heads=2, rope_parameters=_rope("llama3", 500.0, **_LLAMA3)),
    ),
    "ministral": (
        "MinistralForCausalLM",
        "MinistralConfig",
        dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            sliding_window=9,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
    ),
    "ministral3": (
        "Ministral3ForCausalLM",
        "Ministral3Config",
        dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=True,
            rope_parameters=_rope(
                "yarn",
                1e6,
                factor=4.0,
                original_max_position_embeddings=64,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.1,
            ),
        ),
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        dict(
            num_attention_heads=6,
            num_key_value_heads=2,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            moe_intermediate_size=48,
        ),
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        dict(
            num_attention_heads=6,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention", "conv"],
            rope_parameters=_rope(theta=5e5),
        ),
    ),
    "lfm2-odd": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        dict(
            hidden_size=90,
            intermediate_size=150,
            num_attention_heads=3,
            num_key_value_heads=1,
            layer_types=["conv", "conv", "full_attention"],
            block_multiple_of=7,
            block_ffn_dim_multiplier=1.3,
            conv_L_cache=5,
            conv_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    "llama-odd": (  # nothing is a multiple of what kernels read at once
        "LlamaForCausalLM",
        "LlamaConfig",
        dict(hidden_size=90, intermediate_size=150, num_attention_heads=6, num_key_value_heads=2, head_dim=8),
    ),
    "phi3-odd": (
        "Phi3ForCausalLM",
        "Phi3Config",
        dict(
            hidden_size=80,
            num_attention_heads=2,
            num_key_value_heads=1,
            original_max_position_embeddings=256,
            rope_parameters=_rope(partial_rotary_factor=0.6),
        ),
    ),
}

try:
    import transformers
except ImportError:
    pass
else:  # those of families that this version has
    CASES = {name: case for name, case in CASES.items() if hasattr(transformers, case[1])}

# Cases whose traits others have, too: where each case costs much, these add nothing.
ALIKE = frozenset({"exaone", "exaone4", "smollm3", "ministral", "ministral3"})
DISTINCT = sorted(CASES.keys() - ALIKE - {"qwen3-moe"})
ALL_ATTENTION = [name for name in DISTINCT if CASES[name][0] != "Lfm2ForCausalLM"]  # no other kind of layer


def write(directory: Path, name: str, *, shard_size: str = "1GB", dtype: str = "float32", **overrides) -> Path:
    """Writes the random checkpoint of case ``name``; norm weights and biases are random too."""
    import torch
    import transformers

    architecture, config_class, values = CASES[name]
    config = getattr(transformers, config_class)(**{**SIZES, **values, **overrides})
    torch.manual_seed(7)
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.09
            base = 1.0 if "norm" in parameter_name and "gemma" not in name else 0.0
            parameter.normal_(base, scale)
    model.to(getattr(torch, dtype)).save_pretrained(str(directory), max_shard_size=shard_size)
    return directory


def reference(directory: Path):
    """The checkpoint in transformers, float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def reference_logits(model, token_ids: np.ndarray) -> np.ndarray:
    """float32 [n, vocab] for token ids [n], in one pass."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0].numpy()


def reference_greedy(model, token_ids: np.ndarray, count: int) -> list[int]:
    """``count`` tokens after ``token_ids``, end-of-sequence tokens like any other."""
    ids = list(token_ids)
    for _ in range(count):
        ids.append(int(reference_logits(model, np.array(ids))[-1].argmax()))
    return ids[len(token_ids) :]
