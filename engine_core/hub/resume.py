"""Download the large files of a model into the cache of huggingface_hub so that an interrupted one goes on.

huggingface_hub 2 begins a file anew when its process was interrupted, which for gigabytes over a robot's network means
never to finish. So the weights are fetched here, by HTTP ranges, to the place in the cache where huggingface_hub looks
before it downloads: ``blobs/<SHA-256>``, until then ``blobs/<SHA-256>.incomplete``.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from engine_core.errors import DownloadError
from engine_core.formats.gguf_file import SUFFIX

_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 20
_TIMEOUT = 30.0  # s without a byte
_ATTEMPTS = 5  # that bring nothing, one after another
_PAUSE = 1.0  # s between them


@dataclass(frozen=True)
class LargeFile:
    """A file that its hub stores by its SHA-256."""

    name: str
    size: int  # bytes
    sha256: str


def large_files(model_id: str, revision: str, suffix: str) -> list[LargeFile]:
    """Return the files of a repository that end in ``suffix``: those in its root, GGUF files also of its folders.

    Raises what huggingface_hub raises, DownloadError for a hash that is none: it becomes the name of a file.
    """
    from huggingface_hub import HfApi

    found = HfApi().list_repo_tree(model_id, revision=revision, recursive=suffix == SUFFIX)
    files = ((entry.path, getattr(entry, "lfs", None)) for entry in found)
    large = [LargeFile(path, lfs.size, lfs.sha256) for path, lfs in files if lfs is not None and path.endswith(suffix)]
    for file in large:
        if not _SHA256.fullmatch(file.sha256):
            raise DownloadError(f"The hub gives {file.sha256[:80]!r} as the SHA-256 of {file.name} in {model_id}.")
    return large


def fetch(
    model_id: str, revision: str, files: Sequence[LargeFile], blobs: Path, progress: Callable[[int, int], None]
) -> None:
    """Download what is missing of ``files`` to ``blobs``.

    A file gets its name when its hash is right. ``progress`` is called with the bytes that are there and all bytes.
    Raises OSError, http.client.HTTPException or what huggingface_hub raises, and what has arrived stays; DownloadError
    for a file with another hash, which is removed.
    """
    blobs.mkdir(parents=True, exist_ok=True)
    total, done = sum(file.size for file in files), 0
    for file in files:
        if not (blobs / file.sha256).is_file():
            with _part(blobs / f"{file.sha256}.incomplete") as part:
                for size in _appended(part, file, model_id, revision):
                    progress(done + size, total)
                os.fsync(part.fileno())
                if sha256(Path(part.name)) != file.sha256:
                    os.unlink(part.name)
                    raise DownloadError(
                        f"{file.name} of {model_id} did not arrive with the hash that its hub recorded; it was "
                        "removed, and the same command fetches it again."
                    )
                os.replace(part.name, blobs / file.sha256)
        done += file.size
        progress(done, total)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _part(path: Path) -> IO[bytes]:
    """Open a partial file at its end, for this process alone."""
    part = open(path, "ab")
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        part.close()
        raise DownloadError(f"Another process is downloading {path}; wait for it or stop it.") from error
    return part


def _appended(part: IO[bytes], file: LargeFile, model_id: str, revision: str) -> Iterator[int]:
    """Append to ``part`` until it has the whole file; yield its size from time to time."""
    failures = 0
    while (before := part.tell()) < file.size:
        try:
            with _open(model_id, revision, file.name, before) as response:
                if response.status != 206:  # the server sends all of it
                    part.truncate(0)
                    part.seek(0)
                while block := response.read(_BLOCK):
                    part.write(block)
                    yield part.tell()
            failure: Exception | None = None
        except urllib.error.HTTPError:
            raise
        except (ConnectionError, TimeoutError, urllib.error.URLError, http.client.HTTPException) as error:
            failure = error
        part.flush()
        failures = 0 if part.tell() > before else failures + 1
        if failures == _ATTEMPTS:
            raise failure or ConnectionError(f"the server sends nothing of {file.name}")
        if failures:
            time.sleep(_PAUSE)


def _open(model_id: str, revision: str, name: str, start: int) -> http.client.HTTPResponse:
    """Ask for a file from the byte ``start`` on, where the hub says that its content is."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(model_id, name, revision=revision)
    location = get_hf_file_metadata(url).location
    headers = dict(build_hf_headers())
    if urlsplit(location)[:2] != urlsplit(url)[:2]:  # a content network, which the token is no business of
        headers = {key: value for key, value in headers.items() if key.lower() != "authorization"}
    if start:
        headers["Range"] = f"bytes={start}-"
    return urllib.request.urlopen(urllib.request.Request(location, headers=headers), timeout=_TIMEOUT)
