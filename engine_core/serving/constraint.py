"""Hold an answer to its form, and its calls to the schemas of their tools: token masks from ``llguidance``.

The form is a JSON schema, a regular expression, choices, or a grammar. At each step the mask holds the tokens that keep
the text a prefix of some valid answer; the model chooses among them. The library does the grammar; this module bounds
what a form can cost, gives the library only the tokens that can be sampled, and turns its errors into
``InvalidSchemaError``, which ends one request and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from engine_core.errors import DeadlinePassedError, EngineFaultError, InvalidSchemaError, RequestError
from engine_core.request import LIMITS, TOOL_CHOICES, GenerationRequest, Tool
from engine_core.serving.answer_grammar import AnswerGrammar, Calls
from engine_core.serving.answer_value import AnswerValue
from engine_core.serving.json_schema import COMPACT, FLEXIBLE, MAX_DIGITS, first_line, parse_schema
from engine_core.serving.json_text import JsonText
from engine_core.serving.schema_check import SchemaChecker
from engine_core.serving.token_table import TokenTable
from engine_core.serving.tools import checked_tool
from engine_core.text.answer import AnswerScanner, ExpectedAnswer, Phase
from engine_core.text.call_formats import AnswerFormat
from engine_core.text.tokenizer import Reasoning

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from engine_core.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

CACHED_SCHEMAS = 64
# Characters of all forms that are kept, the newest apart: a grammar takes about 20 bytes for each, outside of any plan.
_CACHED_CHARS = 2 << 20
_TIMED_MASKS = 5
MASK_LIMIT = 0.5  # s of the CPU, for one mask, or forced text, in an engine whose other answers wait for it


@dataclass(frozen=True)
class Demand:
    """Demands of a request on its answer, apart from limits of its cost."""

    json_schema: str | None = None  # of the answer where it has no calls; None: it is no JSON
    compact_json: bool = False
    max_string: int = 0
    regex: str = ""
    choices: tuple[str, ...] = ()
    grammar: str = ""
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    reasoning: Reasoning = Reasoning.NEVER

    @classmethod
    def of(cls, request: GenerationRequest, reasoning: Reasoning = Reasoning.NEVER) -> Demand:
        """Return that of ``request``, whose prompt goes on with ``reasoning``."""
        return cls(
            json_schema=request.json_schema or None,
            compact_json=request.compact_json,
            max_string=request.max_string,
            regex=request.regex,
            choices=request.choices,
            grammar=request.grammar,
            tools=request.tools,
            tool_choice=request.tool_choice,
            parallel_tool_calls=request.parallel_tool_calls,
            reasoning=reasoning,
        )

    @property
    def subject(self) -> str:
        """The part of the request that is at fault where the grammar is."""
        if self.json_schema is not None:
            return "The JSON schema"
        if self.regex:
            return "The regular expression"
        if self.choices:
            return "The list of choices"
        if self.grammar:
            return "The grammar"
        return "The parameters of the tools" if self.tools else "The JSON schema"

    @property
    def num_chars(self) -> int:
        """Characters of the form and of the tools' parameters."""
        texts = (self.json_schema or "", self.regex, self.grammar, *self.choices)
        return sum(map(len, texts)) + sum(len(text) for tool in self.tools for text in tool.texts)

    def value(self) -> AnswerValue | None:
        """Return the form of the answer where it has no calls; None: it is text. Raises InvalidSchemaError."""
        if self.json_schema is not None:
            return AnswerValue.json(self.json_schema, self.compact_json, self.max_string)
        if self.regex:
            return AnswerValue.regex(self.regex)
        if self.choices:
            return AnswerValue.choices(self.choices)
        return AnswerValue.lark(self.grammar) if self.grammar else None


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
        self._format = AnswerFormat()
        self._ll_tokenizer: LLTokenizer | None = None
        self._why_not = ""
        self._checker = SchemaChecker()
        self._cache: OrderedDict[bytes, LLMatcher | InvalidSchemaError] = OrderedDict()  # by digest
        self._num_chars: dict[bytes, int] = {}  # of what is in the cache
        self._running: dict[bytes, threading.Event] = {}  # digest → set when it is no longer being compiled
        self._lock = threading.Lock()
        try:
            import llguidance  # noqa: F401
        except ImportError:
            self._why_not = (
                "Forms of answers, such as JSON schemas, need the Python package 'llguidance', which is not installed: "
                "pip install llguidance."
            )
            return
        eos = list(eos_token_ids) or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
        try:
            self._format = tokenizer.answer_format
            self._tokens = TokenTable(tokenizer, vocab_size, eos, kept_ids)
            self._ll_tokenizer = self._tokens.ll_tokenizer()
        except BaseException as error:  # a Rust panic among them; no reason to refuse the whole engine
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            self._why_not = f"This model's tokenizer cannot be held to a form: {first_line(error)}."

    def close(self) -> None:
        """End the processes that check schemas; may be called twice."""
        self._checker.close()

    def compile(
        self,
        demand: Demand | str,
        timeout: float | None = None,
        expected: ExpectedAnswer | None = None,
        budget: int = 0,
    ) -> AnswerConstraint:
        """Return the constraint of an answer, at its start. What is demanded is compiled once and kept.

        ``demand``: a text is a JSON schema of the whole answer. ``timeout``: seconds that the request has left; None:
        no deadline. ``expected``: how the answer is read, where it is not all a JSON value. ``budget``: tokens of
        reasoning that it may have; 0: any number. Raises InvalidSchemaError if a schema is not JSON, not supported, or
        costs too much; DeadlinePassedError if ``timeout`` passes first, and QueueFullError if others' schemas take all
        there is for them.
        """
        if self._ll_tokenizer is None:
            raise InvalidSchemaError(self._why_not)
        demand = Demand(demand) if isinstance(demand, str) else demand
        if (size := len(demand.json_schema or "")) > LIMITS.schema_bytes:
            raise InvalidSchemaError(
                f"The JSON schema has {size} characters, but at most {LIMITS.schema_bytes} are accepted."
            )
        found = self._find(demand, timeout)
        if isinstance(found, InvalidSchemaError):
            raise InvalidSchemaError(str(found))
        closing: list[int] = []
        if budget and self._format.reasoning is not None:
            end = self._format.id_of(self._format.reasoning.end)
            text = "\n" if end is not None else f"\n{self._format.reasoning.end.text}"
            closing = self._tokens(text) + ([] if end is None else [end])
        return AnswerConstraint(
            found.deep_copy(),
            self._vocab_size,
            self._tokens,
            expected=expected,
            subject=demand.subject,
            is_json=demand.json_schema is not None or bool(demand.tools),
            may_sample=self._tokens.textual if demand.grammar else None,
            closing=closing,
            budget=budget,
            give_up=partial(self._keep, _digest(demand), _too_slow(demand.subject), demand.num_chars),
        )

    def mask_seconds(self) -> float:
        """Return how long a mask takes inside a string, s, the shortest of a few; 0.0 where none can be written."""
        times = []
        try:
            constraint = self.compile('{"type":"string"}')
            opening = np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little"))
            constraint.accept(int(opening[0]))
            for _ in range(_TIMED_MASKS):
                start = time.perf_counter()
                constraint.fork().mask()
                times.append(time.perf_counter() - start)
        except RequestError:  # no quote in a reduced vocabulary, say: an engine for text is one all the same
            return 0.0
        return min(times)

    def knows(self, request: GenerationRequest) -> bool:
        """Return whether what ``request`` demands has been compiled, so that preparing it takes no time."""
        if not (request.has_form or request.tools):
            return True
        keys = [_digest(Demand.of(request, reasoning)) for reasoning in Reasoning]
        with self._lock:
            return any(key in self._cache for key in keys)

    def _keep(self, key: bytes, found: LLMatcher | InvalidSchemaError, num_chars: int) -> None:
        """Take what was compiled into the cache, and drop what was used least recently where that is too much."""
        with self._lock:
            self._cache[key], self._num_chars[key] = found, num_chars
            total = sum(self._num_chars.values())
            while len(self._cache) > CACHED_SCHEMAS or (total > _CACHED_CHARS and len(self._cache) > 1):
                oldest, _ = self._cache.popitem(last=False)
                total -= self._num_chars.pop(oldest)

    def _find(self, demand: Demand, timeout: float | None) -> LLMatcher | InvalidSchemaError:
        """Return the LLMatcher or the InvalidSchemaError of ``demand``; who asks meanwhile waits for the first."""
        key = _digest(demand)
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
            found = self._compile(demand, deadline)
            self._keep(key, found, demand.num_chars)
            return found
        finally:
            with self._lock:
                del self._running[key]
            finished.set()

    def _compile(self, demand: Demand, deadline: float | None) -> LLMatcher | InvalidSchemaError:
        """Return what is to be kept. Raises DeadlinePassedError or QueueFullError, which say nothing about the demand.

        ``deadline``: of the request, s, time.monotonic.
        """
        from llguidance import LLMatcher

        unusable = f"{demand.subject} cannot be used"
        try:
            grammar, tried = self._grammars(demand)
        except InvalidSchemaError as error:
            return error
        except ValueError as error:
            return InvalidSchemaError(f"{unusable}: {first_line(error)}.")
        if reason := self._checker.check(tried, deadline):
            return self._blamed(demand, deadline) or InvalidSchemaError(f"{unusable}: {first_line(reason)}.")
        try:
            matcher = LLMatcher(self._ll_tokenizer, grammar, log_level=0)
        except ValueError as error:
            return InvalidSchemaError(f"{unusable}: {first_line(error)}.")
        if matcher.is_error():
            return InvalidSchemaError(f"{unusable}: {first_line(matcher.get_error())}.")
        return matcher

    def _grammars(self, demand: Demand) -> tuple[str, str]:
        """Return the grammar of an answer, and one that costs as much and needs no tokens of the model.

        Raises InvalidSchemaError or ValueError.
        """
        from llguidance import LLMatcher

        if demand.json_schema is not None and not demand.tools and demand.reasoning is Reasoning.NEVER:
            parsed = parse_schema(demand.json_schema, demand.max_string)
            overrides = COMPACT if demand.compact_json else FLEXIBLE
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(parsed), overrides=overrides)
            return grammar, grammar
        value = demand.value()
        calls = None
        if demand.tools:
            is_named = demand.tool_choice not in TOOL_CHOICES
            chosen = [
                checked_tool(tool)
                for tool in demand.tools
                if demand.tool_choice != "none" and (not is_named or tool.name == demand.tool_choice)
            ]
            several = demand.parallel_tool_calls and not is_named
            calls = Calls(chosen, required=demand.tool_choice not in ("auto", "none"), several=several)
        written = (
            AnswerGrammar(self._format, demand.reasoning, value, calls, token_markers).text()
            for token_markers in (True, False)
        )
        own, tried = written
        return own, tried

    def _blamed(self, demand: Demand, deadline: float | None) -> InvalidSchemaError | None:
        """Return the error that names the tool whose parameters cannot be compiled; None if each of them can."""
        from llguidance import LLMatcher

        for tool in demand.tools if not demand.json_schema else ():
            schema = {**checked_tool(tool).schema}
            reason = self._checker.check(LLMatcher.grammar_from_json_schema(json.dumps(schema)), deadline)
            if reason:
                return InvalidSchemaError(
                    f"The parameters of the tool {tool.name!r} cannot be used: {first_line(reason)}."
                )
        return None


