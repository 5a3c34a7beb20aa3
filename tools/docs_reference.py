"""Markdown of the reference pages: interfaces from their files, commands from their parsers, limits from their fields.

``tools/write_generated.py`` puts it between the marks of docs/interfaces.md, cli.md and errors.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine_core import cli  # noqa: E402
from engine_core.memory import format_bytes  # noqa: E402
from engine_core.request import LIMITS  # noqa: E402

_PARTS = {"msg": ("",), "srv": ("Request", "Response"), "action": ("Goal", "Result", "Feedback")}
_FIELD = re.compile(r"([\w/]+(?:\[[<=\d]*\])?)\s+(\w+)\s*(=\s*\S+)?\s*(?:#\s*(.*))?$")


def cell(text: str) -> str:
    """Return ``text`` for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


# --- interfaces -------------------------------------------------------------------------------------------


def interfaces() -> str:
    """Return a section for each message, service and action, with its fields and constants."""
    paths = [path for kind in ("action", "srv", "msg") for path in sorted((ROOT / kind).glob(f"*.{kind}"))]
    return "\n".join(_interface(path) for path in paths)


def _interface(path: Path) -> str:
    kind = path.suffix[1:]
    lines = path.read_text(encoding="utf-8").splitlines()
    head = []
    while lines and lines[0].startswith("#"):
        head.append(lines.pop(0).lstrip("# "))
    parts = "\n".join(["", *lines]).split("\n---")
    text = f"### {kind}/{path.stem}\n\n{' '.join(head)}\n"
    for title, part in zip(_PARTS[kind], parts, strict=True):
        rows = list(_rows(part.splitlines()))
        text += f"\n{title}{':' if title else ''}\n" if title else ""
        text += "\n| field | type | meaning |\n|---|---|---|\n" + "".join(rows) if rows else "\nNothing.\n"
    return text


def _rows(lines: list[str]) -> Iterator[str]:
    """Yield the fields and constants; a comment of its own stands above what follows it."""
    for line in lines:
        if not line.strip():
            continue
        if line.startswith("#"):
            yield f"| | | *{cell(line.lstrip('# '))}* |\n"
            continue
        kind, name, value, meaning = _FIELD.match(line).groups()
        shown = f"`{name}{value.replace(' ', '') if value else ''}`"
        own = re.fullmatch(r"edgellm_ros/(\w+)(.*)", kind)
        link = f"[{own[1]}](#msg{own[1].lower()}){own[2]}" if own else f"`{kind}`"
        yield f"| {shown} | {link} | {cell(meaning or '')} |\n"


# --- commands ---------------------------------------------------------------------------------------------


def commands() -> str:
    """Return a section for each command of edgellm, with its options and its example.

    argparse (Python 3.10 to 3.13) has no public way to list what a parser takes.
    """
    (subparsers,) = (each for each in cli.make_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return "\n".join(_command(name, parser) for name, parser in subparsers.choices.items())


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    example = "\n".join(line.strip() for line in parser.epilog.splitlines()[1:])
    rows = [_option(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    description = " ".join(parser.description.split())
    text = f"## edgellm {name}\n\n{cell(description)}\n\n```sh\n{example}\n```\n"
    return text + ("\n| option | meaning |\n|---|---|\n" + "".join(rows) if rows else "")


def _option(action: argparse.Action) -> str:
    value = ""
    if action.nargs != 0:
        value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
        value += " …" if action.nargs in ("+", "*") else ""
    name = f"{', '.join(action.option_strings)} {value}".strip()
    meaning = (action.help % {"default": action.default}).removesuffix(" (default: True)")  # Python 3.10 adds it
    if action.choices:
        choices = [str(choice) for choice in action.choices if str(choice)]
        if not all(choice in meaning for choice in choices):
            meaning += f". One of {', '.join(choices)}"
    return f"| `{name}` | {cell(meaning)} |\n"


# --- limits -----------------------------------------------------------------------------------------------


def limits() -> str:
    """Return the table of the sizes that the parts of a request may have, with the code of a larger one."""
    rows = []
    for each in dataclasses.fields(LIMITS):
        most = getattr(LIMITS, each.name)
        shown = format_bytes(most).replace(".00", "") if each.name.endswith("_bytes") else f"{most:,}"
        # The constants of ErrorCode are named like the exceptions.
        code = re.sub(r"(?<!^)(?=[A-Z])", "_", each.metadata["error"].__name__.removesuffix("Error")).upper()
        rows.append(f"| {each.metadata['what']} | {shown} | `{code}` |")
    return "\n".join(["| part of a request | most | code |", "|---|---|---|", *rows]) + "\n"
