"""Tables for people: ruled on a terminal, aligned columns in a pipe. No number is ever cut."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", left: int = 1) -> None:
    """Print a table. ``left``: that many first columns are texts, the rest are numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    is_terminal = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if is_terminal else None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # As wide as the table needs: a narrow terminal wraps its lines, a pipe keeps them whole.
    console = Console(width=10_000, highlight=False, no_color=not is_terminal)
    console = Console(width=console.measure(table).maximum, highlight=False, no_color=not is_terminal)
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
