"""The directories in which the engines of the demo models are cached, and the command that builds one.

Used where nobody has named an engine: by the launch file and by ``make demo``. A directory's name has a hash of the
checkpoint and of the builder, so that neither a new model nor a new version of this package meets an old engine.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import engine_core
from engine_core.errors import EngineDirectoryError
from engine_core.formats.manifest import list_variants

# Folders of engine_core whose code decides what an engine directory holds.
_BUILDER = ("backends", "formats", "models", "quantize")


def checkpoint_dir(name: str = "demo") -> Path:
    """Return a demo checkpoint of this package: ``demo``, or ``demo_vision``, which sees.

    Raises EngineDirectoryError if it was not installed.
    """
    from ament_index_python.packages import get_package_share_directory

    path = Path(get_package_share_directory("edgellm_ros")) / "models" / name
    if not (path / "config.json").is_file():
        raise EngineDirectoryError(f"{path} has no demo model; give engine_dir an engine that 'edgellm build' made.")
    return path


def cache_dir() -> Path:
    """Return ``$ROS_HOME/edgellm``, by default ``~/.ros/edgellm``."""
    return Path(os.environ.get("ROS_HOME") or Path.home() / ".ros") / "edgellm"


def engine_dir(checkpoint: Path, backend: str = "auto", quantization: str = "auto") -> Path:
    """Return the directory for this checkpoint, this builder and these options; it need not exist yet."""
    digest = hashlib.sha256(f"{engine_core.__version__} {backend} {quantization}".encode())
    core = Path(engine_core.__file__).parent
    builder = [path for folder in _BUILDER for path in (core / folder).rglob("*.py")]
    for path in sorted([*checkpoint.iterdir(), *builder]):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return cache_dir() / f"{checkpoint.name}-{digest.hexdigest()[:12]}"


def is_built(directory: Path) -> bool:
    try:
        return bool(list_variants(directory))
    except EngineDirectoryError:
        return False


def build_command(checkpoint: Path, directory: Path, backend: str = "auto", quantization: str = "auto") -> list[str]:
    """Return the command to run. ``python3`` is the one the node will run on, which the caller's own need not be."""
    command = ["python3", "-m", "engine_core.cli", "build", "--force", str(checkpoint), str(directory)]
    if backend != "auto":
        command += ["--backend", backend]
    if quantization != "auto":
        command += ["--quantization", quantization]
    return command
