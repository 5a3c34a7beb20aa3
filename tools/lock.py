"""Pins what requirements.txt brings, with hashes, and lists it as a bill of materials.

    python3 tools/lock.py write           # tools/requirements-lock.txt, for Python 3.10 and later; needs uv
    python3 tools/lock.py sbom FILE       # CycloneDX JSON of what the lock file names; needs cyclonedx-bom

    python3 -m pip install --no-deps --require-hashes -r tools/requirements-lock.txt    # installs exactly that

Both tools come from the package index (``pip install uv cyclonedx-bom``, in an environment of their own). The lock file
names no index, so any mirror serves.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "tools" / "requirements-lock.txt"
_UV = "pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --no-annotate"


def tool(name: str) -> str:
    """Return the path of a tool, beside this Python or on the path. Raises SystemExit naming the package."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        package = {"uv": "uv", "cyclonedx-py": "cyclonedx-bom"}[name]
        raise SystemExit(f"error: {name} was not found: python3 -m pip install {package}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("write", "sbom"))
    parser.add_argument("file", type=Path, nargs="?", default=ROOT / "sbom.cdx.json", help="of the bill of materials")
    options = parser.parse_args()
    if options.task == "write":
        command = [tool("uv"), *_UV.split(), "--python-version", "3.10", "requirements.txt", "--output-file", str(LOCK)]
    else:
        command = [tool("cyclonedx-py"), "requirements", "--of", "JSON", "--output-reproducible"]
        command += ["--output-file", str(options.file.resolve()), str(LOCK)]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
