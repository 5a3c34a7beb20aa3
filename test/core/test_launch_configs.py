"""Launch configurations: what the table gives for GPUs that were measured, and what the kernels take for granted.

The sizes of shared memory and the numbers of SMs are those of GPUs from an Orin Nano to an H200.
"""

from __future__ import annotations

import pytest

from engine_core.cuda.kernels import fp8_layout, int4_layout, int8_layout, nvfp4_layout
from engine_core.cuda.kernels.launch_configs import (
    BATCH_TOKENS,
    GEMM_TOKENS,
    PACKED_ROWS,
    DecodeAttentionConfig,
    DecodeAttentionProblem,
    GemvConfig,
    GemvProblem,
    Gpu,
    LaunchConfigs,
    PackedGemmProblem,
    PackedGemvConfig,
    PackedGemvProblem,
    PackedRowsConfig,
    PackedRowsProblem,
    PrefillAttentionConfig,
    PrefillAttentionProblem,
    gemm_splits,
    max_decode_splits,
    table_numbers,
)
from engine_core.cuda.kernels.linear_packed import packed_scratch

H200 = Gpu("H200", 90, 132, 232448)
H100_PCIE = Gpu("H100 PCIe", 90, 114, 232448)
A100 = Gpu("A100", 80, 108, 166912)
ORIN = Gpu("AGX Orin", 87, 16, 166912)
ORIN_32GB = Gpu("AGX Orin 32GB", 87, 14, 166912)
ORIN_NANO = Gpu("Orin Nano", 87, 8, 166912)
THOR = Gpu("Thor", 110, 20, 232448)
RTX_4060 = Gpu("RTX 4060", 89, 24, 101376)
RTX_4090 = Gpu("RTX 4090", 89, 128, 101376)
GPUS = [H200, H100_PCIE, A100, ORIN, ORIN_32GB, ORIN_NANO, THOR, RTX_4060, RTX_4090]
MATRICES = [(16, 128), (48, 384), (528, 4864), (1152, 896), (3072, 2048), (4096, 14336), (28672, 4096), (70000, 128)]
TILE_BYTES = {4: [int4_layout.TILE_BYTES, nvfp4_layout.TILE_BYTES], 8: [int8_layout.TILE_BYTES]}
TILE_BYTES[8] += [fp8_layout.ROWS.TILE_BYTES, fp8_layout.GROUPS.TILE_BYTES]
KINDS = [(bits, which) for bits, sizes in TILE_BYTES.items() for which in range(len(sizes))]
STATIC_SHARED = 12 * 1024  # bytes that kernels declare themselves, at most


def rule(problem, gpu: Gpu):
    return LaunchConfigs(gpu).lookup(problem)


