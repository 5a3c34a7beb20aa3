"""Progress of long work: a callback that is told the share that is done, from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float], object]


def untold(share: float) -> None:
    """Tell nobody."""


def portion(progress: Progress, begin: float, end: float) -> Progress:
    """Return the progress of a part of the work, whose 0 and 1 are ``begin`` and ``end`` of the whole."""
    return lambda share: progress(begin + (end - begin) * share)
