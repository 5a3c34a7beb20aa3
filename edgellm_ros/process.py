"""The node as a process: signals, the executor's thread, and an orderly end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import rclpy
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.executors import SingleThreadedExecutor
from rclpy.logging import get_logger
from rclpy.signals import SignalHandlerOptions

from edgellm_ros.threads import StopSignal
from engine_core.errors import ConfigurationError

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds from the last answer to the end of the context: what Fast DDS still has to send.
_LINGER = 0.15


class _RosHandler(logging.Handler):
    """Brings what the core logs to the ROS log."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = get_logger("edgellm")
        # rclpy wants one severity per line of code.
        if record.levelno >= logging.ERROR:
            logger.error(self.format(record))
        elif record.levelno >= logging.WARNING:
            logger.warning(self.format(record))
        else:
            logger.info(self.format(record))


def run_node(make_node: Callable[[], object], args: list[str] | None) -> int:
    """Runs the node until SIGINT or SIGTERM; returns the exit code.

    rclpy's own signal handling ends the context at once, and with it the way of every answer. Here the context
    lives until the running request has been answered. The executor has a thread of its own because Python runs
    signal handlers in the main thread, which waits for them. One thread is enough for it: no callback waits for long.
    """
    stop = StopSignal(_STOP_SIGNALS)
    core_log = logging.getLogger("engine_core")
    core_log.addHandler(_RosHandler())
    core_log.propagate = False
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = make_node()
    except (ConfigurationError, InvalidParameterTypeException, InvalidParameterValueException) as error:
        print(f"The node cannot start with these parameters: {error}", file=sys.stderr)
        rclpy.shutdown()
        return 1
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    ended = threading.Event()
    thread = threading.Thread(target=_spin, args=(executor, ended, stop), name="edgellm-executor", daemon=True)
    thread.start()
    stop.wait()
    if not _end(node, executor, thread, ended):
        sys.stderr.write("The engine did not stop in time; leaving it.\n")
        sys.stderr.flush()
        os._exit(0)  # no destructor may run under a thread that still uses the engine
    return 0


def _spin(executor: SingleThreadedExecutor, ended: threading.Event, stop: StopSignal) -> None:
    """A callback that raises (a client that vanished while it was answered) is logged and costs nobody else."""
    while not ended.is_set() and executor.context.ok():
        try:
            executor.spin_once()
        except Exception:
            if executor.context.ok():
                get_logger("edgellm").error(f"A callback raised:\n{traceback.format_exc()}")
            time.sleep(0.01)  # what keeps on failing must not take a core
    stop.set()  # also when somebody else has ended the context


def _end(node, executor: SingleThreadedExecutor, thread: threading.Thread, ended: threading.Event) -> bool:
    """Return False if the engine or the executor hangs."""
    stopped = node.stop()
    limit = time.monotonic() + 1.0
    while node.num_open_requests and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(_LINGER)
    ended.set()
    executor.wake()
    thread.join(2.0)
    if thread.is_alive() or not stopped:
        return False
    node.destroy_node()
    executor.shutdown()
    if rclpy.ok():
        rclpy.shutdown()
    return True
