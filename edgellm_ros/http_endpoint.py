"""The HTTP endpoint of the node: there while it is active, if http_port is set."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rclpy.impl.rcutils_logger import RcutilsLogger

from edgellm_ros.parameters import Settings
from engine_core import http
from engine_core.errors import ConfigurationError
from engine_core.serving.intake import Intake

if TYPE_CHECKING:
    from engine_core.http.server import HttpServer


class HttpEndpoint:
    """Opened at activate and closed at deactivate. That it cannot be opened is said and leaves the node active."""

    def __init__(self, intake: Intake, get_logger: Callable[[], RcutilsLogger]) -> None:
        self._intake = intake
        self._get_logger = get_logger
        self._server: HttpServer | None = None
        self.url = ""  # while it is open
        self.problem = ""  # why it is not open although it should be

    def open(self, settings: Settings) -> None:
        self.problem = ""
        if settings.http_port == 0:
            return
        try:
            self._server = http.open_server(
                self._intake, host=settings.http_host, port=settings.http_port,
                api_key_file=settings.http_api_key_file, body_limit=settings.http_body_limit << 20,
            )  # fmt: skip
        except ConfigurationError as error:
            self.problem = str(error)
            self._get_logger().error(f"{self.problem} The node is active without it.")
            return
        self.url = self._server.url
        self._get_logger().info(f"OpenAI's API is served at {self.url}/v1.")

    def close(self) -> None:
        server, self._server = self._server, None
        self.url = self.problem = ""
        if server is not None and not server.close():
            self._get_logger().error("The HTTP endpoint did not end in time; it is left to its thread.")
