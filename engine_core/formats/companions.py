"""Copy the files that every engine directory has beside the weights, and record in its manifest where it came from."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine_core.errors import (
    BuildError,
    CheckpointError,
    EdgeLLMError,
    EngineDirectoryError,
    first_line,
    refusing_panics,
)
from engine_core.formats.checkpoint import Checkpoint
from engine_core.formats.json_file import read_json
from engine_core.formats.vocab_map import (
    VOCAB_MAP_NAME,
    check_ends,
    read_vocab_map,
    vocab_map_metadata,
    write_vocab_map,
)
from engine_core.models.families import decoder_config, family_of
from engine_core.models.spec import ModelSpec
from engine_core.request import SAMPLING_OPTIONS, ChatMessage
from engine_core.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine_core.backends.capabilities import Capabilities

_log = logging.getLogger(__name__)

# Files that the tokenizer and the chat template may need; copied where the checkpoint has them.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def copy_companions(checkpoint: Checkpoint, directory: Path) -> None:
    """Tokenizer, chat template and generation settings. Raises OSError."""
    for path in _companions(checkpoint):
        shutil.copyfile(path, directory / path.name)


def _companions(checkpoint: Checkpoint) -> list[Path]:
    return [path for path in (checkpoint.directory / name for name in _FILES) if path.is_file()]


def model_sampling(directory: Path) -> dict[str, float]:
    """Return option → value of the sampling that generation_config.json in an engine directory asks for.

    It is empty without that file. Without ``do_sample`` there is no temperature: such a model answers greedily.
    Values that are no number of their option's range are left out. Raises EngineDirectoryError.
    """
    try:
        config = read_json(directory / "generation_config.json", required=False)
    except CheckpointError as error:
        raise EngineDirectoryError(str(error)) from None
    return {name: value for name, value in _sampling_values(config).items() if value is not None}


def _sampling_values(config: dict) -> dict[str, float | None]:
    """Return option → value of a generation_config.json; None for a value that is no number of the option's range."""
    names: tuple[str, ...] = ("repetition_penalty",)
    if config.get("do_sample") is True:
        names += ("temperature", "top_p", "top_k", "min_p")
        config = {"temperature": 1.0, **config}
    found: dict[str, float | None] = {}
    for name in names:
        option, value = SAMPLING_OPTIONS[name], config.get(name)
        if value is None:  # as if it were left out
            continue
        if option.kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        kinds = (int,) if option.kind is int else (int, float)
        is_good = isinstance(value, kinds) and not isinstance(value, bool) and value == value and value in option.range
        found[name] = option.kind(value) if is_good else None
    return found


def check_companions(checkpoint: Checkpoint, vocab_size: int) -> None:
    """Try what requests will need: the ids that end an answer, the tokenizer, and the chat template on one message.

    Warn of a missing tokenizer, of tokens that the model does not have and of sampling that is left out. Raises
    CheckpointError for what no engine could load, and for a chat template that would refuse every request.
    """
    eos_token_ids(checkpoint)
    settings = checkpoint.directory / "generation_config.json"
    asked = read_json(settings, required=False)
    for name in (name for name, value in _sampling_values(asked).items() if value is None):
        _log.warning(
            "%s has %s=%.40r, but it must be %s; it is left out.", settings, name, asked[name],
            SAMPLING_OPTIONS[name].range,
        )  # fmt: skip
    path = checkpoint.directory / "tokenizer.json"
    if not path.is_file():
        if (checkpoint.directory / "tokenizer.model").is_file():
            raise CheckpointError(
                f"{checkpoint.directory} has a tokenizer.model but no tokenizer.json, which is read; convert it: "
                "AutoTokenizer.from_pretrained(DIR, use_fast=True).save_pretrained(DIR)."
            )
        _log.warning(
            "%s has no tokenizer.json: its engine runs benchmarks, but answers no requests.", checkpoint.directory
        )
        return
    tokens = _token_ids(read_json(path))
    bad = [token for token, token_id in tokens.items() if not 0 <= token_id < 1 << 31]
    if bad:
        raise CheckpointError(f"{path} gives the token {bad[0]!r} the id {tokens[bad[0]]}; 0 to 2^31 - 1 are read.")
    beyond = [token for token, token_id in tokens.items() if token_id >= vocab_size]
    if beyond:
        _log.warning(
            "%s has %d tokens beyond the model's vocabulary of %d, such as %r: texts that hold one are refused.",
            path, len(beyond), vocab_size, beyond[0],
        )  # fmt: skip
    named = set(tokens.values())
    if tokens and 2 * len(named) < vocab_size:  # models are padded by a few
        _log.warning(
            "%s has tokens for %d of the model's %d ids: answers lack the text of all others; take the tokenizer that "
            "the model was trained with.", path, len(named), vocab_size,
        )  # fmt: skip
    _try_tokenizer(checkpoint)


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Return the tokenizer that an engine will have: a checkpoint's other files, further chat templates, are not read.

    Raises EngineDirectoryError if it cannot be loaded, BuildError without a directory for temporary files.
    """
    with contextlib.ExitStack() as undo:
        try:
            name = undo.enter_context(tempfile.TemporaryDirectory(prefix="edgellm-tokenizer-"))
            for path in _companions(checkpoint):
                os.symlink(path.absolute(), os.path.join(name, path.name))
        except OSError as error:
            raise BuildError(
                f"The directory for temporary files cannot be written to ({error.strerror or error}); name another one "
                "with TMPDIR."
            ) from error
        try:
            return Tokenizer(Path(name))
        except EngineDirectoryError as error:
            raise EngineDirectoryError(str(error).replace(name, str(checkpoint.path))) from error


def _try_tokenizer(checkpoint: Checkpoint) -> None:
    """Tokenize a message. Raises CheckpointError, BuildError."""
    try:
        with refusing_panics("trying the tokenizer on"):
            tokenizer = open_tokenizer(checkpoint)
            if tokenizer.has_chat_template:
                tokenizer.prompt((ChatMessage("user", "Hello!"),))
            else:
                tokenizer.encode("Hello!")
    except BuildError:
        raise
    except EdgeLLMError as error:
        raise CheckpointError(f"{checkpoint.path} cannot answer requests: {first_line(error)}.") from error


def _token_ids(tokenizer: dict) -> dict[str, int]:
    """Return token → id of what a tokenizer.json lists, as far as it has the usual form."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        found = {token: i for token, i in vocabulary.items() if isinstance(i, int)}
    elif isinstance(vocabulary, list):  # Unigram's: pairs of a token and its score
        found = {str(pair[0]): i for i, pair in enumerate(vocabulary) if isinstance(pair, list) and pair}
    for each in added if isinstance(added, list) else []:
        if isinstance(each, dict) and isinstance(each.get("id"), int):
            found[str(each.get("content"))] = each["id"]
    return found


