"""The ``edgellm`` command; ``engine_core/commands`` has a module for each of its commands.

Exit codes: 0 done, 1 refused or failed (one sentence on stderr), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from engine_core.errors import EdgeLLMError

# In the order of a model's way, as --help shows them; modules of engine_core.commands.
COMMANDS = (
    "quantize",
    "reduce_vocab",
    "build",
    "inspect",
    "plan",
    "generate",
    "evaluate",
    "bench",
    "doctor",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # the C locale has ASCII only, and a path need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except EdgeLLMError as error:
        print(f"edgellm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a name that is too long, a directory without permission, a full disk
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"edgellm: {where}{error.strerror or error}.", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgellm", description="Builds, inspects and tries engines without ROS.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"engine_core.commands.{name}").add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
