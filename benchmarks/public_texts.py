"""Public texts that Debian and Python bring, for measurements of quality: licences, documentation, source code."""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import subprocess
from pathlib import Path

_LEAST_TOPIC = 4000  # characters


def texts() -> list[str]:
    """Return licences, topics of Python's documentation and modules of its library, in turns."""
    licences = [Path("/usr/share/common-licenses", name) for name in ("Apache-2.0", "GPL-3", "MPL-2.0", "Artistic")]
    modules = [Path(json.__file__).with_name("decoder.py"), Path(argparse.__file__), Path(subprocess.__file__)]
    read = [path.read_text("utf-8") for path in (*licences, *modules)]
    return [text for pair in zip(_topics(), read) for text in pair]


def other_texts() -> list[str]:
    """Return topics of Python's documentation that ``texts`` has not, for calibration."""
    return _topics()[len(texts()) // 2 :]


def _topics() -> list[str]:
    return [text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > _LEAST_TOPIC]


def kept_texts(path: Path | None) -> list[str]:
    """Return ``texts``, of the file ``path`` if there is one, else written to it.

    Python's own change with its version: with a file of them two machines are measured on the same.
    """
    if path is None:
        return texts()
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(texts()), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))
