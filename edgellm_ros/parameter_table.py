"""The table of the node's parameters: the one place that says what each is.

From it come their declaration and validation (``parameters.py``), the launch arguments (``llm.launch.py``), and, by
``tools/write_generated.py``, config/llm.yaml and docs/parameters.md. It needs neither ROS nor other packages: launch
runs on the system's Python. generate_parameter_library exists in Python for Humble and Jazzy, but is not used: its YAML
cannot take defaults, ranges and choices from the engine's classes, knows no parameter that is fixed only while the node
is configured, and writes no launch arguments.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from dataclasses import dataclass
from typing import Any

from engine_core.backends.capabilities import all_capabilities
from engine_core.config import BUSY_POLICIES, CHOICES, MINIMUMS, EngineConfig
from engine_core.request import LIMITS, SAMPLING_OPTIONS, Range, SamplingOption

DEACTIVATE_POLICIES = ("finish", "cancel")
BOND_MODES = ("auto", "always", "never")  # not on and off, which YAML takes for booleans
RANDOM_SEED = -1
_MAX_INT = 2**31 - 1
_MAX_BATCH = {each.backend: each.max_batch for each in all_capabilities()}


class Kind(enum.Enum):
    """The time at which a parameter may change."""

    FIXED = "fixed"  # read when the node is configured; a change while it is configured is refused
    AT_ACTIVATE = "at activate"  # read when the node is activated; may change at any time
    DYNAMIC = "dynamic"  # holds from the next request on
    AT_START = "at start"  # read when the process starts; a change is refused


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter; its type is the default's."""

    name: str
    kind: Kind
    default: Any  # bool, int, float, str or list[str]
    description: str
    range: Range | None = None
    choices: tuple[str, ...] = ()
    # The default of the launch argument of this name; "" leaves the value to the parameter file and the node, None:
    # there is no such argument.
    launch_default: str | None = None

    def problem(self, value: Any) -> str:
        """Return why ``value``, which has the declared type, is refused; "" if it is not."""
        if self.choices and value not in self.choices:
            return f"{self.name} is {value!r}, but it must be one of {', '.join(self.choices)}."
        if isinstance(value, float) and not math.isfinite(value) and (self.range is None or value not in self.range):
            return f"{self.name} is {value}, but it must be a finite number."
        if self.range is not None and value not in self.range:
            return f"{self.name} is {value}, but it must be {self.range}."
        return ""

    def value_of(self, text: str) -> bool | int | float | str:
        """Return the value that a launch argument's text stands for. Raises ValueError saying what was expected."""
        kind = type(self.default)
        if kind is bool:
            if text.lower() not in ("true", "false"):
                raise ValueError(f"{self.name} is {text!r}, expected true or false.")
            return text.lower() == "true"
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{self.name} is {text!r}, expected {what}.") from None

    @property
    def full_description(self) -> str:
        """The description with the choices or the range behind it."""
        if self.choices:
            return f"{self.description} One of {', '.join(self.choices)}."
        if self.range is not None and self.range.high < _MAX_INT:
            return f"{self.description} {str(self.range).capitalize()}."
        return self.description


def _engine(name: str, description: str, high: float = _MAX_INT, **options: Any) -> ParameterSpec:
    """Return the parameter of an option of EngineConfig."""
    fields = {field.name: field for field in dataclasses.fields(EngineConfig)}
    if name in MINIMUMS:
        options["range"] = Range(MINIMUMS[name], high)
    if name in CHOICES:
        options["choices"] = CHOICES[name]
    return ParameterSpec(name, Kind.FIXED, fields[name].default, description, **options)


def _sampling(option: SamplingOption) -> ParameterSpec:
    """Return the parameter of an option of SamplingParams."""
    if option.name == "seed":  # a parameter always has a value, and none above 2**63 - 1
        description = f"{option.description} {RANDOM_SEED} = none."
        return ParameterSpec(option.name, Kind.DYNAMIC, RANDOM_SEED, description, range=Range(RANDOM_SEED, 2**63 - 1))
    return ParameterSpec(option.name, Kind.DYNAMIC, option.default, option.description, range=option.range)


