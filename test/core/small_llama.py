"""A small Llama for tests of several sequences: its configuration, prompts and requests."""

from __future__ import annotations

import numpy as np

from batch_steps import Requests
from engine_core.request import SamplingParams

VOCAB, CONTEXT = 320, 128
CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", eos_token_id=2, hidden_size=64,
    intermediate_size=160, num_hidden_layers=2, vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, rms_norm_eps=1e-5, max_position_embeddings=256, rope_theta=10000.0, tie_word_embeddings=False,
)  # fmt: skip
MASK = np.zeros(VOCAB // 32, dtype=np.uint32)
MASK[2:5] = 0x0F0F0F0F
# The sampling of each prompt, with a mask or without.
REQUESTS = [
    (SamplingParams(seed=0), None),
    (SamplingParams(seed=7, temperature=1.0, top_p=0.9), None),
    (SamplingParams(seed=7, temperature=2.0, top_k=40, repetition_penalty=1.4), MASK),
    (SamplingParams(seed=1, repetition_penalty=1.3, logit_bias=((9, 2.0), (11, -np.inf))), None),
]
PROMPTS = [np.random.default_rng(i).integers(3, VOCAB, 5 + 13 * i).astype(np.int32) for i in range(4)]
COUNT = 24
_ALL = Requests(PROMPTS, REQUESTS, COUNT)
alone, together = _ALL.alone, _ALL.together
