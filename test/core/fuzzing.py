"""Settings that the fuzz tests share. EDGELLM_FUZZ_EXAMPLES sets how many cases each tries (a few by default)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from engine_core.errors import EdgeLLMError


def _settings(few: int) -> settings:
    count = int(os.environ.get("EDGELLM_FUZZ_EXAMPLES", few))
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)


fuzz = _settings(60)
fuzz_slow = _settings(10)  # where a case takes a tenth of a second

# Texts with lone surrogates, control characters, and every plane of Unicode.
any_text = st.text(st.characters(codec=None, exclude_categories=()), max_size=40)


def refusal(call, *arguments, **options) -> EdgeLLMError | None:
    """Return what the call was refused with, which is one sentence; None if it worked. Anything else is raised."""
    try:
        call(*arguments, **options)
    except EdgeLLMError as error:
        assert str(error) and "\n" not in str(error), error
        return error
    return None
