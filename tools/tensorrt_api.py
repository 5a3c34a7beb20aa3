"""Records which names of TensorRT's Python API, as this package uses it, its versions have.

    python3 tools/tensorrt_api.py WHEEL …      # writes test/core/tensorrt_api.json

WHEELs are those of ``pip download --no-deps tensorrt-cu12-bindings==VERSION``. The bindings cannot be imported without
TensorRT's libraries, so their names are looked up as strings in the extension: pybind11 registers each class, member
and method by one. A string that another one ends with may be stored as its end, so such a name counts as there.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "engine_core" / "backends" / "tensorrt"
TARGET = ROOT / "test" / "core" / "tensorrt_api.json"
# Variables and attributes of ours that hold an object of TensorRT.
_OBJECTS = ("builder", "network", "config", "parser", "runtime", "engine", "context", "layer", "shuffle", "cache")
_NOT_THEIRS = {"__class__", "__init__", "__version__", "endswith"}
# Used only where networks are weakly typed (8.6), or in the branch of a name that was asked for.
_IN_BRANCHES = {
    *("OBEY_PRECISION_CONSTRAINTS", "precision", "set_output_type", "set_flag", "CAST"),
    *("device_memory", "device_memory_size", "EXPLICIT_BATCH", "USER_MANAGED", "ExecutionContextAllocationStrategy"),
    "create_execution_context",
}


def used_names() -> dict[str, bool]:
    """Return each name that api.py uses → whether every version has to have it: ``hasattr`` asks for the others."""
    tree = ast.parse((SOURCES / "api.py").read_text(encoding="utf-8"))
    asked = {
        node.args[1].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "hasattr"
        and isinstance(node.args[1], ast.Constant)
    }
    found = {name for node in ast.walk(tree) if isinstance(node, ast.Attribute) for name in _of_tensorrt(node)}
    asked = {name for name in asked if isinstance(name, str)} | _IN_BRANCHES
    return {name: name not in asked for name in sorted(found | asked)}


def _of_tensorrt(node: ast.Attribute) -> list[str]:
    owner = node.value
    while isinstance(owner, ast.Attribute) and not (owner.attr == "trt" or owner.attr in _OBJECTS):
        owner = owner.value
    name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
    if name in ("trt", "kinds") or name in _OBJECTS:
        return [] if node.attr in _NOT_THEIRS or node.attr in ("trt", *_OBJECTS) else [node.attr]
    return []


def strings_in(wheel: Path) -> list[str]:
    """Return the identifiers that the extension has as C strings."""
    with zipfile.ZipFile(wheel) as file:
        (extension,) = [name for name in file.namelist() if name.endswith("/tensorrt.so")]
        binary = file.read(extension)
    return sorted({each.decode() for each in re.findall(rb"(?<=\0)([A-Za-z_]\w+)(?=\0)", binary)})


def version_of(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path, nargs="+")
    wheels = parser.parse_args().wheels
    there = {version_of(wheel): strings_in(wheel) for wheel in wheels}
    recorded = {
        name: [version for version, strings in there.items() if any(each.endswith(name) for each in strings)]
        for name in used_names()
    }
    versions = {version_of(wheel): wheel.name for wheel in wheels}
    TARGET.write_text(json.dumps({"wheels": versions, "names": recorded}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
