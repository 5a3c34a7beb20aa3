"""The GGUF files of a repository, by their usual names: model-Q4_K_M.gguf, model-Q4_K_M-00001-of-00002.gguf."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from engine_core.errors import DownloadError
from engine_core.formats.gguf_file import SUFFIX

_QUANTIZATION = re.compile(r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|MXFP4\w*|BF16|FP?16|FP?32))$", re.IGNORECASE)
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_OTHERS = ("mmproj", "imatrix")  # in names of files that are no models


def models_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the models among the files of a repository: name without suffix and part → its files in order."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix.lower() == SUFFIX and not any(other in path.name.lower() for other in _OTHERS):
            found.setdefault(_PART.sub("", name[: -len(SUFFIX)]), []).append(name)
    return found


def quantization_of(stem: str) -> str:
    """Return the quantization that a name ends in, as Q4_K_M; "" = it does not say."""
    match = _QUANTIZATION.search(PurePosixPath(stem).name)
    return match[1].upper() if match else ""


def choose(names: Iterable[str], wanted: str, label: str) -> list[str]:
    """Return the files of the one model with the quantization or the file name ``wanted``, in order.

    Raises DownloadError where there is none, there are several, or a part is missing. ``label``: of the repository.
    """
    models = models_of(names)
    fitting = {stem: files for stem, files in models.items() if wanted.upper() == quantization_of(stem)}
    if not fitting:
        fitting = {stem: files for stem, files in models.items() if wanted in (stem, *files)}
    if not fitting:
        raise DownloadError(f"{label} has no GGUF file in {wanted!r:.60}; it has {_listed(models) or 'none at all'}.")
    if len(fitting) > 1:
        raise DownloadError(
            f"{label} has {len(fitting)} GGUF models in {wanted}, {' and '.join(sorted(fitting)[:3])}; name one of the "
            "files instead."
        )
    (files,) = fitting.values()
    match = _PART.search(files[0][: -len(SUFFIX)])
    if match is not None and len(files) != int(match[2]):
        raise DownloadError(f"{label} has {len(files)} of the {int(match[2])} parts of {files[0]}.")
    return files


def which(names: Iterable[str], label: str) -> str | None:
    """Return a sentence that asks which of a repository's GGUF models is meant; None if it has none."""
    models = models_of(names)
    if not models:
        return None
    best = next((found for stem in models if (found := quantization_of(stem)) == "Q4_K_M"), None)
    example = best or next((found for stem in models if (found := quantization_of(stem))), None) or min(models)
    return f"{label} has GGUF files, in {_listed(models)}; name one, such as {label}:{example}."


def _listed(models: Iterable[str]) -> str:
    return ", ".join(sorted({quantization_of(stem) or stem for stem in models})[:40])
