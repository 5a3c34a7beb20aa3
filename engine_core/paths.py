"""Paths that a user writes with ~ for a home directory."""

from __future__ import annotations

from pathlib import Path

from engine_core.errors import ConfigurationError


def expand_user(path: str | Path) -> Path:
    """Return ``path`` with the home directory in the place of a leading ~ or ~NAME.

    Raises ConfigurationError where this machine knows no such home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigurationError(
            f"{str(path)!r:.120} names a home directory that this machine does not know; write the whole path."
        ) from None
