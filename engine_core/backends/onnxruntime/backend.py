"""The CPU backend: ONNX Runtime, one linear KV cache bound in place, and a compute thread that plays the device stream.

Steps are queued and return at once; the thread runs the model and samples, so that the step after never waits for the
caller. Weights, cache, prefix slots, logits and scratch are all taken by ``load``.
"""

from __future__ import annotations

import _thread
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import onnxruntime as ort

from engine_core.backends import SequenceStep
from engine_core.backends.onnxruntime.plan import Layout, plan_memory, resolve
from engine_core.backends.onnxruntime.session import OrtSession, check_runtime
from engine_core.config import EngineConfig
from engine_core.errors import BackendUnavailableError, EdgeLLMError, EngineFaultError
from engine_core.formats.manifest import Manifest
from engine_core.memory import MemoryPlan
from engine_core.request import SAMPLING_OPTIONS, SamplingParams
from engine_core.sampling import Sampler

_log = logging.getLogger(__name__)


class _Pending:
    """The result of one queued job."""

    __slots__ = ("_done", "_error", "_value")

    def __init__(self) -> None:
        self._done = _thread.allocate_lock()
        self._done.acquire()
        self._value: int | None = None
        self._error: EdgeLLMError | None = None

    def set(self, value: int | None, error: EdgeLLMError | None = None) -> None:
        self._value, self._error = value, error
        self._done.release()

    def result(self) -> int | None:
        with self._done:
            if self._error is not None:
                raise self._error
            return self._value


