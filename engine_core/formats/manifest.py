"""The engine directory: its manifest, its integrity, and how one is written so that half of one never counts.

A variant directory holds ``engine.json`` and the files it lists. An engine directory is either one variant
itself or has one variant per subdirectory (``fp16/``, ``int4/``, …); ``select_variant`` picks. The manifest is
written last, into a temporary sibling directory that is renamed when it is whole: a directory without a
valid ``engine.json`` is not an engine, whatever else it holds. ``engine.json.sig`` is its signature, if it has one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from engine_core.errors import BuildError, EngineDirectoryError, IntegrityError, SchemaVersionError, SignatureError
from engine_core.formats.atomic import replaced_directory
from engine_core.formats.signatures import SigningKey, TrustedKeys, signature_of
from engine_core.formats.weight_formats import preference
from engine_core.models.spec import ModelSpec
from engine_core.progress import Progress, untold
from engine_core.text.strict_json import json_kind_name

SCHEMA_VERSION = 2  # 1 had the model's sizes alone and left its traits to each backend
MANIFEST_NAME = "engine.json"
# Files that the tokenizer library reads from a directory by itself where it finds them.
_READ_IF_THERE = (
    "tokenizer*", "chat_template*", "additional_chat_templates/*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "config.json",
)  # fmt: skip


@dataclass(frozen=True)
class FileRecord:
    """The size and digest that one file of an engine directory must have."""

    size: int  # bytes
    sha256: str  # hexadecimal


@dataclass(frozen=True)
class Manifest:
    """The content of ``engine.json``, which describes one variant."""

    model_name: str
    model: ModelSpec
    backend: str  # onnxruntime, tensorrt or cuda
    quantization: str
    kv_cache_type: str  # the type it was built for
    max_context: int  # tokens; what the RoPE table covers
    max_batch: int
    eos_token_ids: tuple[int, ...]
    reduced_vocab_size: int = 0  # rows of the LM head with a vocab map; 0 = no map
    group_size: int = 0  # weights per scale of a group-wise quantization; 0 = none
    use_cuda_graph: bool = False
    gpu_arch: str = ""  # for instance sm_90; empty where any will do
    builder: dict[str, str] = field(default_factory=dict)  # package → version
    options: dict = field(default_factory=dict)  # what only the backend reads; see ``read_options``
    notes: tuple[str, ...] = ()  # what its user should know, a sentence each
    files: dict[str, FileRecord] = field(default_factory=dict)  # relative path → record
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"


def hash_file(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> FileRecord:
    """``on_bytes``: told the bytes of each block that has been read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            on_bytes(len(block))
    return FileRecord(size=path.stat().st_size, sha256=digest.hexdigest())


def read_manifest(
    variant_dir: Path,
    *,
    verify_hashes: bool = True,
    progress: Progress = untold,
    trusted: TrustedKeys | None = None,
) -> Manifest:
    """Read and check one variant directory: the manifest, its signature if there are ``trusted`` keys, the files.

    Raises what ``check_files`` raises, SignatureError or SchemaVersionError.
    """
    manifest = _parse(variant_dir, _read(variant_dir, trusted))
    check_files(variant_dir, manifest, verify_hashes=verify_hashes, progress=progress, signed=trusted is not None)
    return manifest


def check_files(
    variant_dir: Path,
    manifest: Manifest,
    *,
    verify_hashes: bool = True,
    progress: Progress = untold,
    signed: bool = False,
) -> None:
    """Check the size of every file of a manifest and, if ``verify_hashes``, its SHA-256.

    Where the manifest is ``signed``, no other file may be there; else none that the tokenizer would read. Raises
    EngineDirectoryError or IntegrityError.
    """
    total, done = sum(record.size for record in manifest.files.values()), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress(min(1.0, done / total))

    for name, record in manifest.files.items():
        path = variant_dir / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise EngineDirectoryError(f"{variant_dir / MANIFEST_NAME} lists {name!r}, a path outside its directory.")
        if not path.is_file():
            raise EngineDirectoryError(
                f"{path} is missing, though {MANIFEST_NAME} lists it; build the engine again with 'edgellm build'."
            )
        size = path.stat().st_size
        if size != record.size:
            raise IntegrityError(
                f"{path} has {size} bytes, but its manifest says {record.size}; copy or build the engine again."
            )
        if verify_hashes and (found := hash_file(path, on_bytes).sha256) != record.sha256:
            raise IntegrityError(
                f"{path} has SHA-256 {found[:12]}…, but its manifest says {record.sha256[:12]}…; "
                "copy or build the engine again."
            )
    known = {*manifest.files, MANIFEST_NAME, signature_of(Path(MANIFEST_NAME)).name}
    why = "but it is signed as it was without it" if signed else "but the tokenizer would read it"
    patterns = ("**/*",) if signed else _READ_IF_THERE
    for path in sorted(found for pattern in patterns for found in variant_dir.glob(pattern)):
        is_folder = signed and path.is_dir() and not path.is_symlink()
        if not is_folder and path.relative_to(variant_dir).as_posix() not in known:
            raise IntegrityError(
                f"{path} is not listed in {MANIFEST_NAME}, {why}; remove it or build the engine again."
            )


