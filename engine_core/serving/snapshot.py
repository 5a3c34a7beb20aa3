"""A snapshot of an engine at work, for ~/status, the pages of the HTTP endpoint and whoever else shows it."""

from __future__ import annotations

from dataclasses import dataclass

from engine_core.serving.engine import Engine
from engine_core.serving.sequence import Sequence


@dataclass(frozen=True)
class RequestSnapshot:
    """A request that runs or waits; the fields are those of ``msg/RequestStatus``."""

    request_id: str
    priority: int
    session: str  # "" = none
    adapter: str  # "" = the model itself
    running: bool  # False: it waits
    prompt_tokens: int
    generated_tokens: int  # so far
    wait: float  # s from its arrival to the start of the work, or until now

    @classmethod
    def of(cls, sequence: Sequence, running: bool) -> RequestSnapshot:
        request = sequence.prepared.request
        return cls(
            request_id=request.request_id,
            priority=request.priority,
            session=request.session,
            adapter=request.adapter,
            running=running,
            prompt_tokens=len(sequence.prepared.token_ids),
            generated_tokens=sequence.num_sampled,
            wait=sequence.wait,
        )


@dataclass(frozen=True)
class EngineSnapshot:
    """An engine and its requests; the fields are those of ``msg/EngineStatus``."""

    model_name: str
    backend: str
    quantization: str
    max_context: int  # tokens
    memory_total: int  # bytes of the memory plan
    requests: tuple[RequestSnapshot, ...]  # the running ones, then those that wait, the next one first
    kv_tokens: int  # of the running requests
    pool_tokens: int
    pool_tokens_used: int
    busy: bool  # a request is running
    queued: int  # requests that wait

    @classmethod
    def of(cls, engine: Engine) -> EngineSnapshot:
        """Return what ``engine`` does, its requests all at the same moment."""
        running, waiting = engine.scheduler.running_and_waiting
        requests = [RequestSnapshot.of(sequence, True) for sequence in running]
        requests += [RequestSnapshot.of(sequence, False) for sequence in waiting]
        return cls(
            model_name=engine.manifest.model_name,
            backend=engine.backend_name,
            quantization=engine.manifest.quantization,
            max_context=engine.max_context,
            memory_total=engine.plan.total,
            requests=tuple(requests),
            kv_tokens=sum(sequence.num_kv_tokens for sequence in running),
            pool_tokens=engine.pool.num_tokens,
            pool_tokens_used=engine.pool.num_used,
            busy=bool(running),
            queued=len(waiting),
        )
