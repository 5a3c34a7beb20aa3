"""Pages that scripts write are what the scripts would write now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_the_backends_is_up_to_date():
    script = ROOT / "tools" / "docs_tables.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert (result.stderr, result.returncode) == ("", 0), "run tools/docs_tables.py"
