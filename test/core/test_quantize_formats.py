"""Number formats of quantized weights against ml_dtypes and brute force."""

from __future__ import annotations

import numpy as np
import pytest

from engine_core.formats import number_formats as formats

ml_dtypes = pytest.importorskip("ml_dtypes")
RANDOM = np.random.default_rng(0)


def decode(codes: np.ndarray, dtype) -> np.ndarray:
    return codes.view(dtype).astype(np.float32)


def test_every_fp8_code_is_that_of_ml_dtypes():
    np.testing.assert_array_equal(formats.E4M3, decode(np.arange(256, dtype=np.uint8), ml_dtypes.float8_e4m3fn))


def test_every_fp4_code_is_that_of_ml_dtypes():
    fp4 = getattr(ml_dtypes, "float4_e2m1fn", None)
    if fp4 is None:
        pytest.skip("this ml_dtypes has no float4_e2m1fn")
    np.testing.assert_array_equal(formats.E2M1, decode(np.arange(16, dtype=np.uint8), fp4))


@pytest.mark.parametrize(
    "table, name, largest", [(formats.E4M3, "float8_e4m3fn", 448), (formats.E2M1, "float4_e2m1fn", 6)]
)
def test_rounding_is_to_nearest_even_and_saturates(table, name, largest):
    dtype = getattr(ml_dtypes, name, None)
    if dtype is None:
        pytest.skip(f"this ml_dtypes has no {name}")
    finite = np.unique(table[~np.isnan(table)])
    middles = (finite[1:] + finite[:-1]) / 2  # the ties
    values = np.concatenate([finite, middles, RANDOM.normal(0, largest / 3, 4000), [0.0, -0.0, 1e-9, -1e-9]])
    values = values[np.abs(values) <= largest].astype(np.float32)
    codes = formats.to_minifloat(values, table)
    np.testing.assert_array_equal(table[codes], values.astype(dtype).astype(np.float32))
    beyond = formats.to_minifloat(np.array([largest * 1.5, -1e9, np.inf], dtype=np.float32), table)
    np.testing.assert_array_equal(table[beyond], [largest, -largest, largest])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 64])
def test_words_hold_the_first_level_in_their_lowest_bits(bits, columns):
    levels = RANDOM.integers(0, 1 << bits, (3, columns)).astype(np.uint8)
    packed = formats.pack_int32(levels, bits)
    assert packed.dtype == np.int32 and packed.shape == (3, -(-columns * bits // 32))
    for row in range(3):
        for column in range(columns):
            word = int(packed[row, column * bits // 32]) & 0xFFFFFFFF
            assert word >> (column * bits % 32) & ((1 << bits) - 1) == levels[row, column]
    np.testing.assert_array_equal(formats.unpack_int32(packed, bits, columns), levels)


@pytest.mark.parametrize("count", [1, 6, 7])
def test_a_byte_holds_two_levels_the_first_one_low(count):
    levels = RANDOM.integers(0, 16, (2, 3, count)).astype(np.uint8)
    packed = formats.pack_nibbles(levels)
    assert packed.shape == (2, 3, -(-count // 2))
    assert (packed[..., 0] & 15 == levels[..., 0]).all()
    np.testing.assert_array_equal(formats.unpack_nibbles(packed, count), levels)


@pytest.mark.parametrize("bits, symmetric", [(4, True), (4, False), (8, True), (8, False)])
def test_levels_are_the_nearest_and_stand_for_what_the_formula_says(bits, symmetric):
    weights = RANDOM.normal(size=(5, 64)).astype(np.float32)
    weights[1] = 0
    weights[2] = np.abs(weights[2])
    zeros = None
    if symmetric:
        scales = formats.symmetric_scales(weights, bits, 32)
    else:
        scales, zeros = formats.asymmetric_scales(weights, bits, 32)
    quantized = formats.round_to_levels(weights, scales, zeros, bits, 32)
    restored = quantized.dequantize()
    for row in range(5):
        for column in range(64):
            group = column // 32
            zero = 1 << (bits - 1) if zeros is None else int(zeros[row, group])
            reachable = (np.arange(1 << bits) - zero) * scales[row, group]
            nearest = np.abs(reachable - weights[row, column]).min()
            assert restored[row, column] == np.float32((int(quantized.levels[row, column]) - zero) * scales[row, group])
            assert abs(restored[row, column] - weights[row, column]) <= nearest + 1e-6
    assert not restored[1].any()


def test_smaller_groups_of_the_same_weights_stand_for_the_same():
    scales = RANDOM.normal(size=(3, 2)).astype(np.float32)
    zeros = RANDOM.integers(0, 16, (3, 2)).astype(np.uint8)
    levels = RANDOM.integers(0, 16, (3, 96)).astype(np.uint8)
    halves = formats.QuantizedTensor(levels, scales, zeros, 4, 48)
    np.testing.assert_array_equal(halves.regrouped(16).dequantize(), halves.dequantize())
    whole = formats.QuantizedTensor(levels, scales[:, :1], None, 4, 96)
    np.testing.assert_array_equal(whole.regrouped(64).dequantize(), whole.dequantize())


def test_nvfp4_has_two_levels_of_scales():
    weights = (RANDOM.normal(size=(8, 64)) * np.exp(RANDOM.normal(size=(8, 1)))).astype(np.float32)
    weights[3, :16] = 0
    global_scale = formats.nvfp4_global_scale(float(np.abs(weights).max()))
    found = formats.to_nvfp4(weights, global_scale)
    assert np.abs(formats.E4M3[found.block_scales]).max() == 448  # the block with the largest value uses all of fp8
    np.testing.assert_array_equal(found.scales, formats.E4M3[found.block_scales] * global_scale)
    expected = formats.E2M1[found.codes] * np.repeat(found.scales, 16, axis=1)
    np.testing.assert_array_equal(found.dequantize(), expected)
    blocks = np.abs(weights.reshape(8, 4, 16)).max(axis=2)
    # Half the gap between 4 and 6, and what the block scale's own rounding (1/16) may cut off.
    bound = np.repeat(blocks, 16, axis=1) * (1 / 6 + 1 / 16)
    assert (np.abs(expected - weights) <= bound + 1e-7).all()
    assert not expected[3, :16].any()


def test_fp8_has_a_scale_for_each_row_that_16_bits_hold():
    weights = (RANDOM.normal(size=(6, 40)) * 10.0 ** np.arange(-3, 3)[:, None]).astype(np.float32)
    found = formats.to_fp8(weights, "bf16")
    np.testing.assert_array_equal(formats.from_16_bit(formats.to_16_bit(found.scales, "bf16")), found.scales)
    error = np.abs(found.dequantize() - weights)
    assert (error <= np.abs(weights) / 16 + found.scales * 2.0**-9).all()  # 3 mantissa bits, 2^-9 below the normals
