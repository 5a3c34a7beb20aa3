"""The OpenAI-compatible HTTP endpoint: a front of the engine beside ROS, in a thread and an event loop of its own.

It hands every request to the same ``Intake`` as ROS. Nothing of Starlette, uvicorn and prometheus_client is imported
before ``open_server`` is called.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine_core.errors import ConfigurationError
from engine_core.serving.intake import Intake

if TYPE_CHECKING:
    from engine_core.http.server import HttpServer


def open_server(
    intake: Intake, *, host: str, port: int, api_key_file: str = "", body_limit: int | None = None
) -> HttpServer:
    """Return the endpoint, which answers from now on until it is closed.

    ``body_limit``: bytes that the body of a request may have; None: the default of ``HttpLimits``.
    Raises ConfigurationError saying why it cannot be opened: the port is taken, a package or the key file is missing.
    """
    try:
        module = importlib.import_module("engine_core.http.server")
    except ImportError as error:
        raise ConfigurationError(
            f"The HTTP endpoint needs the Python package {error.name}, which is not installed; see requirements.txt."
        ) from error
    make: Callable[..., HttpServer] = module.HttpServer
    limits = module.DEFAULT_LIMITS
    if body_limit is not None:
        limits = dataclasses.replace(limits, body_bytes=body_limit)
    return make(intake, host=host, port=port, api_key_file=api_key_file, limits=limits)
