"""The sizes a chunk of a prompt is rounded up to, of which each has a CUDA graph and its cuBLAS kernels."""

from __future__ import annotations

import pytest

from engine_core.backends.cuda.layout import prefill_rows, round_rows
from engine_core.cuda.kernels.launch_configs import PACKED_ROWS


def test_the_sizes_up_to_512():
    assert prefill_rows(512) == [32, 64, 96, 128, 192, 256, 320, 384, 448, 512]
    assert prefill_rows(40) == [32, 40]


def test_packed_gemm_ends_with_a_size():
    """Else the same tokens would be multiplied one way in a small chunk and another way as part of a rounded one."""
    assert set(PACKED_ROWS) <= set(prefill_rows(512))


@pytest.mark.parametrize("tokens", range(1, 700, 7))
def test_a_size_holds_the_tokens_and_is_its_own(tokens):
    rows = round_rows(tokens)
    assert tokens <= rows < tokens + 64 and round_rows(rows) == rows
    assert rows in prefill_rows(704)
