"""Renders a model's chat template (Jinja) in a sandbox with bounded time and output.

The environment is that of ``transformers`` (tests compare the two). A template comes with a checkpoint, so it can be
anything: loops count their steps, operators and calls that make text say how large it gets before they make it.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_CHARS = 1 << 24  # of any text a template makes on the way, and of what it renders
MAX_STEPS = 1_000_000  # loop passes, macro calls, operators and calls of one rendering
MAX_SECONDS = 10.0  # of one rendering
_MAX_SOURCE = 1 << 20  # characters
_MAX_INT_BITS = 4096
_LONG_WIDTH = re.compile(r"\d{6,}")
_STRING_ATTRIBUTES = ("translate", "maketrans")  # they make a long text of each character


class TemplateLimitError(jinja2.TemplateError):
    """The template takes too long or makes too much text."""


class ChatTemplate:
    """One compiled template. Thread-safe. Raises jinja2.TemplateError where ``source`` is no template."""

    def __init__(self, source: str) -> None:
        if len(source) > _MAX_SOURCE:
            raise TemplateLimitError(f"the template has {len(source)} characters, more than {_MAX_SOURCE}")
        self._environment = _Environment()
        self._template = self._environment.from_string(source)
        # What it reads of the variables that it is rendered with, whether it can do without or not.
        self.variables = frozenset(meta.find_undeclared_variables(self._environment.parse(source)))

    def render(self, **variables: Any) -> str:
        """Return the text. Raises TemplateLimitError, and whatever else a template can end with."""
        self._environment.start()
        parts: list[str] = []
        size = 0
        for part in self._template.generate(**variables):
            size += len(part)
            self._environment.check_size(size)
            parts.append(part)
        return "".join(parts)


class _Generation(jinja2.ext.Extension):
    """Renders the body of {% generation %}, which marks an assistant's text for training."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Counting(NodeTransformer):
    """Has each pass of a loop and each call of a macro counted, and ``~`` checked as other operators are."""

    def _counted(self, node):
        node = self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("count"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(call))
        for inner in (node.body[0], call, call.node):
            inner.set_lineno(node.lineno).set_environment(node.environment)
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted

    def visit_Concat(self, node):
        node = self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("join_values"), node.nodes, [], None, None)
        for inner in (call, call.node):
            inner.set_lineno(node.lineno).set_environment(node.environment)
        return call


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self._state = threading.local()
        self.globals.pop("lipsum", None)
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.filters["tojson"] = _to_json
        self.filters.update({name: self._bounded(name, function) for name, function in self.filters.items()})

    def start(self) -> None:
        """Begins a rendering of this thread."""
        self._state.steps, self._state.end = 0, time.monotonic() + MAX_SECONDS

    def count(self) -> str:
        state = self._state
        state.steps = getattr(state, "steps", 0) + 1
        if state.steps > MAX_STEPS or (state.steps % 256 == 0 and time.monotonic() > state.end):
            raise TemplateLimitError("the template takes too many steps")
        return ""

    def check_size(self, size: int) -> None:
        if size > MAX_CHARS:
            raise TemplateLimitError(f"the template makes a text of more than {MAX_CHARS} characters")

    def concat(self, parts) -> str:  # Jinja's hook, for what macros and blocks put together
        texts = list(parts)
        self.check_size(sum(map(len, texts)))
        return "".join(texts)

    def join_values(self, *values: Any) -> str:
        self.count()
        texts = [str(value) for value in values]
        self.check_size(sum(map(len, texts)))
        return "".join(texts)

    def parse(self, source, name=None, filename=None):
        return _Counting().visit(super().parse(source, name, filename))

    def compile(self, source, name=None, filename=None, *args, **options):
        tree = self.parse(source, name, filename) if isinstance(source, str) else source
        return super().compile(tree, name, filename, *args, **options)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr in _STRING_ATTRIBUTES)

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        self.count()
        if operator == "+":
            self.check_size(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, (str, bytes)):
            self._check_widths(left, right if isinstance(right, tuple) else (right,))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_INT_BITS:
                raise TemplateLimitError("the template makes too large a number")
        elif operator == "*":
            number, sized = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(number, int):
                self.check_size(_size(sized) * number)
        return super().call_binop(context, operator, left, right)

    def call(self, context, function: Any, *arguments: Any, **options: Any) -> Any:  # noqa: D102
        if function == self.count or function == self.join_values:
            return function(*arguments)
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # the sandbox wraps str.format
        own = (owner,) if isinstance(owner, (str, bytes, list, tuple, dict)) else ()
        self._check_arguments(getattr(function, "__name__", ""), (*own, *arguments), options)
        return self._checked(super().call(context, function, *arguments, **options))

    def _bounded(self, name: str, function: Any) -> Any:
        @functools.wraps(function)
        def bounded(*arguments: Any, **options: Any) -> Any:
            self._check_arguments(name, arguments, options)
            return self._checked(function(*arguments, **options))

        return bounded

    def _check_arguments(self, name: str, arguments: tuple, options: dict) -> None:
        """Counts a call, and refuses one that may make a text longer than the product of its two largest arguments."""
        self.count()
        values = (*arguments, *options.values())
        if name in ("format", "format_map") and values and isinstance(values[0], str):
            self._check_widths(values[0], values[1:])
        numbers = [abs(value) for value in values if isinstance(value, int)]
        self.check_size(max(numbers, default=0) if name != "range" else 0)
        if name in ("replace", "join", "indent", "wordwrap"):
            sizes = sorted([*(_size(value) for value in values), *numbers])[-2:]
            self.check_size((sizes[0] * sizes[1] if len(sizes) == 2 else 0) // 16)

    def _check_widths(self, pattern: Any, values: Sequence[Any]) -> None:
        long = _LONG_WIDTH.search(pattern if isinstance(pattern, str) else pattern.decode("latin-1"))
        if long or any(isinstance(value, int) and abs(value) > MAX_CHARS for value in values):
            raise TemplateLimitError("the template formats a text of too large a width")

    def _checked(self, value: Any) -> Any:
        self.check_size(_size(value))
        return value


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
