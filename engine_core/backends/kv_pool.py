"""The size of the KV pool, the one place beside the KV cache where a backend keeps the KV of prefixes.

The pool is laid out as a slot of the cache is, only longer: a row for each layer, kind (K, V) and head, and in it a
place for each token. What is in which place is the business of ``engine_core.serving.session_pool``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from engine_core.errors import ConfigurationError
from engine_core.memory import format_bytes

if TYPE_CHECKING:
    from engine_core.config import EngineConfig

BLOCK_TOKENS = 16  # tokens that are given out together
STATE_TOKENS = 64  # places for each state of a conversation, where the layers of a model keep states
NUM_MARKS = 2  # states that a slot keeps of the sequence in it: of the end of what prompts share, and of the prompt
STATES_KEPT = 2  # of a conversation at most: at the end of its prompt, and at its own


def pool_tokens(config: EngineConfig, max_context: int, token_bytes: float, state_bytes: int = 0) -> int:
    """Return the places of the pool: for the system prompts, and as many more as fit in ``session_memory``.

    ``token_bytes``: of the KV of a token, scales included; ``state_bytes``: of the states of a sequence. Raises
    ConfigurationError if ``session_memory`` is too small for one conversation of ``max_context`` tokens.
    """
    prompts = _prompt_tokens(config, max_context)
    if not config.session_memory:
        return prompts
    token_bytes += state_bytes / STATE_TOKENS
    memory = max(0, (config.session_memory << 20) - STATES_KEPT * state_bytes)
    sessions = int(memory / token_bytes) // BLOCK_TOKENS * BLOCK_TOKENS
    if sessions < max_context:
        needed = in_blocks(max_context) * token_bytes + STATES_KEPT * state_bytes
        raise ConfigurationError(
            f"session_memory is {config.session_memory} MiB, which holds the KV of {sessions} tokens, but one "
            f"conversation of max_context {max_context} tokens takes {format_bytes(math.ceil(needed))}; set it to "
            f"{math.ceil(needed / 2**20)} or more, lower max_context, or set it to 0 to keep no conversations."
        )
    return prompts + sessions


def state_places(config: EngineConfig, max_context: int, num_tokens: int) -> int:
    """Return the places for states in a pool of ``num_tokens``: a state for each system prompt, and those of
    conversations."""
    sessions = num_tokens - _prompt_tokens(config, max_context)
    return config.prompt_cache_entries + (STATES_KEPT + sessions // STATE_TOKENS if config.session_memory else 0)


def _prompt_tokens(config: EngineConfig, max_context: int) -> int:
    return config.prompt_cache_entries * in_blocks(min(config.prompt_cache_tokens, max_context))


def in_blocks(tokens: int) -> int:
    """Return ``tokens`` rounded up to whole blocks."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