def sign_variant(variant_dir: Path, key: SigningKey, progress: Progress = untold) -> Manifest:
    """Sign the manifest of a variant whose files are whole, and return it. Raises as ``read_manifest``, and OSError."""
    content = _read(variant_dir, None)
    manifest = _parse(variant_dir, content)
    check_files(variant_dir, manifest, progress=progress, signed=True)
    key.sign(variant_dir / MANIFEST_NAME, content)
    return manifest


def _read(variant_dir: Path, trusted: TrustedKeys | None) -> bytes:
    """Return the bytes of a manifest, which are signed if there are ``trusted`` keys.

    Raises EngineDirectoryError or SignatureError.
    """
    path = variant_dir / MANIFEST_NAME
    if not variant_dir.exists():
        raise EngineDirectoryError(
            f"The engine directory {variant_dir} does not exist; "
            f"make one with 'edgellm build CHECKPOINT {variant_dir}'."
        )
    if not path.is_file():
        raise EngineDirectoryError(
            f"{variant_dir} has no {MANIFEST_NAME}, so it is not an engine directory; make one with 'edgellm build'."
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EngineDirectoryError(f"{path} cannot be read ({error}); build the engine again.") from error
    if trusted is not None:
        trusted.verify(path, content)
    return content


def _parse(variant_dir: Path, content: bytes) -> Manifest:
    """Return the manifest that ``content`` is. Raises EngineDirectoryError or SchemaVersionError."""
    path = variant_dir / MANIFEST_NAME
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise EngineDirectoryError(f"{path} cannot be read as JSON ({error}); build the engine again.") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise EngineDirectoryError(f"{path} has no schema_version, so it is not a manifest; build the engine again.")
    if version > SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{path} has schema version {version}, but this version reads up to {SCHEMA_VERSION}; "
            "update edgellm_ros or build the engine again."
        )
    if version < SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{path} has schema version {version} of an earlier edgellm_ros, but this one reads {SCHEMA_VERSION}; "
            f"build the engine again: '{_build_command(variant_dir, values)}'."
        )
    try:
        return _typed(Manifest, values, "")
    except ValueError as error:
        raise EngineDirectoryError(f"{path} is not a whole manifest: {error}; build the engine again.") from None


def _build_command(variant_dir: Path, values: dict) -> str:
    """Return the command that builds such an engine again."""
    parts = ["edgellm build CHECKPOINT", str(variant_dir)]
    for name in ("backend", "quantization", "max_context"):
        if isinstance(values.get(name), (str, int)):
            parts.append(f"--{name.replace('_', '-')} {values[name]}")
    return " ".join(parts)


Options = typing.TypeVar("Options")


def read_options(manifest: Manifest, kind: type[Options]) -> Options:
    """Return the fields of the dataclass ``kind`` from the manifest's ``options``. Raises EngineDirectoryError."""
    known = typing.get_type_hints(kind)
    try:
        return _typed(kind, {name: value for name, value in manifest.options.items() if name in known}, "options.")
    except ValueError as error:
        raise EngineDirectoryError(f"The manifest's options are not whole: {error}; build the engine again.") from None


