"""A chat in the terminal over the node's action: ``ros2 run edgellm_ros chat`` or ``python3 -m edgellm_ros.chat``.

The answer appears as it is generated. Ctrl-C cancels it; a second one, or one at the prompt, leaves. ``/reset``
forgets the conversation, ``/system TEXT`` sets the system prompt and forgets it, ``/quit`` leaves. Lines can also come
from a pipe.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator

import rclpy
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args

from edgellm_ros import qos
from edgellm_ros.action import Generate
from edgellm_ros.client import PieceText
from edgellm_ros.msg import ChatMessage, ErrorCode, FinishReason, SamplingOptions

_OPTIONS = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float,
            "seed": int, "max_new_tokens": int}  # fmt: skip
_ENDINGS = {FinishReason.CANCELLED: "cancelled", FinishReason.TIMEOUT: "timeout", FinishReason.PREEMPTED: "preempted",
            FinishReason.LENGTH: "length limit"}  # fmt: skip


class ChatError(Exception):
    """One sentence: why there is no answer. ``code``: a constant of ErrorCode, where the node gave one."""

    def __init__(self, message: str, code: int = ErrorCode.NONE) -> None:
        super().__init__(message)
        self.code = code


class Interrupts:
    """Counts Ctrl-C: the first one of an answer cancels it, the next raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.pending = False
        self.answering = False
        signal.signal(signal.SIGINT, self._on_sigint)

    def _on_sigint(self, _signum, _frame) -> None:
        if not self.answering or self.pending:
            raise KeyboardInterrupt
        self.pending = True

    @contextlib.contextmanager
    def during_answer(self) -> Iterator[None]:
        self.pending, self.answering = False, True
        try:
            yield
        finally:
            self.answering = False


class Client:
    """The action's client; rclpy spins in a thread of its own, so that the main one can be interrupted."""

    def __init__(self, name: str, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self._name = name
        self._node = rclpy.create_node("llm_chat")
        self._action = ActionClient(
            self._node, Generate, f"{name}/generate", feedback_sub_qos_profile=qos.STREAM
        )
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._executor.spin, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._executor.shutdown()
        self._thread.join(2.0)
        self._action.destroy()
        self._node.destroy_node()

    def wait_for_node(self, timeout: float) -> None:
        """Raises ChatError if no node offers the action within ``timeout`` seconds."""
        if not self._action.wait_for_server(timeout):
            raise ChatError(f"No node offers {self._name}/generate; start it, or name it with --node.")

    def ask(self, goal: Generate.Goal) -> Generate.Result:
        """Prints the answer as it comes; raises ChatError if there is none."""
        text = PieceText()

        def show(message) -> None:
            print(text.piece(message.feedback.sequence, message.feedback.text), end="", flush=True)

        with self._interrupts.during_answer():
            handle = self._wait(self._action.send_goal_async(goal, feedback_callback=show))
            if not handle.accepted:
                raise ChatError(f"{self._name} is not active; configure and activate it first.")
            answer = handle.get_result_async()
            cancelled = False
            while not answer.done():
                if self._interrupts.pending and not cancelled:
                    cancelled = True
                    handle.cancel_goal_async()
                self._pause()
        result = answer.result().result
        if result.error_code:
            raise ChatError(result.error_message, result.error_code)
        print(text.rest(result.text))  # feedback may be lost; the result has all of the text
        return result

    def _wait(self, future):
        while not future.done():
            self._pause()
        return future.result()

    def _pause(self) -> None:
        if not self._action.server_is_ready():
            raise ChatError(f"{self._name} is gone.")
        time.sleep(0.005)


class Chat:
    """A conversation; failed and empty turns do not become part of it."""

    def __init__(self, client: Client, system_prompt: str, sampling: SamplingOptions) -> None:
        self._client = client
        self._system_prompt = system_prompt
        self._sampling = sampling
        self._turns: list[ChatMessage] = []

    def line(self, line: str) -> bool:
        """Takes one line of input; False: the user wants to leave."""
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command == "/reset":
            self._turns.clear()
        elif command == "/system":
            self._system_prompt = rest.strip()
            self._turns.clear()
        elif command.startswith("/"):
            print(f"Unknown command {command}; there are /reset, /system TEXT and /quit.", file=sys.stderr)
        elif line.strip():
            self._say(line)
        return True

    def _say(self, text: str) -> None:
        system = [ChatMessage(role="system", content=self._system_prompt)] if self._system_prompt else []
        question = ChatMessage(role="user", content=text)
        turns = list(self._turns)  # forgotten only if the question fits without them
        while True:
            goal = Generate.Goal(messages=[*system, *turns, question], sampling=self._sampling)
            try:
                result = self._client.ask(goal)
                break
            except ChatError as error:
                if error.code != ErrorCode.PROMPT_TOO_LONG or not turns:
                    raise
            # Half of the turns, so that the next lines do not wait for the same again; in pairs, question and answer.
            del turns[: max(2, len(turns) // 4 * 2)]
        if dropped := len(self._turns) - len(turns):
            print(
                f"[the context was full: the oldest {dropped} of {len(self._turns)} messages are forgotten; "
                "/reset forgets all]",
                file=sys.stderr,
            )
        self._turns = turns
        if ending := _ENDINGS.get(result.finish_reason):
            print(f"[{ending}]", file=sys.stderr)
        if result.text:
            self._turns += [question, ChatMessage(role="assistant", content=result.text)]


def read_lines(interactive: bool) -> Iterator[str]:
    """Lines until the end of the input; with a prompt and line editing on a terminal only."""
    if not interactive:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing for input()
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def run(arguments: argparse.Namespace) -> int:
    sampling = SamplingOptions()
    for name in _OPTIONS:
        if (value := getattr(arguments, name)) is not None:
            setattr(sampling, name, [value])
    interactive = sys.stdin.isatty()
    client = Client(arguments.node, Interrupts())
    failed = False
    try:
        client.wait_for_node(arguments.wait)
        chat = Chat(client, arguments.system, sampling)
        for line in read_lines(interactive):
            try:
                if not chat.line(line):
                    break
            except ChatError as error:
                failed = True
                print(f"{error}", file=sys.stderr)
    except ChatError as error:
        failed = True
        print(f"{error}", file=sys.stderr)
    finally:
        client.close()
    return 1 if failed and not interactive else 0


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chat", description="Chat with an edgellm_ros node in the terminal.")
    parser.add_argument("--node", default="/llm", help="full name of the node (default: /llm)")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt; without it the node's")
    parser.add_argument("--wait", type=float, default=5.0, metavar="SECONDS", help="how long to look for the node")
    for name, kind in _OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="without it the node's parameter")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> None:
    args = sys.argv if args is None else args
    arguments = parse(remove_ros_args(args)[1:])
    arguments.node = arguments.node if arguments.node.startswith("/") else f"/{arguments.node}"
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    try:
        code = run(arguments)
    except KeyboardInterrupt:
        print()
        code = 130
    except BrokenPipeError:
        code = 1
    rclpy.shutdown()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
