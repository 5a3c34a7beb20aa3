"""No private member of another file or package is used, by its name or by a string."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("edgellm_ros", "engine_core") for path in (ROOT / folder).rglob("*.py"))
# Documented as public, whatever the name: members by the text before them, and those of every named tuple.
PUBLIC = {("os", "_exit"), ("", "_thread")}
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}
OWN_OBJECTS = ("self", "cls", "super()")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def defined_in(tree: ast.AST) -> set[str]:
    """Names of functions, classes and variables, and attributes stored in ``self``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if ast.unparse(node.value) in OWN_OBJECTS else set()
    return names


def uses(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, of what, private name): attributes, imports, and the names that getattr and its like are given."""
    for node in ast.walk(tree):
        found: list[tuple[str, str]] = []
        if isinstance(node, ast.Attribute):
            found = [(ast.unparse(node.value), node.attr)]
        elif isinstance(node, ast.Import):
            found = [("", part) for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found = [(node.module or "", name) for name in names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            found = [(ast.unparse(node.args[0]), arg.value) for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
        for owner, name in found:
            if isinstance(name, str) and is_private(name):
                yield node.lineno, owner, name


def foreign_uses(tree: ast.AST, inherited: set[str]) -> list[str]:
    """Uses of what neither this file defines nor, for an object's own members, ``inherited`` has."""
    own = defined_in(tree)
    return [
        f"line {line}: {name} of {owner or 'an import'}"
        for line, owner, name in uses(tree)
        if (owner, name) not in PUBLIC
        and name not in NAMED_TUPLE
        and name not in own
        and not (owner in OWN_OBJECTS and name in inherited)
    ]


@cache
def all_defined() -> set[str]:
    return set().union(*(defined_in(parsed(path)) for path in SOURCES))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_members_are_the_files_own(path):
    """A class also uses its own members that a base class of ours, in another file, defines."""
    assert foreign_uses(parsed(path), all_defined()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import numpy._core",
        "import _socket",
        "from numpy import _core",
        "from numpy._core import multiarray",
        "node._handle",
        "rclpy.node.Node._rate",
        "self.node._handle.x",
        "node._inherited",
        "self._theirs",
        "getattr(node, '_handle')",
        "setattr(node, '_handle', 1)",
        "other = node\nother._handle = 1",
    ],
)
def test_foreign_members_are_seen_in_every_form(source):
    assert len(foreign_uses(ast.parse(source), {"_inherited"})) == 1, source


@pytest.mark.parametrize(
    "source",
    [
        "self._inherited()",
        "super()._inherited()",
        "class A:\n def f(self, other):\n  self._x = other._x",
        "def _f(): pass\nf = _f",
        "os._exit(1)",
        "import _thread",
        "pair._replace(x=1)",
        "from __future__ import annotations",
        "f.__name__",
        "getattr(node, 'handle')",
    ],
)
def test_own_and_public_members_are_allowed(source):
    assert foreign_uses(ast.parse(source), {"_inherited"}) == []
