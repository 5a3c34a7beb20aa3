"""The methods of ``edgellm quantize``: what each writes for a weight, and what config.json says about it.

The layout is that of compressed-tensors (github.com/vllm-project/compressed-tensors), which transformers, vLLM and
SGLang read: a method here is a "preset scheme" there (W4A16, W8A16, W8A8, FP8_DYNAMIC, NVFP4A16).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine_core.errors import BuildError
from engine_core.formats.number_formats import (
    NVFP4_BLOCK,
    QuantizedTensor,
    asymmetric_scales,
    from_16_bit,
    group_sizes_fit,
    pack_int32,
    pack_nibbles,
    round_to_levels,
    symmetric_scales,
    to_16_bit,
    to_fp8,
    to_nvfp4,
)

METHODS = ("fp16", "int8", "int8_smoothquant", "int4_awq", "int4", "fp8", "nvfp4")
CALIBRATED = ("int8_smoothquant", "int4_awq")
GROUP_SIZES = (32, 64, 128)
_FORMATS = {"int4": "pack-quantized", "fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized"}


@dataclass(frozen=True)
class Scheme:
    """``group_size``: columns that share a scale; 0 = a row has one. ``dtype``: fp16 or bf16, of scales and the rest.
    """

    method: str
    group_size: int
    symmetric: bool
    dtype: str

    @property
    def kind(self) -> str:
        """int4, int8, fp8 or nvfp4; "" = the weights stay floats."""
        return "" if self.method == "fp16" else self.method.split("_")[0]

    @property
    def bits(self) -> int:
        return {"int4": 4, "nvfp4": 4, "int8": 8, "fp8": 8}[self.kind]

    @property
    def format(self) -> str:
        if self.kind == "int8":  # weights alone are packed; with int8 activations they are not
            return "int-quantized" if self.method == "int8_smoothquant" else "pack-quantized"
        return _FORMATS[self.kind]

    @property
    def stored(self) -> str:
        return {"fp16": "F16", "bf16": "BF16"}[self.dtype]

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raises BuildError for a weight whose columns are not a whole number of groups."""
        group = NVFP4_BLOCK if self.kind == "nvfp4" else self.group_size
        if group and not group_sizes_fit(shape[1], group):
            fitting = [size for size in GROUP_SIZES if shape[1] % size == 0]
            advice = " or ".join(map(str, fitting)) if fitting else "int8 or fp8, which have no groups"
            raise BuildError(
                f"{name} has {shape[1]} columns, which are not a multiple of the group of {group}; choose {advice}."
            )

    def tensors(self, name: str, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name → (type, shape) of what ``encode`` gives for the weight ``name``, in the order in which it is written.
        """
        rows, columns = shape
        groups = columns // self.group_size if self.group_size else 1
        scale = {f"{name}_scale": (self.stored, (rows, groups))}
        if self.format == "pack-quantized":
            words = 32 // self.bits
            packed = {f"{name}_packed": ("I32", (rows, -(-columns // words))), **scale}
            zeros = {} if self.symmetric else {f"{name}_zero_point": ("I32", (-(-rows // words), groups))}
            return packed | zeros | {f"{name}_shape": ("I64", (2,))}
        if self.kind == "nvfp4":
            return {
                f"{name}_packed": ("U8", (rows, columns // 2)),
                f"{name}_scale": ("F8_E4M3", (rows, columns // NVFP4_BLOCK)),
                f"{name}_global_scale": ("F32", (1,)),
            }
        return {name: ("I8" if self.kind == "int8" else "F8_E4M3", shape), **scale}

    def encode(
        self, name: str, weights: np.ndarray, ratios: np.ndarray | None, global_scale: np.float32
    ) -> dict[str, np.ndarray]:
        """The tensors of one weight, float32 [rows, columns]. ``ratios``: [rows, groups], what clipping leaves of each
        group's range. ``global_scale``: nvfp4's, shared by the parts of a linear."""
        if self.kind == "nvfp4":
            found = to_nvfp4(weights, global_scale)
            return {
                f"{name}_packed": pack_nibbles(found.codes),
                f"{name}_scale": found.block_scales,
                f"{name}_global_scale": np.array([1 / global_scale], dtype=np.float32),
            }
        if self.kind == "fp8":
            found = to_fp8(weights, self.dtype)
            return {name: found.codes, f"{name}_scale": to_16_bit(found.scales, self.dtype)}
        quantized = self.round(weights, ratios)
        scale = {f"{name}_scale": to_16_bit(quantized.scales, self.dtype)}
        if self.format == "int-quantized":
            return {name: (quantized.levels ^ 0x80).view(np.int8), **scale}
        packed = {f"{name}_packed": pack_int32(quantized.levels, self.bits), **scale}
        if quantized.zeros is not None:
            zeros = pack_int32(np.ascontiguousarray(quantized.zeros.T), self.bits)
            packed[f"{name}_zero_point"] = np.ascontiguousarray(zeros.T)
        return packed | {f"{name}_shape": np.array(weights.shape, dtype=np.int64)}

    def round(self, weights: np.ndarray, ratios: np.ndarray | None = None) -> QuantizedTensor:
        """To the nearest integers; scales are rounded to 16 bits first, so that the levels make up for it."""
        group_size = self.group_size or weights.shape[1]
        zeros = None
        if self.symmetric:
            scales = symmetric_scales(weights, self.bits, group_size)
        else:
            scales, zeros = asymmetric_scales(weights, self.bits, group_size)
        if ratios is not None:
            scales = scales * ratios
        scales = from_16_bit(to_16_bit(scales, self.dtype))
        return round_to_levels(weights, scales, zeros, self.bits, group_size)

    def config(self, ignore: list[str]) -> dict:
        """``quantization_config`` of config.json. ``ignore``: linear modules that stay as they are."""
        weights: dict = {"num_bits": self.bits, "type": "int" if self.kind.startswith("int") else "float"}
        weights |= {"symmetric": self.symmetric, "dynamic": False}
        activations = None
        if self.kind == "nvfp4":
            weights |= {"strategy": "tensor_group", "group_size": NVFP4_BLOCK, "scale_dtype": "torch.float8_e4m3fn"}
        elif self.group_size:
            weights |= {"strategy": "group", "group_size": self.group_size}
        else:
            weights |= {"strategy": "channel"}
        if self.format in ("int-quantized", "float-quantized"):
            activations = {"num_bits": 8, "type": weights["type"], "symmetric": True}
            activations |= {"strategy": "token", "dynamic": True}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": self.format,
            "config_groups": {"group_0": {**group, "output_activations": None, "format": self.format}},
            "ignore": ignore,
        }


def make_scheme(method: str, group_size: int, symmetric: bool, dtype: str) -> Scheme:
    """Raises BuildError for a combination that does not exist."""
    if method not in METHODS:
        raise BuildError(f"There is no method {method!r}; choose one of {', '.join(METHODS)}.")
    grouped = method in ("int4", "int4_awq", "int8")
    if group_size and not grouped:
        raise BuildError(f"{method} has no group size of one's own choice; leave it out.")
    if group_size not in (0, *GROUP_SIZES):
        raise BuildError(f"The group size is {group_size}, expected one of {', '.join(map(str, GROUP_SIZES))}.")
    if not symmetric and method not in ("int4", "int4_awq"):
        raise BuildError(f"{method} has no zero points; they belong to int4 and int4_awq.")
    if method in ("int4", "int4_awq"):
        group_size = group_size or 128
    return Scheme(method, group_size, symmetric, "fp16" if method == "fp16" else dtype)
