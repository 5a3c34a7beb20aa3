"""The parameters of the node: each declared once, here, as data.

*Fixed* parameters are read when the node is configured; a change while it is configured is refused with the reason.
*Dynamic* ones hold from the next request on. ``config/llm.yaml`` repeats the defaults; a test compares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    ParameterType,
    SetParametersResult,
)
from rclpy.node import Node
from rclpy.parameter import Parameter

from edgellm_ros.bond import MODES as BOND_MODES
from engine_core.config import BACKENDS, KV_CACHE_TYPES, QUANTIZATIONS, EngineConfig
from engine_core.errors import EngineDirectoryError
from engine_core.request import SamplingParams
from engine_core.serving.worker import BUSY_POLICIES

DEACTIVATE_POLICIES = ("finish", "cancel")
RANDOM_SEED = -1

_TYPES = {
    bool: ParameterType.PARAMETER_BOOL,
    int: ParameterType.PARAMETER_INTEGER,
    float: ParameterType.PARAMETER_DOUBLE,
    str: ParameterType.PARAMETER_STRING,
    list: ParameterType.PARAMETER_STRING_ARRAY,
}


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter. ``range`` is inclusive; sliders come from it. ``fixed``: not changed while configured."""

    name: str
    default: Any
    description: str
    range: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    fixed: bool = False
    read_only: bool = False

    def descriptor(self) -> ParameterDescriptor:
        descriptor = ParameterDescriptor(
            name=self.name, type=_TYPES[type(self.default)], description=self.description, read_only=self.read_only
        )
        if self.choices:
            descriptor.additional_constraints = f"One of: {', '.join(self.choices)}."
        if self.range is not None and isinstance(self.default, int):
            descriptor.integer_range = [IntegerRange(from_value=self.range[0], to_value=self.range[1], step=1)]
        elif self.range is not None:
            descriptor.floating_point_range = [FloatingPointRange(from_value=self.range[0], to_value=self.range[1])]
        return descriptor

    def problem(self, value: Any) -> str:
        """Why ``value``, which has the declared type, is refused; empty if it is not."""
        if self.choices and value not in self.choices:
            return f"{self.name} is {value!r}, but it must be one of {', '.join(self.choices)}."
        if isinstance(value, float) and not math.isfinite(value):
            return f"{self.name} is {value}, but it must be a finite number."
        if self.range is not None and not self.range[0] <= value <= self.range[1]:
            return f"{self.name} is {value}, but it must be from {self.range[0]} to {self.range[1]}."
        return ""


def _fixed(name: str, default: Any, description: str, **options) -> ParameterSpec:
    return ParameterSpec(name, default, description + " Taken at the next configure.", fixed=True, **options)


_MAX_INT = 2**31 - 1

SPECS: tuple[ParameterSpec, ...] = (
    _fixed("engine_dir", "", "Engine directory made by 'edgellm build'."),
    _fixed(
        "backend",
        "auto",
        "What runs the model; auto takes the fastest that is built, runs here and fits.",
        choices=BACKENDS,
    ),
    _fixed("quantization", "auto", "Variant of the engine directory; auto takes the smallest.", choices=QUANTIZATIONS),
    _fixed("vocab_map", "auto", "Reduced vocabulary: auto (the engine's, if it has one), none, or the path of a file."),
    _fixed("max_context", 0, "Tokens of prompt and answer together; 0 = what was built.", range=(0, _MAX_INT)),
    _fixed("max_batch", 1, "Requests decoded at the same time.", range=(1, 64)),
    _fixed("kv_cache_type", "auto", "Type of the KV cache's numbers.", choices=KV_CACHE_TYPES),
    _fixed("use_cuda_graph", True, "Replay decode steps and prompt chunks as CUDA graphs where the backend can."),
    _fixed("prefill_chunk", 0, "Tokens per prefill step; 0 = the backend's choice.", range=(0, _MAX_INT)),
    _fixed("prompt_cache_entries", 2, "System prompts whose KV is kept beside the cache.", range=(0, 64)),
    _fixed("prompt_cache_tokens", 512, "Tokens each kept system prompt can have.", range=(1, _MAX_INT)),
    _fixed("num_threads", 0, "CPU threads; 0 = the backend's choice.", range=(0, 1024)),
    _fixed(
        "reproducible",
        True,
        "A request with a seed of its own reuses no KV, so that it gives the same text whatever is cached.",
    ),
    _fixed("verify_files", True, "Check the SHA-256 of every file of the engine, not only its size."),
    ParameterSpec("temperature", 0.0, "Randomness of the answer; 0 = greedy.", range=(0.0, 2.0)),
    ParameterSpec("top_p", 1.0, "Sample among the likeliest tokens of this total probability; 1 = off.", (0.01, 1.0)),
    ParameterSpec("top_k", 0, "Sample among this many likeliest tokens; 0 = off.", range=(0, 1000)),
    ParameterSpec("min_p", 0.0, "Drop tokens below this share of the likeliest one; 0 = off.", range=(0.0, 0.99)),
    ParameterSpec("repetition_penalty", 1.0, "Divides the logits of tokens seen before; 1 = off.", range=(0.5, 2.0)),
    ParameterSpec("seed", RANDOM_SEED, "Seed of the sampling; -1 = a fresh one per request.", range=(-1, 2**63 - 1)),
    ParameterSpec("max_new_tokens", 256, "Most tokens of an answer.", range=(1, 131072)),
    # An empty list has no type in a parameter file, so "no stop strings" is a list of one empty string.
    ParameterSpec("stop", [""], "Strings before which an answer ends; empty ones are ignored."),
    ParameterSpec("stream_interval", 0.0, "Milliseconds between two pieces; 0 = one piece per token.", (0.0, 10000.0)),
    ParameterSpec("system_prompt", "", "Put before conversations without a system message; its KV is kept."),
    ParameterSpec(
        "busy_policy",
        "queue",
        "A request while another runs: queue (it waits), reject (refused), preempt (it ends what has no higher "
        "priority, with its partial text), preempt_lower (it ends what has a lower one).",
        choices=BUSY_POLICIES,
    ),
    ParameterSpec("queue_depth", 8, "Requests that may wait; further ones are refused at once.", range=(0, 1024)),
    ParameterSpec(
        "request_timeout", 0.0, "Seconds until a request without a deadline ends; 0 = never.", range=(0.0, 86400.0)
    ),
    ParameterSpec(
        "warn_wait", 5.0, "Seconds a request may wait before /diagnostics warns; 0 = never.", range=(0.0, 86400.0)
    ),
    ParameterSpec(
        "deactivate_policy", "finish", "What deactivate does to the running request.", choices=DEACTIVATE_POLICIES
    ),
    ParameterSpec("deactivate_timeout", 5.0, "Seconds the running request may go on in deactivate.", (0.0, 300.0)),
    ParameterSpec(
        "bond",
        "auto",
        "Heartbeats for nav2_lifecycle_manager: auto (once it sends its own), always, never.",
        choices=BOND_MODES,
        read_only=True,
    ),
    ParameterSpec("autostart", False, "Configure and activate without a lifecycle manager.", read_only=True),
)
_BY_NAME = {spec.name: spec for spec in SPECS}
_ENGINE_OPTIONS = tuple(spec.name for spec in SPECS if spec.fixed)
_SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


