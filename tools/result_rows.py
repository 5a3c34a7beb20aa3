"""Files of results: one JSON object a line, and what every row says of its run."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine_core.formats.atomic import replaced_file  # noqa: E402


def commit() -> str:
    """Return the commit that is measured: EDGELLM_COMMIT where it is set, as for a copy without .git."""
    if value := os.environ.get("EDGELLM_COMMIT"):
        return value
    found = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def now() -> str:
    """Return the date and the minute, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")


def run_head() -> dict[str, str]:
    """Return date, ``run`` (a name of this run alone), commit and machine."""
    name = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S") + f"-{os.getpid()}"
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    return {"date": now(), "run": name, "commit": commit(), "machine": machine}


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a file; none without the file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Write a file of ``rows``, whole or not at all."""
    with replaced_file(path) as file:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(path: Path, rows: list[dict]) -> None:
    """Write the rows of one run at the end of the file, in the place of those that the run wrote before."""
    write_rows(path, [*(row for row in read_rows(path) if row.get("run") != rows[0]["run"]), *rows])