class OnnxRuntimeBackend:
    """Implements ``engine_core.backends.Backend`` on the CPU."""

    name = "onnxruntime"
    num_slots = 1
    sampler_options = frozenset(SAMPLING_OPTIONS)

    def __init__(self, session: OrtSession, layout: Layout) -> None:
        self.max_context = session.max_context
        self.vocab_size = layout.vocab_size
        self.reduced_vocab_size = layout.head_rows
        self.kept_ids = layout.vocab_map
        self._session: OrtSession | None = session
        self._sampler = Sampler(layout.vocab_size, layout.vocab_map)
        kv = session.kv_cache.shape
        self._prefixes = np.empty((layout.prefix_slots, *kv[:4], layout.prefix_tokens, kv[5]), session.kv_cache.dtype)
        self._prefixes.fill(0)
        # The sequence's state belongs to the compute thread; the flag may be set from any.
        self._stop_ids: frozenset[int] = frozenset()
        self._ended = True
        self._interrupted = False
        self._length = 0
        self._last = 0
        self._jobs: SimpleQueue[tuple[Callable, tuple, _Pending] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="onnxruntime-stream", daemon=True)
        self._thread.start()

    @classmethod
    def plan(cls, variant_dir: Path, manifest: Manifest, config: EngineConfig) -> MemoryPlan:
        """Raises ConfigurationError for what this backend cannot do."""
        return plan_memory(resolve(variant_dir, manifest, config), manifest)

    @classmethod
    def load(cls, variant_dir: Path, manifest: Manifest, config: EngineConfig) -> OnnxRuntimeBackend:
        """Loads, allocates and runs the largest step once, so that all scratch memory is taken.

        Raises ConfigurationError, BackendUnavailableError, InsufficientMemoryError, EngineDirectoryError or
        EngineFaultError.
        """
        layout = resolve(variant_dir, manifest, config)
        check_runtime(layout.kv_cache_type)
        plan_memory(layout, manifest).check()
        try:
            session = OrtSession(
                variant_dir,
                manifest.model,
                layout.head_rows,
                layout.max_context,
                layout.chunk,
                layout.threads,
                layout.kv_cache_type,
                packed=manifest.quantization != "fp32",
                kept=layout.vocab_map if layout.cuts_head else None,
            )
        except EdgeLLMError:
            raise
        except Exception as error:  # the runtime's exceptions share no base class
            raise BackendUnavailableError(
                f"ONNX Runtime {ort.__version__} cannot load {variant_dir} ({_first_line(error)}); "
                "update onnxruntime or build the engine again."
            ) from error
        backend = cls(session, layout)
        try:
            backend._submit(backend._warm_up).result()
        except BaseException:
            backend.close()
            raise
        return backend

    # --- the protocol: any call queues a job --------------------------------------------------------

    def begin(self, slot: int, sampling: SamplingParams, history: np.ndarray) -> None:
        assert slot == 0
        self._set_interrupted(False)
        self._submit(self._begin, sampling, history).result()

    def step(self, steps: Sequence[SequenceStep]) -> list[_Pending]:
        (step,) = steps
        mask = None if step.mask is None else step.mask.copy()
        if step.token_ids is None:
            return [self._submit(self._decode_step, mask)]
        return [self._submit(self._prefill_step, step.token_ids.copy(), step.position, mask, step.samples)]

    def log_probabilities(self, token_ids: np.ndarray, first: int) -> np.ndarray:
        """float64 [n - first]: of each token of ``token_ids``, int32 [n], from index ``first`` (1 or more) on, given
        all before it; -inf for one the LM head has lost. Prefill up to ``first``, then decode steps as in an answer.

        Beside the protocol, for measuring. Raises EngineFaultError."""
        self._set_interrupted(False)
        return self._submit(self._score, token_ids.copy(), first).result()

    def interrupt(self, slot: int) -> None:
        self._set_interrupted(True)

    def save_prefix(self, slot: int, entry: int, length: int) -> None:
        self._submit(self._save, entry, length).result()

    def load_prefix(self, slot: int, entry: int, length: int) -> None:
        self._submit(self._restore, entry, length).result()

    def close(self) -> None:
        if self._session is None:
            return
        self._set_interrupted(True)
        self._jobs.put(None)
        self._thread.join()
        self._session = None
        self._prefixes = np.empty(0, dtype=np.float32)

    # --- the compute thread -------------------------------------------------------------------------

    def _submit(self, job: Callable, *arguments) -> _Pending:
        assert self._session is not None, "the backend is closed"
        pending = _Pending()
        self._jobs.put((job, arguments, pending))
        return pending

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, arguments, pending = item
            try:
                token = job(*arguments)
            except EdgeLLMError as error:
                self._ended = True
                pending.set(None, error)
            except BaseException as error:  # the runtime's exceptions share no base class; panics are no Exception
                self._ended = True
                _log.debug("The compute thread failed", exc_info=True)
                pending.set(None, EngineFaultError(f"ONNX Runtime failed in a step: {_first_line(error)}"))
            else:
                pending.set(token)
            del item, job, arguments, pending  # nothing is kept alive while waiting

    def _begin(self, sampling: SamplingParams, history: np.ndarray) -> None:
        self._sampler.begin(sampling, history)
        self._stop_ids = sampling.stop_token_ids
        self._ended = False

    def _prefill_step(self, token_ids: np.ndarray, position: int, mask: np.ndarray | None, samples: bool) -> int | None:
        if self._ended or not self._feed(token_ids, position) or not samples:
            return None
        return self._sample(mask)

    def _decode_step(self, mask: np.ndarray | None) -> int | None:
        if self._interrupted or self._ended:
            return None
        self._check_room(self._length + 1)
        self._session.decode(self._last, self._length)
        self._length += 1
        return self._sample(mask)

    def _feed(self, token_ids: np.ndarray, position: int) -> bool:
        """Writes the KV of ``token_ids`` chunk by chunk; False: interrupted."""
        self._check_room(position + len(token_ids))
        chunk = self._session.chunk
        for start in range(0, len(token_ids), chunk):
            try:
                if self._interrupted:
                    return False
                self._session.prefill(token_ids[start : start + chunk], position + start)
            except Exception:
                if self._interrupted:  # ended by ``terminate``, between two of its nodes
                    return False
                raise
        self._length = position + len(token_ids)
        return True

    def _score(self, token_ids: np.ndarray, first: int) -> np.ndarray:
        self._ended = True  # no sequence that ``decode`` could go on with
        self._check_room(len(token_ids))
        self._feed(token_ids[:first], 0)
        found = np.empty(len(token_ids) - first)
        for index, token_id in enumerate(token_ids[first:].tolist()):
            found[index] = self._sampler.log_probability(self._session.logits, token_id)
            if index + 1 < len(found):
                self._session.decode(token_id, first + index)
        if np.isnan(found).any():
            raise EngineFaultError("The model's logits are NaN; the weights or the engine are damaged.")
        return found

    def _sample(self, mask: np.ndarray | None) -> int:
        self._last = token = self._sampler.sample(self._session.logits, mask)
        if token in self._stop_ids:
            self._ended = True
        return token

    def _save(self, entry: int, length: int) -> None:
        self._prefixes[entry][..., :length, :] = self._session.kv_cache[..., :length, :]

    def _restore(self, entry: int, length: int) -> None:
        self._session.kv_cache[..., :length, :] = self._prefixes[entry][..., :length, :]

    def _warm_up(self) -> None:
        session = self._session
        session.prefill(np.zeros(session.chunk, dtype=np.int64), session.max_context - session.chunk)
        session.decode(0, session.max_context - 1)
        session.kv_cache.fill(0)

    # --- helpers ------------------------------------------------------------------------------------

    def _set_interrupted(self, value: bool) -> None:
        session = self._session
        self._interrupted = value
        if session is not None:
            session.terminate(value)

    def _check_room(self, length: int) -> None:
        if length > self.max_context:
            raise EngineFaultError(f"A step would fill {length} positions, but the KV cache has {self.max_context}.")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
