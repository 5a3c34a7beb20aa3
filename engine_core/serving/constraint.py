"""Hold an answer to a JSON schema: token masks from the ``llguidance`` library.

At each step the mask holds the tokens that keep the text a prefix of some valid value; the model chooses among
them. The library does the grammar; this module bounds what a schema can cost, gives the library only the tokens that
can be sampled, and turns its errors into ``InvalidSchemaError``, which ends one request and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine_core.errors import EngineFaultError, InvalidSchemaError
from engine_core.serving.schema_check import SchemaChecker

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from engine_core.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

MAX_SCHEMA_CHARS = 256 * 1024
MAX_SCHEMA_DEPTH = 64  # objects and arrays inside each other
MAX_DIGITS = 17  # of a number: what a double can hold
_CACHED_SCHEMAS = 64
# One optional space or line break where JSON allows any amount: small models otherwise fill the context with it.
_WHITE_SPACE = r"[ \n]?"
# Keywords that describe a schema and do not constrain a value.
_ANNOTATIONS = frozenset(
    "$schema $id $anchor $comment $vocabulary $dynamicAnchor id title description default examples readOnly writeOnly "
    "deprecated $defs definitions nullable discriminator contentEncoding contentMediaType".split()
)
# One of these has to be in a schema with unknown keywords, or it constrains nothing.
_CONSTRAINTS = frozenset(
    "$ref $dynamicRef type enum const anyOf oneOf allOf not if then else properties required additionalProperties "
    "patternProperties propertyNames minProperties maxProperties items prefixItems additionalItems minItems maxItems "
    "uniqueItems contains minContains maxContains minimum maximum exclusiveMinimum exclusiveMaximum multipleOf "
    "minLength maxLength pattern format dependentRequired dependentSchemas unevaluatedProperties "
    "unevaluatedItems".split()
)
# Where schemas lie inside a schema: one, a list of them, or an object of them by name.
_INNER = frozenset(
    "not if then else items additionalItems additionalProperties propertyNames contains unevaluatedProperties "
    "unevaluatedItems anyOf oneOf allOf prefixItems".split()
)
_INNER_BY_NAME = frozenset("properties patternProperties dependentSchemas $defs definitions".split())
_LEADING_DIGITS = re.compile(rb"[0-9.]*")
_EXPONENT = re.compile(rb"[0-9.]*[eE]")
# A number that begins inside the token, outside every string, and has an exponent or too many digits.
_UNBOUNDED = re.compile(rb'[^"]*(?:[0-9.][eE]|[0-9.]{%d})' % (MAX_DIGITS + 2))


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
        self._cache: OrderedDict[bytes, object] = OrderedDict()  # digest → LLMatcher or InvalidSchemaError
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
            self._tokens = _TokenTable(tokenizer, vocab_size, eos, kept_ids)
            self._ll_tokenizer = self._tokens.ll_tokenizer()
        except BaseException as error:  # a Rust panic among them; no reason to refuse the whole engine
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            self._why_not = f"This model's tokenizer cannot be held to a JSON schema: {_first_line(error)}."

    def close(self) -> None:
        """End the processes that check schemas; may be called twice."""
        self._checker.close()

    def compile(self, schema: str, timeout: float | None = None) -> JsonConstraint:
        """Return the constraint of a schema, at its start. A schema is compiled once and kept.

        ``timeout``: seconds left for it, at most. Raises InvalidSchemaError if ``schema`` is not JSON, not a supported
        schema, or costs too much.
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

    def knows(self, schema: str) -> bool:
        """Return whether ``compile`` would answer at once, having seen ``schema`` before."""
        with self._lock:
            return _digest(schema) in self._cache

    def _find(self, schema: str, timeout: float | None) -> object:
        """Return the LLMatcher or the InvalidSchemaError of ``schema``; who asks meanwhile waits for the first."""
        key = _digest(schema)
        end = time.monotonic() + min(self._checker.timeout, timeout or self._checker.timeout)
        while True:
            with self._lock:
                if (found := self._cache.get(key)) is not None:
                    self._cache.move_to_end(key)
                    return found
                running = self._running.get(key)
                if running is None:
                    finished = self._running[key] = threading.Event()
                    break
            if not running.wait(max(0.0, end - time.monotonic())):
                raise InvalidSchemaError("The JSON schema cannot be used: it takes too long to compile.")
            timeout = max(0.05, end - time.monotonic())
        try:
            found = self._compile(schema, timeout)
            with self._lock:
                self._cache[key] = found
                while len(self._cache) > _CACHED_SCHEMAS:
                    self._cache.popitem(last=False)
            return found
        finally:
            with self._lock:
                del self._running[key]
            finished.set()

    def _compile(self, schema: str, timeout: float | None) -> object:
        from llguidance import LLMatcher

        try:
            parsed = _parse(schema)
            overrides = {"whitespace_pattern": _WHITE_SPACE}
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(parsed), overrides=overrides)
        except InvalidSchemaError as error:
            return error
        except ValueError as error:
            return InvalidSchemaError(f"The JSON schema cannot be used: {_first_line(error)}.")
        if reason := self._checker.check(grammar, timeout):
            error = InvalidSchemaError(f"The JSON schema cannot be used: {_first_line(reason)}.")
            if "try again" in reason or (timeout is not None and timeout < self._checker.timeout):
                raise error  # says nothing about the schema: not to be kept
            return error
        try:
            matcher = LLMatcher(self._ll_tokenizer, grammar, log_level=0)
        except ValueError as error:
            return InvalidSchemaError(f"The JSON schema cannot be used: {_first_line(error)}.")
        if matcher.is_error():
            return InvalidSchemaError(f"The JSON schema cannot be used: {_first_line(matcher.get_error())}.")
        return matcher


