"""Long work on a terminal: a bar with the time that is left, and the sentences of the work above it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine_core.progress import Progress

_LINE_INTERVAL = 10.0  # s


@contextmanager
def shown(label: str) -> Iterator[tuple[Callable[[str], None], Progress]]:
    """Give what takes the sentences of a piece of work, and what takes its progress. Both go to stderr. The bar is
    drawn on a terminal only, and goes when the work is over; elsewhere a line now and then says how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=1.0)

        def report(line: str) -> None:
            if console.is_terminal:
                bar.console.print(line, markup=False)
            else:
                print(line, file=sys.stderr, flush=True)

        next_line = time.monotonic() + _LINE_INTERVAL

        def progress(share: float) -> None:
            nonlocal next_line
            bar.update(task, completed=share)
            if not console.is_terminal and time.monotonic() > next_line:
                next_line = time.monotonic() + _LINE_INTERVAL
                report(f"{label}: {share:.0%}")

        yield report, progress
