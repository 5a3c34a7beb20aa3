"""pip and the Python headers without root: Debian and Ubuntu split them off into packages a bare machine lacks.

``apt-get download`` needs no privileges, only the package lists. The packages are unpacked beside the virtual
environment and nothing is installed.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


class PartsError(Exception):
    """One sentence: what is missing and how to install it."""


def has_pip() -> bool:
    """Return True if this Python can put pip into a virtual environment."""
    spec = importlib.util.find_spec("ensurepip")
    return spec is not None and spec.origin is not None


def has_headers() -> bool:
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def pip_wheel(directory: Path) -> Path:
    """A wheel of pip, which Python can run as it is. Raises PartsError."""
    _unpack("python3-pip-whl", directory, f"python{VERSION}-venv")
    return next((directory / "usr" / "share" / "python-wheels").glob("pip-*.whl"))


def headers(directory: Path) -> list[Path]:
    """The include directories that replace this Python's own. Raises PartsError."""
    include = directory / "usr" / "include"
    if not (include / f"python{VERSION}" / "Python.h").is_file():
        _unpack(f"libpython{VERSION}-dev", directory, f"python{VERSION}-dev")
    # The second one: pyconfig.h includes <x86_64-linux-gnu/python3.x/pyconfig.h>.
    return [include / f"python{VERSION}", include]


def _unpack(package: str, directory: Path, instead: str) -> None:
    advice = f"Python {VERSION} lacks a part that Debian packages separately: sudo apt install {instead}"
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None or platform.system() != "Linux":
        raise PartsError(advice)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as work:
        command = ["apt-get", "download", "--quiet", package]
        result = subprocess.run(command, cwd=work, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        archives = list(Path(work).glob("*.deb"))
        if result.returncode or not archives:
            reason = (result.stderr.strip().splitlines() or ["nothing was downloaded"])[-1]
            raise PartsError(f"{advice} (fetching {package} without root failed: {reason})")
        subprocess.run(["dpkg-deb", "--extract", str(archives[0]), str(directory)], check=True)
