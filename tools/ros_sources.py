"""Read the definitions of a ROS distribution's Python packages and interfaces from their released sources.

Nothing is imported: modules are parsed, so that a distribution can be read on any Python and without its libraries.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Package → the release repository of github.com/ros2-gbp that has it, without "-release".
PACKAGES = {
    "rclpy": "rclpy",
    "launch": "launch",
    "launch_ros": "launch_ros",
    "ament_index_python": "ament_index",
    "diagnostic_updater": "diagnostics",
    "action_msgs": "rcl_interfaces",
    "builtin_interfaces": "rcl_interfaces",
    "lifecycle_msgs": "rcl_interfaces",
    "rcl_interfaces": "rcl_interfaces",
    "diagnostic_msgs": "common_interfaces",
    "sensor_msgs": "common_interfaces",
    "std_msgs": "common_interfaces",
    "geometry_msgs": "common_interfaces",
    "bond": "bond_core",
}
DISTRIBUTIONS = ("humble", "jazzy", "kilted", "rolling")
# What rosidl_generator_py gives every message class.
MESSAGE_MEMBERS = ("get_fields_and_field_types", "SLOT_TYPES")


@dataclass(frozen=True)
class Signature:
    """The parameters of a callable: those that may be given by place, all that may be given by name."""

    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    any_positional: bool = False  # *args
    any_keyword: bool = False  # **kwargs
    returns: str = ""  # the annotation, as a qualified name where it is one class


@dataclass
class Definition:
    """A module, class, function or value.

    ``bases``: qualified names, of a module those it imports all of; ``alias``: the name that it stands for.
    """

    kind: str  # module, class, function, property, value, message
    signature: Signature | None = None
    bases: tuple[str, ...] = ()
    members: dict[str, Definition] = field(default_factory=dict)
    alias: str = ""
    type: str = ""  # of a value: a qualified class, where it is known


class Distribution:
    """The modules and interfaces of one distribution, by qualified name."""

    def __init__(self, name: str, sources: Path) -> None:
        """``sources``: a folder with clones of the release repositories, NAME-release. Raises LookupError."""
        self.name = name
        self.versions: dict[str, str] = {}
        self._names: dict[str, Definition] = {}
        for package, repository in PACKAGES.items():
            clone = sources / f"{repository}-release"
            tag = _newest_tag(clone, f"release/{name}/{package}/")
            self.versions[package] = tag.rpartition("/")[2]
            for path, text in _files(clone, tag):
                if path.endswith(".py"):
                    _read_module(_module_name(path), text, path.endswith("__init__.py"), self._names)
                elif path.startswith(("msg/", "srv/")):
                    self._names |= _read_interface(package, path, text)

    def find(self, name: str, depth: int = 0) -> Definition | None:
        """Return the definition of a qualified name, through imports, base classes and assignments."""
        if depth > 12:
            return None
        if (found := self._names.get(name)) is not None:
            return self.find(found.alias, depth + 1) or found if found.alias else found
        owner, _, member = name.rpartition(".")
        if not owner:
            return None
        container = self.find(owner, depth + 1)
        if container is None:
            return None
        if member in container.members:
            return container.members[member]
        for base in container.bases:
            if (found := self.find(f"{base}.{member}", depth + 1)) is not None:
                return found
        if container.kind == "value":  # such as an enumeration of the C extension: its members are not in Python
            return Definition("value")
        return None


def _newest_tag(clone: Path, prefix: str) -> str:
    command = ["git", "-C", str(clone), "tag", "--list", f"{prefix}*", "--sort=version:refname"]
    tags = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if not tags:
        raise LookupError(f"{clone} has no tag {prefix}*; fetch it again.")
    return tags[-1]


def _files(clone: Path, tag: str) -> Iterator[tuple[str, str]]:
    archive = subprocess.run(["git", "-C", str(clone), "archive", tag], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        for member in file:
            name = member.name
            is_module = name.endswith(".py") and not name.startswith(("test/", "scripts/", "setup.py", "doc"))
            if member.isfile() and (is_module or re.fullmatch(r"(msg/\w+\.msg|srv/\w+\.srv)", name)):
                stream = file.extractfile(member)
                assert stream is not None
                yield name, stream.read().decode(errors="replace")


def _module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


# --- modules ------------------------------------------------------------------------------------------------


def _read_module(module: str, text: str, is_package: bool, names: dict[str, Definition]) -> None:
    """Add what the module defines to ``names``."""
    tree = ast.parse(text)
    scope: dict[str, str] = {}  # local name → qualified name
    stars: list[str] = []  # modules of ``from … import *``
    for node in _statements(tree.body):
        if isinstance(node, ast.ImportFrom):
            source = _source(module, node, is_package)
            for alias in node.names:
                if alias.name == "*":
                    stars.append(source)
                else:
                    scope[alias.asname or alias.name] = f"{source}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                scope[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            scope[node.name] = f"{module}.{node.name}"
    names[module] = Definition("module", bases=tuple(stars))
    for local, target in scope.items():
        if target != f"{module}.{local}":
            names[f"{module}.{local}"] = Definition("value", alias=target)
    for node in _statements(tree.body):
        if isinstance(node, ast.ClassDef):
            names[f"{module}.{node.name}"] = _class(node, scope, f"{module}.{node.name}")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names[f"{module}.{node.name}"] = Definition("function", _signature(node, scope, bound=False))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    names.setdefault(f"{module}.{target.id}", Definition("value"))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of the top level, and of its ``if`` and ``try``."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from _statements([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from _statements([*node.body, *(each for handler in node.handlers for each in handler.body)])


def _source(module: str, node: ast.ImportFrom, is_package: bool) -> str:
    """Return the module that ``from … import`` names."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _class(node: ast.ClassDef, scope: dict[str, str], name: str) -> Definition:
    bases = tuple(filter(None, (_qualified(base, scope) for base in node.bases)))
    found = Definition("class", bases=bases)
    inner = {**scope}
    for each in node.body:
        if isinstance(each, ast.ClassDef):
            inner[each.name] = f"{name}.{each.name}"
    for each in _statements(node.body):
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = [_decorator(decorator) for decorator in each.decorator_list]
            signature = _signature(each, inner, bound="staticmethod" not in decorators)
            if "overload" in decorators:
                continue  # the implementation follows
            is_property = "property" in decorators or "setter" in decorators
            if not (is_property and each.name in found.members):
                found.members[each.name] = Definition("property" if is_property else "function", signature)
            for inside in ast.walk(each):  # self.x = …
                if isinstance(inside, ast.Assign | ast.AnnAssign):
                    for target in inside.targets if isinstance(inside, ast.Assign) else [inside.target]:
                        if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
                            found.members.setdefault(target.attr, Definition("value"))
        elif isinstance(each, ast.ClassDef):
            found.members[each.name] = _class(each, inner, f"{name}.{each.name}")
        elif isinstance(each, ast.Assign | ast.AnnAssign):
            for target in each.targets if isinstance(each, ast.Assign) else [each.target]:
                if isinstance(target, ast.Name):
                    found.members.setdefault(target.id, Definition("value"))
                elif isinstance(target, ast.Tuple):
                    for item in target.elts:
                        found.members.setdefault(getattr(item, "id", ""), Definition("value"))
    return found