def packed(rows: int, cols: int, bits: int, which: int = 0) -> tuple[int, int, int, int]:
    """``which``: of TILE_BYTES[bits]."""
    return -(-rows // 16), -(-cols // 128), TILE_BYTES[bits][which], bits


def in_16_bits(rows: int, cols: int) -> tuple[int, int, int, int]:
    return rows // 16, cols // 128, 16 * 128 * 2, 16


# --- the table ------------------------------------------------------------------------------------------


def test_the_table_lists_what_was_measured():
    listed = [gpu for gpu in GPUS if table_numbers(gpu) is not None]
    assert listed == [H200, H100_PCIE]
    assert table_numbers(Gpu("a slice of an H100", 90, 16, 232448)) is None
    assert LaunchConfigs(H200).in_table and not LaunchConfigs(ORIN).in_table


def test_the_decode_step_of_an_8b_on_an_h200():
    """Chosen by a search over 10 to 30 configurations each; another choice is a change of speed to be measured."""
    for matrix, wide, four, eight in (
        ((6144, 4096), (8, 2, 2, 3, 2), (4, 4, 3), (8, 1, 4)),
        ((4096, 4096), (8, 2, 2, 3, 2), (8, 2, 3), (8, 1, 4)),
        ((28672, 4096), (8, 2, 2, 3, 2), (2, 8, 3), (8, 1, 4)),
        ((4096, 14336), (8, 1, 1, 3, 2), (7, 2, 3), (8, 1, 4)),
        ((128256, 4096), (8, 2, 2, 3, 2), (2, 8, 3), (8, 1, 4)),
    ):
        assert rule(GemvProblem(*matrix), H200) == GemvConfig(*wide), matrix
        assert rule(PackedGemvProblem(*packed(*matrix, 4)), H200) == PackedGemvConfig(*four), matrix
        assert rule(PackedGemvProblem(*packed(*matrix, 8)), H200) == PackedGemvConfig(*eight), matrix
    attention = DecodeAttentionProblem(32, 8, 128, False, False)
    assert rule(attention, H200) == DecodeAttentionConfig(splits=16, min_keys=256, warps=8, depth=3)
    assert rule(PackedRowsProblem(4096, 14336, 6144, 4), H200) == PackedRowsConfig(96)
    assert rule(PackedRowsProblem(2048, 8192, 3072, 4), H200) == PackedRowsConfig(64)


def test_what_was_chosen_is_looked_up():
    configs, problem = LaunchConfigs(ORIN), GemvProblem(64, 64)
    before, other = configs.lookup(problem), GemvConfig(1, 2, 1, 5)
    with configs.trying(problem, other):
        assert configs.lookup(problem) == other
    assert configs.lookup(problem) == before != other
    configs.choose(problem, other)
    assert configs.lookup(problem) == other
    assert configs.lookup(GemvProblem(64, 72)) == LaunchConfigs(ORIN).lookup(GemvProblem(64, 72))


def test_problems_that_are_looked_up_are_noted_in_order_and_once():
    configs = LaunchConfigs(ORIN)
    problems = [GemvProblem(64, 64), PackedRowsProblem(1, 2, 3, 4), GemvProblem(64, 64)]
    with configs.noting() as noted:
        for problem in problems:
            configs.lookup(problem)
    configs.lookup(GemvProblem(8, 8))
    assert list(noted) == problems[:2]


# --- candidates -----------------------------------------------------------------------------------------


def all_problems():
    """Yield problems of every kind, of the shapes of models."""
    for matrix in MATRICES:
        yield GemvProblem(*matrix)
        for kind in KINDS:
            yield PackedGemvProblem(*packed(*matrix, *kind))
            yield PackedGemmProblem(*packed(*matrix, *kind))
    for heads, kv_heads, head_dim in ((32, 8, 128), (32, 8, 64), (14, 2, 64), (8, 1, 256), (3, 3, 16), (8, 4, 96)):
        for kv_int8 in (False, True):
            yield DecodeAttentionProblem(heads, kv_heads, head_dim, False, kv_int8)
            for rows in (1, 32, 64, 128, 512, 2048):
                yield PrefillAttentionProblem(heads, kv_heads, head_dim, kv_int8, rows)
    yield PackedRowsProblem(4096, 14336, 6144, 4)
    for tokens in BATCH_TOKENS:
        yield PackedGemmProblem(*packed(6144, 4096, 4), 0, tokens)
        yield PackedGemmProblem(*in_16_bits(6144, 4096), 0, tokens)
        yield DecodeAttentionProblem(32, 8, 128, False, False, tokens)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_candidates_begin_with_the_rule_differ_and_are_few(gpu):
    for problem in all_problems():
        candidates = problem.candidates(gpu)
        assert candidates[0] == rule(problem, gpu)
        assert len(set(candidates)) == len(candidates) <= 9
        assert all(isinstance(config, problem.config_type) for config in candidates)


def test_there_is_something_to_choose_from_on_an_orin():
    for problem in (
        GemvProblem(6144, 4096),
        PackedGemvProblem(*packed(6144, 4096, 4)),
        PackedGemmProblem(*packed(6144, 4096, 4)),
        DecodeAttentionProblem(32, 8, 128, False, False),
        PrefillAttentionProblem(32, 8, 128, False, 128),
    ):
        assert len(problem.candidates(ORIN_NANO)) >= 3, problem


def test_keys_name_every_field():
    keys = [problem.key for problem in all_problems()]
    assert len(set(keys)) == len(keys)
    assert GemvProblem(8, 16, 2, True).key == "GemvProblem(rows=8, cols=16, epilogue=2, normed=True)"


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("rows, cols", MATRICES)
def test_gemv_fits_the_gpu(rows, cols, gpu):
    for config in GemvProblem(rows, cols).candidates(gpu):
        assert config.shared(cols) + 2 * config.k_warps * 64 * 4 <= gpu.max_shared
        assert config.threads <= 512 and 64 % (config.batch * config.row_warps) == 0
        assert config.batch in (1, 2, 4) and config.depth >= 1


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("rows, cols", [m for m in MATRICES if m != (70000, 128)])
@pytest.mark.parametrize(("bits", "which"), KINDS)
def test_gemv_of_packed_tiles_fits_the_gpu(bits, which, rows, cols, gpu):
    problem = PackedGemvProblem(*packed(rows, cols, bits, which))
    for config in problem.candidates(gpu):
        assert config.shared(problem.groups, problem.tile_bytes) + STATIC_SHARED <= gpu.max_shared
        assert 32 <= config.threads <= 512 and config.depth >= 1
        own_groups = -(-problem.groups // config.k_warps)
        assert own_groups * (config.k_warps - 1) < problem.groups  # each warp has columns


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("rows, cols", MATRICES)
@pytest.mark.parametrize(
    ("bits", "which", "cta_tokens"),
    [*((*kind, GEMM_TOKENS) for kind in KINDS), (4, 0, 8), (8, 0, 16), (4, 1, 16), (8, 2, 8), (16, 0, 8), (16, 0, 16)],
)
def test_gemm_fits_the_gpu_and_covers_the_matrix(bits, which, cta_tokens, rows, cols, gpu):
    sizes = in_16_bits(rows, cols) if bits == 16 else packed(rows, cols, bits, which)
    problem = PackedGemmProblem(*sizes, 0, cta_tokens)
    tiles, groups, bands = problem.tiles, problem.groups, -(-problem.tiles // 2)
    num_tokens = 70 if cta_tokens == GEMM_TOKENS else cta_tokens
    sums, counters = packed_scratch([(rows, cols)], num_tokens, gpu.num_sms, cta_tokens)
    token_tiles = -(-num_tokens // cta_tokens)
    for config in problem.candidates(gpu):
        ctas, own_groups = config.ctas(tiles), -(-groups // config.splits)
        assert config.shared(problem.tile_bytes, cta_tokens) + 1024 <= gpu.max_shared
        assert 1 <= config.row_warps * config.k_warps <= 16
        assert -(-bands // ctas) <= config.row_warps and ctas <= bands
        assert config.stage % config.k_warps == 0
        assert config.buffers == 2 or own_groups <= config.stage
        assert config.splits <= groups  # each CTA has columns
        if config.splits > 1:  # the memory plan has room for the partial sums of every candidate
            assert sums >= config.splits * rows * cta_tokens * token_tiles and counters >= tiles * token_tiles


def test_a_large_packed_matrix_keeps_every_sm_of_an_h200_busy():
    for rows, cols in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (16384, 2048), (2048, 8192)):
        problem = PackedGemmProblem(*packed(rows, cols, 4))
        config = rule(problem, H200)
        assert 0.9 * 132 <= config.ctas(problem.tiles) * config.splits <= 132
        assert config.splits == gemm_splits(problem.tiles, problem.groups, 132)


def test_packed_rows_are_sizes_of_a_chunk():
    candidates = PackedRowsProblem(2048, 8192, 3072, 8).candidates(ORIN)
    assert {config.rows for config in candidates} == set(PACKED_ROWS)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("kv_int8", [False, True])
@pytest.mark.parametrize("sequences", [1, 2, 16])
def test_decode_attention_fits_the_gpu(gpu, kv_int8, sequences):
    for heads, kv_heads, head_dim in ((32, 8, 128), (32, 8, 64), (14, 2, 64), (8, 8, 256), (3, 3, 16)):
        problem = DecodeAttentionProblem(heads, kv_heads, head_dim, False, kv_int8, sequences)
        for config in problem.candidates(gpu):
            assert problem.shared(config) + STATIC_SHARED <= gpu.max_shared
            assert 1 <= config.splits <= max_decode_splits(kv_heads * sequences, gpu.num_sms) <= 64
            assert config.warps in (2, 4, 8) and config.depth >= 1


# --- attention of many tokens ---------------------------------------------------------------------------


def prefill(gpu: Gpu, rows: int, heads: int = 32, head_dim: int = 128, kv_int8: bool = False):
    return rule(PrefillAttentionProblem(heads, heads, head_dim, kv_int8, rows), gpu)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("kv_int8", [False, True])
def test_prefill_attention_fits_the_gpu(gpu, head_dim, kv_int8):
    for heads in (1, 4, 16, 32):
        for rows in (1, 64, 65, 128, 200, 512, 2048):
            for config in PrefillAttentionProblem(heads, heads, head_dim, kv_int8, rows).candidates(gpu):
                assert config.shared(head_dim, kv_int8) <= gpu.max_shared
                assert config.threads <= 256  # with 255 registers each they take an SM's 65,536
                assert config.tile_keys % 16 == 0
                assert head_dim <= 128 or config.blocks == 1  # two blocks would not fit the registers
                # The sums of all groups but one take the place of the stages: merge_groups of attention_prefill.cu.
                stages = (4 if kv_int8 else 8) * config.groups * config.tile_keys
                assert (config.groups - 1) * 64 * config.warps * config.blocks <= stages


@pytest.mark.parametrize(
    "gpu, rows, expected",
    [
        (H200, 32, (1, 1, 4, 32)),
        (H200, 64, (1, 1, 4, 32)),
        (H200, 128, (4, 1, 2, 64)),
        (H200, 256, (4, 1, 2, 64)),
        (H200, 512, (4, 2, 2, 64)),
        (H200, 2048, (4, 2, 1, 64)),
        (A100, 64, (4, 1, 1, 64)),  # more CTAs of 16 queries than SMs
        (ORIN, 16, (4, 1, 1, 64)),
        (ORIN, 64, (4, 1, 1, 64)),
        (ORIN, 128, (4, 2, 1, 32)),  # two CTAs with tiles of 64 keys would not fit an SM
        (ORIN, 512, (4, 2, 1, 32)),
        (THOR, 512, (4, 2, 1, 64)),
        (RTX_4060, 64, (4, 1, 1, 64)),
        (RTX_4060, 512, (8, 1, 1, 64)),
        (RTX_4090, 512, (8, 1, 1, 64)),
        (RTX_4090, 64, (1, 1, 4, 16)),  # nor tiles of 32 keys for four groups
        (RTX_4090, 128, (4, 1, 1, 64)),  # two groups would not fit
    ],
    ids=str,
)
def test_prefill_attention_of_32_heads_of_128(gpu, rows, expected):
    assert prefill(gpu, rows) == PrefillAttentionConfig(*expected)


def test_prefill_attention_of_other_models():
    assert prefill(H200, 32, kv_int8=True) == PrefillAttentionConfig(1, 1, 8, 16)
    assert prefill(RTX_4090, 32, kv_int8=True) == PrefillAttentionConfig(1, 1, 4, 16)
    assert prefill(ORIN, 64, head_dim=64) == PrefillAttentionConfig(4, 1, 2, 64)  # two CTAs of two groups fit
    assert prefill(ORIN, 64, heads=4) == PrefillAttentionConfig(1, 1, 4, 32)


def test_heads_of_256_take_one_block_a_warp():
    assert prefill(H200, 512, head_dim=256) == PrefillAttentionConfig(8, 1, 1, 32)
    assert prefill(ORIN, 512, heads=8, head_dim=256) == PrefillAttentionConfig(8, 1, 1, 32)
