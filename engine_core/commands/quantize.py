"""``edgellm quantize``: a smaller checkpoint from a checkpoint."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from engine_core.commands.arguments import add_command, add_force, check_output, whole_number
from engine_core.commands.progress import shown
from engine_core.commands.tables import print_verdict
from engine_core.errors import BuildError
from engine_core.memory import format_bytes
from engine_core.quantize.methods import GROUP_SIZES, METHODS


def add(commands) -> None:
    parser = add_command(
        commands,
        "quantize",
        help="make a smaller checkpoint from a Hugging Face checkpoint or a GGUF file",
        example="edgellm quantize CHECKPOINT small --method int4\n"
        "edgellm quantize CHECKPOINT small --method int4_awq --calibration chats.jsonl",
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
        choices=(0, *GROUP_SIZES),
        help="weights that share a scale, for integers (default: the method's own, else a whole row)",
    )
    parser.add_argument(
        "--calibration", type=Path, help="text file or JSONL chats (default: the checkpoint's calibration.jsonl)"
    )
    count = whole_number(1)
    parser.add_argument("--num-samples", type=count, default=128, help="chats or pieces of text (default: 128)")
    parser.add_argument("--sequence-length", type=count, default=256, help="tokens of each at most (default: 256)")
    parser.add_argument("--asymmetric", action="store_true", help="zero points, for 4-bit integers")
    parser.add_argument("--head", action="store_true", help="quantize an LM head of its own, too")
    add_force(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        from engine_core.quantize import quantize_checkpoint
    except ImportError as error:
        raise BuildError(f"Quantizing needs the Python package {error.name!r}: pip install it.") from error
    check_output(options.out, options.force)
    with shown(f"Quantizing to {options.method}") as (report, progress):
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
            report=report,
            progress=lambda done, total: progress(done / max(1, total)),
        )
    size = format_bytes(sum(path.stat().st_size for path in options.out.iterdir() if path.is_file()))
    print_verdict(f"Wrote {options.out}: a checkpoint in {options.method}, {size}.")
    print(f"Build an engine of it: edgellm build {shlex.quote(str(options.out))} ENGINE_DIR")
    return 0
