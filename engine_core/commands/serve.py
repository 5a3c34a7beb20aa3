"""``edgellm serve``: OpenAI's API in front of an engine, without ROS."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import signal
import sys
import threading
from typing import TYPE_CHECKING

from engine_core.commands.arguments import add_command, add_engine, add_opening, engine_config, port, whole_number
from engine_core.commands.progress import shown
from engine_core.config import BUSY_POLICIES
from engine_core.request import SAMPLING_OPTIONS, RequestDefaults, SamplingParams

if TYPE_CHECKING:
    from engine_core.serving.engine import Engine
    from engine_core.serving.worker import Worker


def add(commands) -> None:
    parser = add_command(
        commands,
        "serve",
        help="answer OpenAI's API over HTTP, without ROS",
        example="edgellm serve ~/engines/demo --port 8000",
    )
    add_engine(parser)
    add_opening(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=port, default=8000, help="TCP port (default: 8000; 0: any that is free)")
    parser.add_argument("--api-key-file", default="", metavar="FILE", help="one API key a line; a client sends one")
    parser.add_argument(
        "--body-limit", type=whole_number(1), default=16, metavar="MIB", help="largest body (default: 16)"
    )
    parser.add_argument("--max-batch", type=int, default=1, help="requests decoded at the same time (default: 1)")
    parser.add_argument("--queue-depth", type=whole_number(0), default=8, help="requests that may wait (default: 8)")
    parser.add_argument(
        "--busy-policy", choices=BUSY_POLICIES, default="queue", help="what a request meets while all slots are taken"
    )
    parser.add_argument("--system", default="", help="system prompt of conversations without one")
    for option in SAMPLING_OPTIONS.values():
        flag = f"--{option.name.replace('_', '-')}"
        parser.add_argument(flag, type=option.kind, default=option.default, help=option.description)
    parser.set_defaults(run=run)


@dataclasses.dataclass
class _State:
    """The settings, engine and worker of the command; see ``ServingState``."""

    settings: RequestDefaults
    engine: Engine | None = None
    worker: Worker | None = None


def run(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Returns 1 if the engine fails."""
    from engine_core.http import open_server
    from engine_core.serving.engine import Engine
    from engine_core.serving.intake import Intake
    from engine_core.serving.worker import Worker

    logging.basicConfig(format="%(message)s")
    stop = threading.Event()
    faults: list[Exception] = []

    def on_fault(error: Exception) -> None:
        faults.append(error)
        stop.set()

    sampling = SamplingParams(**{name: getattr(options, name) for name in SAMPLING_OPTIONS})
    sampling.validate()
    state = _State(RequestDefaults(sampling, system_prompt=options.system))
    config = dataclasses.replace(engine_config(options), max_batch=options.max_batch)
    with contextlib.ExitStack() as undo:
        with shown("Loading") as (report, progress):
            state.engine = Engine.open(config, report, progress)
        undo.callback(state.engine.close)
        state.worker = Worker(
            state.engine, queue_depth=options.queue_depth, busy_policy=options.busy_policy, on_fault=on_fault
        )
        undo.callback(state.worker.close)
        state.worker.warm_system_prompt(options.system)
        intake = Intake(state)
        undo.callback(intake.close)
        server = open_server(
            intake, host=options.host, port=options.port, api_key_file=options.api_key_file,
            body_limit=options.body_limit << 20,
        )  # fmt: skip
        undo.callback(server.close)
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda *_: stop.set())
        print(f"OpenAI's API is served at {server.url}/v1, a page of its figures at {server.url}/.", flush=True)
        while not stop.wait(1.0):  # in slices: a signal may have been given to another thread
            pass
        state.worker.close()  # before the server, which still sends the last answers
        intake.cancel("")  # what the worker has not seen yet
    if faults:
        print(f"edgellm: The engine failed: {faults[0]}", file=sys.stderr)
    return 1 if faults else 0
