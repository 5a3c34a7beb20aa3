"""Read the fields of JSON objects: each by its name and type, and none that nobody reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from engine_core.errors import InvalidRequestError
from engine_core.text.strict_json import json_kind, json_kind_name, parse_json

T = TypeVar("T")
# Values in a body, counted by what separates them, also in texts. Each takes up to 100 bytes, and time of the thread
# that all clients share.
_MOST_VALUES = 1 << 19


class FieldError(InvalidRequestError):
    """A field of a request is unknown, has the wrong type, or a value that is not supported."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def parse_object(body: bytes) -> Fields:
    """Return the fields of the JSON object in ``body``. Raises InvalidRequestError."""

    if (count := sum(map(body.count, (b",", b"[", b"{")))) > _MOST_VALUES:
        raise InvalidRequestError(f"The body has about {count} values, but at most {_MOST_VALUES} are accepted.")
    try:
        value = parse_json(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"The body is not valid UTF-8 (at byte {error.start}).") from None
    except RecursionError:
        raise InvalidRequestError("The body has too many objects and lists inside each other.") from None
    except ValueError as error:
        raise InvalidRequestError(f"The body does not parse as JSON: {str(error)[:200]}.") from None
    return Fields(value)


class Fields:
    """The fields of one JSON object. ``take`` reads one; ``finish`` refuses those that were not read.

    null is the same as leaving a field out, as clients send it for their unset options.
    """

    def __init__(self, value: Any, path: str = "") -> None:
        """``path``: where the object lies in the body, such as ``messages[2]``; "" = the body. Raises FieldError."""
        self.path = path
        if not isinstance(value, dict):
            where = f"{path} is" if path else "The body is"
            raise FieldError(path, f"{where} {json_kind(value)}, but it must be an object.")
        self._left: dict[str, Any] = dict(value)

    def name(self, field: str) -> str:
        return f"{self.path}.{field}" if self.path else field

    def take(self, field: str, *kinds: type[T]) -> T | None:
        """Return the value, of one of ``kinds``; None if it is left out. Raises FieldError."""
        value = self._left.pop(field, None)
        if value is None:
            return None
        if float in kinds and type(value) is int and abs(value) < 1 << 1000:
            value = float(value)
        if float in kinds and type(value) is int:
            raise FieldError(self.name(field), f"{self.name(field)} is {str(value)[:20]}…, which no double can hold.")
        if type(value) not in kinds:  # exactly: true is no number
            expected = " or ".join(json_kind_name(kind) for kind in kinds)
            raise FieldError(self.name(field), f"{self.name(field)} is {json_kind(value)}, but it must be {expected}.")
        return value

    def object(self, field: str) -> Fields | None:
        """Return the fields of an object; None if it is left out. Raises FieldError."""
        value = self.take(field, dict)
        return None if value is None else Fields(value, self.name(field))

    def objects(self, field: str) -> list[Fields]:
        """Return the fields of each object of a list; none if it is left out. Raises FieldError."""
        values: list[Any] = self.take(field, list) or []
        return [Fields(value, f"{self.name(field)}[{index}]") for index, value in enumerate(values)]

    def only(self, field: str, *values: Any, why: str) -> None:
        """Read a field that may be left out or have one of ``values``. Raises FieldError with ``why``."""
        value = self._left.pop(field, None)
        if value is not None and not any(value == each and type(value) is type(each) for each in values):
            raise FieldError(self.name(field), f"{self.name(field)} is not supported: {why}")

    def skip(self, fields: Iterable[str]) -> None:
        """Read fields that have no effect here, as is documented."""
        for field in fields:
            self._left.pop(field, None)

    def finish(self) -> None:
        """Raises FieldError if a field has not been read."""
        if unknown := next((name for name, value in self._left.items() if value is not None), None):
            known = f" in {self.path}" if self.path else ""
            raise FieldError(
                self.name(unknown)[:200],
                f"The field {unknown[:64]!r}{known} is not supported by this endpoint; leave it out.",
            )
