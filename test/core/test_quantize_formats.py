"""The numbers and the weight formats against ml_dtypes and brute force."""

from __future__ import annotations

import numpy as np
import pytest

from engine_core.formats import number_formats as formats
from engine_core.formats.weight_formats import NAMES, preference, weight_format
from engine_core.formats.weight_formats.base import QuantizedFormat, Rounding

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


@pytest.mark.parametrize("table", [formats.E4M3, formats.E2M1], ids=["E4M3", "E2M1"])
def test_every_float_becomes_the_nearest_code(table):
    """All float32 values that share their upper half but the first become one code, as rounding is monotonic, if the
    second and the last of them do."""
    half = len(table) // 2
    largest = np.nanmax(table)
    by_preference = np.r_[0:half:2, 1:half:2]  # argmin takes the first of two that are as near: the even one
    by_preference = by_preference[~np.isnan(table[by_preference])]
    upper = np.arange(0x7F81, dtype=np.uint32) << 16  # zero to infinity
    for lower in (0, 1, 0x8000, 0xFFFF):
        values = (upper | np.uint32(lower)).view(np.float32)
        values = values[~np.isnan(values)]
        within = np.minimum(values, largest).astype(np.float64)
        nearest = by_preference[np.abs(table[by_preference].astype(np.float64) - within[:, None]).argmin(axis=1)]
        np.testing.assert_array_equal(formats.to_minifloat(values, table), nearest)
        np.testing.assert_array_equal(formats.to_minifloat(-values, table), nearest | half)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (70_001,), (5, 7, 3)])
def test_codes_have_the_shape_of_the_values(shape):
    values = RANDOM.normal(0, 100, shape).astype(np.float32) if shape else np.float32(-3)
    codes = formats.to_minifloat(values, formats.E4M3)
    assert codes.shape == shape and codes.dtype == np.uint8
    if values.ndim > 1:
        np.testing.assert_array_equal(formats.to_minifloat(values.T, formats.E4M3), codes.T)
    np.testing.assert_allclose(formats.E4M3[codes], values, rtol=2.0**-4, atol=2.0**-10)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 64])
