"""The configuration that an engine is opened with: frozen, resolved once; unknown keys raise."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from engine_core.backends.capabilities import all_capabilities, all_kv_cache_types
from engine_core.backends.registry import backend_names
from engine_core.errors import ConfigurationError
from engine_core.formats import weight_formats
from engine_core.paths import expand_user

BACKENDS = ("auto", *backend_names())
GPU_BACKENDS = frozenset(each.backend for each in all_capabilities() if each.on_gpu)
QUANTIZATIONS = ("auto", *weight_formats.NAMES)
# auto: where it changes no answer; on: also where several tokens at once are rounded otherwise than one, so that an
# answer may differ from the one without, but is always the same.
SPECULATIONS = ("auto", "on", "off")
KV_CACHE_TYPES = ("auto", *all_kv_cache_types())
# How a request is treated while another one runs: see the node's parameter busy_policy.
BUSY_POLICIES = ("queue", "reject", "preempt", "preempt_lower")
# Option of EngineConfig → the values it can have, or the least it can be.
CHOICES = {
    "backend": BACKENDS, "quantization": QUANTIZATIONS, "kv_cache_type": KV_CACHE_TYPES, "speculation": SPECULATIONS,
}  # fmt: skip
MINIMUMS = {
    "max_context": 0, "max_batch": 1, "prefill_chunk": 0, "prompt_cache_entries": 0, "prompt_cache_tokens": 1,
    "session_memory": 0, "max_sessions": 1, "num_threads": 0, "lora_max_rank": 1,
    "max_images": 0, "max_image_tokens": 0, "image_frames_memory": 0,
}  # fmt: skip


@dataclass(frozen=True)
class EngineConfig:
    """The options that are fixed while an engine is open. ``auto`` and 0 become values when it is opened."""

    engine_dir: Path
    backend: str = "auto"
    quantization: str = "auto"
    vocab_map: str = "auto"  # auto: the engine's, if it has one; none; or a path
    max_context: int = 0  # tokens, prompt and answer together; 0 = what the engine was built for
    max_batch: int = 1  # sequences decoded at the same time, each with a KV slot of max_context tokens
    kv_cache_type: str = "auto"  # auto: what the engine was built to open with
    use_cuda_graph: bool = True
    # On a GPU whose launch configurations are not in the table, the first configure measures them for some seconds and
    # keeps them in the kernel cache. False: the table's rules, extrapolated.
    tune_kernels: bool = True
    speculation: str = "auto"  # steps that feed guessed tokens too and keep those that would have been sampled
    max_images: int = 4  # of a prompt, those of earlier turns included, where the model sees; 0 = no encoder is loaded
    max_image_tokens: int = 0  # of an image, which is scaled down to it; 0 = see vision/limits.py
    image_frames_memory: int = 0  # MiB of the memory plan in which a node keeps frames of topics, where the model sees
    prefill_chunk: int = 0  # tokens per prefill step; 0 = the backend's choice
    prompt_cache_entries: int = 2  # saved prefixes (system prompts); their memory is part of the plan
    prompt_cache_tokens: int = 512  # tokens each saved prefix can hold
    # MiB of the memory plan in which the KV of conversations is kept: the host's, or the GPU's where they are one.
    # 0: a conversation goes on only from the slot it was in.
    session_memory: int = 0
    max_sessions: int = 64  # conversations whose text is kept
    # LoRA adapters that requests may name, each "name:directory"; see formats/lora.py. Empty entries are ignored.
    lora_adapters: tuple[str, ...] = ()
    lora_max_rank: int = 64  # an adapter of a higher rank is refused
    # A request with a seed of its own computes its whole prompt: KV reused from other requests was computed in other
    # chunks, whose rounding (most of all int8's) can change a sampled token. Without it, seeds repeat only mostly.
    reproducible: bool = True
    schema_dir: str = ""  # directory of JSON schemas that requests may name; "" = none
    num_threads: int = 0  # CPU threads; 0 = the backend's choice
    verify_files: bool = True  # check the SHA-256 of every file, not only its size
    # File or directory of public keys, one of which has to have signed the engine; "" = none is asked for. See
    # formats/signatures.py.
    trusted_keys: str = ""

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value, kind = getattr(self, option.name), type(option.default)
            if option.name == "engine_dir":
                if not isinstance(value, (str, Path)):
                    raise ConfigurationError(f"engine_dir is {value!r:.60}, expected a path.")
            elif kind is tuple:
                if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
                    raise ConfigurationError(f"{option.name} is {value!r:.60}, expected a list of texts.")
                object.__setattr__(self, option.name, tuple(entry for entry in value if entry))
            elif type(value) is not kind:
                raise ConfigurationError(f"{option.name} is {value!r:.60}, expected a value of type {kind.__name__}.")
        object.__setattr__(self, "engine_dir", expand_user(self.engine_dir))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}.")
        for name, minimum in MINIMUMS.items():
            if getattr(self, name) < minimum:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, expected {minimum} or more.")
        if self.trusted_keys and not self.verify_files:
            raise ConfigurationError(
                "trusted_keys needs verify_files: a signature is of the SHA-256 of the files; set verify_files to true."
            )

    @classmethod
    def from_dict(cls, values: dict) -> EngineConfig:
        """Raises ConfigurationError on a key this version does not know."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigurationError(f"Unknown engine option {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        return cls(**values)
