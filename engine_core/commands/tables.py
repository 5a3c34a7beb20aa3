"""Verdicts and tables for people: coloured and ruled on a terminal (NO_COLOR is respected), plain in a pipe.

No number is ever cut.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

_GOOD, _WARNING, _BAD = "bold green", "bold yellow", "bold red"


def print_verdict(text: str, *, good: bool = True, warning: bool = False) -> None:
    """Print the first line of a command's output: what it has found, in one sentence."""
    from rich.console import Console
    from rich.text import Text

    style = _WARNING if warning else _GOOD if good else _BAD
    Console(highlight=False, soft_wrap=True, no_color=_no_color()).print(Text(text, style))


def _no_color() -> bool | None:
    """Return None to leave it to the environment's NO_COLOR."""
    return None if sys.stdout.isatty() else True


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", left: int = 1, marked: str = ""
) -> None:
    """Print a table. ``left``: that many first columns are texts, the rest are numbers. ``marked``: the header of a
    column, or the first cell of a row, that is emphasized."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    is_terminal = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if is_terminal else None, pad_edge=False)
    for index, name in enumerate(header):
        style = _GOOD if marked and name == marked else ""
        table.add_column(name, justify="left" if index < left else "right", no_wrap=True, style=style)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row), style=_GOOD if marked and row[0] == marked else "")
    # As wide as the table needs: a narrow terminal wraps its lines, a pipe keeps them whole.
    console = Console(width=10_000, highlight=False, no_color=_no_color())
    console = Console(width=console.measure(table).maximum, highlight=False, no_color=_no_color())
    with console.capture() as capture:
        console.print(table)
    if title:
        print(title)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def print_notes(notes: Sequence[str]) -> None:
    """Sentences below a table, wrapped on a terminal, one line each in a pipe."""
    width = min(120, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 100_000
    for note in notes:
        print(textwrap.fill(note, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
