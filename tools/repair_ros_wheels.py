"""Makes ROS wheels usable for building interfaces: run with the virtual environment's Python.

The exported CMake targets of the message wheels name the Python and NumPy headers of the machine the wheels were
made on. CMake refuses a target with an include directory that does not exist, and the directories of this
machine come from its own ``find_package(Python3)`` anyway, so the foreign ones are taken out. Running it again
changes nothing.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_INCLUDES = re.compile(r'(INTERFACE_INCLUDE_DIRECTORIES ")([^"]*)(")')


def _without_foreign(match: re.Match) -> str:
    """Keeps what is relative to the prefix (``${_IMPORT_PREFIX}/…``, generator expressions) or exists here."""
    kept = [path for path in match[2].split(";") if not path.startswith("/") or Path(path).is_dir()]
    return match[1] + ";".join(kept) + match[3]


def repair(prefix: Path) -> int:
    """Repairs the exported targets under ``prefix``; returns how many files were changed."""
    changed = 0
    for path in prefix.glob("share/*/cmake/*Export.cmake"):
        text = path.read_text(encoding="utf-8")
        repaired = _INCLUDES.sub(_without_foreign, text)
        if repaired != text:
            path.write_text(repaired, encoding="utf-8")
            changed += 1
    return changed


if __name__ == "__main__":
    print(f"repaired the exported include paths of {repair(Path(sys.prefix))} packages")
