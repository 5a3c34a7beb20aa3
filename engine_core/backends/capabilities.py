"""The models and formats that each backend builds and runs, and why not.

It is the one source of ``plan``, ``build``, ``inspect``, ``doctor``, the choices of parameters and the tables of the
documentation.

A backend's folder has a module ``capabilities`` with its ``CAPABILITIES``. It needs none of the packages that the
backend itself needs, so that every machine can say what another one would run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from engine_core.backends.registry import backend_names, check_name
from engine_core.errors import BuildError, UnsupportedModelError
from engine_core.formats import weight_formats as formats
from engine_core.formats.weight_formats import NAMES

if TYPE_CHECKING:
    from engine_core.backends.machine import Machine, Missing
    from engine_core.formats.weight_formats.base import WeightFormat
    from engine_core.models.spec import ModelSpec

# Compute capability → the architectures that have it or a higher one.
_ARCHITECTURES = {89: "Ada, Hopper or Blackwell", 100: "Blackwell"}
_LEAST_CONTEXT = 2  # tokens: one to read and one to write


@dataclass(frozen=True)
class Trait:
    """Something a model can have that a backend does not run. ``label`` completes "it has" and may name {spec}."""

    label: str
    is_in: Callable[[ModelSpec, int], bool]  # of a model, with so many tokens of context


# No backend scales queries by their positions; before the first such position there is nothing to scale.
SCALED_QUERIES = Trait(
    "queries scaled from position {spec.query_scale_position} on, before which max_context has to end",
    lambda spec, max_context: 0 < spec.query_scale_position < max_context,
)
VISION_ENCODER = Trait("a vision encoder", lambda spec, _: spec.vision is not None)
CONVOLUTIONS = Trait("short convolutions", lambda spec, _: any(layer.conv_kernel for layer in spec.layers))


@dataclass(frozen=True)
class Capabilities:
    """The models, formats and sizes that one backend builds and runs.

    Every method whose name ends in ``refusal`` returns one sentence with its full stop, or None where there is nothing
    against it. ``kv_cache_type`` "" or "auto" is the backend's default, ``max_context`` 0 what ``build`` takes.
    """

    backend: str
    on_gpu: bool
    runs_format: Callable[[WeightFormat], bool]  # whether weights in the format are built and run
    default_format: str  # what ``build`` makes of weights that are not quantized
    kv_cache_types: tuple[str, ...]  # the first is the default
    longest_default: int  # tokens an engine is built for unless more is asked for and the model was made for more
    max_batch: int = 1  # sequences decoded at the same time, at most
    plans_others: bool = False  # whether ``plan`` says what other quantized formats would take
    traits: tuple[Trait, ...] = ()  # what no model that runs may have
    kv_cache_types_of: Callable[[ModelSpec | None, str, int], tuple[str, ...]] | None = None  # where they depend on it
    group_sizes: tuple[int, ...] = ()  # integers that share a scale, as ``build --group-size`` takes
    keeps_order: Callable[[ModelSpec], bool] = lambda spec: False  # integers in groups of any columns (GPTQ's desc_act)
    context_step: int = 1  # max_context is a multiple of it
    least_capability: int = 0  # of the GPU; 80 = sm_80
    cuda_graphs: bool = False
    lora: bool = False  # LoRA adapters at run time
    switches_rope: bool = False  # every sequence has the RoPE of its own length: see ``RopeSpec.switch``
    drafts: bool = False  # steps that check guessed tokens: speculation
    log_probabilities: bool = False  # ``Backend.log_probabilities``: the logits of every step reach the host
    declined_options: Mapping[str, str] = field(default_factory=dict)  # option of ``build`` it does not take → why not
    packages: tuple[str, ...] = ()  # distributions whose versions say what ran
    missing: Callable[[Machine], Missing | None] = field(default=lambda machine: None)  # what a machine lacks to run it

    # --- what there is --------------------------------------------------------------------------------

    @cached_property
    def weight_formats(self) -> tuple[str, ...]:
        """Return the weight formats that are built and run."""
        return tuple(name for name in NAMES if self.runs_format(formats.weight_format(name)))

    @cached_property
    def planned_formats(self) -> tuple[str, ...]:
        """Return the weight formats ``plan`` has something to say about."""
        others = [name for name in NAMES if self.plans_others and formats.weight_format(name).bits < 16]
        return tuple(name for name in NAMES if name in (*self.weight_formats, *others))

    def kv_cache_types_for(self, spec: ModelSpec | None, weight_format: str, max_context: int = 0) -> tuple[str, ...]:
        """Return the KV cache types of a model (None: of any) with weights in ``weight_format``, the default first."""
        if self.kv_cache_types_of is None:
            return self.kv_cache_types
        return self.kv_cache_types_of(spec, weight_format, max_context or self._context_for(spec))

    def format_for(self, found: str) -> str:
        """Return the format to build, unless told otherwise, of a checkpoint that is ``found``; "" = not quantized.

        A quantized checkpoint in a format that the backend lacks is rounded anew to the default format, if that is
        quantized, too. Else it is refused, so that nothing is dequantized unasked.
        """
        is_rounded = found not in self.weight_formats and formats.weight_format(self.default_format).bits < 16
        return self.default_format if is_rounded or not found else found

    def rounding_notice(self, found: str) -> str | None:
        """Say that ``format_for`` has another format than the one that the checkpoint is quantized as."""
        chosen = self.format_for(found)
        if chosen == (found or chosen):
            return None
        return f"{self.format_refusal(found)} The weights are rounded anew to {chosen}; --quantization chooses another."

    def default_context(self, spec: ModelSpec) -> int:
        """Return the tokens an engine is built for unless told otherwise."""
        longest = min(self.longest_default, spec.default_position)
        return longest // self.context_step * self.context_step

    def notes(self, spec: ModelSpec, max_context: int = 0) -> tuple[str, ...]:
        """Return what the user of an engine for ``max_context`` tokens should know, a sentence each."""
        original, max_context = spec.rope_switch, max_context or self.default_context(spec)
        if self.switches_rope or not 0 < original < max_context:
            return ()
        able = [each.backend for each in all_capabilities() if each.switches_rope]
        return (
            f"max_context is {max_context}, but the model's RoPE has other factors up to {original} tokens: on the "
            f"{self.backend} backend every prompt gets those for longer ones, so that up to {original} tokens the "
            f"answers differ from transformers and may be worse; build with a max_context of {original} if that is "
            f"enough, or for {' or '.join(able)}.",
        )

    # --- why not --------------------------------------------------------------------------------------

    def refusal(
        self,
        spec: ModelSpec | None,
        weight_format: str,
        kv_cache_type: str = "",
        *,
        max_context: int = 0,
        capability: int = 0,
    ) -> str | None:
        """Say why this does not run: the weights, the KV cache, the model and its sizes, the GPU.

        ``spec``: None asks only what holds for every model. ``capability``: of the GPU, 87 = sm_87; 0 = unknown.
        """
        reasons: Iterable[Callable[[], str | None]] = (
            lambda: self.device_refusal(weight_format, capability),
            lambda: self.build_refusal(spec, weight_format, kv_cache_type, max_context=max_context),
        )
        return next((found for reason in reasons if (found := reason()) is not None), None)

    def build_refusal(
        self,
        spec: ModelSpec | None,
        weight_format: str,
        kv_cache_type: str = "",
        *,
        max_context: int = 0,
    ) -> str | None:
        """Say why no engine of this is built, on whatever machine."""
        reasons: list[Callable[[], str | None]] = [
            lambda: self.format_refusal(weight_format),
            lambda: self.kv_cache_refusal(spec, weight_format, kv_cache_type, max_context),
        ]
        if spec is not None:
            reasons += [
                lambda: self.model_refusal(spec, max_context),
                lambda: self.context_refusal(spec, max_context),
            ]
        return next((found for reason in reasons if (found := reason()) is not None), None)

    def check_build(
        self,
        spec: ModelSpec,
        weight_format: str,
        kv_cache_type: str = "",
        *,
        max_context: int = 0,
    ) -> None:
        """Raise what ``build_refusal`` says: UnsupportedModelError for the model itself, BuildError for the rest."""
        found = self.build_refusal(spec, weight_format, kv_cache_type, max_context=max_context)
        if found is not None:
            is_model = found == self.model_refusal(spec, max_context)
            raise UnsupportedModelError(found) if is_model else BuildError(found)

    def format_refusal(self, weight_format: str) -> str | None:
        """Say that the backend has no such weights."""
        if weight_format in self.weight_formats:
            return None
        return f"The {self.backend} backend has no {weight_format!r} weights; it has {_series(self.weight_formats)}."

    def kv_cache_refusal(
        self, spec: ModelSpec | None, weight_format: str, kv_cache_type: str, max_context: int = 0
    ) -> str | None:
        """Say that the backend has no such KV cache, at all or beside such weights."""
        found = self.kv_cache_types_for(spec, weight_format, max_context)
        if kv_cache_type in ("", "auto", *found):
            return None
        where = ""
        if found != self.kv_cache_types:
            where = f" for {spec.architecture}" if spec is not None and found != self._any_model(weight_format) else ""
            where += f" with {weight_format} weights"
        return f"The {self.backend} backend has no {kv_cache_type!r} KV cache{where}; it has {_series(found)}."

    def model_refusal(self, spec: ModelSpec, max_context: int = 0) -> str | None:
        """Name the first trait of the model that the backend does not run, and the backends that do."""
        context = max_context or self._context_for(spec)
        trait = next((trait for trait in self.traits if trait.is_in(spec, context)), None)
        if trait is None:
            return None
        others = [each for each in all_capabilities() if each.backend != self.backend]
        able = [each.backend for each in others if not any(t.is_in(spec, context) for t in each.traits)]
        use = f"; use the backend {' or '.join(able)}" if able else ""
        label = trait.label.format(spec=spec)
        return f"{spec.architecture} has {label}, which the {self.backend} backend does not run{use}."

    def context_refusal(self, spec: ModelSpec, max_context: int) -> str | None:
        """Say that a ``max_context`` is too long for the model, too short for a prompt and an answer, or no multiple of
        what the backend takes."""
        if not max_context:
            max_context = self.default_context(spec)
        if not 0 < max_context <= spec.max_position:
            return f"max_context is {max_context}, but the model was made for 1 to {spec.max_position} tokens."
        if max_context < _LEAST_CONTEXT:
            return f"max_context is {max_context}, but an engine needs at least {_LEAST_CONTEXT} tokens to answer."
        return self.context_step_refusal(max_context)

    def context_step_refusal(self, max_context: int) -> str | None:
        """Say that ``max_context`` is no multiple of what the backend takes."""
        if max_context % self.context_step == 0:
            return None
        return f"max_context is {max_context}, but the {self.backend} backend takes multiples of {self.context_step}."

    def options_refusal(self, max_batch: int, lora_adapters: Collection[str], speculation: str) -> str | None:
        """Say which of these options of EngineConfig the backend does not do for any model."""
        return (
            self.batch_refusal(max_batch)
            or self.adapter_refusal(lora_adapters)
            or self.speculation_refusal(speculation)
        )

    def batch_refusal(self, max_batch: int) -> str | None:
        """Say that the backend does not decode so many sequences at a time."""
        if max_batch <= self.max_batch:
            return None
        at_most = "one sequence" if self.max_batch == 1 else f"up to {self.max_batch} sequences"
        limit = f"set it to {self.max_batch}" if self.max_batch == 1 else f"set it to {self.max_batch} or less"
        return f"max_batch is {max_batch}, but the {self.backend} backend runs {at_most} at a time; {limit}."

    def adapter_refusal(self, entries: Collection[str]) -> str | None:
        """Say that the backend runs no LoRA adapters, where there are ``entries`` of lora_adapters."""
        if self.lora or not entries:
            return None
        able = [each.backend for each in all_capabilities() if each.lora]
        return (
            f"lora_adapters names {len(entries)}, but the {self.backend} backend runs no adapters; leave it empty or "
            f"use the backend {' or '.join(able)}."
        )

    def speculation_refusal(self, speculation: str) -> str | None:
        """Say that the backend takes no drafts, where ``speculation`` is "on"."""
        if self.drafts or speculation != "on":
            return None
        able = [each.backend for each in all_capabilities() if each.drafts]
        return (
            f"speculation is 'on', but the {self.backend} backend takes no drafts; set it to auto or use the backend "
            f"{' or '.join(able)}."
        )

    def draft_refusal(self, spec: ModelSpec, speculation: str) -> str | None:
        """Say that drafts cannot be taken back in such a model, where ``speculation`` is "on"."""
        if not spec.states or speculation != "on":
            return None
        return (
            f"speculation is 'on', but {spec.architecture} has layers that keep a state, from which a refused draft "
            "cannot be taken back; set it to auto."
        )

    def perplexity_refusal(self) -> str | None:
        """Say that the backend gives out no log probabilities."""
        if self.log_probabilities:
            return None
        able = [each.backend for each in all_capabilities() if each.log_probabilities]
        return (
            f"Perplexity needs the logits of every step, which the {self.backend} backend keeps on its device; measure "
            f"a variant built for {' or '.join(able)}."
        )

    def group_refusal(self, group_size: int) -> str | None:
        """Say that weights cannot share a scale in groups of that size; 0 is the backend's own choice."""
        if group_size in (0, *self.group_sizes):
            return None
        known = f"one of {_series(self.group_sizes)}" if self.group_sizes else "none"
        return f"group_size is {group_size}, but the {self.backend} backend takes {known}."

    def device_refusal(self, weight_format: str, capability: int) -> str | None:
        """Say what the GPU of that compute capability lacks; 0 = unknown."""
        if not self.on_gpu or not capability:
            return None
        if weight_format not in self.weight_formats and weight_format in NAMES:
            least = formats.weight_format(weight_format).least_capability
            if capability < least:
                needs = _ARCHITECTURES.get(least, f"sm_{least} or newer")
                return f"{weight_format} needs {needs}; this GPU is sm_{capability}."
        if capability < self.least_capability:
            return f"The {self.backend} backend needs sm_{self.least_capability} or newer; this GPU is sm_{capability}."
        return None

    # --- helpers --------------------------------------------------------------------------------------

    def _context_for(self, spec: ModelSpec | None) -> int:
        return self.longest_default if spec is None else self.default_context(spec)

    def _any_model(self, weight_format: str) -> tuple[str, ...]:
        return self.kv_cache_types_for(None, weight_format)


def _series(names: Iterable[object]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    *most, last = map(str, names)
    return f"{', '.join(most)} and {last}" if most else last


# --- all backends -----------------------------------------------------------------------------------------


def capabilities_of(backend: str) -> Capabilities:
    """Return what ``backend`` builds and runs, installed or not. Raises BackendUnavailableError for another name."""
    check_name(backend)
    return importlib.import_module(f"engine_core.backends.{backend}.capabilities").CAPABILITIES


def all_capabilities() -> Iterator[Capabilities]:
    """Yield the capabilities of every backend, the fastest first."""
    return map(capabilities_of, backend_names())


def all_kv_cache_types() -> tuple[str, ...]:
    """Return every type of KV cache that some backend runs, the largest first."""
    from engine_core.memory import NUMBER_BYTES

    found = {kind for each in all_capabilities() for kind in each.kv_cache_types}
    return tuple(sorted(found, key=lambda kind: (-NUMBER_BYTES[kind], kind != "int8")))
