"""``edgellm report``: one file about this machine, to send or to keep."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from engine_core.commands.arguments import add_command, add_force, check_output
from engine_core.config import BACKENDS, QUANTIZATIONS
from engine_core.errors import BuildError


def add(commands) -> None:
    parser = add_command(
        commands,
        "report",
        help="measure this machine and write one JSON file and a readable page about it",
        description="Writes what the machine has, which known models fit, whether the kernels agree with their "
        "references, memory bandwidth, decode speed of random weights and, where it can be read, energy. Needs no "
        "model and no network; takes some minutes and 6 GB of disk for a while. The files have no names of users, "
        "hosts or folders. Exit status 1 if something could not be done; the files say what.",
        example="edgellm report\nedgellm report orin.json --shapes qwen3-0.6b --weights int4 fp16",
    )
    parser.add_argument(
        "output", type=Path, nargs="?", default=Path("edgellm-report.json"), help="default: %(default)s"
    )
    add_force(parser, "two files")
    parser.add_argument("--shapes", nargs="+", metavar="MODEL", help="known models (default: qwen3-0.6b qwen3-1.7b)")
    parser.add_argument("--weights", nargs="+", choices=QUANTIZATIONS[1:], help="default: int4")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="auto: the fastest that runs here")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", help="default: 32 512")
    parser.add_argument("--new-tokens", type=int, help="default: 64")
    parser.add_argument("--repeats", type=int, help="default: 3")
    parser.add_argument(
        "--directory", type=Path, help="where random engines are kept meanwhile (default: the system's)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from engine_core.measure.report import ReportOptions, make_report, page

    names = ("shapes", "weights", "prompt_tokens", "new_tokens", "repeats", "directory")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    readable = options.output.with_suffix(".md")
    if readable == options.output:
        raise BuildError(f"{readable} is the name of the readable page; name the JSON file, such as report.json.")
    for path in (options.output, readable):
        check_output(path, options.force)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    chosen = ReportOptions(backend="" if options.backend == "auto" else options.backend, **given)
    report = make_report(chosen, _progress)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    readable.write_text(page(report), encoding="utf-8")
    print(page(report))
    print(f"Written: {options.output} and {readable}")
    return 1 if report["problems"] else 0


def _progress(line: str) -> None:
    """Show progress: on a terminal one line that changes, else a line for each part that takes long."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
