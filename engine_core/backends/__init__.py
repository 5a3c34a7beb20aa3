"""The one protocol every backend implements.

A backend owns the weights, the linear KV cache with a slot for each sequence, and the sampling. It hands back tokens
that may still be on their way (``PendingToken``), so that the host's work on one token overlaps the computation of the
next one: the engine calls ``step`` again *before* it reads the tokens of the call before.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from engine_core.backends.registry import BACKENDS, check_name
from engine_core.errors import BackendUnavailableError
from engine_core.progress import Progress, untold
from engine_core.request import SamplingParams

if TYPE_CHECKING:
    import numpy as np

    from engine_core.config import EngineConfig
    from engine_core.formats.manifest import Manifest
    from engine_core.memory import MemoryPlan
    from engine_core.vision.prompt import PlacedImage


class Draft(NamedTuple):
    """Tokens that may come after the one a step feeds. They are fed with it, and the step samples after each of them
    as long as what is sampled is the next of them."""

    token_ids: np.ndarray  # int32 [k], k >= 1
    # bool [k]: it is the only token that may stand there, so that nothing is sampled for it. Its mask is not read.
    forced: np.ndarray
    # uint32 [k, words]: the masks of the tokens after each of them; None = all tokens may be sampled.
    masks: np.ndarray | None = None


class SequenceStep(NamedTuple):
    """The work of one step for the sequence in ``slot``: feed tokens of its prompt, or its last sampled token."""

    slot: int
    # int32 [n], n >= 1: their KV is written from ``position`` on. None: the last sampled token is fed, which need not
    # have reached the host.
    token_ids: np.ndarray | None = None
    position: int = 0
    # uint32 [ceil(vocab_size / 32)], bit i of word i // 32 set = full-vocabulary id i may be sampled (the layout of
    # llguidance and xgrammar); None = all. Read before ``step`` returns.
    mask: np.ndarray | None = None
    samples: bool = True  # False: the KV alone, of a part of a prompt or of a prefix that is to be saved
    # The states of layers after its tokens are kept, because later sequences may go on from there.
    marks: bool = False
    # Only where ``token_ids`` is None, and of no more than ``max_draft`` tokens.
    draft: Draft | None = None
    # Nothing is fed: one piece of the work on the features of the images among ``token_ids`` is done, so that the step
    # that feeds them takes no longer than one without images. Only with ``samples`` False.
    encodes: bool = False
    # Only where ``token_ids`` is not None: the sequence is longer than ``rope_switch``. Steps of one token go on so.
    long_rope: bool = False

    @property
    def most_tokens(self) -> int:
        """The tokens that it samples at most."""
        return self.samples if self.draft is None else 1 + len(self.draft.token_ids)


class PendingToken(Protocol):
    """The outcome of a step for one sequence: what it sampled, which may still be on its way from the device."""

    def result(self) -> int | tuple[int, ...] | None:
        """Waits for the full-vocabulary id; a step with a draft gives one or more. None: the sequence had ended before
        (the step did nothing), or the step was not to sample, and the KV is valid now. A step that encodes gives the
        pieces of work that are known to be left: 0 = the features are there.

        Raises EngineFaultError if the step failed, InvalidSamplingError if no token was left to sample; the
        sequence has ended then, and steps queued behind give None.
        """


class Backend(Protocol):
    """One loaded engine that works on up to ``num_slots`` sequences at a time, each in a KV slot of its own.

    Positions are explicit: the KV of a slot holds ``position`` valid tokens; a step that feeds a prompt states where
    it writes, so reusing a prefix is prefilling from a later position, and rolling back is free. Where layers keep a
    state (``has_states``), a step begins at position 0 or at one of ``state_positions``. All memory is taken by
    ``load`` and given back by ``close``. Not thread-safe, but for ``interrupt``: one thread calls it.
    """

    name: str
    num_slots: int
    prefill_chunk: int  # tokens of a prompt it computes at once
    max_context: int  # tokens the KV of a slot holds
    pool_tokens: int  # places of the KV pool, see ``kv_pool``
    has_states: bool  # layers of the model keep a state, which holds for one position; the methods for them are used
    state_places: int  # places of the pool for states
    vocab_size: int  # of the full vocabulary
    reduced_vocab_size: int  # rows of the LM head; vocab_size without a vocab map
    kept_ids: np.ndarray | None  # int32 [reduced_vocab_size], the ids of those rows; None without a vocab map
    # Tokens beyond which all KV of a sequence is another, with ``long_rope``: its cache is computed anew when it grows
    # longer. 0: the KV does not depend on the length.
    rope_switch: int
    sampler_options: frozenset[str]  # the names of ``SAMPLING_OPTIONS`` that its sampler applies
    max_draft: int  # tokens of a step's draft, at most; 0: it takes no drafts
    exact_drafts: bool  # a step with a draft gives, bit for bit, what steps of one token give
    # Of one token, as ``load`` measured it, s; 0.0: unknown, or drafts must not depend on what was measured.
    step_seconds: float
    undrafted_options: frozenset[str]  # sampling options that a step with a draft would not apply

    @classmethod
    def check_here(cls, manifest: Manifest) -> None:
        """Raises BackendUnavailableError or EngineDirectoryError for an engine that is bound to other machines."""

    @classmethod
    def plan(cls, variant_dir: Path, manifest: Manifest, config: EngineConfig) -> MemoryPlan:
        """Return every byte ``load`` is going to take, by purpose, and what is free. Allocates nothing."""

    @classmethod
    def load(
        cls, variant_dir: Path, manifest: Manifest, config: EngineConfig, *, progress: Progress = untold
    ) -> Backend:
        """Allocates, loads, captures graphs and warms up. Leaves nothing allocated when it raises.

        Raises BackendUnavailableError, InsufficientMemoryError, EngineDirectoryError or EngineFaultError.
        """

    def begin(
        self,
        slot: int,
        sampling: SamplingParams,
        history: np.ndarray,
        adapter: str = "",
        images: Sequence[PlacedImage] = (),
    ) -> None:
        """Starts a sequence in ``slot``. ``sampling``: resolved. ``history``: int32 [n], the whole prompt, for the
        repetition penalty. ``adapter``: of ``lora_adapters``, for every step of the sequence; "" = none. ``images``: of
        the prompt, whose features take the place of the embeddings of their tokens as these are fed; of a model
        that sees alone."""

    def step(self, steps: Sequence[SequenceStep]) -> list[PendingToken]:
        """Queue one step of each of these sequences, all of different slots; return what they give, in their order.

        A prompt that is long is worked through in chunks, between two of which ``interrupt`` ends it."""

    def step_cost(self, rows: Sequence[int]) -> float:
        """Return how long a step takes that feeds so many tokens of each sequence, as a multiple of the step of one
        token of one sequence. Measured by ``load``. Only where ``max_draft`` is not 0."""

    def log_probabilities(self, token_ids: np.ndarray, first: int) -> np.ndarray:
        """Return float64 [n - first]: the natural logarithm of the probability of each token of ``token_ids``, int32
        [n], from index ``first`` (1 or more) on, given all before it; -inf for one that the LM head lacks. Works in
        slot 0. Only where the capabilities have ``log_probabilities``. Raises EngineFaultError."""

    def interrupt(self, slot: int) -> None:
        """Makes the steps of this slot's sequence that run, are queued or are still to come end early: their tokens
        become None. Holds until the next ``begin`` of the slot. From any thread; returns at once."""

    def save_kv(self, slot: int, position: int, place: int, count: int) -> None:
        """Copies the KV of ``count`` positions of ``slot`` to as many places of the pool, before any later step."""

    def load_kv(self, slot: int, position: int, place: int, count: int) -> None:
        """Copies ``count`` places of the pool back, bit for bit, to positions of ``slot`` that may be others."""

    def state_positions(self, slot: int, *, marked: bool = False) -> list[int]:
        """Return the positions above 0 that a sequence in ``slot`` can go on from: where steps with ``marks`` ended,
        lately, and, unless only ``marked`` ones are asked for, where its last steps began and ended. Of a slot that
        nothing runs in, or ``marked``."""

    def save_state(self, slot: int, position: int, place: int) -> None:
        """Copies the states of one of ``state_positions`` to a place of the pool, before any later step."""

    def load_state(self, slot: int, position: int, place: int) -> None:
        """Copies a place of the pool back, as the states of ``position``, the only ones of ``slot`` then."""

    def close(self) -> None:
        """Gives everything back; may be called twice."""


def backend_class(name: str) -> type[Backend]:
    """Return the class of backend ``name``. Raises BackendUnavailableError with what is missing."""
    check_name(name)
    module, attribute = BACKENDS[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise BackendUnavailableError(
            f"The backend {name!r} needs the Python package {error.name!r}, which is not installed: pip install it."
        ) from error
