"""Compile a JSON schema in a process that can be killed, before it is compiled where it would block the engine.

Some schemas take the grammar library minutes and gigabytes (``{"multipleOf": 9999991}``), and a native call cannot be
interrupted. A ``SchemaChecker`` hands each schema that it has not seen to a worker process with a limit on memory and
waits for a limited time. Worker processes are started when first needed, kept for the next schema, and killed when they
take too long.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import threading
import time

_MEMORY_LIMIT = 1 << 30  # bytes of address space beyond what the library itself maps
_MAX_PROCESSES = 4
_TOO_LONG = "it takes too long to compile"
# Bytes. The library follows references by recursion, and a stack that overflows ends the process. What passes with this
# one has room to spare on the engine's threads, which have 8 MiB.
_STACK = 2 << 20


class SchemaChecker:
    """Thread-safe. ``timeout``: seconds a schema may take to compile."""

    def __init__(self, timeout: float = 5.0) -> None:
        self.timeout = timeout
        self._idle: list[subprocess.Popen] = []
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(_MAX_PROCESSES)
        self._closed = False

    def check(self, grammar: str, timeout: float | None = None) -> str:
        """Return why ``grammar`` (llguidance's JSON form) cannot be compiled within the limits; empty if it can."""
        end = time.monotonic() + min(self.timeout, timeout or self.timeout)
        if not self._places.acquire(timeout=max(0.0, end - time.monotonic())):
            return "other schemas are being compiled; try again later"
        try:
            return self._check(grammar, end)
        finally:
            self._places.release()

    def close(self) -> None:
        """End the worker processes; may be called twice."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            _kill(process)

    def _check(self, grammar: str, end: float) -> str:
        with self._lock:
            process = self._idle.pop() if self._idle else None
        if process is None or process.poll() is not None:
            try:
                process = subprocess.Popen(
                    [sys.executable, __file__],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            except OSError as error:
                return f"the process that checks it cannot be started ({error.strerror}); try again later"
        try:
            process.stdin.write(json.dumps(grammar).encode() + b"\n")
            process.stdin.flush()
            answer = _read_line(process, end)
        except OSError:
            answer = None
        if answer is None:
            died = process.poll() is not None
            _kill(process)
            return "it takes too much memory, or its references are too deep, to compile" if died else _TOO_LONG
        with self._lock:
            if not self._closed:
                self._idle.append(process)
                return answer
        _kill(process)
        return answer


def _read_line(process: subprocess.Popen, end: float) -> str | None:
    """Return the answer; None if the process ended or said nothing until ``end`` (time.monotonic)."""
    data = b""
    while not data.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
        part = process.stdout.read1(65536) if ready else b""
        if not part:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05 if ready else 0.0)
            return None
        data += part
    return json.loads(data)


def _kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


class _Bytes:
    """A tokenizer whose tokens are the single bytes: compiling a grammar does not depend on the model's."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [bytes((byte,)) for byte in range(256)] + [b"<eos>"]
    special_token_ids = [256]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _serve() -> None:
    """The worker process: a line with a grammar in, a line with the reason against it out."""
    import resource

    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=257)
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MEMORY_LIMIT, mapped + _MEMORY_LIMIT))
    for line in sys.stdin.buffer:
        matcher = LLMatcher(tokenizer, json.loads(line), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        reason = matcher.get_error() if matcher.is_error() else ""
        sys.stdout.buffer.write(json.dumps(reason).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    threading.stack_size(_STACK)
    serving = threading.Thread(target=_serve, daemon=True)
    serving.start()
    with contextlib.suppress(KeyboardInterrupt):
        serving.join()
