"""Stopping a request from another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

from engine_core.request import FinishReason


class CancelToken:
    """Says, once, that and why a request is to end early. The first reason stays. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: FinishReason | None = None
        self._on_cancel: Callable[[], None] | None = None

    @property
    def reason(self) -> FinishReason | None:
        """The reason of the cancellation; None while nobody has cancelled."""
        return self._reason

    def cancel(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        with self._lock:
            if self._reason is None:
                self._reason = reason
                if self._on_cancel is not None:
                    self._on_cancel()

    def attach(self, on_cancel: Callable[[], None]) -> None:
        """Have ``on_cancel`` called when the token is cancelled, at once if it already is."""
        with self._lock:
            self._on_cancel = on_cancel
            if self._reason is not None:
                on_cancel()

    def detach(self) -> None:
        """After this, a cancel calls nothing: it can no longer meet the request that follows."""
        with self._lock:
            self._on_cancel = None