def _decorator(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _qualified(node: ast.expr | None, scope: dict[str, str]) -> str:
    """Return the qualified name of a class in a base or an annotation; "" if it is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            node = ast.parse(node.value, mode="eval").body
        except SyntaxError:
            return ""
    if isinstance(node, ast.Name):
        return scope.get(node.id, "")
    if isinstance(node, ast.Attribute):
        owner = _qualified(node.value, scope)
        return f"{owner}.{node.attr}" if owner else ""
    if isinstance(node, ast.Subscript):
        owner = _qualified(node.value, scope)
        if owner in ("typing.Optional",):
            return _qualified(node.slice, scope)
        return "" if owner.startswith(("typing.", "collections.")) else owner
    if isinstance(node, ast.BinOp):  # X | None
        return _qualified(node.left, scope)
    return ""


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, scope: dict[str, str], *, bound: bool) -> Signature:
    arguments = node.args
    named = [each.arg for each in arguments.args]
    positional = [*(each.arg for each in arguments.posonlyargs), *named]
    if bound:  # without the instance
        positional, named = positional[1:], named[not arguments.posonlyargs :]
    return Signature(
        tuple(positional),
        (*named, *(each.arg for each in arguments.kwonlyargs)),
        arguments.vararg is not None,
        arguments.kwarg is not None,
        _qualified(node.returns, scope),
    )


# --- interfaces ---------------------------------------------------------------------------------------------

_FIELD = re.compile(r"^([\w/]+)(?:<=\d+)?(\[(?:<=)?\d*\])?\s+(\w+)\s*(=?)", re.M)


def _read_interface(package: str, path: str, text: str) -> dict[str, Definition]:
    kind, name = path.split("/")
    name = name.partition(".")[0]
    qualified = f"{package}.{kind}.{name}"
    module = {f"{package}": Definition("module"), f"{package}.{kind}": Definition("module")}
    if kind == "msg":
        return {**module, qualified: _message(package, text)}
    request, _, response = text.partition("\n---")
    request, response = ("", text.removeprefix("---")) if text.startswith("---") else (request, response)
    service = Definition("class")
    service.members = {"Request": _message(package, request), "Response": _message(package, response)}
    return {**module, qualified: service}


def _message(package: str, text: str) -> Definition:
    """The class of a message: constants and fields; every field may be given by name."""
    found = Definition("message")
    fields = []
    for kind, is_array, name, is_constant in _FIELD.findall(re.sub(r"#.*", "", text)):
        owner, _, of = kind.rpartition("/")
        is_message = of[0].isupper()
        type_ = f"{owner or package}.msg.{of}" if is_message and not is_array else ""
        found.members[name] = Definition("value", type=type_)
        if not is_constant:
            fields.append(name)
    for member in MESSAGE_MEMBERS:
        found.members[member] = Definition("function", Signature((), ()))
    found.members["__init__"] = Definition("function", Signature((), tuple(fields)))
    return found
