"""The models and formats of the ONNX Runtime backend, which runs on the CPU in the runtime's fused operators."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from engine_core.backends.capabilities import SCALED_QUERIES, Capabilities

if TYPE_CHECKING:
    from engine_core.backends.machine import Machine, Missing
    from engine_core.formats.weight_formats.base import WeightFormat

_OLDEST = (1, 20)  # of ONNX Runtime
_GROUP_SIZES = (16, 32, 64, 128, 256)  # of MatMulNBits and GatherBlockQuantized


def _runs_format(kind: WeightFormat) -> bool:
    """Return True if the runtime's operators multiply by the format: MatMul by fp32, MatMulNBits by integers."""
    from engine_core.formats.weight_formats.integers import IntegerFormat

    if not isinstance(kind, IntegerFormat):
        return kind.name == "fp32"
    return not kind.has_fixed_group or kind.group_size in _GROUP_SIZES


def _missing(machine: Machine) -> Missing | None:
    from engine_core.backends.machine import Missing

    version, oldest = machine.packages["onnxruntime"], ".".join(map(str, _OLDEST))
    if not version:
        return Missing("onnxruntime is not installed", f"pip install 'onnxruntime>={oldest}'")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _OLDEST:
        return Missing(f"onnxruntime is {version}, {oldest} is needed", f"pip install -U 'onnxruntime>={oldest}'")
    return None


CAPABILITIES = Capabilities(
    backend="onnxruntime",
    on_gpu=False,
    runs_format=_runs_format,
    default_format="int8",
    kv_cache_types=("fp32", "fp16", "int8"),
    longest_default=4096,
    max_batch=4,
    lora=True,
    switches_rope=True,
    log_probabilities=True,
    drafts=True,
    traits=(SCALED_QUERIES,),
    group_sizes=_GROUP_SIZES,
    declined_options={
        "max_prefill": "--max-prefill is fixed in an engine for tensorrt only; elsewhere set prefill_chunk.",
        "exporter": "--exporter is a matter of tensorrt only; leave it out.",
    },
    packages=("onnxruntime",),
    missing=_missing,
)
