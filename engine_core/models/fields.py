"""Typed reading of config.json: each value is of the expected type and range, or one sentence says which is not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine_core.errors import CheckpointError

_MISSING = object()
_LARGEST = 2**31 - 1


class Fields:
    """The fields of one JSON object.

    A field that is missing has the default given, one that is null is refused unless ``optional``. Every method raises
    CheckpointError naming the field, its value and what was expected.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = values
        self._where = where

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def whole(self, name: str, default: Any = _MISSING, *, optional: bool = False) -> Any:
        """Return a whole number from 1 to 2³¹ − 1; None if it may be null and is. Raises what ``refuse`` raises."""
        value = self._get(name, default, optional)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST):
            self.refuse(name, "a whole number above 0")
        return value

    def count(self, name: str, default: Any = _MISSING) -> int:
        """Return a whole number from 0 to 2³¹ − 1. Raises what ``refuse`` raises."""
        value = self._get(name, default, False)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
            self.refuse(name, "a whole number, 0 or above")
        return value

    def number(self, name: str, default: Any = _MISSING, *, optional: bool = False, zero: bool = False) -> Any:
        """Return a finite number above 0, or 0 itself if ``zero``. Raises what ``refuse`` raises."""
        value = self._get(name, default, optional)
        if value is None:
            return None
        usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
        if not usable or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            self.refuse(name, "a finite number, 0 or above" if zero else "a finite number above 0")
        return float(value)

    def numbers(self, name: str, default: tuple[float, ...], count: int) -> tuple[float, ...]:
        """Return ``count`` finite numbers of a list. Raises what ``refuse`` raises."""
        value = self._get(name, list(default), False)
        is_list = isinstance(value, list) and len(value) == count
        if not is_list or not all(type(v) in (int, float) and abs(v) < 1e30 for v in value):
            self.refuse(name, f"a list of {count} numbers")
        return tuple(float(v) for v in value)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false. Raises what ``refuse`` raises."""
        value = self._get(name, default, False)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def text(self, name: str, default: Any = _MISSING) -> str:
        """Return a string of whole characters. Raises what ``refuse`` raises."""
        value = self._get(name, default, False)
        if not isinstance(value, str):
            self.refuse(name, "a string")
        if has_lone_surrogate(value):
            self.refuse(name, "a string without half a surrogate pair")
        return value

    def texts(self, name: str) -> list[str] | None:
        """Return a list of strings of whole characters, or None. Raises what ``refuse`` raises."""
        value = self._get(name, None, True)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            self.refuse(name, "a list of strings")
        if value is not None and has_lone_surrogate("\0".join(value)):
            self.refuse(name, "a list of strings without half a surrogate pair")
        return value

    def counts(self, name: str) -> list[int] | None:
        """Return a list of whole numbers, 0 or above, or None. Raises what ``refuse`` raises."""
        value = self._get(name, None, True)
        is_list = isinstance(value, list) and all(type(item) is int and 0 <= item <= _LARGEST for item in value)
        if value is not None and not is_list:
            self.refuse(name, "a list of whole numbers, 0 or above")
        return value

    def table(self, name: str) -> dict | None:
        """Return a JSON object, or None. Raises what ``refuse`` raises."""
        value = self._get(name, None, True)
        if value is not None and not isinstance(value, dict):
            self.refuse(name, "an object")
        return value

    def refuse(self, name: str, expected: str) -> None:
        """Raises CheckpointError."""
        shown = "no " + name if name not in self._values else f"{name}={_short(self._values[name])}"
        raise CheckpointError(f"{self._where} has {shown}, expected {expected}.")

    def _get(self, name: str, default: Any, optional: bool) -> Any:
        value = self._values.get(name, default)
        if value is _MISSING or (value is None and not optional):
            self.refuse(name, "a value")
        return value


def has_lone_surrogate(text: str) -> bool:
    """Return True for a text with half a surrogate pair: UTF-8 cannot hold it, but an escape of JSON can spell it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
