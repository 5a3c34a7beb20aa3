"""Builds the core's wheel from a source archive of a commit, installs it in a new environment, and tries it there.

    python3 tools/check_wheel.py [--commit HEAD] [--keep DIR]

The archive is what ``git archive`` writes, so a file that only the working tree has is missed here. The environment
gets the wheel with its extra ``cpu``, from the package index. Tried are ``edgellm --version``, ``edgellm build`` of the
demo model and an answer of it, in a directory without the sources. Exit status 0 if all of it worked; the versions are
printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Please bring me the red cup from the kitchen."


def extract_archive(commit: str, directory: Path) -> Path:
    """Write the sources of ``commit`` below ``directory`` and return their folder. Raises CalledProcessError."""
    archive = directory / "edgellm_ros.tar"
    command = ["git", "-C", str(ROOT), "archive", "--prefix=edgellm_ros/", f"--output={archive}", commit]
    subprocess.run(command, check=True)
    with tarfile.open(archive) as file:
        # Python before 3.12 has no filter; the archive is git's own.
        file.extractall(directory, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return directory / "edgellm_ros"


def build_wheel(source: Path, directory: Path, *options: str) -> Path:
    """Return the wheel that pip builds of ``source``, in ``directory``. Raises CalledProcessError."""
    pip = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--quiet", "--no-deps", *options]
    subprocess.run([*pip, "--wheel-dir", str(directory), str(source)], check=True)
    (wheel,) = directory.glob("edgellm-*.whl")
    return wheel


def try_wheel(wheel: Path, demo: Path, directory: Path) -> None:
    """Install ``wheel`` in a new environment, build the model ``demo`` and let it answer. Raises CalledProcessError."""
    venv = directory / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, f"{wheel}[cpu]"], check=True)
    edgellm = str(venv / "bin" / "edgellm")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for arguments in (
        ["--version"],
        ["build", str(demo), str(directory / "engine")],
        ["generate", str(directory / "engine"), PROMPT],
    ):
        print("$ edgellm", *arguments, flush=True)
        subprocess.run([edgellm, *arguments], check=True, cwd=directory, env=env)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="HEAD", help="what to build (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="an empty directory for what is made (default: removed at the end)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = (options.keep or Path(temporary)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        try:
            source = extract_archive(options.commit, directory)
            wheel = build_wheel(source, directory)
            print(f"{wheel.name}, of {options.commit}", flush=True)
            try_wheel(wheel, source / "models" / "demo", directory)
        except subprocess.CalledProcessError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