def _dynamic(name: str, default: Any, description: str, *limits: float, **options: Any) -> ParameterSpec:
    range = Range(limits[0], limits[1]) if limits else None
    return ParameterSpec(name, Kind.DYNAMIC, default, description, range=range, **options)


def _at_activate(name: str, default: Any, description: str, *limits: float, **options: Any) -> ParameterSpec:
    range = Range(limits[0], limits[1]) if limits else None
    return ParameterSpec(name, Kind.AT_ACTIVATE, default, description, range=range, **options)


def _at_start(name: str, default: Any, description: str, **options: Any) -> ParameterSpec:
    return ParameterSpec(name, Kind.AT_START, default, description, **options)


# Title → parameters, in the order in which they are shown.
SECTIONS: dict[str, tuple[ParameterSpec, ...]] = {
    "The engine": (
        ParameterSpec(
            "engine_dir", Kind.FIXED, "",
            "Engine directory made by 'edgellm build'; where none is named, llm.launch.py takes the demo model's.",
            launch_default="",
        ),
        _engine(
            "backend", "Backend that runs the model; auto takes the fastest that is built, runs here and fits.",
            launch_default="",
        ),
        _engine("quantization", "Variant of the engine directory; auto takes the smallest.", launch_default=""),
        _engine(
            "vocab_map", "Reduced vocabulary: auto (the engine's, if it has one), none, or the path of a file.",
            launch_default="",
        ),
        _engine("max_context", "Tokens of prompt and answer together; 0 = what was built.", launch_default=""),
        _engine(
            "max_batch",
            "Requests decoded at the same time, each with a KV cache of its own; at most "
            f"{', '.join(f'{count} on {backend}' for backend, count in _MAX_BATCH.items())}.",
            max(_MAX_BATCH.values()),
        ),
        _engine("kv_cache_type", "Number format of the KV cache; auto: what the engine was built for."),
        _engine("use_cuda_graph", "Replay decode steps and prompt chunks as CUDA graphs where the backend can."),
        _engine(
            "tune_kernels",
            "Measure kernel launch configurations for up to 10 s at the first configure on a GPU that the backend has "
            "no figures for.",
        ),
        _engine(
            "speculation",
            "Steps that also check guessed tokens and keep those that the model would have given: auto (where that "
            "changes no answer: on the CPU with kv_cache_type int8), on (also where an answer may round otherwise: "
            "on the CPU with a float KV cache, on cuda), off.",
        ),
        _engine(
            "prefill_chunk",
            "Tokens per prefill step, 0 = the backend's choice; with max_batch above 1, the next token of the other "
            "requests waits for one such step at most.",
        ),
        _engine(
            "max_images",
            "Images of a prompt, those of earlier turns included, for models that see; 0 = the encoder is not loaded.",
            LIMITS.images,
        ),
        _engine(
            "max_image_tokens",
            "Tokens of an image, which is scaled down to have no more; fewer are faster. 0 = the model's own limit, at "
            "most half of max_context, and 256 where an image has as many as its pixels ask for (Qwen3-VL).",
        ),
        ParameterSpec(
            "image_frames_memory", Kind.FIXED, 64,
            "MiB of the memory plan for the frames of image_topics that are kept, where the model sees: of all topics "
            "in equal parts, as they came; the oldest are dropped.",
            range=Range(0, 1 << 14),
        ),
        _engine("prompt_cache_entries", "System prompts whose KV is kept beside the cache.", 64),
        _engine("prompt_cache_tokens", "Tokens each kept system prompt can have."),
        _engine(
            "session_memory",
            "MiB for the KV of conversations, so that one that comes back is not computed again; in the host's memory, "
            "or on a Jetson in the one it shares with the GPU. 0 = a conversation is kept only until another request "
            "needs its place.",
            1 << 20,
        ),
        _engine("max_sessions", "Sessions, conversations whose text is kept; a further one is refused.", 4096),
        ParameterSpec(
            # An empty list has no type in a parameter file, so "no adapters" is a list of one empty string.
            "lora_adapters", Kind.FIXED, [""],
            "LoRA adapters that requests may name, each 'name:directory' as peft saves it; empty ones are ignored.",
        ),
        _engine("lora_max_rank", "Adapters of a higher rank are refused."),
        _engine(
            "schema_dir", "Directory of JSON schemas, a file NAME.json each, that requests may name; empty = none."
        ),
        _engine("num_threads", "CPU threads; 0 = the backend's choice.", 1024),
        _engine(
            "reproducible",
            "A request with a seed of its own reuses no KV, so that it gives the same text whatever is cached.",
        ),
        _engine("verify_files", "Check the SHA-256 of every file of the engine, not only its size."),
        _engine(
            "trusted_keys",
            "File or directory of Ed25519 public keys (PEM or OpenSSH), one of which has to have signed the engine: "
            "see 'edgellm sign'; empty = none is asked for.",
        ),
    ),
    "Defaults of requests": (
        *map(_sampling, SAMPLING_OPTIONS.values()),
        # An empty list has no type in a parameter file, so "no stop strings" is a list of one empty string.
        _dynamic("stop", [""], "Strings before which an answer ends; empty ones are ignored."),
        _dynamic("system_prompt", "", "Put before conversations without a system message; its KV is kept."),
    ),
    "How requests are served": (
        _dynamic("stream_interval", 0.0, "Milliseconds between two pieces; 0 = one piece per token.", 0.0, 10000.0),
        _dynamic(
            "busy_policy", "queue",
            "A request while another runs: queue (it waits), reject (refused), preempt (it ends what has no higher "
            "priority, with its partial text), preempt_lower (it ends what has a lower one).",
            choices=BUSY_POLICIES,
        ),
        _dynamic("queue_depth", 8, "Requests that may wait; further ones are refused at once.", 0, 1024),
        _dynamic("request_timeout", 0.0, "Seconds until a request without a deadline ends; 0 = never.", 0.0, 86400.0),
        _dynamic(
            "max_image_age", 1.0,
            "Seconds since the stamp of a topic's newest frame after which a request that asks for it is refused; 0 = "
            "any.",
            0.0, 86400.0,
        ),
        _dynamic("warn_wait", 5.0, "Seconds a request may wait before /diagnostics warns; 0 = never.", 0.0, 86400.0),
        _dynamic(
            "deactivate_policy", "finish", "How deactivate ends the running request.", choices=DEACTIVATE_POLICIES
        ),
        _dynamic("deactivate_timeout", 5.0, "Seconds the running request may go on in deactivate.", 0.0, 300.0),
    ),
    "Images of topics": (
        # An empty list has no type in a parameter file, so "no topics" is a list of one empty string.
        _at_activate(
            "image_topics", [""],
            "Topics of cameras whose newest frames requests may ask for by these names: sensor_msgs/Image, or "
            "CompressedImage where the name ends in /compressed; empty ones are ignored.",
        ),
        _at_activate("image_frames", 1, "Frames of each topic that a request may ask for; they are kept.", 1, 32),
        _at_activate(
            "image_frame_interval", 0.5, "Least seconds between the frames that are kept, by their stamps.", 0.0, 3600.0
        ),
    ),
    "The OpenAI-compatible endpoint": (
        _at_activate(
            "http_port", 0, "TCP port of the HTTP endpoint while the node is active; 0 = there is none.", 0, 65535,
            launch_default="",
        ),
        _at_activate(
            "http_host", "127.0.0.1",
            "Address it listens on; 127.0.0.1: programs of this machine alone, 0.0.0.0: every network.",
        ),
        _at_activate(
            "http_api_key_file", "",
            "File with one API key a line, of which a client has to send one; empty = none is asked for.",
        ),
        _at_activate(
            "http_body_limit", 16, "MiB that the body of a request may have, with its images as base64.", 1, 512
        ),
    ),
    "The process": (
        _at_start(
            "bond", "auto",
            "Heartbeats for nav2_lifecycle_manager, with the ROS package bond: auto (once it sends its own), always, "
            "never.",
            choices=BOND_MODES,
        ),
        _at_start(
            "sessions_dir", "", "Directory where ~/sessions saves and loads conversations; empty = it does neither.",
        ),
        _at_start("autostart", False, "Configure and activate without a lifecycle manager.", launch_default="true"),
    ),
}  # fmt: skip
SPECS: tuple[ParameterSpec, ...] = tuple(spec for specs in SECTIONS.values() for spec in specs)
LAUNCH_SPECS = tuple(spec for spec in SPECS if spec.launch_default is not None)
