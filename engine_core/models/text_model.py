"""The text model in a checkpoint of a larger one, and a family's own names in the words of all others."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from engine_core.errors import CheckpointError, UnsupportedModelError
from engine_core.models.families import FAMILIES, TEXT_PARTS
from engine_core.models.families.family import Family, TextPart

# What the larger model says of the text model, too.
_OUTER = (
    "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "quantization_config", "_name_or_path",
)  # fmt: skip
# Names of the text model's tensors in a larger one, as versions 4 and 5 of transformers write them; others are not its.
_INNER = (
    (r"language_model\.model\.", "model."),
    (r"model\.language_model\.", "model."),
    (r"language_model\.lm_head\.", "lm_head."),
)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the text model, in the words of all families.

    Raises CheckpointError for a text_config that is missing or a field that has two values, UnsupportedModelError for a
    text model that the larger one is not run with.
    """
    part = _part_of(config)
    return _renamed(dict(config) if part is None else _inner_config(config, part))


def tensor_renaming(config: Mapping[str, Any]) -> Callable[[str], str] | None:
    """Return what gives a stored tensor the name that other families have for it ("" = it is not the text model's).

    None: names stay as they are. ``config``: of the checkpoint as a whole.
    """
    if _part_of(config) is not None:
        return _inner_name
    family = _family_of(config)
    if family is None or not family.tensor_names:
        return None
    patterns = family.tensor_names

    def rename(name: str) -> str:
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name, count=1)
        return name

    return rename


def _inner_name(name: str) -> str:
    for pattern, replacement in _INNER:
        if (match := re.match(pattern, name)) is not None:
            return replacement + name[match.end() :]
    return name if name.startswith("lm_head.") else ""


def _part_of(config: Mapping[str, Any]) -> TextPart | None:
    return next((part for part in TEXT_PARTS if _is_of(config, part)), None)


def _inner_config(config: Mapping[str, Any], part: TextPart) -> dict[str, Any]:
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        raise CheckpointError(f"config.json has no text_config, which {part.architecture} keeps its text model in.")
    model_type = inner.get("model_type", part.text_types[0])
    if model_type not in part.text_types:
        raise UnsupportedModelError(
            f"{part.architecture} has a text model of the type {model_type!r:.60}; {', '.join(part.text_types)} are "
            "supported."
        )
    (family,) = (family for family in FAMILIES if family.model_type == model_type)
    return {
        **inner,
        **{name: config[name] for name in _OUTER if name in config},
        "architectures": [family.architecture],
        "model_type": model_type,
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
    }


def _family_of(config: Mapping[str, Any]) -> Family | None:
    found = (family for family in FAMILIES if _is_of(config, family) or _is_written_as(config, family))
    return max(found, key=lambda family: bool(family.written_as), default=None)


def _is_of(config: Mapping[str, Any], known: Family | TextPart) -> bool:
    """Return whether the configuration names ``known``, as ``family_of`` decides."""
    names = config.get("architectures")
    if names:
        return isinstance(names, list) and names[0] == known.architecture
    return config.get("model_type") == known.model_type


def _is_written_as(config: Mapping[str, Any], family: Family) -> bool:
    is_type = config.get("model_type") == family.model_type
    return bool(family.written_as) and is_type and config.get("architectures") == [family.written_as]


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    family = _family_of(config)
    if family is not None and _is_written_as(config, family):
        config["architectures"] = [family.architecture]
    for own, name in () if family is None else family.field_names:
        if own in config:
            value = config.pop(own)
            if config.setdefault(name, value) != value:
                raise CheckpointError(f"config.json has {own}={value!r:.60} and {name}={config[name]!r:.60}.")
    return config
