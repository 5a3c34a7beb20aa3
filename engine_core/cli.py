"""The ``edgellm`` command; ``engine_core/commands`` has a module for each of its commands.

Exit codes: 0 done, 1 refused or failed (one sentence on stderr), 2 wrong usage, 128 plus the number of the
signal that ended it (130: Ctrl-C).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

import engine_core
from engine_core.errors import EdgeLLMError

# In the order of a model's way, as --help shows them; modules of engine_core.commands.
COMMANDS = (
    "recommend",
    "get",
    "quantize",
    "reduce_vocab",
    "build",
    "sign",
    "inspect",
    "plan",
    "generate",
    "schema",
    "serve",
    "evaluate",
    "bench",
    "doctor",
    "report",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # the C locale has ASCII only, and a path need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    if odd := next((text for text in arguments if text.startswith("--") and text.endswith("=--")), None):
        parser.error(f"argument {odd[:-3]}: '--' is no value")  # argparse before 3.13 makes an empty list of it
    options = parser.parse_args(arguments)
    try:
        with _ended_by(signal.SIGTERM), _ended_by(signal.SIGHUP):
            return options.run(options)
    except EdgeLLMError as error:
        return _failed(str(error))
    except MemoryError:
        return _failed("There is not enough memory for this command.")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a name that is too long, a directory without permission, a full disk
        where = "" if error.filename is None else f"{error.filename}: "
        return _failed(f"{where}{error.strerror or error}.")


@contextlib.contextmanager
def _ended_by(number: int) -> Iterator[None]:
    """Let the signal ``number`` end the command as Ctrl-C does, which removes what is half written."""

    def end(*_) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) is not signal.SIG_DFL:
        yield
        return
    signal.signal(number, end)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL)


def _failed(reason: str) -> int:
    """Print ``reason`` on one line, whatever characters a name in it has."""
    shown = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in reason)
    print(f"edgellm: {''.join(shown)}", file=sys.stderr)
    return 1


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with all commands."""
    parser = argparse.ArgumentParser(prog="edgellm", description="Builds, inspects and tries engines without ROS.")
    parser.add_argument("--version", action="version", version=f"edgellm {engine_core.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"engine_core.commands.{name}").add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
