"""The oldest version of each package that the requirements allow: write them down, or test the core with them.

    python tools/oldest.py write               writes requirements-oldest.txt
    python tools/oldest.py test -k worker      makes .venv-oldest with them and runs the tests of the core there

The tests run on Python 3.10 where there is one (or PYTHON), without torch and the tests that compare with it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "requirements-oldest.txt"
VENV = ROOT / ".venv-oldest"
_HEADER = (
    "# Lower bounds of requirements.txt and setup.py, made by tools/oldest.py; make test-oldest tests with them.\n"
)
# In the versions of tools/requirements-test.txt.
_TEST_TOOLS = ("pytest", "hypothesis", "jsonschema", "psutil", "openai")
_COMPILER = "nvidia-cuda-nvrtc-cu12"  # compiles the kernels without a GPU
_REQUIREMENT = re.compile(r"([\w.-]+)>=([\w.]+)(?:,[^;]*)?(;.*)?")


def oldest(requirement: str) -> str:
    """Return ``name==version`` of ``name>=version,<other; marker``, with the marker. Raises ValueError."""
    match = _REQUIREMENT.fullmatch(requirement)
    if match is None:
        raise ValueError(f"{requirement!r} has no lower bound; write it as name>=version.")
    name, version, marker = match.groups()
    return f"{name}=={version}{marker or ''}"


def requirements() -> list[str]:
    """Return what the node needs, what the GPU backends need and what signatures need, as setup.py says them."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines())
    setup = (ROOT / "setup.py").read_text("utf-8")
    found = [line for line in lines if line]
    for name in ("gpu", "sign"):
        extra = re.search(rf'"{name}": \[(.*?)\]', setup)
        if extra is None:
            raise ValueError(f"setup.py has no extra {name!r}.")
        found += re.findall(r'"([^"]+)"', extra[1])
    return found


def contents() -> str:
    return _HEADER + "".join(f"{oldest(requirement)}\n" for requirement in requirements())


def python() -> str:
    """Return the interpreter to test with: the oldest that is supported, if it is there."""
    for name in (os.environ.get("PYTHON"), "python3.10"):
        found = shutil.which(name) if name else None
        if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
            return found
    return sys.executable


def test(arguments: list[str]) -> int:
    lines = (ROOT / "tools" / "requirements-test.txt").read_text("utf-8").splitlines()
    tools = [line for line in lines if re.match(r"[\w-]*", line)[0] in _TEST_TOOLS]
    if not VENV.exists():
        subprocess.run([python(), "-m", "venv", str(VENV)], check=True)
        (VENV / "COLCON_IGNORE").touch()
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(TARGET), *tools, _COMPILER], check=True)
    command = [str(VENV / "bin" / "python"), "-m", "pytest", str(ROOT / "test" / "core"), *arguments]
    return subprocess.run(command, cwd=ROOT / "test").returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("write", "test"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed on to pytest")
    options = parser.parse_args()
    if options.task == "test":
        return test(options.arguments)
    TARGET.write_text(contents(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
