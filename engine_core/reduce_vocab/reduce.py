"""Chooses the tokens a smaller LM head keeps, from the user's own texts, and writes them as a vocab map with a report.

    reduce_vocab(checkpoint, out, method="input_aware", texts=[Path("chats.jsonl")], fraction=0.25)

On small models the head is up to half of the bytes a decode step reads; a robot's language needs a part of its rows.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine_core.errors import BuildError
from engine_core.formats.atomic import replaced_file
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.companions import config_ids, eos_token_ids, open_tokenizer
from engine_core.formats.vocab_map import (
    FINGERPRINT,
    TOKENIZER_NAME,
    VOCAB_MAP_NAME,
    tokenizer_fingerprint,
    write_vocab_map,
)
from engine_core.models.reader import read_spec
from engine_core.models.spec import ModelSpec
from engine_core.reduce_vocab.report import HeldOut, covered, lost_tokens, step_bytes, summary
from engine_core.reduce_vocab.required import TokenTexts, required_ids
from engine_core.reduce_vocab.select import METHODS, Chooser, Selection
from engine_core.reduce_vocab.texts import Counts, split, tokenize
from engine_core.text.documents import read_documents, read_text
from engine_core.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

REPORT_NAME = "reduced_vocab.json"
HELD_OUT_SHARE = 0.1
_ROW_STEP = 16  # rows of a packed tile of the int8 and int4 kernels, which a rounded size fills


@dataclass(frozen=True)
class ReducedVocab:
    """The token ids that are kept, and the files that say so."""

    ids: np.ndarray  # int32 [rows], ascending
    map_path: Path
    report_path: Path
    report: dict  # what report_path holds


def reduce_vocab(
    checkpoint_dir: Path,
    out_dir: Path,
    *,
    method: str,
    texts: Sequence[Path],
    inputs: Sequence[Path] = (),
    size: int = 0,
    fraction: float = 0.0,
    coverage: float = 0.0,
    held_out: Path | None = None,
    held_out_share: float = HELD_OUT_SHARE,
    keep: Sequence[str] = (),
    report: Callable[[str], None] = _log.info,
) -> ReducedVocab:
    """Writes vocab_map.safetensors and reduced_vocab.json to ``out_dir``, both as a whole or neither.

    ``method``: frequency or input_aware. ``texts``: examples of what the model writes, plain text or JSONL chats (whose
    other messages are examples of what it reads); ``inputs``: further examples of what it reads. One of ``size``
    (tokens), ``fraction`` (of the checkpoint's vocabulary) and ``coverage`` (percent of the texts' written tokens) says
    how many tokens are kept. ``held_out``: a text for the report alone; without one, ``held_out_share`` of the texts.
    ``keep``: token ids, or files whose lines' tokens are kept too.

    Raises BuildError, CheckpointError, UnsupportedModelError, or EngineDirectoryError without a tokenizer.
    """
    _check_options(method, texts, size, fraction, coverage, held_out_share)
    checkpoint = Checkpoint(checkpoint_dir)
    spec = read_spec(checkpoint)
    tokenizer = open_tokenizer(checkpoint)
    counts, held = _count(tokenizer, spec.vocab_size, texts, inputs, held_out, held_out_share)
    report(f"Counted {int(counts.outputs.sum())} written and {int(counts.inputs.sum())} read tokens")
    tokens = TokenTexts.of(tokenizer)
    required = required_ids(
        tokenizer,
        tokens,
        spec.vocab_size,
        eos_token_ids(checkpoint),
        [*config_ids(checkpoint, "bos_token_id"), *config_ids(checkpoint, "pad_token_id")],
        _asked_for(keep, tokenizer, spec.vocab_size),
    )
    allowed = np.zeros(spec.vocab_size, dtype=bool)
    allowed[[index for index in tokens.texts if index < spec.vocab_size]] = True
    chooser = Chooser(method, required, allowed, counts.outputs, counts.inputs)
    selection = chooser.select(_size(chooser, size, fraction, coverage))
    values = _report(checkpoint, spec, selection, method, counts, held, tokens.texts)
    report(summary(values))
    return _write(Path(out_dir), selection.ids, values)


def _check_options(
    method: str, texts: Sequence[Path], size: int, fraction: float, coverage: float, held_out_share: float
) -> None:
    if method not in METHODS:
        raise BuildError(f"The method {method!r} is unknown; it is one of {', '.join(METHODS)}.")
    if not texts:
        raise BuildError("There are no texts to choose the tokens from; give at least one.")
    given = [name for name, value in (("size", size), ("fraction", fraction), ("coverage", coverage)) if value]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise BuildError(f"Exactly one of size, fraction and coverage says how many tokens are kept; found {found}.")
    if size < 0 or not 0 <= fraction <= 1 or not 0 <= coverage <= 100:
        raise BuildError(
            f"size {size}, fraction {fraction}, coverage {coverage}: a size is above 0, a fraction at most 1 and a "
            "coverage at most 100 (percent)."
        )
    if not 0 <= held_out_share < 1:
        raise BuildError(f"The held-out share is {held_out_share}, expected 0 to below 1.")


def _count(
    tokenizer: Tokenizer,
    vocab_size: int,
    texts: Sequence[Path],
    inputs: Sequence[Path],
    held_out: Path | None,
    held_out_share: float,
) -> tuple[Counts, HeldOut]:
    counts, held = Counts.zeros(vocab_size), HeldOut()
    for document, is_held_out in split(texts, held_out, held_out_share):
        sample = tokenize(document, tokenizer)
        if is_held_out:
            held.answers += sample.answers
            held.documents += 1
        else:
            counts.add(sample)
    for path in inputs:
        for document in read_documents(path):
            counts.add(tokenize(document, tokenizer), all_inputs=True)
    if not counts.outputs.any():
        raise BuildError(
            f"The texts {', '.join(map(str, texts))} hold no text the model would write: chats need messages of the "
            "role assistant."
        )
    return counts, held


def _asked_for(keep: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> set[int]:
    """``keep``: "12,17" or the path of a text file, whose lines are tokenized, with and without a blank before."""
    ids: set[int] = set()
    for value in map(str, keep):
        if all(part.strip().isdecimal() for part in value.split(",")):
            ids.update(int(part) for part in value.split(","))
            continue
        if not Path(value).is_file():
            raise BuildError(f"keep has {value!r}, which is neither a list of token ids (12,17) nor a file.")
        for line in read_text(Path(value)).splitlines():
            for text in (line, " " + line):
                ids.update(tokenizer.encode(text, add_special_tokens=False).tolist())
    outside = sorted(index for index in ids if index >= vocab_size)
    if outside:
        raise BuildError(f"keep has the token id {outside[0]}, but the vocabulary has ids from 0 to {vocab_size - 1}.")
    return ids


def _size(chooser: Chooser, size: int, fraction: float, coverage: float) -> int:
    """Return how many tokens to keep. Raises BuildError if there are not so many, or more have to be."""
    if coverage:
        size = chooser.smallest_size(coverage / 100)
    elif fraction:
        size = round(fraction * len(chooser.allowed))
    if fraction or coverage:
        size = min(-(-size // _ROW_STEP) * _ROW_STEP, chooser.most)
    if size < chooser.num_required:
        by_reason = ", ".join(f"{len(ids)} for {reason}" for reason, ids in chooser.required.items() if ids)
        raise BuildError(
            f"The size is {size}, but {chooser.num_required} tokens have to be kept ({by_reason}); "
            "ask for that many or more."
        )
    if size > chooser.most:
        raise BuildError(f"The size is {size}, but the tokenizer has {chooser.most} tokens; ask for fewer.")
    return size


def _report(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    selection: Selection,
    method: str,
    counts: Counts,
    held: HeldOut,
    texts: dict[int, str],
) -> dict:
    ids = selection.ids
    written = int(counts.outputs.sum())
    return {
        "method": method,
        "library_version": _library_version(),
        "tokenizer": tokenizer_fingerprint(checkpoint.directory / TOKENIZER_NAME),
        "vocab_size": spec.vocab_size,
        "tokenizer_vocab_size": len(texts),
        "size": len(ids),
        "fraction": len(ids) / spec.vocab_size,
        "kept_for": selection.reasons,
        "texts": {
            "documents": counts.documents,
            "written_tokens": written,
            "read_tokens": int(counts.inputs.sum()),
            "token_coverage": int(counts.outputs[ids].sum()) / written,
        },
        "held_out": covered(held, ids, spec.vocab_size),
        "step_bytes": step_bytes(spec, len(ids)),
        "lost": lost_tokens(held, ids, spec.vocab_size, texts),
    }


def _library_version() -> str:
    try:
        return importlib.metadata.version("edgellm_ros")
    except importlib.metadata.PackageNotFoundError:  # run from the source folder
        return "source"


def _write(out_dir: Path, ids: np.ndarray, values: dict) -> ReducedVocab:
    metadata = {name: str(values[name]) for name in ("method", "vocab_size", "library_version")}
    metadata[FINGERPRINT] = values["tokenizer"]
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    result = ReducedVocab(ids, out_dir / VOCAB_MAP_NAME, out_dir / REPORT_NAME, values)
    try:
        # Both are written before the first takes its place: a map and its report belong together.
        with replaced_file(result.map_path) as map_path, replaced_file(result.report_path) as report_path:
            write_vocab_map(map_path, ids, metadata)
            report_path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BuildError(
            f"The map could not be written to {out_dir} ({error.strerror or error}); nothing was left behind."
        ) from error
    return result