class JsonConstraint:
    """The state of one answer. Not thread-safe; used by one request and dropped."""

    def __init__(self, matcher, vocab_size: int, tokens: _TokenTable) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._mask = np.zeros((vocab_size + 31) // 32, dtype=np.uint32)
        self._number = b""  # the number at the end of the text so far
        self._in_string = self._escaped = False

    def mask(self) -> np.ndarray:
        """Return uint32 [ceil(vocab_size / 32)], bit i of word i // 32 = token id i may come next.

        The next call reuses the array. Raises InvalidSchemaError if the grammar has become too expensive, or no token
        that can be sampled goes on with the value.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._matcher.is_error():
            raise InvalidSchemaError(f"The JSON schema cannot be used: {_first_line(self._matcher.get_error())}.")
        if not self._mask.any():
            raise InvalidSchemaError("The JSON schema cannot be met: no token of this model goes on with the value.")
        if not self._in_string:
            self._bound_number()
        return self._mask

    def accept(self, token_id: int) -> None:
        """Move on by a sampled token.

        Raises InvalidSchemaError if the grammar has become too expensive, EngineFaultError if the token was not in the
        mask, which only a defect of a backend can cause.
        """
        if not self._matcher.consume_token(token_id):
            if not (self._mask[token_id // 32] >> np.uint32(token_id % 32)) & 1:
                raise EngineFaultError(f"The backend sampled token {token_id}, which the JSON schema did not allow.")
            raise InvalidSchemaError(f"The JSON schema cannot be used: {_first_line(self._matcher.get_error())}.")
        self._follow(self._tokens.bytes_of(token_id))

    @property
    def complete(self) -> bool:
        """The value is whole and nothing can follow it."""
        return self._matcher.is_stopped()

    def _follow(self, text: bytes) -> None:
        """Keep track of whether the text ends inside a number, which is outside every string."""
        for byte in text:
            if self._in_string:
                self._in_string = self._escaped or byte != 0x22
                self._escaped = not self._escaped and byte == 0x5C
                self._number = b""
            elif byte == 0x22:
                self._in_string, self._number = True, b""
            elif byte in b"0123456789.-":
                self._number += bytes((byte,))
            else:
                self._number = b""

    def _bound_number(self) -> None:
        """Take away what makes the number at the end, or a new one, too long or infinite, if anything else is left."""
        if self._number:
            left = MAX_DIGITS - sum(byte in b"0123456789" for byte in self._number)
            longer = self._tokens.longer_than(max(0, left))
        else:
            longer = self._tokens.unbounded
        bounded = self._mask & ~longer
        if bounded.any():
            self._mask[:] = bounded


class _TokenTable:
    """The bytes of every token as the grammar may use them: none for special tokens and for those that are not kept.

    Implements what ``llguidance.TokenizerWrapper`` asks for. A text that the grammar forces is spelled as the model's
    own tokenizer does where that gives these very bytes, and otherwise by the longest tokens that fit: normalizers,
    special tokens and a reduced vocabulary cannot change it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: list[int], kept_ids: np.ndarray | None) -> None:
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer as FastTokenizer

        text = tokenizer.fast.to_str()
        base = LLTokenizer(text, eos_token=eos or None)
        special = {i for i in tokenizer.special_ids if i < vocab_size}
        special |= {i for i in range(min(vocab_size, base.vocab_size)) if base.is_special_token(i)}
        allowed = np.ones(vocab_size, dtype=bool)
        if kept_ids is not None:
            allowed[:] = False
            allowed[kept_ids] = True
        name_of = {i: name for name, i in tokenizer.fast.get_vocab(with_added_tokens=True).items()}
        # Ids without a token, at the end and between: the library gives them a made-up text.
        allowed[[i for i in range(vocab_size) if i not in name_of]] = False
        self._eos = [i for i in eos if i < vocab_size]
        self.eos_token_id = self._eos[0] if self._eos else max(0, vocab_size - 1)
        self.bos_token_id = None
        self.special_token_ids = sorted(special)
        self._bytes = [base.decode_bytes([i]) if allowed[i] and i not in special else b"" for i in range(vocab_size)]
        self.tokens = [
            name_of.get(i, f"<{i}>").encode() if i in special else value for i, value in enumerate(self._bytes)
        ]
        self._vocab_size = vocab_size
        self._fast = FastTokenizer.from_str(text)
        self._fast.no_padding()
        self._fast.no_truncation()
        self._fast.encode_special_tokens = True
        self._by_bytes = {value: i for i, value in reversed(list(enumerate(self._bytes))) if value}
        self._longest = max(map(len, self._by_bytes), default=1)
        self._lead = np.zeros(vocab_size, dtype=np.int32)  # digits a token begins with
        self._exponent = np.zeros(vocab_size, dtype=bool)  # it goes on with an exponent
        for i, value in enumerate(self._bytes):
            if value[:1] and value[:1] in b"0123456789.eE":
                self._lead[i] = len(_LEADING_DIGITS.match(value).group().replace(b".", b""))
                self._exponent[i] = _EXPONENT.match(value) is not None
        self._longer: dict[int, np.ndarray] = {}
        # uint32 mask: tokens in which a number begins that is too long already, or has an exponent
        self.unbounded = self._mask_of(np.array([_UNBOUNDED.match(value) is not None for value in self._bytes]))

    def ll_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(self), n_vocab=self._vocab_size, eos_token=self._eos or None)

    def bytes_of(self, token_id: int) -> bytes:
        return self._bytes[token_id]

    def longer_than(self, digits: int) -> np.ndarray:
        """Return the mask, uint32, of the tokens that begin with more digits, or go on with an exponent."""
        if digits not in self._longer:
            self._longer[digits] = self._mask_of((self._lead > digits) | self._exponent)
        return self._longer[digits]

    def _mask_of(self, chosen: np.ndarray) -> np.ndarray:
        bits = np.zeros((self._vocab_size + 31) // 32 * 32, dtype=np.uint8)
        bits[: self._vocab_size] = chosen
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def __call__(self, text: bytes | str) -> list[int]:
        """Return the ids that spell ``text`` byte for byte."""
        raw = text.encode() if isinstance(text, str) else bytes(text)
        try:
            ids = self._fast.encode(raw.decode("utf-8"), add_special_tokens=False).ids
        except UnicodeDecodeError:
            ids = []
        if ids and all(i < self._vocab_size for i in ids) and b"".join(self._bytes[i] for i in ids) == raw:
            return ids
        ids, start = [], 0
        while start < len(raw):
            for end in range(min(len(raw), start + self._longest), start, -1):
                if (token_id := self._by_bytes.get(raw[start:end])) is not None:
                    ids.append(token_id)
                    start = end
                    break
            else:
                break  # no token has this byte; the mask will be empty and say so
        return ids


def _parse(schema: str) -> dict:
    """Return the schema inside ``schema``, out of OpenAI's wrapper if it is in one. Raises InvalidSchemaError."""

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON value")

    try:
        parsed = json.loads(schema, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidSchemaError(f"The JSON schema does not parse as JSON: {_first_line(error)}.") from None
    if isinstance(parsed, dict) and parsed.get("type") == "json_schema" and isinstance(parsed.get("json_schema"), dict):
        parsed = parsed["json_schema"]
    if isinstance(parsed, dict) and isinstance(parsed.get("schema"), dict) and not parsed.keys() & {"type", "$ref"}:
        unknown = sorted(parsed.keys() - {"name", "strict", "schema", "description"})
        if unknown:
            raise InvalidSchemaError(f"The JSON schema's wrapper has the unknown key {unknown[0]!r}.")
        parsed = parsed["schema"]
    if parsed is True:
        return {}
    if not isinstance(parsed, dict):
        raise InvalidSchemaError(f"The JSON schema is a {type(parsed).__name__}, but it must be an object.")
    if (depth := _depth(parsed)) > MAX_SCHEMA_DEPTH:
        raise InvalidSchemaError(
            f"The JSON schema has {depth} levels of objects and arrays, but at most {MAX_SCHEMA_DEPTH} are accepted."
        )
    if "x-guidance" in parsed:  # llguidance's own options: separators that are no JSON, unknown keywords ignored
        raise InvalidSchemaError("The JSON schema has the key 'x-guidance', which is not accepted; leave it out.")
    for inner in _schemas(parsed):
        unknown = sorted(inner.keys() - _ANNOTATIONS - _CONSTRAINTS)
        if unknown and not inner.keys() & _CONSTRAINTS:
            raise InvalidSchemaError(
                "The JSON schema has a part without a keyword of JSON Schema that constrains it, only "
                f"{', '.join(map(repr, unknown[:3]))[:200]}; it would allow every value."
            )
    return parsed


def _digest(schema: str) -> bytes:
    return hashlib.sha256(schema.encode("utf-8", "surrogatepass")).digest()


def _schemas(schema: dict) -> Iterator[dict]:
    """Yield ``schema`` and every schema inside it; constants, examples and the like are no schemas."""
    waiting: list[object] = [schema]
    while waiting:
        item = waiting.pop()
        if not isinstance(item, dict):
            continue
        yield item
        for key, value in item.items():
            if key in _INNER:
                waiting.extend(value if isinstance(value, list) else [value])
            elif key in _INNER_BY_NAME and isinstance(value, dict):
                waiting.extend(value.values())


def _depth(value: object) -> int:
    """Return how many objects and arrays lie inside each other, without recursion."""
    deepest, level = 0, [value]
    while level:
        deepest += 1
        inner: list[object] = []
        for item in level:
            inner.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        level = [item for item in inner if isinstance(item, (dict, list))]
    return deepest


def _first_line(error: object) -> str:
    """Return the first line of a message, without its full stop, at most 300 characters."""
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("regex parse error"):  # the pattern and a mark follow, and then the reason
        reason = next((line for line in lines if line.startswith("error: ")), "")
        lines[0] = f"a pattern does not parse: {reason.removeprefix('error: ')[:200]}" if reason else lines[0]
    line = (lines[0].strip().rstrip(".:")[:300] if lines else "") or type(error).__name__
    # llguidance's names for a grammar without a continuation.
    return "no value can be written that meets it" if line.startswith("NoExtension") else line
