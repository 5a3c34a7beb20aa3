"""The public models of ``known_models.json``, for ``edgellm recommend`` and ``edgellm get``.

Each entry has what the model's public card and config.json say: id, revision (a commit of its repository), licence as
the hub spells it, whether the hub asks to accept that licence first (gated), the context it was made for, the family of
its chat template and of its tool calls ("" = its template has no tools), whether it thinks before it answers, and the
fields of config.json that a memory plan depends on. Sizes are computed from these.

How an entry is confirmed without the hub: its revision is pinned under this id in public repositories; the sizes agree
with the configurations of other projects (litgpt's config.py has most of them) or with the published number of
parameters, which ``test/core/test_recommend.py`` holds; the template's family is read from the template (llama.cpp has
those of Qwen 2.5, Qwen 3, Llama 3, Gemma 2 and DeepSeek R1). Contexts and licences are those of the cards.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from engine_core.errors import ConfigurationError
from engine_core.models.shapes import spec_of
from engine_core.models.spec import ModelSpec

_TABLE = Path(__file__).with_name("known_models.json")
TASKS = ("chat", "tools", "vision")


@dataclass(frozen=True)
class KnownModel:
    """One entry of the table."""

    id: str  # owner/name on the hub
    revision: str  # 40 hex digits
    licence: str
    gated: bool
    context: int  # tokens
    template: str
    tools: str
    thinking: bool
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The short name that ``edgellm get`` takes: the id without its owner, in lower case."""
        return self.id.partition("/")[2].lower()

    @cached_property
    def spec(self) -> ModelSpec:
        """The model as a plan reads it."""
        return spec_of(self.config)

    def does(self, task: str) -> bool:
        """Return whether the model is meant for ``task``, one of TASKS. Models that see are for vision alone."""
        if task == "vision" or self.spec.vision is not None:
            return task == "vision" and self.spec.vision is not None
        return task == "chat" or bool(self.tools)


@lru_cache(maxsize=1)
def known_models() -> tuple[KnownModel, ...]:
    """Return the table; of models of one size, the one to prefer stands first."""
    return tuple(KnownModel(**entry) for entry in json.loads(_TABLE.read_text(encoding="utf-8")))


def find_known(name: str) -> KnownModel | None:
    """Return the model with this id or short name, in any case; None if the table has none."""
    wanted = name.lower()
    return next((model for model in known_models() if wanted in (model.id.lower(), model.name)), None)


def unknown_name(name: str) -> ConfigurationError:
    """Return the refusal of a name that is neither in the table nor an id of a hub."""
    close = difflib.get_close_matches(name.lower(), [model.name for model in known_models()], n=3, cutoff=0.4)
    hint = f"close to it are {', '.join(close)}" if close else "'edgellm recommend' lists the known ones"
    return ConfigurationError(f"{name!r} is neither a known model nor an id such as Qwen/Qwen3-0.6B; {hint}.")
