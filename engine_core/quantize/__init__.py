"""``edgellm quantize``: calibrate a checkpoint where the method asks for it and write it with quantized weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

_log = logging.getLogger(__name__)


def quantize_checkpoint(
    checkpoint_dir: Path,
    out_dir: Path,
    *,
    method: str,
    group_size: int = 0,
    calibration: Path | None = None,
    num_samples: int = 128,
    sequence_length: int = 256,
    symmetric: bool = True,
    head: bool = False,
    report: Callable[[str], None] = _log.info,
    progress: Callable[[int, int], object] = lambda done, layers: None,
) -> None:
    """Writes the Hugging Face checkpoint ``out_dir`` in the layout of compressed-tensors.

    ``method``: one of ``methods.METHODS``; fp16 dequantizes. ``group_size``: weights that share a scale, 32, 64 or 128;
    0 = the format's own, or a row where it has none. ``calibration``: a text file or JSONL chats, of which up to
    ``num_samples`` pieces of up to ``sequence_length`` tokens are taken; needed by methods that are calibrated, for
    which the checkpoint's own calibration.jsonl is the default. ``symmetric``: False gives zero points, which 4-bit
    integers can have. ``head``: quantize an LM head of its own, too. ``progress`` is called with the layers done and
    all of them.

    Raises CheckpointError, UnsupportedModelError or BuildError; then ``out_dir`` is as it was before.
    """
    from engine_core.quantize.quantizer import quantize

    quantize(
        checkpoint_dir,
        out_dir,
        method=method,
        group_size=group_size,
        calibration=calibration,
        num_samples=num_samples,
        sequence_length=sequence_length,
        symmetric=symmetric,
        head=head,
        report=report,
        progress=progress,
    )
