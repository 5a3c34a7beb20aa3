"""The node at a glance in the terminal: ``ros2 run edgellm_ros top`` or ``python3 -m edgellm_ros.top``.

State, model, memory, tokens per second and waiting times, the requests that run and wait, and the last errors. It may
be started before the node, and stays when the node restarts. Keys: the arrows (or j and k) select a request, c cancels
it, x cancels all, q leaves. Where the output is no terminal, or with ``--once``, it prints one picture and ends.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import termios
import time
import tty
from typing import Any

import rclpy
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.utilities import remove_ros_args
from rich.console import Console
from rich.live import Live

from edgellm_ros import qos
from edgellm_ros.msg import EngineStatus, GenerationStats
from edgellm_ros.srv import Cancel, GetInfo
from edgellm_ros.top_figures import Figures
from edgellm_ros.top_view import View

_PERIOD = 0.25  # s between two pictures
_INFO_INTERVAL = 1.0  # s between two questions for ~/get_info
_SETTLE = 0.5  # s that --once waits for ~/get_info
_KEYS = "arrows select   c cancel   x cancel all   q quit"
_EPILOG = """keys:
  up, down, j, k   select a request
  c                cancel it
  x                cancel all
  q, Ctrl-C        leave

Example:
  ros2 run edgellm_ros top --node /llm"""


class Watcher:
    """Follows one node, which need not be there yet, and asks it to cancel requests."""

    def __init__(self, node: Node, name: str) -> None:
        self.figures = Figures()
        self.view = View(name, self.figures)
        self._node = node
        self._topic = f"{name}/status"
        self._asked = 0.0  # s, time.monotonic(), when ~/get_info was asked last
        node.create_subscription(EngineStatus, self._topic, self._on_status, qos.LATCHED)
        node.create_subscription(GenerationStats, f"{name}/stats", self._on_stats, qos.COMMAND)
        self._info = node.create_client(GetInfo, f"{name}/get_info")
        self._cancel = node.create_client(Cancel, f"{name}/cancel")

    def look(self) -> None:
        """Notice that the node has gone, and ask for what the topics do not tell. Call it now and then."""
        if self.figures.status is not None and not self._node.count_publishers(self._topic):
            self.figures.forget_node()
        now = time.monotonic()
        if self.figures.needs_info and now > self._asked + _INFO_INTERVAL and self._info.service_is_ready():
            self._asked = now
            self._info.call_async(GetInfo.Request()).add_done_callback(self._on_info)

    def cancel(self, request_id: str) -> None:
        """Have the request of this id end, or all with an empty one; the view's message says what came of it."""
        if not self._cancel.service_is_ready():
            self.view.message = "The node does not answer."
            return

        def done(future: Any) -> None:
            count = future.result().num_cancelled
            what = request_id or "all"
            self.view.message = f"Cancelled {what}." if count else f"{what} has ended already."

        self._cancel.call_async(Cancel.Request(request_id=request_id)).add_done_callback(done)

    def key(self, key: str) -> bool:
        """Take a key; False: leave."""
        self.view.message = ""
        if key in ("q", "Q", "\x03", "\x04"):
            return False
        if key in ("up", "k"):
            self.view.move(-1)
        elif key in ("down", "j"):
            self.view.move(1)
        elif key == "x":
            self.cancel("")
        elif key == "c":
            if (request := self.view.chosen) is None:
                self.view.message = "There is no request to cancel."
            else:
                self.cancel(request.request_id)
        return True

    def _on_status(self, status: EngineStatus) -> None:
        self.figures.on_status(status, time.monotonic())

    def _on_stats(self, stats: GenerationStats) -> None:
        self.figures.on_stats(stats, time.monotonic())

    def _on_info(self, future: Any) -> None:
        info = future.result()
        if not info.error_code:
            self.figures.info = info


class Keys:
    """Reads single keys from a terminal; none where the input is no terminal."""

    _NAMES = {"\x1b[A": "up", "\x1b[B": "down", "\x1bOA": "up", "\x1bOB": "down"}

    def __enter__(self) -> Keys:
        self._before = None
        if sys.stdin.isatty():
            self._before = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)

    def read(self) -> list[str]:
        """Return the keys pressed since the last call."""
        if self._before is None or not select.select([sys.stdin], [], [], 0)[0]:
            return []
        data = os.read(sys.stdin.fileno(), 64).decode("utf-8", "replace")
        if not data:
            return ["q"]  # the terminal has gone
        found = []
        while data:
            size = 3 if data[:3] in self._NAMES else 1
            found.append(self._NAMES.get(data[:size], data[:size]))
            data = data[size:]
        return found


def show(watcher: Watcher, executor: SingleThreadedExecutor, console: Console) -> None:
    """Draw until the user leaves."""
    ascii_only = _is_ascii(console)
    with Keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        drawn = 0.0
        while True:
            executor.spin_once(timeout_sec=0.05)
            pressed = keys.read()
            if not all([watcher.key(key) for key in pressed]):
                return
            if pressed or time.monotonic() > drawn + _PERIOD:
                watcher.look()
                width, height = console.size
                picture = watcher.view.render(width, height, ascii_only=ascii_only, keys=_KEYS)
                live.update(picture, refresh=True)
                drawn = time.monotonic()


def show_once(watcher: Watcher, executor: SingleThreadedExecutor, console: Console, wait: float) -> int:
    """Print one picture. Returns 1 if the node is not there after ``wait`` seconds."""
    end = time.monotonic() + wait
    while watcher.figures.status is None and time.monotonic() < end:
        executor.spin_once(timeout_sec=0.05)
    end = time.monotonic() + _SETTLE
    while watcher.figures.needs_info and time.monotonic() < end:
        watcher.look()
        executor.spin_once(timeout_sec=0.05)
    if watcher.figures.status is None:
        print(f"There is no node {watcher.view.name} after {wait:g} s.", file=sys.stderr)
        return 1
    console.print(watcher.view.render(console.width, ascii_only=_is_ascii(console)))
    return 0


def _is_ascii(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="top", description="Shows an edgellm_ros node in the terminal.", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--node", default="/llm", help="full name of the node (default: /llm)")
    parser.add_argument("--once", action="store_true", help="print one picture and end, as where there is no terminal")
    parser.add_argument(
        "--wait", type=float, default=5.0, metavar="SECONDS", help="how long --once looks for the node (default: 5)"
    )
    return parser


def run(arguments: argparse.Namespace, args: list[str]) -> int:
    console = Console()
    once = arguments.once or not console.is_terminal
    if not console.is_terminal:
        console = Console(width=max(console.width, 100), no_color=True, highlight=False)
    context = Context()
    rclpy.init(args=args, context=context)  # with a context of our own rclpy leaves the signals alone
    node = Node(f"edgellm_top_{os.getpid()}", context=context, start_parameter_services=False, enable_rosout=False)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        watcher = Watcher(node, "/" + arguments.node.strip("/"))
        if once:
            return show_once(watcher, executor, console, arguments.wait)
        show(watcher, executor, console)
        return 0
    except ExternalShutdownException:
        return 0
    finally:
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()


def main(args: list[str] | None = None) -> None:
    args = sys.argv if args is None else args
    arguments = make_parser().parse_args(remove_ros_args(args)[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the terminal as it was
    try:
        code = run(arguments, args)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 1
    raise SystemExit(code)


if __name__ == "__main__":
    main()