class AnswerConstraint:
    """The state of one answer. Not thread-safe; used by one request and dropped.

    Text that the schema forces is spelled in one way, as the tokenizer spells it, whether it is sampled token by token
    or fed at once: ``forced`` names such a token, and the mask has no other.
    """

    def __init__(
        self,
        matcher,
        vocab_size: int,
        tokens: TokenTable,
        *,
        expected: ExpectedAnswer | None = None,
        subject: str = "The JSON schema",
        is_json: bool = True,
        may_sample: np.ndarray | None = None,
        closing: Sequence[int] = (),
        budget: int = 0,
        give_up: Callable[[], None] = lambda: None,
    ) -> None:
        """``expected``: None for an answer that is all one value, of JSON if ``is_json``. ``may_sample``: uint32, as
        ``mask``, the tokens that may be sampled whatever the grammar says; None: it has no others. ``closing``: the ids
        that end the reasoning after ``budget`` tokens of it; 0: it ends by itself. ``give_up`` is called when a mask
        has taken too long, so that no further answer gets there."""
        self._matcher = matcher
        self._subject = subject
        self._scanner = None if expected is None else AnswerScanner(expected)
        self._markers = {} if expected is None else expected.token_markers
        self._expected_value = expected is not None and expected.is_value
        self._is_json = is_json
        self._may_sample = None if may_sample is None else may_sample.copy()
        if self._may_sample is not None:
            for marker in self._markers:
                self._may_sample[marker // 32] |= np.uint32(1) << np.uint32(marker % 32)
        self._num_values = 0
        self._closing, self._budget = tuple(closing), budget
        self._give_up = give_up
        self._num_reasoning = 0
        self._tokens = tokens
        self._unspelled = tokens.unspelled
        self._mask = np.zeros((vocab_size + 31) // 32, dtype=np.uint32)
        self._text = JsonText()
        self._forced: deque[int] = deque()  # ids of forced text that come next
        self._excluded: frozenset[int] = frozenset()
        self._fork_mask: np.ndarray | None = None

    def exclude(self, token_ids: Iterable[int]) -> None:
        """State which ids the request's logit bias forbids: no text is forced to be spelled with them."""
        self._excluded = frozenset(token_ids)

    def fork(self) -> AnswerConstraint:
        """Return the state of the same answer, to try out how it may go on. Its mask is valid until the next fork's."""
        other = copy.copy(self)
        if self._fork_mask is None:
            self._fork_mask = np.zeros_like(self._mask)
        other._mask = self._fork_mask
        other._matcher, other._text, other._forced = self._matcher.deep_copy(), self._text.fork(), self._forced.copy()
        other._scanner = None if self._scanner is None else self._scanner.fork()
        return other

    @property
    def forced(self) -> int | None:
        """The id of the only token that may come next, where the schema forces text; else None.

        Raises InvalidSchemaError if that takes too long.
        """
        if not self._forced:
            self._end_reasoning()
        if not self._forced:
            with self._bounded():
                self._forced.extend(takewhile(self._is_sampled, self._matcher.compute_ff_tokens()))
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
        with self._bounded():
            self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._matcher.is_error():
            raise InvalidSchemaError(f"{self._subject} cannot be used: {first_line(self._matcher.get_error())}.")
        self._mask[self._unspelled // 32] &= ~(np.uint32(1) << np.uint32(self._unspelled % 32))
        if self._may_sample is not None:
            self._mask &= self._may_sample
        if not self._mask.any():
            raise InvalidSchemaError(f"{self._subject} cannot be met: no token of this model goes on with the answer.")
        if self._is_json if self._scanner is None else self._scanner.in_value:
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
                raise EngineFaultError(f"The backend sampled token {token_id}, which the mask did not allow.")
            raise InvalidSchemaError(f"{self._subject} cannot be used: {first_line(self._matcher.get_error())}.")
        self._follow(token_id)
        if self._forced and self._forced.popleft() != token_id:
            self._forced.clear()

    @property
    def complete(self) -> bool:
        """The value is whole and nothing can follow it."""
        return self._matcher.is_stopped()

    def _follow(self, token_id: int) -> None:
        """Note what a token adds to the JSON value that the answer is in."""
        scanner = self._scanner
        if scanner is None:
            if self._is_json:
                self._text.feed(self._tokens.bytes_of(token_id))
            return
        if scanner.phase is Phase.REASONING:
            self._num_reasoning += 1
        marker = self._markers.get(token_id)
        parts = scanner.feed(self._tokens.bytes_of(token_id)) if marker is None else scanner.marker(marker)
        if scanner.num_values != self._num_values:
            self._num_values = scanner.num_values
            self._text = JsonText()
        is_value = self._expected_value
        for phase, data in parts:
            if phase is Phase.CALLS or (phase is Phase.TEXT and is_value):
                self._text.feed(data)

    @contextlib.contextmanager
    def _bounded(self) -> Iterator[None]:
        """Raises InvalidSchemaError after work of the library that has taken longer than MASK_LIMIT."""
        start = time.thread_time()
        yield
        if time.thread_time() - start > MASK_LIMIT:
            self._give_up()
            raise _too_slow(self._subject)

    def _is_sampled(self, token_id: int) -> bool:
        if token_id == self._unspelled:
            return False
        found = self._may_sample
        return found is None or bool((found[token_id // 32] >> np.uint32(token_id % 32)) & 1)

    def _end_reasoning(self) -> None:
        """Force the end of reasoning that has had its budget, as soon as it can stand there."""
        if not self._closing or self._scanner is None or self._scanner.phase is not Phase.REASONING:
            return
        if not self._excluded.isdisjoint(self._closing):
            return
        if self._num_reasoning >= self._budget and self._matcher.validate_tokens(list(self._closing)) == len(
            self._closing
        ):
            self._forced.extend(self._closing)

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


def _too_slow(subject: str) -> InvalidSchemaError:
    return InvalidSchemaError(f"{subject} cannot be used: a step of an answer takes too long.")


def _digest(demand: Demand) -> bytes:
    return hashlib.sha256(repr(demand).encode("utf-8", "surrogatepass")).digest()
