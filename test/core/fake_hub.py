"""A hub of models on this machine: the part of its HTTP interface that downloads use, with its refusals."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fakes
import sample_checkpoints

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_checkpoint(directory: Path, architecture: str = "Qwen3ForCausalLM", **changes) -> Path:
    """A small random checkpoint that a build takes, with a tokenizer and a chat template."""
    sample_checkpoints.write(directory, architecture, vocab_size=fakes.VOCAB_SIZE, eos_token_id=258, **changes)
    fakes.write_tokenizer(directory)
    return directory


def write_cache(cache: Path, model_id: str, checkpoint: Path, revision: str = COMMIT) -> Path:
    """A checkpoint as huggingface_hub caches it: blobs named by their hashes, and links to them. Returns its folder."""
    folder = cache / f"models--{model_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    for each in (folder / "blobs", folder / "refs", snapshot):
        each.mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    for path in checkpoint.iterdir():
        blob = folder / "blobs" / etag(path)
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return folder


def is_large(path: Path) -> bool:
    """Return whether the hub keeps a file by its SHA-256 rather than git's hash."""
    return path.suffix in (".safetensors", ".gguf")


def etag(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest() if is_large(path) else git_hash(data)


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeHub:
    """Serves ``models`` (id → directory) at ``url``, each in the one revision COMMIT, also called main.

    ``gated``: ids that nobody may have. ``broken_after``: bytes of a large file after which the connection is cut, and
    each further attempt answered with 503; None = all is well. ``ranges``: the Range of each request for a large file.
    """

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.broken_after: int | None = None
        self.damaged = False  # large files arrive with another byte
        self.ranges: list[str | None] = []
        self._num_cuts = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def cuts(self) -> int:
        """Count a cut; return how many there were before."""
        self._num_cuts += 1
        return self._num_cuts - 1


def _handler(hub: FakeHub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
                self._api(match[1], match[2], match[3] or "main", with_body)
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(match[1], match[2], match[3], with_body)
            else:
                self._refuse(404, "EntryNotFound", with_body)

        def _refusal(self, model_id: str, revision: str) -> tuple[int, str] | None:
            if model_id in hub.gated:
                return 403, "GatedRepo"
            if model_id not in hub.models:
                return 401, "RepoNotFound"
            if revision not in (COMMIT, "main"):
                return 404, "RevisionNotFound"
            return None

        def _api(self, model_id: str, kind: str | None, revision: str, with_body: bool) -> None:
            if (refusal := self._refusal(model_id, revision)) is not None:
                return self._refuse(*refusal, with_body)
            files = sorted(hub.models[model_id].iterdir())
            document: object = {
                "id": model_id,
                "sha": COMMIT,
                "tags": [],
                "siblings": [{"rfilename": path.name} for path in files],
            }
            if kind == "tree":
                document = [_entry(path) for path in files]
            self._send(200, {"Content-Type": "application/json"}, json.dumps(document).encode(), with_body)

        def _file(self, model_id: str, revision: str, name: str, with_body: bool) -> None:
            refusal = self._refusal(model_id, revision)
            if refusal is None and not (hub.models[model_id] / name).is_file():
                refusal = 404, "EntryNotFound"
            if refusal is not None:
                return self._refuse(*refusal, with_body)
            path = hub.models[model_id] / name
            data = path.read_bytes()
            headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if with_body and is_large(path):
                asked = self.headers.get("Range")
                hub.ranges.append(asked)
                if hub.damaged:
                    data = data[:-1] + bytes([data[-1] ^ 1])
                if hub.broken_after is not None:
                    return self._cut(headers, data)
                if asked:
                    start = int(re.fullmatch(r"bytes=(\d+)-.*", asked)[1])
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                    return self._send(206, headers, data[start:], with_body)
            self._send(200, headers, data, with_body)

        def _cut(self, headers: dict[str, str], data: bytes) -> None:
            if hub.cuts():
                return self._refuse(503, "", True)
            self._head(200, headers, len(data))
            self.wfile.write(data[: hub.broken_after])
            self.close_connection = True

        def _refuse(self, status: int, code: str, with_body: bool) -> None:
            self._send(status, {"X-Error-Code": code, "X-Error-Message": "refused"}, b"{}", with_body)

        def _send(self, status: int, headers: dict[str, str], body: bytes, with_body: bool) -> None:
            self._head(status, headers, len(body))
            if with_body:
                self.wfile.write(body)

        def _head(self, status: int, headers: dict[str, str], length: int) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(length)}.items():
                self.send_header(name, value)
            self.end_headers()

    return Handler


def _entry(path: Path) -> dict:
    data = path.read_bytes()
    entry = {"type": "file", "path": path.name, "size": len(data), "oid": git_hash(data)}
    if is_large(path):
        entry["lfs"] = {"oid": etag(path), "size": len(data), "pointerSize": 134}
    return entry
