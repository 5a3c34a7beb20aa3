"""Hold an answer to a JSON schema: token masks from the ``llguidance`` library.

At each step the mask holds the tokens that keep the text a prefix of some valid value; the model chooses among
them. The library does the grammar; this module bounds what a schema can cost, gives the library only the tokens that
can be sampled, and turns its errors into ``InvalidSchemaError``, which ends one request and nothing else.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine_core.errors import DeadlinePassedError, EngineFaultError, InvalidSchemaError
from engine_core.serving.json_schema import MAX_DIGITS, first_line, parse_schema
from engine_core.serving.json_text import JsonText
from engine_core.serving.schema_check import SchemaChecker
from engine_core.serving.token_table import TokenTable

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from engine_core.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

MAX_SCHEMA_CHARS = 256 * 1024
_CACHED_SCHEMAS = 64
_TIMED_MASKS = 5
# One optional space or line break where JSON allows any amount: small models otherwise fill the context with it.
_WHITE_SPACE = r"[ \n]?"


class ConstraintFactory:
    """Compile schemas for one tokenizer. Built once, with the engine; ``compile`` is thread-safe.

    ``kept_ids``: int [n], the full-vocabulary ids that can be sampled, or None when all can.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        kept_ids: np.ndarray | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._ll_tokenizer: LLTokenizer | None = None
        self._why_not = ""
        self._checker = SchemaChecker()
        self._cache: OrderedDict[bytes, LLMatcher | InvalidSchemaError] = OrderedDict()  # by digest
        self._running: dict[bytes, threading.Event] = {}  # digest → set when it is no longer being compiled
        self._lock = threading.Lock()
        try:
            import llguidance  # noqa: F401
        except ImportError:
            self._why_not = (
                "A JSON schema needs the Python package 'llguidance', which is not installed: pip install llguidance."
            )
            return
        eos = list(eos_token_ids) or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
        try:
            self._tokens = TokenTable(tokenizer, vocab_size, eos, kept_ids)
            self._ll_tokenizer = self._tokens.ll_tokenizer()
        except BaseException as error:  # a Rust panic among them; no reason to refuse the whole engine
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            self._why_not = f"This model's tokenizer cannot be held to a JSON schema: {first_line(error)}."

    def close(self) -> None:
        """End the processes that check schemas; may be called twice."""
        self._checker.close()

    def compile(self, schema: str, timeout: float | None = None) -> JsonConstraint:
        """Return the constraint of a schema, at its start. A schema is compiled once and kept.

        ``timeout``: seconds that the request has left; None: no deadline. Raises InvalidSchemaError if ``schema`` is
        not JSON, not a supported schema, or costs too much; DeadlinePassedError if ``timeout`` passes first, and
        QueueFullError if others' schemas take all there is for them.
        """
        if self._ll_tokenizer is None:
            raise InvalidSchemaError(self._why_not)
        if len(schema) > MAX_SCHEMA_CHARS:
            raise InvalidSchemaError(
                f"The JSON schema has {len(schema)} characters, but at most {MAX_SCHEMA_CHARS} are accepted."
            )
        found = self._find(schema, timeout)
        if isinstance(found, InvalidSchemaError):
            raise InvalidSchemaError(str(found))
        return JsonConstraint(found.deep_copy(), self._vocab_size, self._tokens)

    def mask_seconds(self) -> float:
        """Return how long a mask takes inside a string, s, the shortest of a few; 0.0 where there are no schemas."""
        if self._ll_tokenizer is None:
            return 0.0
        constraint = self.compile('{"type":"string"}')
        opening = np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little"))
        constraint.accept(int(opening[0]))
        times = []
        for _ in range(_TIMED_MASKS):
            start = time.perf_counter()
            constraint.fork().mask()
            times.append(time.perf_counter() - start)
        return min(times)

    def knows(self, schema: str) -> bool:
        """Return whether ``compile`` would answer at once, having seen ``schema`` before."""
        with self._lock:
            return _digest(schema) in self._cache

    def _find(self, schema: str, timeout: float | None) -> LLMatcher | InvalidSchemaError:
        """Return the LLMatcher or the InvalidSchemaError of ``schema``; who asks meanwhile waits for the first."""
        key = _digest(schema)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                if (found := self._cache.get(key)) is not None:
                    self._cache.move_to_end(key)
                    return found
                running = self._running.get(key)
                if running is None:
                    finished = self._running[key] = threading.Event()
                    break
            if not running.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
                raise DeadlinePassedError
        try:
            found = self._compile(schema, deadline)
            with self._lock:
                self._cache[key] = found
                while len(self._cache) > _CACHED_SCHEMAS:
                    self._cache.popitem(last=False)
            return found
        finally:
            with self._lock:
                del self._running[key]
            finished.set()

    def _compile(self, schema: str, deadline: float | None) -> LLMatcher | InvalidSchemaError:
        """Return what is to be kept. Raises DeadlinePassedError or QueueFullError, which say nothing about the schema.

        ``deadline``: of the request, s, time.monotonic.
        """
        from llguidance import LLMatcher

        try:
            parsed = parse_schema(schema)
            overrides = {"whitespace_pattern": _WHITE_SPACE}
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(parsed), overrides=overrides)
        except InvalidSchemaError as error:
            return error
        except ValueError as error:
            return InvalidSchemaError(f"The JSON schema cannot be used: {first_line(error)}.")
        if reason := self._checker.check(grammar, deadline):
            return InvalidSchemaError(f"The JSON schema cannot be used: {first_line(reason)}.")
        try:
            matcher = LLMatcher(self._ll_tokenizer, grammar, log_level=0)
        except ValueError as error:
            return InvalidSchemaError(f"The JSON schema cannot be used: {first_line(error)}.")
        if matcher.is_error():
            return InvalidSchemaError(f"The JSON schema cannot be used: {first_line(matcher.get_error())}.")
        return matcher


