"""The sizes a chunk of a prompt is rounded up to, of which each has a CUDA graph and its cuBLAS kernels."""

from __future__ import annotations

import pytest

from engine_core.backends.cuda_layout import prefill_rows, round_rows
from engine_core.kernels.attention import AttentionShape, prefill_spread


def test_the_sizes_up_to_512():
    assert prefill_rows(512) == [32, 64, 96, 128, 192, 256, 320, 384, 448, 512]
    assert prefill_rows(1) == [32]


@pytest.mark.parametrize("tokens", range(1, 700, 7))
def test_a_size_holds_the_tokens_and_is_its_own(tokens):
    rows = round_rows(tokens)
    assert tokens <= rows < tokens + 64 and round_rows(rows) == rows
    assert rows in prefill_rows(700)


@pytest.mark.parametrize("num_sms", [8, 16, 132])
def test_the_size_decides_as_its_tokens_would(num_sms):
    shape = AttentionShape(32, 8, 128, 4096)
    for tokens in range(1, 700):
        of_rows, of_tokens = (prefill_spread(shape, n, num_sms, 166912) for n in (round_rows(tokens), tokens))
        assert of_rows == of_tokens
