"""A model's files on this machine: from a local hub directory, or downloaded by huggingface_hub into its cache.

Downloads go to the cache that every tool of the hub shares (``HF_HOME``). One that was interrupted goes on where it
stopped. Afterwards each file is compared with the hash that its hub recorded.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_core.errors import BuildError, DownloadError, first_line
from engine_core.formats.gguf_file import SUFFIX
from engine_core.formats.json_file import read_json
from engine_core.hub import gguf_files, resume
from engine_core.memory import format_bytes
from engine_core.paths import expand_user

HUB_VARIABLE = "EDGELLM_HUB"
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = ".safetensors"
# What a build reads, and nothing of other formats (consolidated weights, ONNX, GGUF), which some repositories have too.
_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", f"*{_WEIGHTS}", "LICENSE*", "README.md")
_OTHER_WEIGHTS = "consolidated"
_OTHERS = ("*/*", f"{_OTHER_WEIGHTS}*")


@dataclass(frozen=True)
class HubModel:
    """A model of a hub. ``revision``: a commit, branch or tag.

    ``gguf``: the quantization, or the name, of one of the GGUF files that a repository has; "" = it has safetensors.
    """

    id: str
    revision: str = "main"
    gguf: str = ""

    @property
    def cache_name(self) -> str:
        """The name of its folder in a cache."""
        return "models--" + self.id.replace("/", "--")


def is_model_id(name: str) -> bool:
    """Return whether ``name`` is spelled as a hub's id, owner/name."""
    return _ID.fullmatch(name) is not None


# --- a local hub directory --------------------------------------------------------------------------------


def find_local(hub: Path, model: HubModel) -> Path:
    """Return the checkpoint directory, or the GGUF file, of ``model`` in a hub directory.

    ``hub``: a cache of huggingface_hub (``HF_HOME``, or the folder ``hub`` in it), or a folder of checkpoints, as
    owner/name or name. Raises DownloadError if it is not there, or not in that revision.
    """
    if not hub.is_dir():
        raise DownloadError(f"The hub directory {hub} does not exist.")
    for cache in (hub / "hub", hub):
        if (cache / model.cache_name).is_dir():
            return _local(_snapshot(cache / model.cache_name, model), model)
    for directory in (hub / model.id, hub / model.id.partition("/")[2]):
        if (directory / "config.json").is_file() or _gguf_names(directory):
            return _local(directory, model)
    raise DownloadError(
        f"The hub directory {hub} has no {model.id}: neither {model.cache_name}, as in a cache of huggingface_hub, "
        f"nor {model.id} with a config.json."
    )


def _local(directory: Path, model: HubModel) -> Path:
    """Return the directory, with its config.json, or the first of the GGUF files that are meant.

    Raises DownloadError.
    """
    if model.gguf:
        return directory / gguf_files.choose(_gguf_names(directory), model.gguf, model.id)[0]
    has_config = (directory / "config.json").is_file()
    if not has_config and (sentence := gguf_files.which(_gguf_names(directory), model.id)) is not None:
        raise DownloadError(sentence)
    return directory


def _gguf_names(directory: Path) -> list[str]:
    """Return the GGUF files of a repository's directory, and of the folders in it."""
    found = (*directory.glob(f"*{SUFFIX}"), *directory.glob(f"*/*{SUFFIX}"))
    return [path.relative_to(directory).as_posix() for path in found]


def _snapshot(repository: Path, model: HubModel) -> Path:
    """Return the snapshot of the model's revision in its folder of a cache."""
    reference = repository / "refs" / model.revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else model.revision
    snapshot = repository / "snapshots" / commit
    if _COMMIT.fullmatch(commit) and snapshot.is_dir():
        return snapshot
    found = sorted(path.name for path in (repository / "snapshots").glob("*") if path.is_dir())
    what = f"only {' and '.join(found)}; name it with --revision" if found else "no snapshot at all"
    raise DownloadError(f"{repository} does not have the revision {model.revision} of {model.id}, but {what}.")


# --- a hub on the network ---------------------------------------------------------------------------------


