"""Checkpoints as AutoAWQ and GPTQ write them, made of plain ones by rounding to nearest, with numpy alone."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine_core.formats.quantized_layouts import AWQ_ORDER
from engine_core.formats.safetensors_file import SafetensorsFile, write_safetensors


@dataclass(frozen=True)
class Scheme:
    """``group_size``: 0 = a row. ``act_order``: groups are columns of like importance (GPTQ's desc_act)."""

    method: str  # awq or gptq
    bits: int = 4
    group_size: int = 128
    asymmetric: bool = False
    act_order: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The quantization_config."""
        group_size = self.group_size or -1
        if self.method == "awq":
            return dict(quant_method="awq", bits=4, group_size=group_size, zero_point=True, version="gemm")
        common = dict(quant_method="gptq", bits=self.bits, group_size=group_size, desc_act=self.act_order)
        return common | dict(sym=not self.asymmetric, checkpoint_format="gptq")


def quantized(name: str, weight: np.ndarray, scheme: Scheme) -> dict[str, np.ndarray]:
    """Return the tensors of the weight ``name``, [rows, columns]. Linears that share an input share an order."""
    rows, columns = weight.shape
    group_size = scheme.group_size or columns
    zero, top = 1 << (scheme.bits - 1), (1 << scheme.bits) - 1
    layer, _, last = name.removesuffix(".weight").rpartition(".")
    order = np.arange(columns)
    if scheme.act_order:
        same_input = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
        seed = zlib.crc32(f"{layer}.{same_input.get(last, last)}".encode())
        order = np.random.default_rng(seed).permutation(columns)
    grouped = weight[:, order].astype(np.float32).reshape(rows, -1, group_size)
    scales = (np.abs(grouped).max(axis=2) / (zero - 1)).astype(np.float16).astype(np.float32)
    zeros = np.full(scales.shape, zero)
    if scheme.asymmetric:
        zeros = np.random.default_rng(zlib.crc32(name.encode())).integers(zero - 3, zero + 3, scales.shape)
    levels = np.clip(np.rint(grouped / scales[:, :, None]) + zeros[:, :, None], 0, top).astype(np.uint8)
    values = np.empty((rows, columns), dtype=np.uint8)
    values[:, order] = levels.reshape(rows, columns)
    stem = name.removesuffix("weight")
    found = _awq(values, scales, zeros) if scheme.method == "awq" else _gptq(values, scales, zeros, scheme.bits)
    if scheme.method == "gptq":
        found["g_idx"] = np.empty(columns, dtype=np.int32)
        found["g_idx"][order] = np.arange(columns) // group_size
    return {f"{stem}{key}": np.ascontiguousarray(each) for key, each in found.items()}


def quantize(directory: Path, target: Path, scheme: Scheme, **config: Any) -> Path:
    """Write the checkpoint in ``directory`` to ``target`` with quantized linears; ``config``: of config.json."""
    file = SafetensorsFile(directory / "model.safetensors")
    values = json.loads((directory / "config.json").read_text(encoding="utf-8")) | config
    write(target, {name: file.read(name) for name in file.names()}, values, scheme)
    return target


def write(directory: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], scheme: Scheme) -> None:
    """Write a checkpoint of float ``tensors`` with quantized linears, and its configuration."""
    stored: dict[str, np.ndarray] = {}
    for name, weight in tensors.items():
        is_linear = name.endswith("_proj.weight")
        stored |= quantized(name, weight, scheme) if is_linear else {name: weight.astype(np.float16)}
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", stored)
    values = {**config, "quantization_config": scheme.config}
    (directory / "config.json").write_text(json.dumps(values, default=str), encoding="utf-8")


def _words(values: np.ndarray, bits: int) -> np.ndarray:
    """int32 words [...], the first value in the lowest bits; ``values``: [..., values of a word]."""
    places = np.arange(values.shape[-1], dtype=np.uint32) * np.uint32(bits)
    return np.bitwise_or.reduce(values.astype(np.uint32) << places, axis=-1).view(np.int32)


def _awq(values: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
    """``values`` [rows, columns], ``scales`` and ``zeros`` [rows, groups]."""
    weights, packed = (_words(each.T.reshape(each.shape[1], -1, 8)[:, :, AWQ_ORDER], 4) for each in (values, zeros))
    return {"qweight": weights, "qzeros": packed, "scales": scales.T.astype(np.float16)}


def _gptq(values: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """The first version of the format, which stores zeros less one."""
    rows, per_word = len(values), 32 // bits
    return {
        "qweight": _words(np.moveaxis(values.T.reshape(-1, per_word, rows), 1, 2), bits),
        "qzeros": _words((zeros.T - 1).reshape(zeros.shape[1], -1, per_word), bits),
        "scales": scales.T.astype(np.float16),
    }
