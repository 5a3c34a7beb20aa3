"""The layouts in which common tools store quantized weights, read without requantizing them.

compressed-tensors (llm-compressor, and ``edgellm quantize``): pack-quantized, int-quantized, float-quantized,
nvfp4-pack-quantized. ModelOpt: FP8 and NVFP4. AutoAWQ: its GEMM version. GPTQ: zeros off by one in the first version of
its format. fp8 with block scales (``weight_scale_inv``). What is stored how is told by the tensors themselves;
config.json adds the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from engine_core.errors import CheckpointError, UnsupportedModelError
from engine_core.formats.number_formats import (
    E2M1,
    E4M3,
    QuantizedTensor,
    ScaledFloat,
    unpack_int32,
)
from engine_core.formats.safetensors_file import SafetensorsFile
from engine_core.formats.weight_formats import weight_format
from engine_core.formats.weight_formats.base import WeightFormat

Rows: TypeAlias = "slice | np.ndarray"  # a slice, or indices
# AutoAWQ: the output channel in each nibble of a word, lowest first, and where each channel is found again.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_PLACE = np.argsort(AWQ_ORDER)
_METHODS = ("compressed-tensors", "awq", "gptq", "fp8", "modelopt")


@dataclass(frozen=True)
class Stored:
    """The layout of one weight in the checkpoint. ``read`` returns rows of it."""

    format: WeightFormat  # int4, int8, fp8 or nvfp4; the tensors do not tell how they were rounded
    shape: tuple[int, int]
    group_size: int  # columns that share a scale
    has_zeros: bool
    read: Callable[[Rows], QuantizedTensor | ScaledFloat]
    # int64 [columns]: columns in the order in which groups are consecutive (GPTQ's desc_act); None: as they are.
    order: np.ndarray | None = None
    scale_type: str = ""  # of the scales of integers, as safetensors spells it

    def dequantize(self, rows: Rows = slice(None)) -> np.ndarray:
        """Return float32 [n, columns]."""
        values = self.read(rows).dequantize()
        if self.order is None:
            return values
        restored = np.empty_like(values)
        restored[:, self.order] = values
        return restored


def find_stored(config: dict, files: Mapping[str, SafetensorsFile]) -> dict[str, Stored]:
    """Weight's name → how it is stored, for those that are quantized. ``config``: what config.json holds.

    Raises UnsupportedModelError for what is not read, CheckpointError for tensors that do not fit together.
    """
    quantization = config.get("quantization_config") or config.get("compression_config") or {}
    if not quantization:
        return {}
    _check_types(quantization)
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise UnsupportedModelError(
            f"The checkpoint's quantization_config has the method {method!r}; {', '.join(_METHODS)} are read, "
            "so use one of those or the plain weights."
        )
    for trait in ("transform_config", "sparsity_config"):
        value = quantization.get(trait)
        if value and value.get("format") != "dense":
            raise UnsupportedModelError(f"The checkpoint's quantization_config has a {trait}, which is not supported.")
    reader = _Reader(quantization, files)
    stored = {}
    for name in files:
        stem, _, kind = name.rpartition(".")
        if kind in ("qweight", "weight_packed", "weight") and (found := reader.stored(f"{stem}.", kind)):
            stored[f"{stem}.weight"] = found
    return stored


def has_fp8_activations(config: dict) -> bool:
    """Return whether the checkpoint says that its weights are multiplied by activations in fp8.

    ``config``: what config.json holds. compressed-tensors says so of a group's ``input_activations``, fp8 (AutoFP8,
    DeepSeek, Qwen3) by an ``activation_scheme``; ModelOpt's FP8 has such activations always.
    """
    quantization = config.get("quantization_config") or config.get("compression_config") or {}
    method = quantization.get("quant_method")
    if method == "modelopt":
        return quantization.get("quant_algo") == "FP8"
    if method == "fp8":
        return quantization.get("activation_scheme") in ("dynamic", "static")
    groups = (quantization.get("config_groups") or {}).values() if method == "compressed-tensors" else ()
    activations = [group.get("input_activations") or {} for group in groups]
    return any(
        isinstance(each, dict) and (each.get("type"), each.get("num_bits")) == ("float", 8) for each in activations
    )


def _check_types(quantization: object) -> None:
    """Raises CheckpointError if a part of the quantization_config is of another type than is read."""
    objects = ("transform_config", "sparsity_config", "config_groups")
    if not isinstance(quantization, dict):
        raise CheckpointError(f"config.json has a quantization_config that is no object: {str(quantization)[:60]}.")
    for name in objects:
        if not isinstance(quantization.get(name) or {}, dict):
            raise CheckpointError(f"The quantization_config has {name}={str(quantization[name])[:60]}, not an object.")
    for group in (quantization.get("config_groups") or {}).values():
        weights = group.get("weights") if isinstance(group, dict) else group
        if not isinstance(group, dict) or not isinstance(weights or {}, dict):
            raise CheckpointError("The quantization_config has a config group that is no object with weights.")
        _check_block((weights or {}).get("block_structure"))
    _check_block(quantization.get("weight_block_size"))
    for name in ("bits", "w_bit"):
        value = quantization.get(name, 4)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"The quantization_config has {name}={str(value)[:60]}, not a whole number.")


def _check_block(block: object) -> None:
    """Raises CheckpointError unless ``block`` is the rows and columns of a block, or none."""
    if block is None:
        return
    pair = block if isinstance(block, (list, tuple)) and len(block) == 2 else (0, 0)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
        raise CheckpointError(f"The quantization_config has the block {str(block)[:60]}, not two numbers above 0.")


class _Reader:
    def __init__(self, quantization: dict, files: Mapping[str, SafetensorsFile]) -> None:
        self._config = quantization
        self._method = quantization["quant_method"]
        self._files = files

    def stored(self, stem: str, kind: str) -> Stored | None:
        """Return the layout of a weight; None if ``stem + kind`` is a plain tensor."""
        dtype = self._files[stem + kind].dtype(stem + kind)
        if kind == "qweight":
            return self._awq(stem) if self._method == "awq" else self._gptq(stem)
        if kind == "weight_packed":
            return self._nvfp4(stem, kind) if dtype == "U8" else self._packed(stem)
        if stem + "pre_quant_scale" in self._files or (dtype == "U8" and stem + "weight_scale_2" not in self._files):
            raise UnsupportedModelError(
                f"{stem}weight is in ModelOpt's {self._config.get('quant_algo')}, of which FP8 and NVFP4 are read."
            )
        if dtype == "U8":
            return self._nvfp4(stem, kind)
        if dtype == "I8":
            return self._int8(stem)
        return self._fp8(stem) if dtype == "F8_E4M3" else None

    # --- compressed-tensors -------------------------------------------------------------------------

    def _packed(self, stem: str) -> Stored:
        """pack-quantized: words along a row, lowest bits first; zeros are packed along the rows."""
        packed = self._raw(stem + "weight_packed")
        rows, columns = (int(size) for size in self._raw(stem + "weight_shape"))
        scales = self._scales(stem + "weight_scale", rows)
        bits = 4 if packed.shape[1] == -(-columns // 8) else 8
        if packed.shape != (rows, -(-columns * bits // 32)):
            raise CheckpointError(
                f"{stem}weight_packed has the shape {list(packed.shape)}, which is neither int4 nor int8 of "
                f"{rows} × {columns}."
            )
        zeros = None
        if stem + "weight_zero_point" in self._files:
            words = self._raw(stem + "weight_zero_point")
            if words.dtype == np.int8:  # not packed: one signed number for each scale
                zeros = (words.astype(np.int16) + (1 << (bits - 1))).reshape(rows, -1).astype(np.uint8)
            elif words.dtype == np.int32:
                zeros = unpack_int32(np.ascontiguousarray(words.T), bits, rows).T
            else:
                raise CheckpointError(f"{stem}weight_zero_point has the type {words.dtype}; int32 and int8 are read.")
            if zeros.shape != scales.shape:
                raise CheckpointError(
                    f"{stem}weight_zero_point has {list(zeros.shape)} zero points for {list(scales.shape)} scales."
                )
        zeros = _told_apart(zeros, bits)
        order, group_size = self._order(stem + "weight_g_idx", columns, scales.shape[1])

        def read(which: Rows) -> QuantizedTensor:
            values = unpack_int32(packed[which], bits, columns)
            return _integers(values, scales, zeros, bits, group_size, which, order)

        scale_type = self._type(stem + "weight_scale")
        kept = weight_format(f"int{bits}")
        return Stored(kept, (rows, columns), group_size, zeros is not None, read, order, scale_type)

    def _int8(self, stem: str) -> Stored:
        """int-quantized: signed bytes."""
        values = self._raw(stem + "weight")
        scales = self._scales(stem + "weight_scale", len(values))
        zeros = None
        if stem + "weight_zero_point" in self._files:
            found = self._raw(stem + "weight_zero_point").astype(np.int16) + 128
            zeros = np.broadcast_to(found.reshape(-1, scales.shape[1]), scales.shape).astype(np.uint8)
        zeros = _told_apart(zeros, 8)
        order, group_size = self._order(stem + "weight_g_idx", values.shape[1], scales.shape[1])

        def read(which: Rows) -> QuantizedTensor:
            return _integers(values[which].view(np.uint8) ^ 0x80, scales, zeros, 8, group_size, which, order)

        scale_type = self._type(stem + "weight_scale")
        return Stored(weight_format("int8"), values.shape, group_size, zeros is not None, read, order, scale_type)

    def _fp8(self, stem: str) -> Stored:
        """float-quantized, and fp8 with ``weight_scale_inv``, which is multiplied by, too: per tensor, row or block."""
        codes = self._raw(stem + "weight")
        rows, columns = codes.shape
        name = stem + ("weight_scale" if stem + "weight_scale" in self._files else "weight_scale_inv")
        scales = self._float(name)
        if scales.size == 1:
            scales = scales.reshape(1, 1)
        if scales.ndim == 1:
            scales = scales[:, None]
        tall, wide = self._block(rows, columns, scales.shape, name)
        blocks = (np.arange(rows) // tall).astype(np.int64)

        def read(which: Rows) -> ScaledFloat:
            return ScaledFloat(codes[which], scales[blocks[which]], E4M3, wide)

        return Stored(weight_format("fp8"), (rows, columns), wide, False, read)

    def _block(self, rows: int, columns: int, grid: tuple[int, int], name: str) -> tuple[int, int]:
        """Rows and columns of the block that has one scale, for ``grid`` scales."""
        tall, wide = (-(-size // count) for size, count in zip((rows, columns), grid))
        for configured in (self._config.get("weight_block_size"), *self._block_structures()):
            if configured and tuple(-(-size // block) for size, block in zip((rows, columns), configured)) == grid:
                tall, wide = configured
        if (-(-rows // tall), -(-columns // wide)) != grid:
            raise CheckpointError(f"{name} has the shape {list(grid)}, which does not fit {rows} × {columns} weights.")
        return tall, wide

    def _block_structures(self) -> list:
        groups = self._config.get("config_groups") or {}
        return [(group.get("weights") or {}).get("block_structure") for group in groups.values()]

    def _nvfp4(self, stem: str, kind: str) -> Stored:
        """nvfp4-pack-quantized as ``weight_packed``, or ModelOpt's NVFP4 as ``weight``."""
        nvfp4 = weight_format("nvfp4")
        packed = self._raw(stem + kind)
        rows, columns = packed.shape[0], packed.shape[1] * 2
        block_scales = self._raw(stem + "weight_scale")
        if block_scales.shape != (rows, columns // nvfp4.group_size):
            raise CheckpointError(
                f"{stem}weight_scale has the shape {list(block_scales.shape)}, expected one per "
                f"{nvfp4.group_size} of {rows} × {columns} weights."
            )
        if kind == "weight":
            global_scale = self._float(stem + "weight_scale_2").reshape(-1)[0]
        else:  # what is stored is the factor weights were multiplied by
            global_scale = np.float32(1) / self._float(stem + "weight_global_scale").reshape(-1)[0]

        def read(which: Rows) -> ScaledFloat:
            found = block_scales[which]
            codes = nvfp4.unpack(packed[which], columns)
            return ScaledFloat(codes, E4M3[found] * global_scale, E2M1, nvfp4.group_size, found, global_scale)

        return Stored(nvfp4, (rows, columns), nvfp4.group_size, False, read)

    # --- AutoAWQ and GPTQ: [in, out], eight or four to a word ---------------------------------------------

    def _awq(self, stem: str) -> Stored:
        """qweight [in, out / 8], qzeros [groups, out / 8]: output channels interleaved; scales [groups, out]."""
        version = str(self._config.get("version") or "gemm").lower()
        if version != "gemm" or self._bits() != 4:
            raise UnsupportedModelError(
                f"The AWQ checkpoint has {self._bits()} bits in the version {version!r}; 4 bits in 'gemm' are read."
            )
        words = self._raw(stem + "qweight")
        columns, rows = words.shape[0], words.shape[1] * 8
        scales = self._grouped(stem + "scales", rows)

        def unpack(packed: np.ndarray) -> np.ndarray:
            """Unpack int32 [n, out / 8] → uint8 [n, out]."""
            channels = unpack_int32(packed, 4, packed.shape[1] * 8).reshape(len(packed), -1, 8)
            return channels[:, :, _AWQ_PLACE].reshape(len(packed), -1)

        zeros = None
        if self._config.get("zero_point", True):
            zeros = _told_apart(np.ascontiguousarray(unpack(self._raw(stem + "qzeros")).T), 4)
        order, group_size = self._order("", columns, scales.shape[1])

        def read(which: Rows) -> QuantizedTensor:
            first, last, inside = _span(which, rows)
            values = unpack(words[:, first // 8 : -(-last // 8)]).T[inside]
            return _integers(np.ascontiguousarray(values), scales, zeros, 4, group_size, which, None)

        scale_type = self._type(stem + "scales")
        return Stored(weight_format("int4"), (rows, columns), group_size, zeros is not None, read, order, scale_type)

    def _gptq(self, stem: str) -> Stored:
        """qweight [in / 8, out], qzeros [groups, out / 8], scales [groups, out], g_idx [in]."""
        bits = self._bits()
        if bits not in (4, 8) or self._method != "gptq":
            raise UnsupportedModelError(f"The {self._method} checkpoint has weights of {bits} bits; 4 and 8 are read.")
        words = self._raw(stem + "qweight")
        columns, rows = words.shape[0] * 32 // bits, words.shape[1]
        scales = self._grouped(stem + "scales", rows)
        zeros = np.ascontiguousarray(unpack_int32(self._raw(stem + "qzeros"), bits, rows).T)
        if self._config.get("checkpoint_format", "gptq") == "gptq":
            zeros = zeros + np.uint8(1) & np.uint8((1 << bits) - 1)
        zeros = _told_apart(zeros, bits)
        order, group_size = self._order(stem + "g_idx", columns, scales.shape[1])

        def read(which: Rows) -> QuantizedTensor:
            values = unpack_int32(np.ascontiguousarray(words[:, which].T), bits, columns)
            return _integers(values, scales, zeros, bits, group_size, which, order)

        kept, scale_type = weight_format(f"int{bits}"), self._type(stem + "scales")
        return Stored(kept, (rows, columns), group_size, zeros is not None, read, order, scale_type)

    # --- parts ----------------------------------------------------------------------------------------

    def _bits(self) -> int:
        return int(self._config.get("bits", self._config.get("w_bit", 4)))

    def _raw(self, name: str) -> np.ndarray:
        if name not in self._files:
            raise CheckpointError(f"The quantized checkpoint lacks the tensor {name!r}; fetch it again.")
        return self._files[name].raw(name)

    def _type(self, name: str) -> str:
        return self._files[name].dtype(name)

    def _float(self, name: str) -> np.ndarray:
        self._raw(name)
        return self._files[name].read(name)

    def _scales(self, name: str, rows: int) -> np.ndarray:
        """float32 [rows, groups] of one per tensor, row or group."""
        scales = self._float(name)
        scales = scales.reshape(scales.size if scales.ndim < 2 else len(scales), -1)
        if len(scales) not in (1, rows):
            raise CheckpointError(f"{name} has {len(scales)} rows for the {rows} of its weight.")
        return np.broadcast_to(scales, (rows, scales.shape[1]))

    def _grouped(self, name: str, rows: int) -> np.ndarray:
        """float32 [rows, groups] of scales stored as [groups, rows]."""
        scales = self._float(name)
        if scales.ndim != 2 or scales.shape[1] != rows:
            raise CheckpointError(f"{name} has the shape {list(scales.shape)}, expected [groups, {rows}].")
        return np.ascontiguousarray(scales.T)

    def _order(self, name: str, columns: int, groups: int) -> tuple[np.ndarray | None, int]:
        """(the order in which columns of a group are consecutive, or None if they are; columns of a group)."""
        if groups == 0 or columns % groups:
            raise CheckpointError(f"A quantized weight has {columns} columns for {groups} scales, not a multiple.")
        group_size = columns // groups
        if name not in self._files:
            return None, group_size
        indices = self._raw(name)
        # Before it is filled in, compressed-tensors holds -1 in all of it: columns are in their order.
        if (indices < 0).all() or np.array_equal(indices, np.arange(columns) // group_size):
            return None, group_size
        if not np.array_equal(np.bincount(indices, minlength=groups), np.full(groups, group_size)):
            raise CheckpointError(f"{name} does not give each of {groups} groups {group_size} columns.")
        return np.argsort(indices, kind="stable"), group_size


def _told_apart(zeros: np.ndarray | None, bits: int) -> np.ndarray | None:
    """Return None in the place of zeros that are all what they are without any."""
    return None if zeros is None or (zeros == 1 << (bits - 1)).all() else zeros


def _integers(
    values: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    bits: int,
    group_size: int,
    which: Rows,
    order: np.ndarray | None,
) -> QuantizedTensor:
    values = values if order is None else values[:, order]
    return QuantizedTensor(values, scales[which], None if zeros is None else zeros[which], bits, group_size)


def _span(which: Rows, rows: int) -> tuple[int, int, Rows]:
    """(first row of a word, end, the rows within): what is to be unpacked for ``which``."""
    if isinstance(which, slice):
        start, stop, step = which.indices(rows)
        first = start // 8 * 8
        return first, max(start, stop), slice(start - first, max(start, stop) - first, step)
    return 0, rows, which
