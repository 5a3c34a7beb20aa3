"""Figures of the engine and of all its answers, whichever front they came by, in the text format of Prometheus."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from engine_core import __version__
from engine_core.request import GenerationResult
from engine_core.serving.intake import ServingState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TIMES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # s


class Metrics:
    """Counts results since it was made; the rest is read from ``state`` when someone asks."""

    def __init__(self, state: ServingState) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Gauges(state))
        requests = Counter(
            "edgellm_requests",
            "Requests that have ended, by their finish reason.",
            ["finish_reason"],
            registry=self._registry,
        )
        self._requests = requests
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._cached = self._counter("cached_tokens", "Tokens of prompts whose KV was reused.")
        self._generated = self._counter("generated_tokens", "Tokens of answers.")
        self._energy = self._counter("energy_joules", "Energy of requests, where the machine has a reading.")
        self._first = self._histogram("time_to_first_token", "Arrival of a request to its first token.")
        self._queue = self._histogram("queue_time", "Arrival of a request to the start of the work.")
        self._total = self._histogram("request_duration", "Arrival of a request to its end.")

    def observe(self, result: GenerationResult) -> None:
        """Count a result. From any thread."""
        self._requests.labels(result.finish_reason.value).inc()
        self._prompt.inc(result.prompt_tokens)
        self._cached.inc(result.cached_tokens)
        self._generated.inc(result.generated_tokens)
        if not math.isnan(result.energy_joules):
            self._energy.inc(result.energy_joules)
        if result.generated_tokens:
            self._first.observe(result.time_to_first_token)
            self._queue.observe(result.queue_time)
            self._total.observe(result.total_time)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _counter(self, name: str, description: str) -> Counter:
        return Counter(f"edgellm_{name}", description, registry=self._registry)

    def _histogram(self, name: str, description: str) -> Histogram:
        return Histogram(f"edgellm_{name}_seconds", description, registry=self._registry, buckets=_TIMES)


class _Gauges(Collector):
    """Collects the state of the engine at this moment."""

    def __init__(self, state: ServingState) -> None:
        self._state = state

    def describe(self) -> list[Metric]:
        return []  # without it the registry would collect at registration

    def collect(self) -> Iterator[Metric]:
        engine, worker = self._state.engine, self._state.worker
        yield GaugeMetricFamily("edgellm_active", "1 if requests are accepted.", value=float(worker is not None))
        if engine is None:
            return
        manifest, scheduler, pool = engine.manifest, engine.scheduler, engine.pool
        about = {
            "version": __version__, "model": manifest.model_name, "backend": engine.backend_name,
            "quantization": manifest.quantization,
        }  # fmt: skip
        yield InfoMetricFamily("edgellm_engine", "The engine.", value=about)
        sequences = scheduler.sequences
        for name, description, value in (
            ("requests_running", "Requests that hold a slot.", scheduler.num_running),
            ("requests_waiting", "Requests that wait for a slot.", scheduler.num_waiting),
            ("slots", "Requests that can run at a time.", scheduler.num_slots),
            ("max_context_tokens", "Tokens a slot has.", engine.max_context),
            ("kv_tokens", "Tokens of running requests in the KV cache.", sum(each.num_kv_tokens for each in sequences)),
            ("pool_tokens", "Tokens the KV pool can keep.", pool.num_tokens),
            ("pool_tokens_used", "Tokens the KV pool keeps.", pool.num_used),
            ("memory_bytes", "Memory of the memory plan.", engine.plan.total),
        ):
            yield GaugeMetricFamily(f"edgellm_{name}", description, value=float(value))
