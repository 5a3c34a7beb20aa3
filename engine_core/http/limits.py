"""The limits of connections, and the one adapter to uvicorn's protocol that keeps them.

uvicorn (0.27 to 0.54) limits the time between requests of a connection, but neither the number of connections, nor the
time a client takes for its headers or for reading an answer; and it stops reading when more comes behind a request, so
that it does not hear of a client that leaves then. asyncio's protocol callbacks tell all of it; beside them this file
uses ``connections``, ``conn``, ``cycle``, ``flow``, ``loop``, ``transport`` and ``on_response_complete`` of
``H11Protocol``.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_TOO_MANY_HEAD = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n"
)
_TOO_MANY_BODY = (
    b'{"error":{"message":"Too many connections are open; close some.","type":"server_error","param":null,'
    b'"code":"too_many_connections"}}'
)


@dataclass(frozen=True)
class HttpLimits:
    """The limits of one client and of all of them together."""

    connections: int = 128
    header_bytes: int = 16 << 10
    body_bytes: int = 16 << 20  # with the images, as base64
    all_body_bytes: int = 128 << 20  # of all bodies that are being received; one alone is always taken
    header_time: float = 10.0  # s, from the first byte of a request (or the connection) to the end of its headers
    body_time: float = 30.0  # s, for a request's body
    # s, without room for more of an answer because the client does not read, or with the rest of one left unread
    write_time: float = 30.0
    idle_time: int = 15  # s, between two requests


DEFAULT_LIMITS = HttpLimits()


class LimitedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with the limits of connections.

    What comes behind a request that is being answered is kept for later, ``header_bytes`` at most: a connection with
    more of it is ended.
    """

    limits = DEFAULT_LIMITS
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _rest_timer: asyncio.TimerHandle | None = None
    _early = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.write(_TOO_MANY_HEAD % len(_TOO_MANY_BODY) + _TOO_MANY_BODY)
            transport.close()
        else:
            self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._has_request:
            self._early += data
            if len(self._early) > self.limits.header_bytes:
                self.transport.abort()
            return
        if self._header_timer is None and not self._is_answering:
            self._expect_headers()
        super().data_received(data)
        if self._is_answering:
            self._stop_header_timer()
        if self._has_request:
            self.flow.resume_reading()  # where it was paused because of what came with the request's end

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._rest_timer is not None:
            self._rest_timer.cancel()
        self._rest_timer = self.loop.call_later(self.limits.write_time, self._end_if_unread)
        early, self._early = self._early, b""
        if early and not self.transport.is_closing():
            self.data_received(early)
        elif self._has_request:
            self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_time, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_write_timer()
        if self._rest_timer is not None:
            self._rest_timer.cancel()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        """True while a request whose headers have come is not answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _has_request(self) -> bool:
        """True while a request that has come with all of its body is not answered."""
        return self._is_answering and self.conn.their_state is not h11.SEND_BODY

    def _end_if_unread(self) -> None:
        # A transport that was closed with a rest of an answer waits for its client without end.
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _expect_headers(self) -> None:
        self._header_timer = self.loop.call_later(self.limits.header_time, self.transport.abort)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def limited_protocol(limits: HttpLimits) -> type[H11Protocol]:
    """Return the protocol class that keeps ``limits``."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})
