"""How packed products are spread: what gemm_packed.cu takes for granted, for GPUs from an Orin Nano to an H200."""

from __future__ import annotations

import pytest

from engine_core.cuda.kernels import int4_layout, int8_layout
from engine_core.cuda.kernels.linear_packed import PACKED_TOKENS, gemm_shape, packed_scratch

GPUS = [(8, 166912), (16, 166912), (20, 101376), (20, 232448), (46, 101376), (128, 101376), (132, 232448)]
MATRICES = [(16, 128), (48, 384), (528, 4864), (1152, 896), (3072, 2048), (4096, 14336), (28672, 4096), (70000, 128)]


@pytest.mark.parametrize("num_sms, max_shared", GPUS)
@pytest.mark.parametrize("rows, cols", MATRICES)
@pytest.mark.parametrize("layout", [int4_layout, int8_layout], ids=["int4", "int8"])
def test_a_spread_fits_the_gpu_and_covers_the_matrix(layout, rows, cols, num_sms, max_shared):
    tiles, groups, record_bytes = layout.records_shape(rows, cols)
    shape = gemm_shape(tiles, groups, record_bytes, num_sms, max_shared)
    bands, ctas, own_groups = -(-tiles // 2), shape.ctas(tiles), -(-groups // shape.splits)
    assert shape.shared(record_bytes) + 1024 <= max_shared
    assert 1 <= shape.row_warps * shape.k_warps <= 16
    assert -(-bands // ctas) <= shape.row_warps and ctas <= bands
    assert shape.stage % shape.k_warps == 0
    assert shape.buffers == 2 or own_groups <= shape.stage
    assert shape.splits <= groups  # each CTA has columns
    sums, counters = packed_scratch([(rows, cols)], 70, num_sms)
    tokens = -(-70 // PACKED_TOKENS) * PACKED_TOKENS
    assert shape.splits == 1 or (sums >= shape.splits * rows * tokens and counters >= tiles * tokens // PACKED_TOKENS)


def test_a_large_matrix_keeps_every_multiprocessor_of_an_h200_busy():
    for rows, cols in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (16384, 2048), (2048, 8192)):
        tiles, groups, record_bytes = int4_layout.records_shape(rows, cols)
        shape = gemm_shape(tiles, groups, record_bytes, 132, 232448)
        assert 0.9 * 132 <= shape.ctas(tiles) * shape.splits <= 132
