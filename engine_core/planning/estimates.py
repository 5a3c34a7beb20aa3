"""Estimate the memory of an engine that is built from a checkpoint, variant by variant, before it is built.

Nothing is computed here that a backend computes itself (``plan_for`` of its toolkit). Only what no backend of this
version runs is estimated from the weight format, the type of the KV cache and the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from engine_core.backends.capabilities import Capabilities, all_capabilities, capabilities_of
from engine_core.backends.toolkit import Size, toolkit_of
from engine_core.config import EngineConfig
from engine_core.formats.gguf_file import is_gguf
from engine_core.formats.weight_formats import NAMES, weight_format
from engine_core.formats.weight_formats.base import WeightFormat
from engine_core.memory import MemoryPlan, kv_cache_bytes
from engine_core.models.shapes import read_shapes, spec_of
from engine_core.models.spec import ModelSpec
from engine_core.planning.devices import DeviceProfile


class CheckpointEstimate:
    """The plans of one checkpoint. Raises CheckpointError or UnsupportedModelError where it cannot be read."""

    def __init__(self, directory: Path) -> None:
        directory = Path(directory)
        checkpoint, self.spec = read_shapes(directory)
        name = str(checkpoint.config.get("_name_or_path") or "")
        own = directory.resolve()
        self.name = Path(name).name or (own.stem if is_gguf(own) else own.name)

    @classmethod
    def of_config(cls, config: Mapping[str, Any], name: str) -> CheckpointEstimate:
        """Return the plans of a model of which only config.json is known. Raises as the constructor does."""
        estimate = cls.__new__(cls)
        estimate.spec, estimate.name = spec_of(config), name
        return estimate

    def variants(self, backend: str = "", *, on_gpu: bool = True) -> tuple[tuple[str, str], ...]:
        """Return (quantization, backend) of every column: all of ``backend``, or without one of the GPU or the CPU.

        Where several backends have a format, the fastest that runs this model stands for it, else the fastest.
        """
        if backend:
            return tuple((kind, backend) for kind in capabilities_of(backend).planned_formats)
        found = []
        for kind in NAMES:
            having = [each for each in all_capabilities() if each.on_gpu == on_gpu and kind in each.planned_formats]
            having.sort(key=partial(self._rank, kind))
            found += [(kind, each.backend) for each in having[:1]]
        return tuple(found)

    def _rank(self, quantization: str, capabilities: Capabilities) -> tuple[bool, bool]:
        refused = capabilities.refusal(self.spec, quantization) is not None
        return refused, quantization not in capabilities.weight_formats

    def plan(self, quantization: str, backend: str, size: Size, device: DeviceProfile) -> MemoryPlan:
        """Return every byte by purpose, against what is free on ``device``. Also of what no backend of this version
        runs."""
        found = self.plan_items(quantization, backend, size, device.num_sms)
        return MemoryPlan.of(found, device.free, device.title)

    def plan_items(self, quantization: str, backend: str, size: Size, num_sms: int = 0) -> dict[str, int]:
        """Return the bytes by purpose."""
        capabilities, spec = capabilities_of(backend), self.spec
        stands_in = quantization not in capabilities.weight_formats
        base = capabilities.default_format if stands_in else quantization
        kv_cache_types = capabilities.kv_cache_types_for(spec, base, size.max_context)
        wanted = size.kv_cache_type or kv_cache_types[0]
        planned = wanted if wanted in kv_cache_types else kv_cache_types[0]
        own_batch = min(size.max_batch, capabilities.max_batch)
        own_size = dataclasses.replace(size, max_batch=own_batch, kv_cache_type=planned)
        items = toolkit_of(backend).plan_for(spec, base, own_size, num_sms)
        if stands_in:
            items["weights"] = format_bytes_of(spec, weight_format(quantization), size.head_rows or spec.vocab_size)
        return self._adjusted(items, size, own_size, wanted)

    def step_bytes(
        self, quantization: str, backend: str, size: Size, device: DeviceProfile, *, kv_tokens: int = 0
    ) -> int:
        """Return the bytes that a decode step reads: weights, and the KV of ``kv_tokens``.

        ``quantization`` and ``size`` are something the backend runs.
        """
        toolkit, plan = toolkit_of(backend), self.plan(quantization, backend, size, device)
        manifest = toolkit.manifest_for(self.spec, quantization, size)
        config = EngineConfig(Path(), max_context=size.max_context)
        weights = toolkit.step_bytes(manifest, plan, config, size.head_rows or self.spec.vocab_size)
        return weights + plan.item("kv_cache") * kv_tokens // size.max_context

    def why_not(self, quantization: str, backend: str, size: Size, device: DeviceProfile) -> str:
        """Empty if a backend of this version runs it on ``device``, else the first reason against it."""
        capabilities = capabilities_of(backend)
        reason = capabilities.refusal(
            self.spec,
            quantization,
            size.kv_cache_type,
            max_context=size.max_context,
            capability=device.capability if device.has_gpu else 0,
        )
        return reason or capabilities.batch_refusal(size.max_batch) or ""

    def kv_cache_types(self, quantization: str, backend: str, device: DeviceProfile) -> tuple[str, ...]:
        """Return the types to plan: those the backend has for this model; none where it does not run."""
        capabilities = capabilities_of(backend)
        known = quantization if quantization in capabilities.weight_formats else capabilities.default_format
        refused = capabilities.device_refusal(known, device.capability if device.has_gpu else 0)
        return () if refused else capabilities.kv_cache_types_for(self.spec, known)

    def _adjusted(self, items: dict[str, int], size: Size, own_size: Size, wanted: str) -> dict[str, int]:
        """Return ``items``, which the backend plans for ``own_size``, for the batch of ``size`` and KV type ``wanted``,
        which it may not run yet."""
        spec = self.spec
        before, after = (
            kv_cache_bytes(
                num_layers=max(1, len(spec.kv_layers)), num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
                max_context=size.max_context, kv_cache_type=kind,
            )
            for kind in (own_size.kv_cache_type, wanted)
        )  # fmt: skip
        result = dict(items)
        for name in ("kv_cache", "prefix_cache"):
            if name in result and wanted != own_size.kv_cache_type:
                result[name] = result[name] * after // before
        for name in ("kv_cache", "io"):
            result[name] = result[name] * size.max_batch // own_size.max_batch
        return result


def format_bytes_of(spec: ModelSpec, stored: WeightFormat, head_rows: int) -> int:
    """Return the bytes of the weights with the layers' matrices in the format ``stored`` and the rest in 16 bits."""
    shapes = [shape for layer in spec.layers for shape in spec.matrices_of(layer).values()]
    matrices, in_matrices = sum(map(stored.nbytes, shapes)), sum(map(math.prod, shapes))
    tables = (1 if spec.tied else 2) * spec.vocab_size * spec.hidden_size
    others = spec.num_parameters - in_matrices - tables
    whole = spec.tied and head_rows == spec.vocab_size
    rows = spec.vocab_size + (0 if whole else head_rows)
    return matrices + 2 * (others + rows * spec.hidden_size)
