"""JSON schemas of ROS message types, and messages out of the JSON that keeps to them.

A message class describes its fields itself, as rosidl generates it, so that nothing of ROS is imported here but the
package of the message that is asked for.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from engine_core.errors import EdgeLLMError

MAX_STRING = 256  # characters of a string that its type does not bound
MAX_ITEMS = 32  # of a sequence that its type does not bound
_MAX_FLOAT32 = 3.4028234663852886e38
_FLOATS = {"float": _MAX_FLOAT32, "double": math.inf, "long double": math.inf}  # rosidl's name → largest number
_INTEGERS = {
    "octet": (0, 255),
    **{f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": (0, 2**bits - 1) for bits in (8, 16, 32, 64)},
}
_NANOSECONDS = 999_999_999
_TIMES = {  # type → field → what its integer type does not say
    "builtin_interfaces/Time": {"sec": (0, 2**31 - 1), "nanosec": (0, _NANOSECONDS)},
    "builtin_interfaces/Duration": {"nanosec": (0, _NANOSECONDS)},
}
_NAME = re.compile(r"([A-Za-z]\w*)/(?:(msg|srv|action)/)?([A-Za-z]\w*)")
_SEQUENCE = re.compile(r"sequence<(.+?)(?:, ?(\d+))?>")
_ARRAY = re.compile(r"(.+)\[(\d+)\]")
_STRING = re.compile(r"w?string(?:<(\d+)>)?")
_INNER_PART = {"msg": None, "srv": "Request", "action": "Goal"}  # what a client fills in

Fields = dict[str, "Fields"]  # the chosen fields and those inside them; {} = all


class MessageTypeError(EdgeLLMError):
    """A message type cannot be found, or has no such field."""


class MessageValueError(EdgeLLMError, ValueError):
    """A JSON value is not one of the message type."""


def message_type(name: str) -> type:
    """Return the class of ``name``, such as geometry_msgs/msg/PoseStamped.

    Of a service it is the request, of an action the goal. Raises MessageTypeError.
    """
    package, kind, short = split_name(name)
    try:
        module = importlib.import_module(f"{package}.{kind}")
    except ImportError as error:
        raise MessageTypeError(
            f"{name} cannot be imported ({error}); source the ROS workspace that has the package {package}."
        ) from None
    found = getattr(module, short, None)
    if found is not None and (part := _INNER_PART[kind]):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not hasattr(found, "get_fields_and_field_types"):
        raise MessageTypeError(f"The package {package} has no {kind}/{short}.")
    return found


def split_name(name: str) -> tuple[str, str, str]:
    """Return package, kind (msg, srv or action) and short name of a type's name. Raises MessageTypeError."""
    if (match := _NAME.fullmatch(name)) is None:
        raise MessageTypeError(f"{name[:100]!r} is no message type; expected one like geometry_msgs/msg/PoseStamped.")
    return match[1], match[2] or "msg", match[3]


def schema_of(
    message: type, fields: Iterable[str] = (), *, max_string: int = MAX_STRING, max_items: int = MAX_ITEMS
) -> dict[str, Any]:
    """Return the JSON schema of a message class: one object with every field, or with those of ``fields`` alone.

    ``fields``: dotted paths such as ``pose.position``; a path through a sequence means each item. Numbers have the
    range of their type. ``max_string`` and ``max_items`` bound the strings (characters) and sequences that their types
    do not. A field whose constants the message has takes one of their names. Raises MessageTypeError.
    """
    return _object_schema(message, _tree(fields), (max_string, max_items))


def message_of(message: type, answer: str | dict[str, Any]) -> Any:
    """Return the message of a JSON object, given as text or parsed; fields that it lacks keep their defaults.

    A field with constants takes their names and their values. Raises MessageValueError saying where what is wrong.
    """
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise MessageValueError(f"The answer is not JSON: {error}.") from None
    return _filled(message, answer, message.__name__)


