"""The model families, one file and one line of the registry each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from engine_core.errors import CheckpointError, UnsupportedModelError
from engine_core.models.families.family import Family, TextPart

# Each is a module of this package with its FAMILY.
_MODULES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "smollm3",
    "olmo2",
    "granite",
    "exaone",
    "exaone4",
    "ministral",
    "ministral3",
    "smolvlm",
    "idefics3",
    "qwen3_vl",
    "qwen3_moe",
    "lfm2",
)
FAMILIES: tuple[Family, ...] = tuple(importlib.import_module(f"{__name__}.{name}").FAMILY for name in _MODULES)
# Each is a module of this package with its TEXT_PART.
_TEXT_PARTS = ("gemma3_images", "mistral3")
TEXT_PARTS: tuple[TextPart, ...] = tuple(
    importlib.import_module(f"{__name__}.{name}").TEXT_PART for name in _TEXT_PARTS
)
# What models that are asked for have that is not computed here.
_LACKING = {
    "Gemma3nForCausalLM": "embeddings of each layer and several residual streams",
    "Gemma3nForConditionalGeneration": "embeddings of each layer and several residual streams",
    "Gemma4ForCausalLM": "embeddings of each layer and caches that layers share",
    "Gemma4ForConditionalGeneration": "embeddings of each layer and caches that layers share",
    "Qwen3NextForCausalLM": "gated delta nets, which keep a state instead of a KV cache",
    "Qwen3_5ForCausalLM": "gated delta nets, which keep a state instead of a KV cache",
    "Qwen3_5ForConditionalGeneration": "gated delta nets, which keep a state instead of a KV cache",
    "Qwen3_5MoeForConditionalGeneration": "gated delta nets, which keep a state instead of a KV cache",
    "Lfm2MoeForCausalLM": "short convolutions beside experts",
    "GraniteMoeHybridForCausalLM": "state space layers or a fused MLP",
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json, by its architectures, or else its model_type.

    Raises UnsupportedModelError for another one, CheckpointError if the two contradict each other or are no strings.
    """
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if architectures is not None and not (isinstance(architectures, list) and _are_texts(architectures)):
        raise CheckpointError(f"config.json has architectures={str(architectures)[:60]}, expected a list of strings.")
    if model_type is not None and not isinstance(model_type, str):
        raise CheckpointError(f"config.json has model_type={str(model_type)[:60]}, expected a string.")
    for family in FAMILIES:
        if (family.architecture == architectures[0]) if architectures else (family.model_type == model_type):
            if model_type not in (None, family.model_type):
                raise CheckpointError(
                    f"config.json has model_type={model_type!r} with the architecture {family.architecture}, "
                    f"expected {family.model_type!r}."
                )
            return family
    known = [*(family.architecture for family in FAMILIES), *(part.architecture for part in TEXT_PARTS)]
    name = architectures[0] if architectures else model_type or "unknown"
    lacking = f" has {_LACKING[name]}, which" if name in _LACKING else ""
    raise UnsupportedModelError(
        f"The architecture {name}{lacking} is not supported; supported are {', '.join(sorted(known))}."
    )


def decoder_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of the decoder: those of ``text_config`` where a model that sees has them there.

    Whether the embedding is the LM head is said outside of it, as transformers reads it.
    """
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        return config
    tied = "tie_word_embeddings"
    return {k: v for k, v in nested.items() if k != tied} | {k: config[k] for k in (tied,) if k in config}


def _are_texts(values: list) -> bool:
    return all(isinstance(value, str) for value in values)