def _typed(kind: typing.Any, value: typing.Any, name: str) -> typing.Any:
    """Return ``value``, read from JSON, as ``kind``: a dataclass, tuple[X, …], dict[str, X], dict, str, int, float or
    bool.

    Raises ValueError naming the field that is missing, unknown or of another type.
    """
    origin, label = typing.get_origin(kind), name.rstrip(".")
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{label or 'it'} is not an object")
        kinds = typing.get_type_hints(kind)
        if unknown := sorted(value.keys() - kinds.keys()):
            raise ValueError(f"{name}{unknown[0]!r} is not known")
        given = {key: _typed(kinds[key], item, f"{name}{key}.") for key, item in value.items()}
        needed = [
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing := [key for key in needed if key not in given]:
            raise ValueError(f"{name}{missing[0]} is missing")
        return kind(**given)
    if origin in (types.UnionType, typing.Union):
        return _typed_as_one_of(typing.get_args(kind), value, name)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{label} is not a list")
        return tuple(_typed(typing.get_args(kind)[0], item, name) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{label} is not an object")
        return {key: _typed(typing.get_args(kind)[1], item, f"{name}{key}.") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{label} is {json.dumps(value)[:60]}, which is not {json_kind_name(kind)}")
    if kind is int and not 0 <= value < 1 << 63:
        raise ValueError(f"{label} is {value}, which is out of range")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{label} is {value}, which is no finite number")
    return value


def _typed_as_one_of(kinds: tuple[typing.Any, ...], value: typing.Any, name: str) -> typing.Any:
    """Return ``value`` as the first of ``kinds`` that it is. Raises ValueError, with what the last one lacks."""
    if value is None and types.NoneType in kinds:
        return None
    *first, last = (kind for kind in kinds if kind is not types.NoneType)
    for kind in first:
        with contextlib.suppress(ValueError, TypeError):
            return _typed(kind, value, name)
    return _typed(last, value, name)


def find_variants(engine_dir: Path, trusted: TrustedKeys | None = None) -> list[tuple[Path, Manifest]]:
    """Return (directory, manifest) of every variant, by directory name. Only the manifests are read.

    Raises EngineDirectoryError if there is none, SchemaVersionError if all are too new, and SignatureError if one of
    them is not signed by a ``trusted`` key.
    """

    def parsed(directory: Path) -> Manifest:
        return _parse(directory, _read(directory, trusted))

    found: list[tuple[Path, Manifest]] = []
    refused: Exception | None = None
    for directory in variant_directories(engine_dir):
        try:
            found.append((directory, parsed(directory)))
        except SignatureError:  # taking another variant would hide it
            raise
        except EngineDirectoryError as error:
            refused = error
    if not found and refused is not None:
        raise refused
    return found


def variant_directories(engine_dir: Path) -> list[Path]:
    """Return the directories with a manifest, by name; ``engine_dir`` itself if it has one, or if there is none."""
    if not engine_dir.is_dir() or (engine_dir / MANIFEST_NAME).is_file():
        return [engine_dir]
    children = (child for child in sorted(engine_dir.iterdir()) if not child.name.startswith("."))
    return [child for child in children if (child / MANIFEST_NAME).is_file()] or [engine_dir]


def list_variants(engine_dir: Path, trusted: TrustedKeys | None = None) -> dict[str, Path]:
    """Quantization → variant directory; of two backends with the same one, the second as "fp16 (tensorrt)".

    Raises as ``find_variants``.
    """
    found: dict[str, Path] = {}
    for directory, manifest in find_variants(engine_dir, trusted):
        name = manifest.quantization
        found[name if name not in found else f"{name} ({manifest.backend})"] = directory
    return found


def select_variant(engine_dir: Path, quantization: str = "auto", trusted: TrustedKeys | None = None) -> Path:
    """Return the variant directory of ``quantization``; with ``auto``, the best of those that are there.

    Raises EngineDirectoryError naming what the directory does hold.
    """
    variants = list_variants(engine_dir, trusted)
    if quantization == "auto":
        return variants[min(variants, key=preference)]
    if quantization not in variants:
        raise EngineDirectoryError(
            f"{engine_dir} has no variant {quantization!r}; it has {', '.join(sorted(variants))}. "
            f"Build it with 'edgellm build --quantization {quantization}'."
        )
    return variants[quantization]


@contextlib.contextmanager
def write_variant(variant_dir: Path) -> Iterator[Path]:
    """Gives a temporary directory to fill; on success it takes the place of ``variant_dir``, else it is removed.

    The body has to end with ``seal``. An existing engine at ``variant_dir`` is replaced; any other non-empty
    directory is refused. Raises BuildError, also for an OSError of the body (disk full).
    """
    variant_dir = variant_dir.absolute()
    if variant_dir.exists() and not _replaceable(variant_dir):
        raise BuildError(f"{variant_dir} exists and is not an engine directory; name another one.")
    try:
        with replaced_directory(variant_dir) as temporary:
            yield temporary
            assert (temporary / MANIFEST_NAME).is_file(), "write_variant: the body did not call seal"
    except OSError as error:
        raise BuildError(
            f"The engine could not be written to {variant_dir} ({error.strerror or error}); nothing was left behind."
        ) from error


def _replaceable(directory: Path) -> bool:
    return directory.is_dir() and ((directory / MANIFEST_NAME).is_file() or not any(directory.iterdir()))


def seal(directory: Path, manifest: Manifest) -> Manifest:
    """Hashes every file of ``directory`` and writes the manifest last."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST_NAME):
        files[path.relative_to(directory).as_posix()] = hash_file(path)
    manifest = dataclasses.replace(manifest, files=files)
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
