"""The demo: a lifecycle node loads the demo model and answers robot commands, token by token, over ROS 2.

Run by "make demo", which sets up what it needs. The node is a process of its own; this one is a client that knows it
only by its lifecycle services and through edgellm_ros.client. Ctrl-C stops both.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.signals import SignalHandlerOptions

import isolation
from demo_model.conversations import CONVERSATIONS
from edgellm_ros import demo_engine
from edgellm_ros.client import LLM, LLMError
from edgellm_ros.msg import GenerationResult
from edgellm_ros.srv import GetInfo

ROOT = Path(__file__).resolve().parent.parent


class DemoError(Exception):
    """One sentence: what went wrong."""


class Stopped(Exception):
    """Ctrl-C. Raised only where waiting looks for it: a KeyboardInterrupt in the wrong place would leave the node."""


class StopRequest:
    """Set by SIGINT and SIGTERM, also where a shell had SIGINT ignored."""

    def __init__(self) -> None:
        self._event = threading.Event()
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, lambda *_: self._event.set())

    def check(self) -> None:
        if self._event.is_set():
            raise Stopped


class NodeProcess:
    """The node, started on entry; on exit asked to stop, and made to if it does not."""

    def __init__(self, engine: Path, log: Path, stop: StopRequest) -> None:
        self._engine, self.log, self._stop = engine, log, stop
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> NodeProcess:
        executable = next(
            path for prefix in os.environ["AMENT_PREFIX_PATH"].split(os.pathsep)
            if (path := Path(prefix) / "lib" / "edgellm_ros" / "llm_node").exists()
        )  # fmt: skip
        with open(self.log, "wb") as output:
            # A session of its own: Ctrl-C reaches only this process, which then stops the node in good order.
            self._process = subprocess.Popen(
                [str(executable), "--ros-args", "-r", "__node:=llm", "-p", f"engine_dir:={self._engine}"],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return self

    def check(self) -> None:
        self._stop.check()
        if self._process.poll() is not None:
            raise DemoError(f"The node ended by itself with exit status {self._process.returncode}.")

    def __exit__(self, kind, *_exception) -> None:
        for sign, patience in ((signal.SIGINT, 10.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
            if self._process.poll() is None:
                self._process.send_signal(sign)
                try:
                    self._process.wait(patience)
                except subprocess.TimeoutExpired:
                    print(f"The node did not stop on {sign.name} within {patience:.0f} s.", file=sys.stderr)
        if kind is None and self._process.returncode != 0:
            raise DemoError(f"The node ended with exit status {self._process.returncode} when asked to stop.")


class Client:
    """Calls the node; every wait has an end and notices when the node is gone."""

    def __init__(self, process: NodeProcess) -> None:
        self._process = process
        self._node = rclpy.create_node("edgellm_demo")
        self._lifecycle = self._node.create_client(ChangeState, "/llm/change_state")
        self._info = self._node.create_client(GetInfo, "/llm/get_info")

    def _spin_until(self, done, what: str, limit: float) -> None:
        end = time.monotonic() + limit
        while not done():
            self._process.check()
            if time.monotonic() > end:
                raise DemoError(f"{what} took longer than {limit:.0f} s.")
            rclpy.spin_once(self._node, timeout_sec=0.1)

    def _wait(self, future, what: str, limit: float):
        self._spin_until(future.done, what, limit)
        return future.result()

    def change_state(self, transition: int, name: str, limit: float = 120.0) -> None:
        self._spin_until(self._lifecycle.service_is_ready, "Starting the node", 30.0)
        request = ChangeState.Request(transition=Transition(id=transition))
        if not self._wait(self._lifecycle.call_async(request), name, limit).success:
            raise DemoError(f"The node refused to {name}.")

    def info(self) -> GetInfo.Response:
        return self._wait(self._info.call_async(GetInfo.Request()), "get_info", 10.0)


def build_engine(log: Path, stop: StopRequest) -> Path:
    """The demo engine, built on the first run."""
    checkpoint = demo_engine.checkpoint_dir()
    directory = demo_engine.engine_dir(checkpoint)
    if not demo_engine.is_built(directory):
        print(f"building the engine of the demo model into {directory}", flush=True)
        with open(log, "wb") as output:
            command = demo_engine.build_command(checkpoint, directory)
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            with subprocess.Popen(command, start_new_session=True, **streams) as process:
                try:
                    while process.poll() is None:
                        stop.check()
                        time.sleep(0.05)
                except Stopped:
                    process.send_signal(signal.SIGINT)  # it removes what it has half written
                    raise
        if process.returncode:
            raise DemoError(f"The demo engine could not be built (exit status {process.returncode}).")
    return directory


def ask(llm: LLM, messages: list[dict[str, str]], stop: StopRequest) -> GenerationResult:
    """Print the answer as it is generated and return it with its figures."""
    pieces = llm.pieces(messages, deadline=60.0)
    try:
        for piece in pieces:
            stop.check()
            print(piece, end="", flush=True)
    except LLMError as error:
        raise DemoError(f"The node answered with error {error.code}: {error}") from None
    finally:
        pieces.close()
    return pieces.result


def talk(client: Client, stop: StopRequest) -> None:
    info = client.info()
    print(f"{info.model_name}: {info.parameters / 1e6:.1f} M parameters, {info.backend}, {info.quantization}, "
          f"{info.memory.total / 2**20:.0f} MiB planned, loaded in {info.load_time:.2f} s")  # fmt: skip
    with LLM("/llm") as llm:
        for commands in CONVERSATIONS:
            messages: list[dict[str, str]] = []
            for command in commands:
                messages.append({"role": "user", "content": command})
                print(f"\nyou    {command}\nrobot  ", end="", flush=True)
                result = ask(llm, messages, stop)
                messages.append({"role": "assistant", "content": result.text})
                metrics = result.metrics
                print(f"\n       time to first token {metrics.time_to_first_token * 1e3:.1f} ms, "
                      f"{metrics.generated_tokens} tokens at {metrics.tokens_per_second:.0f} tokens/s")  # fmt: skip


def run(work: Path, stop: StopRequest) -> None:
    engine = build_engine(work / "build.log", stop)
    print(f"starting the node (its log: {work / 'node.log'})", flush=True)
    with NodeProcess(engine, work / "node.log", stop) as process:
        client = Client(process)
        client.change_state(Transition.TRANSITION_CONFIGURE, "configure")
        client.change_state(Transition.TRANSITION_ACTIVATE, "activate")
        talk(client, stop)
        client.change_state(Transition.TRANSITION_DEACTIVATE, "deactivate")
        client.change_state(Transition.TRANSITION_CLEANUP, "clean up")
    print("\nThe node has stopped.")


def show_log(work: Path) -> None:
    for name in ("build.log", "node.log"):
        if (work / name).is_file():
            lines = (work / name).read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join([f"--- end of {work / name}", *lines[-40:]]), file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".demo", help="directory for the engine and the logs")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    for name in ("build.log", "node.log"):
        (work / name).unlink(missing_ok=True)
    os.environ["ROS_HOME"] = str(work)  # the engine and ROS's own logs stay in the clone
    isolation.isolate()
    stop = StopRequest()
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    try:
        run(work, stop)
    except DemoError as error:
        show_log(work)
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except Stopped:
        print("\nStopped.", file=sys.stderr)
        return 130
    finally:
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
