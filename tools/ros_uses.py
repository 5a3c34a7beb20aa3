"""List the names of ROS that this package's code uses and how it calls them, from the sources, without running them.

Types are followed as far as the sources say them: imports, annotations, constructors, ``self.x = …``, base classes
and, for what ROS itself returns, the table ``returns`` that ``tools/ros_api.py`` records. What is called on a value of
unknown type is not seen.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("edgellm_ros", "launch", "examples", "scripts")
OWN = ("edgellm_ros",)
_SUPER = "super "  # in front of a class of ours: its base classes


@dataclass(frozen=True)
class Use:
    """A name of ROS in the sources. ``names``: qualified; with several, one of them has it (a class of several bases,
    or the branches of ``try … except ImportError``). ``keywords`` is None unless it is called."""

    names: tuple[str, ...]
    where: str
    positional: int = 0
    keywords: tuple[str, ...] | None = None
    spread: bool = False  # it is called with *args or **kwargs
    optional: bool = False  # ``hasattr`` was asked first: not every distribution has to have it


@dataclass
class OwnClass:
    """A class of ours. Types are qualified names: ``=`` in front means the class itself, else an instance."""

    bases: tuple[str, ...] = ()  # of ROS
    own_bases: tuple[str, ...] = ()
    attributes: dict[str, str] = field(default_factory=dict)
    methods: set[str] = field(default_factory=set)


class Sources:
    """All modules of ours; ``uses`` is what they use."""

    def __init__(self, packages: tuple[str, ...], returns: Mapping[str, str], root: Path = ROOT) -> None:
        """``packages``: of ROS; ``returns``: qualified name → the class of what it returns or is."""
        self.packages = packages
        self.returns = returns
        self.classes: dict[str, OwnClass] = {}
        self._modules: list[_Module] = []
        for folder in FOLDERS:
            for path in sorted((root / folder).rglob("*")):
                if path.is_file() and (path.suffix == ".py" or folder == "scripts"):
                    name = ".".join(path.relative_to(root).with_suffix("").parts)
                    self._modules.append(
                        _Module(self, name, ast.parse(path.read_text("utf-8")), path.relative_to(root))
                    )
        for _ in range(3):  # attributes of one class may depend on those of another
            for module in self._modules:
                module.note_classes()

    def uses(self) -> Iterator[Use]:
        for module in self._modules:
            yield from module.uses()

    def of_ros(self, name: str) -> bool:
        return name.split(".")[0] in self.packages

    def member(self, owner: str, attribute: str) -> tuple[tuple[str, ...], str]:
        """Return (names of ROS that ``attribute`` of an instance or class stands for, its type)."""
        above = owner.startswith(_SUPER)
        if (own := self.classes.get(owner.removeprefix(_SUPER))) is not None:
            if attribute in own.attributes:
                return (), own.attributes[attribute]
            if attribute in own.methods and not above:
                return (), ""
            for base in own.own_bases:
                found = self.member(base, attribute)
                if found != ((), ""):
                    return found
            names = tuple(f"{base}.{attribute}" for base in own.bases)
            return names, next((self.returns[name] for name in names if name in self.returns), "")
        if self.of_ros(owner):
            name = f"{owner}.{attribute}"
            return (name,), self.returns.get(name, "")
        return (), ""


class _Module:
    def __init__(self, sources: Sources, name: str, tree: ast.Module, path: Path) -> None:
        self._sources, self._name, self._tree, self._path = sources, name, tree, path
        self._imports: dict[str, tuple[str, ...]] = {}  # local name → qualified names
        self._guarded: list[tuple[tuple[str, ...], int]] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Try) and any(_is_import_error(handler.type) for handler in node.handlers):
                self._note_guarded(node)
        for node in ast.walk(tree):
            for local, target in _imported(node):
                self._imports.setdefault(local, (target,))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                sources.classes.setdefault(f"{name}.{node.name}", OwnClass())

    def _note_guarded(self, node: ast.Try) -> None:
        """Names of which an import in ``try`` may be missing; what the handler imports takes their place."""
        branches = [node.body, *(handler.body for handler in node.handlers)]
        for branch in branches:
            for statement in branch:
                for local, target in _imported(statement):
                    self._imports[local] = (*self._imports.get(local, ()), target)

    # --- types --------------------------------------------------------------------------------------------

    def note_classes(self) -> None:
        for node in ast.walk(self._tree):
            if not isinstance(node, ast.ClassDef):
                continue
            found = self._sources.classes[f"{self._name}.{node.name}"]
            bases = [self._type(base, {}) for base in node.bases]
            bases = [base.removeprefix("=") for base in bases if base.startswith("=")]
            found.bases = tuple(base for base in bases if self._sources.of_ros(base))
            found.own_bases = tuple(base for base in bases if base in self._sources.classes)
            for method in node.body:
                if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.methods.add(method.name)
                    if any(getattr(each, "id", "") == "property" for each in method.decorator_list):
                        found.attributes[method.name] = self._annotated(method.returns)
                    scope = self._scope(method, f"{self._name}.{node.name}")
                    for target, value, annotation in _assignments(method):
                        if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
                            type_ = self._annotated(annotation) or self._type(value, scope)
                            if type_ or target.attr not in found.attributes:
                                found.attributes[target.attr] = type_
                elif isinstance(method, ast.AnnAssign) and isinstance(method.target, ast.Name):
                    found.attributes[method.target.id] = self._annotated(method.annotation)

    def _scope(self, function: ast.AST, owner: str = "") -> dict[str, str]:
        """Local name → type, of a function's parameters and variables."""
        scope: dict[str, str] = {"self": owner} if owner else {}
        for each in ast.walk(function):
            if isinstance(each, ast.arg) and each.annotation is not None:
                scope[each.arg] = self._annotated(each.annotation)
        for _ in range(2):
            for target, value, annotation in _assignments(function):
                if isinstance(target, ast.Name):
                    type_ = self._annotated(annotation) or self._type(value, scope)
                    scope[target.id] = type_ or scope.get(target.id, "")
        return scope

    def _annotated(self, node: ast.expr | None) -> str:
        """Return the class of an annotation; "" if it is no single class."""
        if isinstance(node, ast.BinOp):
            return self._annotated(node.left) or self._annotated(node.right)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if not isinstance(node, ast.Name | ast.Attribute):
            return ""
        return self._type(node, {}).removeprefix("=") if self._type(node, {}).startswith("=") else ""

    def _type(self, node: ast.expr | None, scope: Mapping[str, str]) -> str:
        sources = self._sources
        if isinstance(node, ast.Name):
            if node.id in scope:
                return scope[node.id]
            if node.id in self._imports:
                return f"={self._imports[node.id][0]}"
            local = f"{self._name}.{node.id}"
            return f"={local}" if local in sources.classes else ""
        if isinstance(node, ast.Attribute):
            owner = self._type(node.value, scope)
            if owner.startswith("="):
                return f"{owner}.{node.attr}" if sources.of_ros(owner[1:]) or owner[1:] in OWN else ""
            return sources.member(owner, node.attr)[1] if owner else ""
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "super":
                return _SUPER + scope.get("self", "")
            called = self._type(node.func, scope)
            if called.startswith("="):
                name = called[1:]
                return sources.returns.get(name, name)
            if isinstance(node.func, ast.Attribute) and (owner := self._type(node.func.value, scope)):
                return sources.member(owner, node.func.attr)[1]
            return ""
        if isinstance(node, ast.NamedExpr):
            return self._type(node.value, scope)
        if isinstance(node, ast.IfExp):
            return self._type(node.body, scope) or self._type(node.orelse, scope)
        if isinstance(node, ast.BoolOp):
            return next(filter(None, (self._type(value, scope) for value in node.values)), "")
        if isinstance(node, ast.Await):
            return ""
        return ""

    # --- uses ---------------------------------------------------------------------------------------------

    def uses(self) -> Iterator[Use]:
        for local, names in self._imports.items():
            if any(self._sources.of_ros(name) for name in names):
                yield Use(names, f"{self._path}: {local}")
        yield from self._of_body(self._tree.body, {}, "")

    def _of_body(self, body: list[ast.stmt], scope: Mapping[str, str], owner: str) -> Iterator[Use]:
        for statement in body:
            if isinstance(statement, ast.ClassDef):
                yield from self._of_body(statement.body, scope, f"{self._name}.{statement.name}")
            elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from self._of_expressions(statement, {**scope, **self._scope(statement, owner)})
            else:
                yield from self._of_expressions(statement, scope)

    def _of_expressions(self, node: ast.AST, scope: Mapping[str, str]) -> Iterator[Use]:
        called = {id(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)}
        asked = {id(each) for inside in ast.walk(node) if isinstance(inside, ast.If) for each in _asked_for(inside)}
        for each in ast.walk(node):
            where = f"{self._path}:{getattr(each, 'lineno', 0)}"
            if isinstance(each, ast.Call) and (names := self._names(each.func, scope)):
                spread = any(isinstance(a, ast.Starred) for a in each.args) or any(k.arg is None for k in each.keywords)
                given = sum(not isinstance(argument, ast.Starred) for argument in each.args)
                # Node.__init__(self, …): the instance is the first argument.
                given -= isinstance(each.func, ast.Attribute) and self._is_unbound(each, scope)
                keywords = tuple(k.arg for k in each.keywords if k.arg)
                yield Use(names, where, given, keywords, spread, optional=id(each.func) in asked)
            elif isinstance(each, ast.Attribute) and id(each) not in called and (names := self._names(each, scope)):
                yield Use(names, where, optional=id(each) in asked)

    def _is_unbound(self, call: ast.Call, scope: Mapping[str, str]) -> bool:
        assert isinstance(call.func, ast.Attribute)
        owner = self._type(call.func.value, scope)
        first = call.args[0] if call.args else None
        return owner.startswith("=") and isinstance(first, ast.Name) and first.id == "self"

    def _names(self, node: ast.expr, scope: Mapping[str, str]) -> tuple[str, ...]:
        """Return the names of ROS that an expression stands for."""
        if isinstance(node, ast.Name):
            if node.id in scope:
                return ()
            return tuple(name for name in self._imports.get(node.id, ()) if self._sources.of_ros(name))
        if not isinstance(node, ast.Attribute):
            return ()
        owner = self._type(node.value, scope)
        if owner.startswith("="):
            return (f"{owner[1:]}.{node.attr}",) if self._sources.of_ros(owner[1:]) else ()
        return self._sources.member(owner, node.attr)[0] if owner else ()


def _asked_for(node: ast.If) -> Iterator[ast.Attribute]:
    """Attributes in the body of ``if hasattr(x, "name")``."""
    tests = [each for each in ast.walk(node.test) if isinstance(each, ast.Call)]
    names = {
        test.args[1].value
        for test in tests
        if getattr(test.func, "id", "") == "hasattr" and isinstance(test.args[1], ast.Constant)
    }
    for statement in node.body:
        for each in ast.walk(statement):
            if isinstance(each, ast.Attribute) and each.attr in names:
                yield each


def _is_import_error(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Name) and node.id in ("ImportError", "ModuleNotFoundError")


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(local name, qualified name) of an import."""
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        for alias in node.names:
            yield alias.asname or alias.name, f"{node.module}.{alias.name}"
    elif isinstance(node, ast.Import):
        for alias in node.names:
            yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0], alias.name.split(".")[0])


def _assignments(function: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None, ast.expr | None]]:
    """(target, value, annotation) of every assignment."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                    yield each, node.value if each is target else None, None
        elif isinstance(node, ast.AnnAssign):
            yield node.target, node.value, node.annotation
        elif isinstance(node, ast.NamedExpr):
            yield node.target, node.value, None
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            yield node.optional_vars, node.context_expr, None
