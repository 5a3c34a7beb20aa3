"""JSON schemas of a directory, which requests name instead of sending them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from engine_core.errors import ConfigurationError, InvalidSchemaError
from engine_core.request import LIMITS
from engine_core.serving.constraint import CACHED_SCHEMAS, ConstraintFactory
from engine_core.serving.json_schema import first_line

_FILE = re.compile(rf"([A-Za-z0-9._-]{{1,{LIMITS.schema_name_chars}}}?)(?:\.schema)?\.json")
MAX_SCHEMAS = CACHED_SCHEMAS // 2  # the other half is left to schemas that requests bring


class NamedSchemas:
    """Schemas by name, as text. Not changed after they have been read."""

    def __init__(self, schemas: Mapping[str, str] | None = None) -> None:
        self._schemas = dict(schemas or {})

    @classmethod
    def read(cls, directory: Path, constraints: ConstraintFactory, report: Callable[[str], None]) -> NamedSchemas:
        """Read and compile the files NAME.json and NAME.schema.json of a directory.

        A file that cannot be used is left out, and ``report`` is told its name and why. Raises ConfigurationError if
        the directory cannot be listed.
        """
        try:
            files = sorted(path for path in directory.iterdir() if path.suffix == ".json" and path.is_file())
        except OSError as error:
            raise ConfigurationError(f"schema_dir: {directory} cannot be read ({error.strerror}).") from None
        schemas: dict[str, str] = {}
        for path in files:
            try:
                name = _name_of(path, schemas)
                text = _text_of(path)
                constraints.compile(text)
                schemas[name] = text
            except InvalidSchemaError as error:
                report(f"The schema {path} is left out: {error}")
        return cls(schemas)

    @property
    def names(self) -> list[str]:
        return sorted(self._schemas)

    def __getitem__(self, name: str) -> str:
        """Return the schema of this name. Raises InvalidSchemaError if there is none."""
        if (schema := self._schemas.get(name)) is None:
            known = f"it has {', '.join(self.names)}" if self._schemas else "it has none (schema_dir)"
            raise InvalidSchemaError(f"No schema has the name {name!r} in this engine; {known}.")
        return schema

    def get(self, name: str) -> str:
        """Return the schema of this name, "" if there is none."""
        return self._schemas.get(name, "")


def _name_of(path: Path, taken: Mapping[str, str]) -> str:
    if (match := _FILE.fullmatch(path.name)) is None:
        raise InvalidSchemaError(
            f"its name must have 1 to {LIMITS.schema_name_chars} letters, digits, '.', '_' and '-' before .json."
        )
    if match[1] in taken:
        raise InvalidSchemaError(f"another file has the name {match[1]!r}.")
    if len(taken) >= MAX_SCHEMAS:
        raise InvalidSchemaError(f"at most {MAX_SCHEMAS} schemas are read.")
    return match[1]


def _text_of(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > LIMITS.schema_bytes:
            raise InvalidSchemaError(f"it has {size} bytes, but at most {LIMITS.schema_bytes} are accepted.")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidSchemaError(f"it is not UTF-8 (at byte {error.start}).") from None
    except OSError as error:
        raise InvalidSchemaError(f"it cannot be read ({first_line(error.strerror)}).") from None
