"""A chat in the terminal over the node's action: ``ros2 run edgellm_ros chat`` or ``python3 -m edgellm_ros.chat``.

The answer appears as it is generated; while the model thinks first, a line says so. Ctrl-C cancels it; a second one, or
one at the prompt, leaves. ``/reset`` forgets the conversation, ``/system TEXT`` sets the system prompt and forgets it,
``/image FILE`` shows the model a picture with the next line, ``/quit`` leaves. Lines can also come from a pipe. With
``--session`` the node keeps the conversation, so that a later chat goes on with it.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rclpy.utilities import remove_ros_args
from sensor_msgs.msg import CompressedImage

from edgellm_ros.client import (
    LLM,
    InvalidImageError,
    InvalidSessionError,
    LLMError,
    PromptTooLongError,
    UnavailableError,
)
from edgellm_ros.client_images import to_image_messages
from edgellm_ros.msg import FinishReason, GenerationResult
from edgellm_ros.sampling_options import OPTION_TYPES
from engine_core.errors import ConfigurationError

_ENDINGS = {FinishReason.CANCELLED: "cancelled", FinishReason.TIMEOUT: "timeout", FinishReason.PREEMPTED: "preempted",
            FinishReason.LENGTH: "length limit"}  # fmt: skip


_HELP = (
    "/reset forgets the conversation, /system TEXT sets the system prompt, /image FILE shows the model a picture with "
    "the next line, /quit leaves; Ctrl-C ends an answer."
)


class Turn(NamedTuple):
    """A message, and its images as they were when they were named."""

    message: dict[str, Any]
    images: tuple[CompressedImage, ...] = ()


class Interrupts:
    """Counts Ctrl-C: the first one of an answer cancels it, the next raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._cancel: Callable[[], None] | None = None  # while an answer runs that has not been cancelled
        signal.signal(signal.SIGINT, self._on_sigint)

    def _on_sigint(self, _signum, _frame) -> None:
        cancel, self._cancel = self._cancel, None
        if cancel is None:
            raise KeyboardInterrupt
        cancel()

    @contextlib.contextmanager
    def during_answer(self, cancel: Callable[[], None]) -> Iterator[None]:
        """Call ``cancel`` at the first Ctrl-C inside."""
        self._cancel = cancel
        try:
            yield
        finally:
            self._cancel = None


