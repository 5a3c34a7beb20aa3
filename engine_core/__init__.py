"""The inference core of edgellm_ros: usable as a library and on the command line, without ROS."""

from __future__ import annotations

import re
from pathlib import Path

_PARENT = Path(__file__).resolve().parent.parent


def __getattr__(name: str) -> str:
    """Return ``__version__``, which has its home in package.xml.

    package.xml lies beside this package in the sources. Installed, by pip or by colcon, the metadata beside this
    package has the version. Raises AttributeError where there is neither.
    """
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    manifest = _PARENT / "package.xml"
    if manifest.is_file():
        found = re.search(r"<name>edgellm_ros</name>\s*<version>([^<]+)</version>", manifest.read_text("utf-8"))
        if found is not None:
            return found[1]
    from importlib.metadata import distributions

    for distribution in ("edgellm", "engine_core"):  # by pip; by ament_cmake_python
        for each in distributions(name=distribution, path=[str(_PARENT)]):
            return each.version
    raise AttributeError(f"{_PARENT} has neither edgellm_ros's package.xml nor metadata of an installed package.")
