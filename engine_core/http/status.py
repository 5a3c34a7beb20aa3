"""The page for people, ``GET /``, and the figures it shows, ``GET /status``."""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from engine_core import __version__
from engine_core.errors import first_line
from engine_core.request import GenerationResult
from engine_core.serving.intake import ServingState
from engine_core.serving.snapshot import EngineSnapshot

_KEPT = 120  # answers whose times are told
_KEPT_ERRORS = 8
_ERROR_CHARS = 300

PAGE = (Path(__file__).parent / "status.html").read_text(encoding="utf-8")
# The page shows what clients have named: nothing of it may become a script, and nothing is fetched from elsewhere.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class _Error(NamedTuple):
    time: float  # s, time.monotonic()
    request_id: str
    message: str


class StatusFigures:
    """Keeps the last results since it was made; the rest is read from ``state`` when someone asks. Thread-safe."""

    def __init__(self, state: ServingState) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._answers: deque[tuple[int, float, float]] = deque(maxlen=_KEPT)
        self._errors: deque[_Error] = deque(maxlen=_KEPT_ERRORS)
        self._num_requests = 0
        self._num_tokens = 0

    def observe(self, result: GenerationResult) -> None:
        """Take a result. From any thread."""
        with self._lock:
            self._num_requests += 1
            self._num_tokens += result.generated_tokens
            if result.generated_tokens:
                self._answers.append((self._num_requests, result.queue_time, result.time_to_first_token))
            if result.error is not None:
                message = first_line(result.error)[:_ERROR_CHARS]
                self._errors.append(_Error(time.monotonic(), result.request_id, message))

    def as_dict(self) -> dict[str, Any]:
        """Return what ``GET /status`` answers. Bytes, tokens and seconds."""
        engine, worker = self._state.engine, self._state.worker
        with self._lock:
            num_requests, num_tokens = self._num_requests, self._num_tokens
            answers, errors = list(self._answers), list(self._errors)
        now = time.monotonic()
        document: dict[str, Any] = {
            "version": __version__,
            "state": "unconfigured" if engine is None else "inactive" if worker is None else "active",
            "requests_total": num_requests,
            "tokens_total": num_tokens,  # with those of running requests
            "answers": [
                {"number": number, "wait": wait, "time_to_first_token": first}
                for number, wait, first in answers
            ],
            "errors": [
                {"age": now - each.time, "request_id": each.request_id, "message": each.message} for each in errors
            ],
        }
        if engine is None:
            return document
        found = vars(EngineSnapshot.of(engine))
        requests = [vars(request) for request in found.pop("requests")]
        document["tokens_total"] += sum(request["generated_tokens"] for request in requests)
        return document | found | {
            "device": engine.device,
            "max_batch": engine.scheduler.num_slots,
            "memory_free": engine.plan.available,  # before anything was taken
            "memory": {item.name: item.bytes for item in engine.plan.items if not item.on_host},
            "requests": requests,
        }  # fmt: skip