class ThinkingLine:
    """The line that is shown while the model thinks: on a terminal it counts, and goes when the answer begins."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._num_characters = 0  # of the reasoning so far; 0 = no line is shown

    def add(self, reasoning: str) -> None:
        if self._is_terminal:
            text = f"\r[thinking: {self._num_characters + len(reasoning)} characters]"
            print(text, end="", file=sys.stderr, flush=True)
        elif not self._num_characters:
            print("[thinking]", file=sys.stderr, flush=True)
        self._num_characters += len(reasoning)

    def end(self) -> None:
        if self._is_terminal and self._num_characters:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._num_characters = 0


class Chat:
    """A conversation; failed and empty turns do not become part of it. With a ``session`` the node keeps it.

    ``options``: of each request.
    """

    def __init__(
        self, llm: LLM, interrupts: Interrupts, system_prompt: str, options: dict[str, Any], session: str = ""
    ) -> None:
        self._llm = llm
        self._interrupts = interrupts
        self._system_prompt = system_prompt
        self._options = options
        self._session = session
        self._turns: list[Turn] = []
        self._images: list[CompressedImage] = []  # for the next line

    def line(self, line: str) -> bool:
        """Takes one line of input; False: the user wants to leave."""
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command == "/reset":
            self._forget()
        elif command == "/system":
            self._forget()
            self._system_prompt = rest.strip()
        elif command == "/image":
            self._add_image(Path(rest.strip()))
        elif command == "/help":
            print(_HELP, file=sys.stderr)
        elif command.startswith("/"):
            print(f"Unknown command {command}; {_HELP}", file=sys.stderr)
        elif line.strip():
            self._say(line)
        return True

    def _add_image(self, path: Path) -> None:
        try:
            self._images += to_image_messages([path])[1]
        except OSError as error:
            print(f"{path} cannot be read ({error.strerror}).", file=sys.stderr)
        except ConfigurationError as error:  # a ~ without a home directory
            print(error, file=sys.stderr)

    def _forget(self) -> None:
        self._turns.clear()
        self._images.clear()
        if self._session:
            with contextlib.suppress(InvalidSessionError):  # it has not begun
                self._llm.sessions.reset(self._session)

    def _say(self, text: str) -> None:
        system = [Turn({"role": "system", "content": self._system_prompt})] if self._system_prompt else []
        images = tuple(self._images)
        self._images.clear()
        question = Turn({"role": "user", "content": text, "image_offsets": [0] * len(images)}, images)
        if self._session:
            result = self._show([*system, question], session=self._session, context_policy="drop_oldest")
            forgotten = f"{result.dropped_turns} turns" if result.dropped_turns else ""
        else:
            result, forgotten = self._say_all(system, question)
        if forgotten:
            print(f"[there was no room: the oldest {forgotten} are forgotten; /reset forgets all]", file=sys.stderr)
        if ending := _ENDINGS.get(result.finish_reason):
            print(f"[{ending}]", file=sys.stderr)

    def _say_all(self, system: list[Turn], question: Turn) -> tuple[GenerationResult, str]:
        """Send the whole conversation; return the result and what was forgotten of it, for people."""
        turns = list(self._turns)  # forgotten only if the question fits without them
        while True:
            try:
                result = self._show([*system, *turns, question])
                break
            except PromptTooLongError:
                if not turns:
                    raise
                # Half of the turns, in pairs, so that the next lines do not wait for the same again.
                del turns[: max(2, len(turns) // 4 * 2)]
            except InvalidImageError:  # there may be too many: max_images counts those of earlier turns, too
                with_images = [index for index, turn in enumerate(turns) if turn.images]
                if not with_images:
                    raise
                del turns[: with_images[0] + 2]
        dropped = len(self._turns) - len(turns)
        forgotten = f"{dropped} of {len(self._turns)} messages" if dropped else ""
        self._turns = turns
        if result.text:
            self._turns += [question, Turn({"role": "assistant", "content": result.text})]
        return result, forgotten

    def _show(self, turns: list[Turn], **fields: str) -> GenerationResult:
        """Print the answer as it comes, and return its result."""
        thinking = ThinkingLine()
        messages, images = [turn.message for turn in turns], [image for turn in turns for image in turn.images]
        pieces = self._llm.pieces(messages, images=images, on_reasoning=thinking.add, **fields, **self._options)
        with self._interrupts.during_answer(pieces.cancel):
            try:
                for piece in pieces:
                    thinking.end()
                    print(piece, end="", flush=True)
            finally:
                thinking.end()
        print()
        return pieces.result


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
    options = {name: value for name in OPTION_TYPES if (value := getattr(arguments, name)) is not None}
    options["thinking"] = arguments.thinking
    interactive = sys.stdin.isatty()
    interrupts = Interrupts()
    failed = False
    with LLM(arguments.node, wait=arguments.wait) as llm:
        try:
            llm.wait()
            if interactive:
                print(f"Connected to {arguments.node}. {_HELP}", file=sys.stderr)
            chat = Chat(llm, interrupts, arguments.system, options, arguments.session)
            for line in read_lines(interactive):
                try:
                    if not chat.line(line):
                        break
                except LLMError as error:
                    failed = True
                    print(f"{error}", file=sys.stderr)
        except UnavailableError as error:
            failed = True
            print(f"{error}", file=sys.stderr)
    return 1 if failed and not interactive else 0


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chat", description="Chat with an edgellm_ros node in the terminal.")
    parser.add_argument("--node", default="/llm", help="full name of the node (default: /llm)")
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt; without it the node's")
    parser.add_argument("--session", default="", metavar="NAME", help="the node keeps the conversation under this name")
    parser.add_argument("--wait", type=float, default=5.0, metavar="SECONDS", help="how long to look for the node")
    parser.add_argument(
        "--thinking", choices=("model", "off", "on"), default="model",
        help="whether the model thinks before it answers; model (the default): as its template does",
    )  # fmt: skip
    for name, kind in OPTION_TYPES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="without it the node's parameter")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> None:
    args = sys.argv if args is None else args
    arguments = parse(remove_ros_args(args)[1:])
    try:
        code = run(arguments)
    except KeyboardInterrupt:
        print()
        code = 130
    except BrokenPipeError:
        code = 1
    raise SystemExit(code)


if __name__ == "__main__":
    main()