def download_config(model: HubModel) -> Path:
    """Download config.json alone, from which a plan is made before gigabytes follow. Raises DownloadError."""
    from huggingface_hub import errors

    with _explained(model) as hub:
        try:
            return Path(hub.hf_hub_download(model.id, "config.json", revision=model.revision))
        except errors.LocalEntryNotFoundError:
            raise
        except errors.EntryNotFoundError:
            names = [file.name for file in resume.large_files(model.id, model.revision, SUFFIX)]
            if (sentence := gguf_files.which(names, model.id)) is not None:
                raise DownloadError(sentence) from None
            raise


def download(model: HubModel, progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Download what a build reads; return the checkpoint directory, a snapshot in the cache of huggingface_hub, or the
    GGUF file in it.

    What is there already is not fetched again. ``progress`` is called with the bytes of weights that are there and all
    of them. Raises DownloadError; what has arrived is kept, and the same call goes on from there.
    """
    options = {"revision": model.revision, "allow_patterns": list(_PATTERNS)}
    if model.gguf:
        return _download_gguf(model, progress)
    with _explained(model) as hub:
        if (snapshot := _complete_snapshot(model)) is not None:
            return snapshot
        hub.snapshot_download(model.id, ignore_patterns=[*_OTHERS, f"*{_WEIGHTS}"], **options)
        files = resume.large_files(model.id, model.revision, _WEIGHTS)
        files = [file for file in files if not file.name.startswith(_OTHER_WEIGHTS)]
        resume.fetch(model.id, model.revision, files, _folder(model) / "blobs", progress)
        return Path(hub.snapshot_download(model.id, ignore_patterns=list(_OTHERS), **options))


def cached_gguf(model: HubModel) -> Path | None:
    """Return the GGUF file that is meant if the cache has it of a commit, so that the hub need not be asked."""
    if not _COMMIT.fullmatch(model.revision):
        return None
    with suppress(DownloadError):  # there is nothing, another model, or a part of this one
        return _local(_folder(model) / "snapshots" / model.revision, model)
    return None


def gguf_bytes(model: HubModel) -> int:
    """Return the bytes of the GGUF files that are meant. Raises DownloadError."""
    with _explained(model):
        return sum(file.size for file in _gguf_of_hub(model))


def _gguf_of_hub(model: HubModel) -> list[resume.LargeFile]:
    files = {file.name: file for file in resume.large_files(model.id, model.revision, SUFFIX)}
    return [files[name] for name in gguf_files.choose(files, model.gguf, model.id)]


def _download_gguf(model: HubModel, progress: Callable[[int, int], None]) -> Path:
    with _explained(model) as hub:
        files = _gguf_of_hub(model)
        resume.fetch(model.id, model.revision, files, _folder(model) / "blobs", progress)
        patterns = [file.name for file in files]
        return Path(hub.snapshot_download(model.id, revision=model.revision, allow_patterns=patterns)) / patterns[0]


def _folder(model: HubModel) -> Path:
    """Return the model's folder in the cache of huggingface_hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / model.cache_name


def _complete_snapshot(model: HubModel) -> Path | None:
    """Return the snapshot of a commit if all its weights are in the cache, so that the hub need not be asked.

    ``download`` fetches the weights last.
    """
    snapshot = _folder(model) / "snapshots" / model.revision
    single, index = snapshot / "model.safetensors", snapshot / "model.safetensors.index.json"
    if not single.is_file() and not index.is_file():
        return None
    shards = [] if single.is_file() else set(read_json(index).get("weight_map", {}).values())
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", *shards)
    return snapshot if all((snapshot / name).is_file() for name in names) else None


def check_space(model: HubModel, num_bytes: int, out: Path, engine_bytes: int) -> None:
    """Raises DownloadError if the disks of the cache and of ``out`` have no room for a download of about ``num_bytes``
    and an engine of about ``engine_bytes``. What has been downloaded already counts."""
    blobs = _folder(model) / "blobs"
    here = sum(path.stat().st_size for path in blobs.glob("*") if path.is_file())
    needs = {_existing(blobs): max(0, num_bytes - here)}
    disk = _existing(out)
    shared = next((place for place in needs if os.stat(place).st_dev == os.stat(disk).st_dev), disk)
    needs[shared] = needs.get(shared, 0) + engine_bytes
    for place, needed in needs.items():
        if (free := shutil.disk_usage(place).free) < needed:
            raise DownloadError(
                f"{model.id} needs about {format_bytes(needed)} on the disk of {place}, which has "
                f"{format_bytes(free)} free; free some, or set HF_HOME to another disk."
            )


def _existing(path: Path) -> Path:
    path = expand_user(path).absolute()
    return next(each for each in (path, *path.parents) if each.exists())


@contextmanager
def _explained(model: HubModel) -> Iterator[Any]:
    """Give huggingface_hub; turn what it and its HTTP library raise into a DownloadError of one sentence."""
    try:
        import huggingface_hub
        from huggingface_hub import utils
    except ImportError as error:
        raise BuildError(f"Downloading needs the Python package {error.name!r}: pip install it.") from error
    utils.logging.set_verbosity_error()  # its warnings of retries
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        yield huggingface_hub
    except DownloadError:
        raise
    except Exception as error:  # HTTP libraries differ from version to version, and so do their errors
        raise DownloadError(_reason(model, error)) from error


def _reason(model: HubModel, error: Exception) -> str:
    from huggingface_hub import errors

    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return f"The disk is full; free some space and the same command goes on with the download of {model.id}."
    if _any(causes, errors.GatedRepoError):
        return (
            f"{model.id} is gated: accept its licence at https://huggingface.co/{model.id}, log in with "
            "'hf auth login' or set HF_TOKEN, and give the same command again."
        )
    if _any(causes, errors.RepositoryNotFoundError):
        return f"The hub has no model {model.id} that is open to you; check its name, or log in if it is private."
    if _any(causes, errors.RevisionNotFoundError):
        return f"The hub has no revision {model.revision} of {model.id}; name another one with --revision."
    if _any(causes, errors.EntryNotFoundError) and not _any(causes, errors.LocalEntryNotFoundError):
        return f"The repository {model.id} has no config.json, so it is not a checkpoint that can be built."
    offline = _any(causes, errors.OfflineModeIsEnabled) or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    if offline or _any(causes, errors.LocalEntryNotFoundError, ConnectionError):
        why = "HF_HUB_OFFLINE forbids to ask the hub" if offline else "the hub cannot be reached"
        return (
            f"{model.id} is not, or only in part, in the cache, and {why}; connect and give the same command again, "
            f"or name a directory that has it with --hub or {HUB_VARIABLE}."
        )
    return (
        f"The download of {model.id} failed ({type(error).__name__}: {first_line(error)[:200]}); the same command goes "
        "on where it stopped."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _any(causes: list[BaseException], *kinds: Any) -> bool:
    return any(isinstance(cause, kinds) for cause in causes)


# --- hashes -----------------------------------------------------------------------------------------------


def verify(directory: Path, *, repair: bool = False) -> int:
    """Compare the files of a snapshot with the hashes that the hub recorded; return how many were compared.

    In a cache, a file's link names the hash: SHA-256 of a large file, git's hash of a small one. A plain directory
    records none, so that 0 is returned. ``repair``: remove a damaged file, for the next download to fetch it again.
    Raises DownloadError for a file with another hash.
    """
    num_compared = 0
    for path in sorted(directory.iterdir()):
        blob = Path(os.path.realpath(path))  # which raises nothing for links in a circle
        if blob.parent.name != "blobs" or not blob.is_file():
            continue
        if (expected := blob.name) != _hash(blob, len(expected)):
            what = f"remove {blob} and fetch it again"
            if repair:
                path.unlink()
                blob.unlink()
                what = "it was removed, and the same command fetches it again"
            raise DownloadError(f"{path.name} in {directory} does not have the hash that its hub recorded; {what}.")
        num_compared += 1
    return num_compared


def _hash(blob: Path, num_digits: int) -> str:
    """Return the SHA-256 (64 digits) of a file, or else git's SHA-1 of it as a blob."""
    if num_digits == 64:
        return resume.sha256(blob)
    data = blob.read_bytes()  # small: large files have the other
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