@dataclass(frozen=True)
class Settings:
    """The dynamic parameters as one consistent snapshot; a request reads exactly one."""

    sampling: SamplingParams
    stop: tuple[str, ...]
    stream_interval: float  # s
    system_prompt: str
    busy_policy: str
    queue_depth: int
    request_timeout: float  # s; 0 = none
    warn_wait: float  # s; 0 = never
    deactivate_policy: str
    deactivate_timeout: float  # s


def declare_parameters(node: Node) -> None:
    """Declares all of them. Raises rclpy's InvalidParameterTypeException or InvalidParameterValueException."""
    node.declare_parameters("", [(spec.name, spec.default, spec.descriptor()) for spec in SPECS])


def check_parameters(
    parameters: Sequence[Parameter], *, configured: bool, current: Callable[[str], Any] | None = None
) -> SetParametersResult:
    """Check whether the node takes these values, without side effects and always with a reason.

    Others' parameters pass, and so does a fixed parameter that gets the value it has, by ``current`` (name → value).
    """
    for parameter in parameters:
        spec = _BY_NAME.get(parameter.name)
        if spec is None:
            continue
        if parameter.type_ == Parameter.Type.NOT_SET:
            reason = f"{spec.name} cannot be removed."
        elif spec.fixed and configured and (current is None or current(spec.name) != parameter.value):
            reason = f"{spec.name} is fixed while the node is configured; clean up, set it and configure again."
        else:
            reason = spec.problem(parameter.value)
        if reason:
            return SetParametersResult(successful=False, reason=reason)
    return SetParametersResult(successful=True)


def check_declared(node: Node) -> str:
    """What is wrong with the values the node was started with; empty if nothing is."""
    return check_parameters(node.get_parameters([spec.name for spec in SPECS]), configured=False).reason


def read_engine_config(node: Node) -> EngineConfig:
    """Return the fixed parameters. Raises ConfigurationError, and EngineDirectoryError if engine_dir is empty."""
    if not node.get_parameter("engine_dir").value:
        name = node.get_fully_qualified_name()
        raise EngineDirectoryError(
            f"The parameter engine_dir is empty; set it to a directory made by 'edgellm build'. In a params_file it "
            f"belongs into the section '{name}' (or '/**'): sections of other nodes are not read."
        )
    return EngineConfig.from_dict({name: node.get_parameter(name).value for name in _ENGINE_OPTIONS})


def read_settings(node: Node) -> Settings:
    """The dynamic parameters as they are now; call it where parameters are set (the executor) for one snapshot."""

    def value(name: str) -> Any:
        return node.get_parameter(name).value

    seed = value("seed")
    return Settings(
        sampling=SamplingParams(
            seed=None if seed == RANDOM_SEED else seed, **{name: value(name) for name in _SAMPLING_OPTIONS}
        ),
        stop=tuple(text for text in value("stop") if text),
        stream_interval=value("stream_interval") / 1000.0,
        system_prompt=value("system_prompt"),
        busy_policy=value("busy_policy"),
        queue_depth=value("queue_depth"),
        request_timeout=value("request_timeout"),
        warn_wait=value("warn_wait"),
        deactivate_policy=value("deactivate_policy"),
        deactivate_timeout=value("deactivate_timeout"),
    )