def type_name(message: type) -> str:
    """Return the name of a message class as fields give it, such as geometry_msgs/Pose."""
    return f"{message.__module__.partition('.')[0]}/{message.__name__}"


# --- schemas ------------------------------------------------------------------------------------------


def _tree(paths: Iterable[str]) -> Fields:
    """Return the fields that ``paths`` choose. A path that ends at a field chooses all inside it."""
    chosen = sorted({path.strip() for path in paths})
    tree: Fields = {}
    for path in chosen:
        if any(path.startswith(f"{other}.") for other in chosen):
            continue
        at = tree
        for name in path.split("."):
            at = at.setdefault(name, {})
    return tree


def _object_schema(message: type, chosen: Fields, limits: tuple[int, int], path: str = "") -> dict[str, Any]:
    types: dict[str, str] = message.get_fields_and_field_types()  # type: ignore[attr-defined]
    for name in chosen:
        if name not in types:
            raise MessageTypeError(f"{type_name(message)} has no field {path + name!r}, only {', '.join(types)}.")
    constants = _constants_of_fields(message)
    times = _TIMES.get(type_name(message), {})
    properties: dict[str, Any] = {}
    for name, kind in types.items():
        if chosen and name not in chosen:
            continue
        if chosen.get(name) and (name in constants or name in times):
            raise MessageTypeError(f"The field {path + name!r} is a {kind}, which has no fields.")
        if name in constants:
            properties[name] = {"enum": list(constants[name])}
        elif name in times:
            low, high = times[name]
            properties[name] = {"type": "integer", "minimum": low, "maximum": high}
        else:
            properties[name] = _schema(kind, chosen.get(name, {}), limits, path + name)
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _schema(kind: str, chosen: Fields, limits: tuple[int, int], path: str) -> dict[str, Any]:
    max_string, max_items = limits
    if match := _SEQUENCE.fullmatch(kind):
        most = int(match[2]) if match[2] else max_items
        return {"type": "array", "items": _schema(match[1], chosen, limits, path), "maxItems": most}
    if match := _ARRAY.fullmatch(kind):
        size = int(match[2])
        items = _schema(match[1], chosen, limits, path)
        return {"type": "array", "items": items, "minItems": size, "maxItems": size}
    if "/" in kind:
        return _object_schema(message_type(kind), chosen, limits, f"{path}.")
    if chosen:
        raise MessageTypeError(f"The field {path!r} is a {kind}, which has no fields.")
    if match := _STRING.fullmatch(kind):
        return {"type": "string", "maxLength": int(match[1]) if match[1] else max_string}
    if kind in _INTEGERS:
        low, high = _INTEGERS[kind]
        return {"type": "integer", "minimum": low, "maximum": high}
    if kind in _FLOATS:
        high = _FLOATS[kind]
        return {"type": "number", **({} if math.isinf(high) else {"minimum": -high, "maximum": high})}
    if kind == "boolean":
        return {"type": "boolean"}
    if kind in ("char", "wchar"):
        pattern: dict[str, Any] = {"pattern": "^[ -~]$"} if kind == "char" else {}
        return {"type": "string", "minLength": 1, "maxLength": 1, **pattern}
    raise MessageTypeError(f"The field {path!r} has the type {kind}, which has no JSON schema here.")


def _constants_of_fields(message: type) -> dict[str, dict[str, Any]]:
    """Return field → name → value of the constants that are surely a field's.

    These have the field's name before their own (STATUS_UNKNOWN of status), or the message has one field alone of
    their type and none by name. Constants that may be or-ed, powers of two, are no choice of one.
    """
    constants = {
        name: value
        for name, value in vars(message).items()
        if name.isupper() and not name.endswith("__DEFAULT") and type(value) in (int, str, bytes)
    }
    types: dict[str, str] = message.get_fields_and_field_types()  # type: ignore[attr-defined]
    by_field: dict[str, dict[str, Any]] = {}
    for name, value in constants.items():
        fitting = [
            field for field, kind in types.items() if _fits(value, kind) and name.startswith(f"{field.upper()}_")
        ]
        if fitting:
            by_field.setdefault(max(fitting, key=len), {})[name] = value
    if not by_field and constants:
        first = next(iter(constants.values()))
        fields = [field for field, kind in types.items() if _fits(first, kind)]
        same = all(type(value) is type(first) for value in constants.values())
        if len(fields) == 1 and same and len(set(constants.values())) == len(constants):
            by_field[fields[0]] = constants
    return {
        field: of_field
        for field, of_field in by_field.items()
        if len(of_field) > 1
        and not _are_flags(of_field.values())
        and all(_fits(v, types[field]) for v in of_field.values())
    }


