"""The figures that ``top`` shows, collected from the node's messages."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

from edgellm_ros.msg import EngineStatus, ErrorCode, FinishReason, GenerationStats
from edgellm_ros.srv import GetInfo

SECONDS = 120  # of history
_KEPT_WAITS = 120  # answers
_KEPT_ERRORS = 20
_REMEMBERED = 30.0  # s that the tokens of an ended request are kept, for a status that is late
_RATE_SPAN = 2.0  # s: ~/status tells tokens once a second

_CODES = {value: name for name, value in vars(ErrorCode).items() if name.isupper() and isinstance(value, int)}


class Failure(NamedTuple):
    """Something that went wrong."""

    time: float  # s, time.time()
    what: str  # a request's id, or "node"
    why: str


class Figures:
    """Takes the messages of one node. Times are seconds of ``time.monotonic()``, unless told otherwise."""

    def __init__(self) -> None:
        self.failures: deque[Failure] = deque(maxlen=_KEPT_ERRORS)
        self.waits: deque[float] = deque(maxlen=_KEPT_WAITS)  # s, of the last answers
        self.first_tokens: deque[float] = deque(maxlen=_KEPT_WAITS)  # s, the times to the first token
        self.forget_node()

    def forget_node(self) -> None:
        """Forget a node that is gone, but for its errors and how fast it was."""
        self.status: EngineStatus | None = None
        self.info: GetInfo.Response | None = None
        self._tokens: dict[str, tuple[int, float]] = {}  # of each request, and when it was last heard of
        self._arrived: deque[tuple[float, int]] = deque()  # (when, tokens) of the last SECONDS
        self.num_requests = 0
        self.num_tokens = 0

    @property
    def needs_info(self) -> bool:
        """There is an engine whose memory plan is not known."""
        return self.status is not None and bool(self.status.model_name) and self.info is None

    def on_status(self, status: EngineStatus, now: float) -> None:
        before, self.status = self.status, status
        if not status.model_name or (before is not None and before.model_name != status.model_name):
            self.info = None
        if status.error_code and (before is None or before.error_message != status.error_message):
            self._fail("node", status.error_code, status.error_message)
        for request in status.requests:
            self._heard(request.request_id, request.generated_tokens, now)

    def on_stats(self, stats: GenerationStats, now: float) -> None:
        """Take the figures of an answer that has ended."""
        metrics = stats.metrics
        self.num_requests += 1
        if metrics.generated_tokens:
            self.waits.append(metrics.queue_time)
            self.first_tokens.append(metrics.time_to_first_token)
            self._heard(stats.request_id, metrics.generated_tokens, now)
        if stats.finish_reason == FinishReason.ERROR:
            self._fail(stats.request_id, stats.error_code)

    def rate(self, now: float) -> float:
        """Return the tokens per second of all requests together, over the last two seconds."""
        self._drop(now)
        return sum(count for when, count in self._arrived if when > now - _RATE_SPAN) / _RATE_SPAN

    def rates(self, now: float, count: int) -> list[float]:
        """Return the tokens per second of the last ``count`` two-second spans, the newest one last."""
        self._drop(now)
        spans = [0.0] * count
        for when, tokens in self._arrived:
            index = int((now - when) / _RATE_SPAN)
            if index < count:
                spans[count - 1 - index] += tokens / _RATE_SPAN
        return spans

    def _heard(self, request_id: str, num_tokens: int, now: float) -> None:
        known, _ = self._tokens.get(request_id, (0, 0.0))
        if num_tokens > known:
            self._arrived.append((now, num_tokens - known))
            self.num_tokens += num_tokens - known
        self._tokens[request_id] = max(known, num_tokens), now

    def _drop(self, now: float) -> None:
        while self._arrived and self._arrived[0][0] < now - SECONDS:
            self._arrived.popleft()
        self._tokens = {name: (n, when) for name, (n, when) in self._tokens.items() if when > now - _REMEMBERED}

    def _fail(self, what: str, code: int, message: str = "") -> None:
        name = _CODES.get(code, str(code))
        self.failures.append(Failure(time.time(), what, f"{name}: {message}" if message else name))