def find_vocab_map(checkpoint: Checkpoint, given: Path | None) -> Path | None:
    """Return ``given``, or else the checkpoint's own, or None: the LM head keeps all its rows."""
    own = checkpoint.directory / VOCAB_MAP_NAME
    return Path(given) if given is not None else own if own.is_file() else None


def kept_ids(vocab_map: Path | None, checkpoint: Checkpoint, spec: ModelSpec) -> np.ndarray | None:
    """Return int32 [rows], ascending full ids with every end-of-sequence id among them. Raises CheckpointError."""
    if vocab_map is None:
        return None
    kept = read_vocab_map(vocab_map, spec.vocab_size, checkpoint.directory)
    check_ends(vocab_map, kept, eos_token_ids(checkpoint))
    return kept


def copy_vocab_map(vocab_map: Path | None, kept: np.ndarray | None, directory: Path) -> None:
    """Copy the map and its metadata. Raises OSError."""
    if vocab_map is not None and kept is not None:
        write_vocab_map(directory / VOCAB_MAP_NAME, kept, vocab_map_metadata(vocab_map))


def eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the ids of generation_config.json, of config.json and of the tokenizer, which may differ.

    Where none of them names one: that of the family's configuration class. Raises CheckpointError, also for an id that
    the model's vocabulary does not have: an answer would never end with it.
    """
    named = config_ids(checkpoint, "eos_token_id", negative=False)
    size = decoder_config(checkpoint.config).get("vocab_size")
    known = range(size) if isinstance(size, int) else range(1 << 31)
    if bad := [token_id for token_id in named if token_id not in known]:
        raise CheckpointError(
            f"The eos_token_id {bad[0]} of {checkpoint.path} is not in the model's vocabulary of {size} tokens; name "
            "the token that ends an answer in config.json and generation_config.json, or null."
        )
    ids = {*named, *_tokenizer_eos(checkpoint)}
    if not ids and "eos_token_id" not in {**decoder_config(checkpoint.config), **checkpoint.config}:
        default = family_of(checkpoint.config).eos_token_id
        ids = {default} if default is not None and default in known else set()
    return tuple(sorted(ids))


def config_ids(checkpoint: Checkpoint, name: str, *, negative: bool = True) -> list[int]:
    """Return what config.json and generation_config.json have under ``name``: a token id, several, or none.

    Negative ids stand for none, if ``negative``. Raises CheckpointError for what is no id.
    """
    ids: list[int] = []
    for file, config in (
        (checkpoint.config_name, {**decoder_config(checkpoint.config), **checkpoint.config}),
        ("generation_config.json", checkpoint.generation_config),
    ):
        value = config.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        least = -(1 << 31) if negative else 0
        if any(isinstance(x, bool) or not isinstance(x, int) or not least <= x < 2**31 for x in values):
            raise CheckpointError(f"{file} has {name}={str(value)[:60]}, expected a token id or a list of them.")
        ids += [token_id for token_id in values if token_id >= 0]
    return ids


def _tokenizer_eos(checkpoint: Checkpoint) -> list[int]:
    """Return the id of the end-of-sequence token of tokenizer_config.json, else of special_tokens_map.json; or none."""
    directory = checkpoint.directory
    config = read_json(directory / "tokenizer_config.json", required=False)
    token = config.get("eos_token")
    if token is None:
        token = read_json(directory / "special_tokens_map.json", required=False).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        return []
    tokenizer = read_json(directory / "tokenizer.json", required=False)
    found = _token_ids(tokenizer).get(text)
    if not tokenizer:
        decoder = config.get("added_tokens_decoder")
        for index, each in decoder.items() if isinstance(decoder, dict) else ():
            if isinstance(each, dict) and each.get("content") == text and index.isdecimal():
                found = int(index)
    size = decoder_config(checkpoint.config).get("vocab_size")
    is_usable = found is not None and found >= 0 and not (isinstance(size, int) and found >= size)
    return [found] if found is not None and is_usable else []


def notes(capabilities: Capabilities, spec: ModelSpec, max_context: int) -> tuple[str, ...]:
    """Warn of what the user of an engine for ``max_context`` tokens should know, and return it for the manifest."""
    found = capabilities.notes(spec, max_context)
    for note in found:
        _log.warning("%s", note)
    return found


def model_name(checkpoint: Checkpoint) -> str:
    name = str(checkpoint.config.get("_name_or_path") or "")
    return Path(name).name or checkpoint.name


def versions(packages: Sequence[str] = ("onnx",)) -> dict[str, str]:
    """Return the versions of this project, numpy and ``packages``, as far as they are installed."""
    found = {}
    for package in ("edgellm_ros", *packages, "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
