"""The model families, one file and one line of the registry each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from engine_core.errors import CheckpointError, UnsupportedModelError
from engine_core.models.families.family import Family

# Each is a module of this package with its FAMILY.
_MODULES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
)
FAMILIES: tuple[Family, ...] = tuple(importlib.import_module(f"{__name__}.{name}").FAMILY for name in _MODULES)


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
    raise UnsupportedModelError(
        f"The architecture {architectures[0] if architectures else model_type or 'unknown'} is not supported; "
        f"supported are {', '.join(sorted(family.architecture for family in FAMILIES))}."
    )


def _are_texts(values: list) -> bool:
    return all(isinstance(value, str) for value in values)
