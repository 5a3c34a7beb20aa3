"""Answers that are JSON of a given schema: token masks from the ``llguidance`` library.

At each step the mask holds the tokens that keep the text a prefix of some valid value; the model chooses among
them. The library does the grammar; this module checks input and speaks the package's errors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine_core.errors import EngineFaultError, InvalidSchemaError

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from engine_core.text.tokenizer import Tokenizer

_MAX_SCHEMA_CHARS = 256 * 1024
# One optional space or line break where JSON allows any amount: small models otherwise fill the context with it.
_WHITE_SPACE = r"[ \n]?"


class ConstraintFactory:
    """Compiles schemas for one tokenizer. Built once, with the engine; ``compile`` is thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._ll_tokenizer: LLTokenizer | None = None
        self._why_not = ""
        try:
            import llguidance
        except ImportError:
            self._why_not = (
                "A JSON schema needs the Python package 'llguidance', which is not installed: pip install llguidance."
            )
            return
        eos = list(eos_token_ids) or tokenizer.eos_token_id
        try:
            self._ll_tokenizer = llguidance.LLTokenizer(tokenizer.fast.to_str(), n_vocab=vocab_size, eos_token=eos)
        except ValueError as error:  # no reason to refuse the whole engine
            self._why_not = f"This model's tokenizer cannot be held to a JSON schema: {error}."

    def compile(self, schema: str) -> JsonConstraint:
        """Raises InvalidSchemaError if ``schema`` is not JSON, not a supported schema, or cannot be used here."""
        if self._ll_tokenizer is None:
            raise InvalidSchemaError(self._why_not)
        if len(schema) > _MAX_SCHEMA_CHARS:
            raise InvalidSchemaError(
                f"The JSON schema has {len(schema)} characters, but at most {_MAX_SCHEMA_CHARS} are accepted."
            )
        try:
            parsed = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InvalidSchemaError(f"The JSON schema does not parse as JSON: {error}.") from None
        if not isinstance(parsed, (dict, bool)):
            raise InvalidSchemaError(f"The JSON schema is a {type(parsed).__name__}, but it must be an object.")
        from llguidance import LLMatcher

        try:
            overrides = {"whitespace_pattern": _WHITE_SPACE}
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(parsed), overrides=overrides)
            matcher = LLMatcher(self._ll_tokenizer, grammar, log_level=0)
        except ValueError as error:
            raise InvalidSchemaError(f"The JSON schema cannot be used: {error}.") from None
        if matcher.is_error():
            raise InvalidSchemaError(f"The JSON schema cannot be used: {matcher.get_error().splitlines()[0]}.")
        return JsonConstraint(matcher, self._vocab_size)


class JsonConstraint:
    """The state of one answer. Not thread-safe; used by one request and dropped."""

    def __init__(self, matcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._mask = np.zeros((vocab_size + 31) // 32, dtype=np.uint32)

    def mask(self) -> np.ndarray:
        """uint32 [ceil(vocab_size / 32)], bit i of word i // 32 = token id i may come next. Reused by the next call."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._matcher.is_error():
            raise EngineFaultError(f"The JSON constraint failed: {self._matcher.get_error()}")
        return self._mask

    def accept(self, token_id: int) -> None:
        """Moves on by a sampled token. Raises EngineFaultError if the token was not in the mask."""
        if not self._matcher.consume_token(token_id):
            raise EngineFaultError(f"The JSON constraint refused token {token_id}: {self._matcher.get_error()}")

    @property
    def complete(self) -> bool:
        """The value is whole and nothing can follow it."""
        return self._matcher.is_stopped()