def test_words_hold_the_first_level_in_their_lowest_bits(bits, columns):
    values = RANDOM.integers(0, 1 << bits, (3, columns)).astype(np.uint8)
    packed = formats.pack_int32(values, bits)
    assert packed.dtype == np.int32 and packed.shape == (3, -(-columns * bits // 32))
    for row in range(3):
        for column in range(columns):
            word = int(packed[row, column * bits // 32]) & 0xFFFFFFFF
            assert word >> (column * bits % 32) & ((1 << bits) - 1) == values[row, column]
    np.testing.assert_array_equal(formats.unpack_int32(packed, bits, columns), values)


@pytest.mark.parametrize("count", [1, 6, 7])
def test_a_byte_holds_two_levels_the_first_one_low(count):
    values = RANDOM.integers(0, 16, (2, 3, count)).astype(np.uint8)
    packed = formats.pack_nibbles(values)
    assert packed.shape == (2, 3, -(-count // 2))
    assert (packed[..., 0] & 15 == values[..., 0]).all()
    np.testing.assert_array_equal(formats.unpack_nibbles(packed, count), values)


@pytest.mark.parametrize("bits, symmetric", [(4, True), (4, False), (8, True), (8, False)])
def test_levels_are_the_nearest_and_stand_for_what_the_formula_says(bits, symmetric):
    weights = RANDOM.normal(size=(5, 64)).astype(np.float32)
    weights[1] = 0
    weights[2] = np.abs(weights[2])
    quantized = weight_format(f"int{bits}").quantize(weights, Rounding(32, symmetric=symmetric))
    scales, zeros = quantized.scales, quantized.zeros
    restored = quantized.dequantize()
    for row in range(5):
        for column in range(64):
            group = column // 32
            zero = 1 << (bits - 1) if zeros is None else int(zeros[row, group])
            reachable = (np.arange(1 << bits) - zero) * scales[row, group]
            nearest = np.abs(reachable - weights[row, column]).min()
            assert restored[row, column] == np.float32((int(quantized.values[row, column]) - zero) * scales[row, group])
            assert abs(restored[row, column] - weights[row, column]) <= nearest + 1e-6
    assert not restored[1].any()


def test_smaller_groups_of_the_same_weights_stand_for_the_same():
    scales = RANDOM.normal(size=(3, 2)).astype(np.float32)
    zeros = RANDOM.integers(0, 16, (3, 2)).astype(np.uint8)
    values = RANDOM.integers(0, 16, (3, 96)).astype(np.uint8)
    halves = formats.QuantizedTensor(values, scales, zeros, 4, 48)
    np.testing.assert_array_equal(halves.regrouped(16).dequantize(), halves.dequantize())
    whole = formats.QuantizedTensor(values, scales[:, :1], None, 4, 96)
    np.testing.assert_array_equal(whole.regrouped(64).dequantize(), whole.dequantize())


def test_nvfp4_has_two_levels_of_scales():
    weights = (RANDOM.normal(size=(8, 64)) * np.exp(RANDOM.normal(size=(8, 1)))).astype(np.float32)
    weights[3, :16] = 0
    found = weight_format("nvfp4").quantize(weights, Rounding())
    global_scale = np.float32(np.abs(weights).max()) / np.float32(448 * 6)
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
    found = weight_format("fp8").quantize(weights, Rounding(scale_type="bf16"))
    np.testing.assert_array_equal(formats.from_16_bit(formats.to_16_bit(found.scales, "bf16")), found.scales)
    error = np.abs(found.dequantize() - weights)
    assert (error <= np.abs(weights) / 16 + found.scales * 2.0**-9).all()  # 3 mantissa bits, 2^-9 below the normals


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(weight_format(name), QuantizedFormat)])
def test_what_a_format_stores_is_what_it_says_and_is_read_back(name):
    """The tensors have the announced types and shapes, ``nbytes`` counts them, ``unpack`` undoes ``pack``."""
    sizes = {"I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "F32": 4, "I64": 8}
    found, shape = weight_format(name), (32, 256)
    weights = RANDOM.normal(size=shape).astype(np.float32)
    rounding = Rounding(found.group_size, "fp16")
    quantized = found.quantize(weights, rounding)
    tensors = found.store("w", quantized, rounding)
    announced = found.tensors("w", shape, rounding)
    assert list(tensors) == list(announced)
    for tensor, (dtype, size) in announced.items():
        assert tensors[tensor].shape == size and tensors[tensor].dtype.itemsize == sizes[dtype]
    aside = ("w_shape", "w_global_scale")  # of the tensor as a whole
    assert sum(tensor.nbytes for key, tensor in tensors.items() if key not in aside) == found.nbytes(shape)
    values = quantized.values if found.name.startswith("int") else quantized.codes
    packed = found.pack(values)
    assert packed.shape == (32, 256 * found.bits // 8)
    np.testing.assert_array_equal(found.unpack(packed, 256), values)
    error = np.linalg.norm(quantized.dequantize() - weights) / np.linalg.norm(weights)
    assert 0 < error < (0.15 if found.bits == 4 else 0.05)


def test_formats_of_as_many_bits_are_told_apart():
    kinds = {name: weight_format(name).kind for name in NAMES}
    assert len({kinds["int8"], kinds["fp8"]}) == len({kinds["int4"], kinds["nvfp4"]}) == 2
    assert kinds["int4"] == kinds["int4_awq"]  # which differ in how they are made
    for first, second in (("int8", "fp8"), ("int4", "nvfp4")):
        assert weight_format(first).bits == weight_format(second).bits
        assert not weight_format(first).keeps(weight_format(second), 128)


def test_of_several_variants_the_smallest_is_preferred_and_calibrated_before_rounded():
    assert sorted(NAMES, key=preference)[:2] == ["int4_awq", "int4"]
    assert sorted(["unheard-of", "fp32", "fp16", "int8"], key=preference) == ["int8", "fp16", "fp32", "unheard-of"]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_short_last_group_is_rounded_with_a_scale_of_its_own(bits):
    weights = RANDOM.normal(size=(3, 40)).astype(np.float32)
    found = weight_format(f"int{bits}")
    whole = found.quantize(weights, Rounding(32))
    assert whole.scales.shape == (3, 2)
    for columns, group in ((slice(0, 32), 0), (slice(32, 40), 1)):
        part = found.quantize(weights[:, columns], Rounding(0))
        np.testing.assert_array_equal(whole.values[:, columns], part.values)
        np.testing.assert_array_equal(whole.scales[:, group], part.scales[:, 0])
