"""The HTTP server in a thread of its own."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading

import uvicorn

from engine_core.errors import ConfigurationError
from engine_core.http.app import OpenAIApp
from engine_core.http.limits import DEFAULT_LIMITS, HttpLimits, limited_protocol
from engine_core.http.metrics import Metrics
from engine_core.http.status import StatusFigures
from engine_core.paths import expand_user
from engine_core.request import GenerationResult
from engine_core.serving.intake import Intake

_BACKLOG = 64
_MAX_PORT = 65535
# Of an address that a name has and this machine has not: ::1 of localhost where there is no IPv6.
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_GRACE = 1  # s, for answers that are still being sent when it is closed

_log = logging.getLogger(__name__)


class HttpServer:
    """Serves OpenAI's API in front of ``intake``, from when it is made until it is closed."""

    def __init__(
        self,
        intake: Intake,
        *,
        host: str = "127.0.0.1",
        port: int,
        api_key_file: str = "",
        limits: HttpLimits = DEFAULT_LIMITS,
    ) -> None:
        """``port``: 0 = any that is free. Raises ConfigurationError."""
        keys = read_keys(api_key_file) if api_key_file else ()
        sockets = _listen(host, port)
        self.host, self.port = sockets[0].getsockname()[:2]
        if not keys and not all(_is_loopback(sock.getsockname()[0]) for sock in sockets):
            _log.warning("The HTTP endpoint answers everyone who reaches %s; set an API key file.", self.url)
        self._intake = intake
        metrics, figures = Metrics(intake.state), StatusFigures(intake.state)

        def watch(result: GenerationResult) -> None:
            metrics.observe(result)
            figures.observe(result)

        intake.watch = watch
        config = uvicorn.Config(
            OpenAIApp(intake, metrics, figures, limits, keys).asgi,
            http=limited_protocol(limits),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="critical",  # the pages log what goes wrong in them
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=limits.idle_time,
            timeout_graceful_shutdown=_GRACE,
            h11_max_incomplete_event_size=limits.header_bytes,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, args=(sockets,), name="edgellm-http", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def close(self, timeout: float = 3.0) -> bool:
        """Stop listening, end the connections and the thread; False if it still runs after ``timeout`` seconds.

        Requests are not cancelled: close the worker first, and cancel what has not reached it.
        """
        self._intake.watch = None
        self._server.should_exit = True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _serve(self, sockets: list[socket.socket]) -> None:
        try:
            self._server.run(sockets=sockets)
        except BaseException:
            _log.exception("The HTTP endpoint ended")
        finally:
            for sock in sockets:
                sock.close()


def read_keys(path: str) -> tuple[bytes, ...]:
    """Return the API keys of a file, one a line; empty lines and those with a # are left out.

    Raises ConfigurationError if it cannot be read or has none.
    """
    try:
        lines = [line.strip() for line in expand_user(path).read_bytes().splitlines()]
    except (OSError, ValueError) as error:  # the latter: NUL in the path
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise ConfigurationError(f"The API key file {path} cannot be read: {reason}.") from None
    keys = tuple(line for line in lines if line and not line.startswith(b"#"))
    if not keys:
        raise ConfigurationError(f"The API key file {path} has no key; write one key a line.")
    return keys


def _listen(host: str, port: int) -> list[socket.socket]:
    """Return a listening socket for each address of ``host`` that this machine has, all with one port.

    Raises ConfigurationError if there is none, or one cannot be listened on.
    """
    if not 0 <= port <= _MAX_PORT:  # getaddrinfo would take it modulo 65536
        raise ConfigurationError(f"The port of the HTTP endpoint is {port}, but it must be from 0 to {_MAX_PORT}.")
    with contextlib.ExitStack() as undo:
        sockets: list[socket.socket] = []
        absent: OSError | None = None
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, address in dict.fromkeys((family, address[:2]) for family, _, _, _, address in found):
                port = sockets[0].getsockname()[1] if sockets else port
                try:
                    sock = socket.create_server((str(address[0]), port), family=family, backlog=_BACKLOG)
                except OSError as error:
                    if error.errno not in _ABSENT:
                        raise
                    absent = error
                    continue
                undo.callback(sock.close)
                # Its connections inherit this. asyncio sets it only where the protocol was named, which create_server
                # does not do; without it the first event waits up to 40 ms for the client to acknowledge the head.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sockets.append(sock)
            if not sockets and absent is not None:
                raise absent
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigurationError(f"The HTTP endpoint cannot listen on {host}, port {port}: {reason}.") from None
        undo.pop_all()
        return sockets


def _is_loopback(host: str) -> bool:
    return host == "::1" or host.startswith("127.")