def _fits(value: int | str | bytes, kind: str) -> bool:
    """Return whether a constant can be the value of a field of the type ``kind``."""
    if isinstance(value, str):
        return _STRING.fullmatch(kind) is not None
    if isinstance(value, bytes):
        return kind == "octet"
    return kind in _INTEGERS and kind != "octet" and _INTEGERS[kind][0] <= value <= _INTEGERS[kind][1]


def _are_flags(values: Iterable[Any]) -> bool:
    bits = [value for value in values if isinstance(value, int) and value > 0]
    return len(bits) > 2 and all(value & (value - 1) == 0 for value in bits)


# --- messages -----------------------------------------------------------------------------------------


def _filled(message: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, value, f"an object of {type_name(message)}")
    types: dict[str, str] = message.get_fields_and_field_types()  # type: ignore[attr-defined]
    constants = _constants_of_fields(message)
    filled = message()
    for name, given in value.items():
        if name not in types:
            raise MessageValueError(f"{where} has the key {name[:100]!r}, but {type_name(message)} has no such field.")
        of_field = constants.get(name, {})
        if isinstance(given, str) and given in of_field:
            setattr(filled, name, of_field[given])
        else:
            setattr(filled, name, _value(types[name], given, f"{where}.{name}"))
    return filled


def _value(kind: str, value: Any, where: str) -> Any:
    """Return ``value`` as the setter of a field of the type ``kind`` takes it."""
    sequence, array = _SEQUENCE.fullmatch(kind), _ARRAY.fullmatch(kind)
    if match := sequence or array:
        size = int(match[2]) if match[2] else None
        if not isinstance(value, list) or (size is not None and (len(value) > size or (array and len(value) < size))):
            raise _wrong(where, value, "a list" if size is None else f"a list of {'' if array else 'at most '}{size}")
        return [_value(match[1], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if "/" in kind:
        return _filled(message_type(kind), value, where)
    if match := _STRING.fullmatch(kind):
        most = int(match[1]) if match[1] else None
        if not isinstance(value, str) or (most is not None and len(value) > most):
            raise _wrong(where, value, "a string" if most is None else f"a string of at most {most} characters")
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            raise _wrong(where, value, "a string without NUL and half characters, which ROS cannot send")
        return value
    if kind == "boolean":
        if not isinstance(value, bool):
            raise _wrong(where, value, "true or false")
        return value
    if kind in _INTEGERS:
        low, high = _INTEGERS[kind]
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not is_whole or not low <= value <= high:
            raise _wrong(where, value, f"a whole number from {low} to {high}")
        return bytes([int(value)]) if kind == "octet" else int(value)
    if kind in _FLOATS:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_number(value, _FLOATS[kind]):
            raise _wrong(where, value, f"a number of the type {kind}")
        return float(value)
    if not isinstance(value, str) or len(value) != 1 or (kind == "char" and not value.isascii()):
        raise _wrong(where, value, "one character")
    return value


def _is_number(value: int | float, high: float) -> bool:
    try:
        return math.isfinite(float(value)) and abs(value) <= high
    except OverflowError:
        return False


def _wrong(where: str, value: Any, expected: str) -> MessageValueError:
    return MessageValueError(f"{where} is {str(value)[:60]!r}, but it must be {expected}.")
