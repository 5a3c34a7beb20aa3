"""The demo: a lifecycle node answers robot commands, token by token, over ROS 2, and then questions about a picture.

Run by "make demo", which sets up what it needs. There is one demo model for each. The node is a process of its own;
this one is a client that knows it only by its lifecycle services and through edgellm_ros.client. Ctrl-C stops both.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.signals import SignalHandlerOptions

import isolation
from demo_model.conversations import CONVERSATIONS
from demo_vision.conversation import PICTURE, QUESTIONS
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

    def close(self) -> None:
        self._node.destroy_node()


def build_engine(checkpoint: Path, log: Path, stop: StopRequest) -> Path:
    """The engine of a demo model, built on the first run."""
    directory = demo_engine.engine_dir(checkpoint)
    if not demo_engine.is_built(directory):
        print(f"building the engine of {checkpoint.name} into {directory}", flush=True)
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


def ask(llm: LLM, messages: list[dict[str, str]], stop: StopRequest, images: Sequence[Path] = ()) -> GenerationResult:
    """Print the last message, the answer as it is generated, and its figures; return the result."""
    print(f"\nyou    {messages[-1]['content']}\nrobot  ", end="", flush=True)
    pieces = llm.pieces(messages, images=images, deadline=60.0)
    try:
        for piece in pieces:
            stop.check()
            print(piece, end="", flush=True)
    except LLMError as error:
        raise DemoError(f"The node answered with error {error.code}: {error}") from None
    finally:
        pieces.close()
    metrics = pieces.result.metrics
    print(f"\n       time to first token {metrics.time_to_first_token * 1e3:.1f} ms, "
          f"{metrics.generated_tokens} tokens at {metrics.tokens_per_second:.0f} tokens/s")  # fmt: skip
    return pieces.result


def show_model(info: GetInfo.Response) -> None:
    print(f"{info.model_name}: {info.parameters / 1e6:.1f} M parameters, {info.backend}, {info.quantization}, "
          f"{info.memory.total / 2**20:.0f} MiB planned, loaded in {info.load_time:.2f} s")  # fmt: skip


def talk(llm: LLM, stop: StopRequest) -> None:
    """Hold the conversations with the model of commands."""
    for commands in CONVERSATIONS:
        messages: list[dict[str, str]] = []
        for command in commands:
            messages.append({"role": "user", "content": command})
            messages.append({"role": "assistant", "content": ask(llm, messages, stop).text})


def look(llm: LLM, stop: StopRequest) -> None:
    """Ask the model that sees about its picture. The node encodes the picture once."""
    picture = demo_engine.checkpoint_dir("demo_vision") / PICTURE
    print(f"asking about {picture}", flush=True)
    for question in QUESTIONS:
        ask(llm, [{"role": "user", "content": question}], stop, [picture])


def run(work: Path, stop: StopRequest) -> None:
    for name, converse in (("demo", talk), ("demo_vision", look)):
        engine = build_engine(demo_engine.checkpoint_dir(name), work / "build.log", stop)
        print(f"starting the node (its log: {work / 'node.log'})", flush=True)
        with NodeProcess(engine, work / "node.log", stop) as process:
            client = Client(process)
            client.change_state(Transition.TRANSITION_CONFIGURE, "configure")
            client.change_state(Transition.TRANSITION_ACTIVATE, "activate")
            show_model(client.info())
            with LLM("/llm") as llm:
                converse(llm, stop)
            client.change_state(Transition.TRANSITION_DEACTIVATE, "deactivate")
            client.change_state(Transition.TRANSITION_CLEANUP, "clean up")
            client.close()
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
