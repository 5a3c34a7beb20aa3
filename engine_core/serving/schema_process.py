"""The process that compiles grammars for ``schema_check``. Run as a script: it imports nothing of this package."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time

_MEMORY_LIMIT = 1 << 30  # bytes of address space beyond what the library itself maps
# Bytes. The library follows references by recursion, and a stack that overflows ends the process. What passes with this
# one has room to spare on the engine's threads, which have 8 MiB.
_STACK = 2 << 20
_STEPS = 4
# All answers of an engine wait for a mask, and for the tokens of a text that is forced.
_MASK_LIMIT = 0.25  # s of the CPU
_MOST_FORCED = 1 << 16  # bytes


class _Bytes:
    """A tokenizer whose tokens are the single bytes: compiling a grammar does not depend on the model's."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [bytes((byte,)) for byte in range(256)] + [b"<eos>"]
    special_token_ids = [256]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _serve() -> None:
    """The worker process: an empty answer when it is ready, then a line with a grammar in, one with the reason out."""
    import resource

    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=257)
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MEMORY_LIMIT, mapped + _MEMORY_LIMIT))
    _answer("")
    for line in sys.stdin.buffer:
        matcher = LLMatcher(tokenizer, json.loads(line), log_level=0)
        reason = _walk(matcher)
        _answer(matcher.get_error() if matcher.is_error() else reason)


def _walk(matcher) -> str:
    """Compute masks a few bytes into an answer; return why one takes too long, empty if none does.

    A repetition ("a{1000000}") costs only once it has begun.
    """
    for _ in range(_STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        if len(matcher.compute_ff_tokens()) > _MOST_FORCED:
            return f"it forces a text of more than {_MOST_FORCED} bytes"
        start = time.thread_time()
        mask = int.from_bytes(matcher.compute_bitmask(), "little") & (1 << 256) - 1
        if time.thread_time() - start > _MASK_LIMIT:
            return "a step of an answer takes too long"
        if not mask:
            break
        matcher.consume_token(mask.bit_length() - 1)
    return ""


def _answer(reason: str) -> None:
    sys.stdout.buffer.write(json.dumps(reason).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    threading.stack_size(_STACK)
    serving = threading.Thread(target=_serve, daemon=True)
    serving.start()
    with contextlib.suppress(KeyboardInterrupt):
        serving.join()