class JsonConstraint:
    """The state of one answer. Not thread-safe; used by one request and dropped.

    Text that the schema forces is spelled in one way, as the tokenizer spells it, whether it is sampled token by token
    or fed at once: ``forced`` names such a token, and the mask has no other.
    """

    def __init__(self, matcher, vocab_size: int, tokens: TokenTable) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._mask = np.zeros((vocab_size + 31) // 32, dtype=np.uint32)
        self._text = JsonText()
        self._forced: deque[int] = deque()  # ids of forced text that come next
        self._excluded: frozenset[int] = frozenset()
        self._fork_mask: np.ndarray | None = None

    def exclude(self, token_ids: Iterable[int]) -> None:
        """State which ids the request's logit bias forbids: no text is forced to be spelled with them."""
        self._excluded = frozenset(token_ids)

    def fork(self) -> JsonConstraint:
        """Return the state of the same answer, to try out how it may go on. Its mask is valid until the next fork's."""
        other = copy.copy(self)
        if self._fork_mask is None:
            self._fork_mask = np.zeros_like(self._mask)
        other._mask = self._fork_mask
        other._matcher, other._text, other._forced = self._matcher.deep_copy(), self._text.fork(), self._forced.copy()
        return other

    @property
    def forced(self) -> int | None:
        """The id of the only token that may come next, where the schema forces text; else None."""
        if not self._forced:
            self._forced.extend(self._matcher.compute_ff_tokens())
            if not self._excluded.isdisjoint(self._forced):
                self._forced.clear()
        return self._forced[0] if self._forced else None

    def mask(self) -> np.ndarray:
        """Return uint32 [ceil(vocab_size / 32)], bit i of word i // 32 = token id i may come next.

        The next call reuses the array. Raises InvalidSchemaError if the grammar has become too expensive, or no token
        that can be sampled goes on with the value.
        """
        if (forced := self.forced) is not None:
            self._mask.fill(0)
            self._mask[forced // 32] = np.uint32(1) << np.uint32(forced % 32)
            return self._mask
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._matcher.is_error():
            raise InvalidSchemaError(f"The JSON schema cannot be used: {first_line(self._matcher.get_error())}.")
        if not self._mask.any():
            raise InvalidSchemaError("The JSON schema cannot be met: no token of this model goes on with the value.")
        if not self._text.in_string:
            self._bound_number()
        self._keep_keys_apart()
        return self._mask

    def accept(self, token_id: int) -> None:
        """Move on by a sampled token.

        Raises InvalidSchemaError if the grammar has become too expensive, EngineFaultError if the token was not in the
        mask, which only a defect of a backend can cause.
        """
        if not self._matcher.consume_token(token_id):
            if not (self._mask[token_id // 32] >> np.uint32(token_id % 32)) & 1:
                raise EngineFaultError(f"The backend sampled token {token_id}, which the JSON schema did not allow.")
            raise InvalidSchemaError(f"The JSON schema cannot be used: {first_line(self._matcher.get_error())}.")
        self._text.feed(self._tokens.bytes_of(token_id))
        if self._forced and self._forced.popleft() != token_id:
            self._forced.clear()

    @property
    def complete(self) -> bool:
        """The value is whole and nothing can follow it."""
        return self._matcher.is_stopped()

    def _bound_number(self) -> None:
        """Take away what makes the number at the end, or a new one, too long or infinite, if anything else is left."""
        if self._text.number:
            longer = self._tokens.longer_than(max(0, MAX_DIGITS - self._text.digits))
        else:
            longer = self._tokens.unbounded
        self._take_away(longer)

    def _keep_keys_apart(self) -> None:
        """Take away what writes a key a second time, if anything else is left; the library counts it as another key.

        Parsers keep one value of such a key, and the object may have fewer keys than the schema demands. Where the
        keys are limited by a pattern and all are written already, one comes twice.
        """
        key = self._text.key
        for taken in self._text.taken:
            if key is None:
                same = self._tokens.beginning_with_key(taken)
            elif taken.startswith(key):
                same = self._tokens.beginning_with(taken[len(key) :] + b'"')
            else:
                continue
            if same is not None:
                self._take_away(same)

    def _take_away(self, tokens: np.ndarray) -> None:
        left = self._mask & ~tokens
        if left.any():
            self._mask[:] = left


def _digest(schema: str) -> bytes:
    return hashlib.sha256(schema.encode("utf-8", "surrogatepass")).digest()
