"""JSON texts that clients send: parsed without what Python's parser accepts beside JSON."""

from __future__ import annotations

import json
from typing import Any

_KINDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
          dict: "an object", type(None): "null"}  # fmt: skip


def parse_json(text: str) -> Any:
    """Return the value of ``text``.

    Raises ValueError with the reason for NaN, Infinity, a key that stands twice in an object, and text that is no JSON;
    RecursionError for too many levels.
    """

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON value")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"there is an object with the key {name[:64]!r} twice")
            found[name] = value
        return found

    try:
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique)
    except ValueError as error:
        reason = str(error).partition(";")[0]  # behind it, and in parentheses, advice for programs in Python
        raise ValueError(reason.replace(" (decode using utf-8-sig)", "")) from None


def json_kind(value: object) -> str:
    """Return what kind of JSON value ``value`` is, with its article."""
    return json_kind_name(type(value))


def json_kind_name(kind: type) -> str:
    """Return the name of the JSON values that Python parses to ``kind``, with its article."""
    return _KINDS.get(kind, kind.__name__)
