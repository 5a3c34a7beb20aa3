"""How prefill attention is spread: what fits a GPU, and what was the fastest where it was measured."""

from __future__ import annotations

import pytest

from engine_core.cuda.kernels.attention import AttentionShape, PrefillSpread, prefill_spread

H200, A100, ORIN, THOR, RTX_4060, RTX_4090 = (
    (132, 232448),
    (108, 166912),
    (16, 166912),
    (20, 232448),
    (24, 101376),
    (128, 101376),
)


def _spread(gpu: tuple[int, int], count: int, heads: int = 32, head_dim: int = 128, kv_int8: bool = False):
    num_sms, max_shared = gpu
    shape = AttentionShape(heads, heads, head_dim, 8192, kv_int8=kv_int8)
    return prefill_spread(shape, count, num_sms, max_shared)


@pytest.mark.parametrize("gpu", [H200, A100, ORIN, THOR, RTX_4060, RTX_4090])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("kv_int8", [False, True])
def test_a_spread_fits_the_gpu(gpu, head_dim, kv_int8):
    for heads in (1, 4, 16, 32):
        for count in (1, 64, 65, 128, 200, 512, 2048):
            spread = _spread(gpu, count, heads, head_dim, kv_int8)
            assert spread.shared(head_dim, kv_int8) <= gpu[1]
            assert spread.threads <= 256  # with 255 registers each they take a multiprocessor's 65,536
            assert spread.tile_keys % 16 == 0


@pytest.mark.parametrize(
    "gpu, count, expected",
    [
        (H200, 32, (1, 1, 4, 32)),
        (H200, 64, (1, 1, 4, 32)),
        (H200, 128, (4, 1, 2, 64)),
        (H200, 256, (4, 1, 2, 64)),
        (H200, 512, (4, 2, 2, 64)),
        (H200, 2048, (4, 2, 1, 64)),
        (A100, 64, (4, 1, 1, 64)),  # more CTAs of 16 queries than multiprocessors
        (ORIN, 16, (4, 1, 1, 64)),
        (ORIN, 64, (4, 1, 1, 64)),
        (ORIN, 128, (4, 2, 1, 32)),  # two CTAs with tiles of 64 keys would not fit a multiprocessor
        (ORIN, 512, (4, 2, 1, 32)),
        (THOR, 512, (4, 2, 1, 64)),
        (RTX_4060, 64, (4, 1, 1, 64)),
        (RTX_4060, 512, (8, 1, 1, 64)),
        (RTX_4090, 512, (8, 1, 1, 64)),
        (RTX_4090, 64, (1, 1, 4, 16)),  # nor tiles of 32 keys for four groups
        (RTX_4090, 128, (4, 1, 1, 64)),  # two groups would not fit
    ],
)
def test_the_spread_of_32_heads_of_128(gpu, count, expected):
    assert _spread(gpu, count) == PrefillSpread(*expected)


def test_other_models():
    assert _spread(H200, 32, kv_int8=True) == PrefillSpread(1, 1, 8, 16)
    assert _spread(RTX_4090, 32, kv_int8=True) == PrefillSpread(1, 1, 4, 16)
    assert _spread(ORIN, 64, head_dim=64) == PrefillSpread(4, 1, 2, 64)  # two CTAs of two groups fit
    assert _spread(ORIN, 64, heads=4) == PrefillSpread(1, 1, 4, 32)


def test_heads_of_256_take_one_block_a_warp():
    assert _spread(H200, 512, heads=32, head_dim=256) == PrefillSpread(8, 1, 1, 32)
    assert _spread(ORIN, 512, heads=8, head_dim=256) == PrefillSpread(8, 1, 1, 32)
