"""``edgellm reduce-vocab``: which tokens a smaller LM head keeps, from the user's own texts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from engine_core.commands.arguments import add_command
from engine_core.errors import BuildError

_SHOWN_LOST = 10


def add(commands) -> None:
    parser = add_command(
        commands,
        "reduce-vocab",
        help="choose the tokens a smaller, faster LM head keeps, from your own texts",
        example="edgellm reduce-vocab CHECKPOINT map --texts chats.jsonl --coverage 99.9",
    )
    parser.add_argument("checkpoint", type=Path, help="directory with config.json, safetensors and tokenizer.json")
    parser.add_argument("out", type=Path, help="where vocab_map.safetensors and reduced_vocab.json go")
    parser.add_argument(
        "--texts", type=Path, nargs="+", required=True, help="what the model is to write: plain text or JSONL chats"
    )
    parser.add_argument("--inputs", type=Path, nargs="+", default=[], help="more of what it reads, for input_aware")
    parser.add_argument(
        "--method", choices=("frequency", "input_aware"), default="frequency",
        help="frequency: the tokens written most often; input_aware: those that are read, too (default: frequency)",
    )  # fmt: skip
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--size", type=int, default=0, help="tokens to keep")
    size.add_argument("--fraction", type=float, default=0.0, help="of the vocabulary, for instance 0.25")
    size.add_argument("--coverage", type=float, default=0.0, help="percent of the texts' tokens, for instance 99.9")
    parser.add_argument(
        "--held-out", default="", help="a text only the report sees, or the share of the texts it gets (default: 0.1)"
    )
    parser.add_argument("--keep", nargs="+", default=[], help="token ids (12,17), or files whose lines are kept too")
    parser.add_argument("--json", action="store_true", help="the report as it is written")
    parser.add_argument("--force", action="store_true", help="replace a map that is there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        from engine_core.formats.vocab_map import VOCAB_MAP_NAME
        from engine_core.reduce_vocab.reduce import REPORT_NAME, reduce_vocab
    except ImportError as error:
        raise BuildError(f"Reducing needs the Python package {error.name!r}: pip install it.") from error
    for name in (VOCAB_MAP_NAME, REPORT_NAME):
        if (options.out / name).exists() and not options.force:
            raise BuildError(f"{options.out / name} is there; name another directory, or replace it with --force.")
    result = reduce_vocab(
        options.checkpoint,
        options.out,
        method=options.method,
        texts=options.texts,
        inputs=options.inputs,
        size=options.size,
        fraction=options.fraction,
        coverage=options.coverage,
        keep=options.keep,
        report=lambda line: print(line, file=sys.stderr),
        **_held_out(options.held_out),
    )
    if options.json:
        print(json.dumps(result.report, indent=1, ensure_ascii=False))
    else:
        _show(result.report)
        print(f"\nBuild with it: edgellm build {options.checkpoint} ENGINE_DIR --vocab-map {result.map_path}")
    return 0


def _held_out(value: str) -> dict:
    if not value or Path(value).is_file():
        return {"held_out": Path(value)} if value else {}
    try:
        return {"held_out_share": float(value)}
    except ValueError:
        raise BuildError(f"--held-out is {value!r}, which is neither a file nor a share such as 0.1.") from None


def _show(report: dict) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()

    def table(title: str, *columns: str) -> Table:
        console.print(f"\n[bold]{escape(title)}[/bold]")
        made = Table(box=box.SIMPLE_HEAD)
        for index, column in enumerate(columns):
            made.add_column(column, justify="right" if index else "left")
        return made

    kept = table(
        f"{report['size']} of {report['vocab_size']} tokens ({report['fraction']:.1%}), {report['method']}",
        "kept for",
        "tokens",
    )
    for reason, count in report["kept_for"].items():
        if count:
            kept.add_row(reason, str(count))
    console.print(kept)
    covered = table("Coverage", "of", "documents", "tokens", "tokens covered", "whole answers covered")
    held_out, texts = report["held_out"], report["texts"]
    share = _share(texts["token_coverage"])
    covered.add_row("the texts", str(texts["documents"]), str(texts["written_tokens"]), share, "–")
    covered.add_row(
        "held-out text",
        str(held_out["documents"]),
        str(held_out["tokens"]),
        _share(held_out["token_coverage"]),
        _share(held_out["whole_answers"]),
    )
    console.print(covered)
    steps = table("Weights read in a decode step", "head", "layers", "MiB", "MiB saved", "share saved")
    for row in report["step_bytes"]:
        saved = (f"{row['step_bytes'] / 2**20:.1f}", f"{row['saved_bytes'] / 2**20:.1f}", f"{row['share']:.1%}")
        steps.add_row(row["head"], row["layers"], *saved)
    console.print(steps)
    if report["lost"]:
        lost = table("Lost most often in the held-out text", "token", "id", "times")
        for entry in report["lost"][:_SHOWN_LOST]:
            lost.add_row(escape(json.dumps(entry["text"], ensure_ascii=False)), str(entry["id"]), str(entry["count"]))
        console.print(lost)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"
