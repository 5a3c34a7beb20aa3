"""Measure an engine here: time to first token and time per token, through the backend as the engine drives it."""

from __future__ import annotations

import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine_core.backends import Backend
from engine_core.backends.capabilities import capabilities_of
from engine_core.backends.toolkit import toolkit_of
from engine_core.config import EngineConfig
from engine_core.errors import ConfigurationError
from engine_core.formats.manifest import Manifest
from engine_core.measure.power import open_meter
from engine_core.measure.steps import begin, decode, prefill, seconds_per_step
from engine_core.memory import MemoryPlan
from engine_core.planning.selection import advice, choose
from engine_core.request import SamplingParams

MAX_REPEATS = 1_000_000
_GREEDY = SamplingParams(seed=0)  # no stop ids: every run has the same length


@dataclass(frozen=True)
class Timing:
    """The times of one prompt length, over all repeats. Seconds."""

    prompt_tokens: int
    new_tokens: int
    first_token: float  # median
    per_token: float  # median over the repeats of the mean of a run's decode steps
    per_token_p95: float  # of all single steps

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.per_token


@dataclass(frozen=True)
class Energy:
    """The energy of decoding for some seconds: of the device, with whatever else runs there."""

    source: str  # see ``power.Meter``
    joules_per_token: float
    watts: float  # mean
    tokens: int


class Benchmark:
    """One loaded engine. A context manager.

    The variant is the one that the node would open, for ``reason``. ``load_time``: seconds; ``peak_resident``: bytes
    the process has grown by since before it was loaded, at its peak. Raises what opening an engine raises.
    """

    def __init__(self, config: EngineConfig) -> None:
        choice = choose(dataclasses.replace(config, verify_files=bool(config.trusted_keys)))
        config, self.manifest, self.plan = choice.config, choice.manifest, choice.plan
        self.plan.check(advice(config, self.plan))
        self.reason = choice.reason
        gc.collect()
        self._resident_before = _resident()
        start = time.perf_counter()
        self.backend: Backend = choice.backend.load(choice.directory, self.manifest, config)
        self.load_time = time.perf_counter() - start
        self.peak_resident = 0
        self.threads = toolkit_of(self.manifest.backend).num_threads(choice.directory, self.manifest, config)
        self.bytes_per_step = step_bytes(self.manifest, self.plan, config, self.backend.reduced_vocab_size)

    def __enter__(self) -> Benchmark:
        return self

    def __exit__(self, *_) -> None:
        self.backend.close()

    def check(self, prompt_tokens: Sequence[int], new_tokens: int) -> None:
        """Raises ConfigurationError for a length that does not fit."""
        longest = max(prompt_tokens) + new_tokens
        if longest > self.backend.max_context:
            raise ConfigurationError(
                f"{max(prompt_tokens)} prompt tokens and {new_tokens} new ones are {longest}, but max_context is "
                f"{self.backend.max_context}; ask for fewer."
            )

    def measure(
        self, prompt_tokens: int, new_tokens: int, repeats: int, report: Callable[[str], None] = lambda line: None
    ) -> Timing:
        """Make one run to warm up, then ``repeats`` of the same random prompt. Needs 3 new tokens or more."""
        assert new_tokens >= 3 and repeats >= 1
        ids = np.random.default_rng(1).integers(0, self.backend.vocab_size, prompt_tokens).astype(np.int32)
        self._run(ids, min(8, new_tokens))
        runs = []
        for index in range(repeats):
            report(f"{prompt_tokens} prompt tokens, run {index + 1} of {repeats}")
            runs.append(self._run(ids, new_tokens))
        self.peak_resident = max(self.peak_resident, _resident() - self._resident_before)
        steps = np.concatenate([run[1] for run in runs])
        return Timing(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            first_token=statistics.median(run[0] for run in runs),
            per_token=statistics.median(float(run[1].mean()) for run in runs),
            per_token_p95=float(np.percentile(steps, 95)),
        )

    def measure_energy(self, prompt_tokens: int, new_tokens: int, seconds: float = 2.0) -> Energy | None:
        """Decode again and again for ``seconds``, prompts apart; None where the machine's energy cannot be read."""
        meter = open_meter(on_gpu=capabilities_of(self.manifest.backend).on_gpu)
        if meter is None:
            return None
        ids = np.random.default_rng(1).integers(0, self.backend.vocab_size, prompt_tokens).astype(np.int32)
        joules = spent = 0.0
        tokens = 0
        try:
            while spent < seconds:
                begin(self.backend, _GREEDY, ids)
                prefill(self.backend, ids).result()
                before, start = meter.joules(), time.perf_counter()
                seconds_per_step(self.backend, [0], new_tokens - 2)
                spent += time.perf_counter() - start
                joules += meter.joules() - before
                tokens += new_tokens - 1
        finally:
            meter.close()
        return Energy(meter.source, joules / tokens, joules / spent, tokens)

    def _run(self, ids: np.ndarray, count: int) -> tuple[float, np.ndarray]:
        """(time to first token, times between the tokens after it [count - 1])."""
        backend = self.backend
        times = np.empty(count)
        start = time.perf_counter()
        begin(backend, _GREEDY, ids)
        pending = prefill(backend, ids)
        for index in range(count):  # as the engine does: the next step is queued before the token is read
            ahead = decode(backend) if index + 1 < count else pending
            pending.result()
            times[index] = time.perf_counter()
            pending = ahead
        return times[0] - start, np.diff(times)


def figures(bench: Benchmark, timing: Timing, energy: Energy | None = None) -> dict[str, Any]:
    """Return what was measured, with the names of benchmarks/results/*.jsonl; None for energy without ``energy``."""
    per_token = timing.per_token
    return {
        "engine": bench.manifest.backend,
        "weights": bench.manifest.quantization,
        "vocab_size": bench.backend.reduced_vocab_size,
        "threads": bench.threads,
        "prompt_tokens": timing.prompt_tokens,
        "generated_tokens": timing.new_tokens,
        "ttft_ms": round(1e3 * timing.first_token, 3),
        "ms_per_token": round(1e3 * per_token, 4),
        "p95_ms_per_token": round(1e3 * timing.per_token_p95, 4),
        "tok_s": round(timing.tokens_per_second, 1),
        "bytes_per_step": bench.bytes_per_step,
        "gb_s": round(bench.bytes_per_step / per_token / 1e9, 2),
        "load_s": round(bench.load_time, 3),
        "planned_bytes": bench.plan.total,
        "resident_bytes": bench.peak_resident,
        "joules_per_token": round(energy.joules_per_token, 4) if energy else None,
        "watts": round(energy.watts, 2) if energy else None,
        "energy_source": energy.source if energy else None,
    }


def step_bytes(manifest: Manifest, plan: MemoryPlan, config: EngineConfig, head_rows: int) -> int:
    """Return the bytes of weights a decode step reads: the layers and ``head_rows`` of the LM head, not the token
    lookup's table.

    The KV cache is not in it: it grows with the position.
    """
    return toolkit_of(manifest.backend).step_bytes(manifest, plan, config, head_rows)


def _resident() -> int:
    """Return the bytes of main memory that this process holds."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
