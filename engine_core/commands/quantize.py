"""``edgellm quantize``: a smaller checkpoint from a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine_core.errors import BuildError
from engine_core.quantize.methods import METHODS


def add(commands) -> None:
    parser = commands.add_parser(
        "quantize", help="make a smaller checkpoint from a Hugging Face checkpoint or a GGUF file"
    )
    parser.add_argument("checkpoint", type=Path, help="directory with config.json and safetensors, or a GGUF file")
    parser.add_argument("out", type=Path, help="the directory to write; takes its name only when it is whole")
    parser.add_argument(
        "--method",
        choices=METHODS,
        required=True,
        help="the weight format; int8_smoothquant is int8 with the outliers of the activations moved into the weights",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        default=0,
        choices=(0, 32, 64, 128),
        help="weights that share a scale, for integers (default: the method's own, else a whole row)",
    )
    parser.add_argument(
        "--calibration", type=Path, help="text file or JSONL chats (default: the checkpoint's calibration.jsonl)"
    )
    parser.add_argument("--num-samples", type=int, default=128, help="chats or pieces of text (default: 128)")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of each at most (default: 256)")
    parser.add_argument("--asymmetric", action="store_true", help="zero points, for 4-bit integers")
    parser.add_argument("--head", action="store_true", help="quantize an LM head of its own, too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from engine_core.quantize import quantize_checkpoint
    except ImportError as error:
        raise BuildError(f"Quantizing needs the Python package {error.name!r}: pip install it.") from error
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        layers = bar.add_task("Layers", total=None)
        quantize_checkpoint(
            options.checkpoint,
            options.out,
            method=options.method,
            group_size=options.group_size,
            calibration=options.calibration,
            num_samples=options.num_samples,
            sequence_length=options.sequence_length,
            symmetric=not options.asymmetric,
            head=options.head,
            report=print,
            progress=lambda done, total: bar.update(layers, completed=done, total=total),
        )
    return 0
