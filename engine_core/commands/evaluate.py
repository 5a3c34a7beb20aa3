"""``edgellm evaluate``: what a variant costs in quality."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

from engine_core.commands.arguments import add_command, add_engine, add_opening, engine_config
from engine_core.commands.tables import print_notes, print_table
from engine_core.errors import BackendUnavailableError, InsufficientMemoryError


def add(commands) -> None:
    parser = add_command(
        commands,
        "evaluate",
        help="measure the perplexity of an engine's variants on your texts",
        description="Scores the answers of chats, and all of a plain text. Lower is better.",
        example="edgellm evaluate ~/engines/mine --texts held_out.jsonl",
    )
    add_engine(parser)
    add_opening(parser)
    parser.add_argument(
        "--texts",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="plain text, or JSONL chats; none that calibrated the engine or chose its vocabulary",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    rows, refused = [], []
    for backend, variant in _variants(options):
        try:
            rows.append(_evaluate(options, backend, variant))
        except (BackendUnavailableError, InsufficientMemoryError) as error:
            refused.append((f"{variant} ({backend}) was not measured: {error}", error))
    if not rows:
        raise refused[0][1]
    if options.json:
        document = {"kind": "evaluate", "results": rows, "not_measured": [text for text, _ in refused]}
        print(json.dumps(document, indent=2))
        return 0
    best = min((row["perplexity"] for row in rows if row["scored_tokens"]), default=math.nan)
    print_table(
        ["variant", "KV cache", "vocabulary", "perplexity", "against the best", "tokens", "lost"],
        [
            [
                row["variant"],
                row["kv_cache_type"],
                str(row["vocab_size"]),
                f"{row['perplexity']:.4f}",
                f"{100 * (row['perplexity'] / best - 1):+.2f} %",
                str(row["scored_tokens"]),
                str(row["lost_tokens"]),
            ]
            for row in rows
        ],
        left=2,
    )
    print_notes([text for text, _ in refused])
    if any(row["lost_tokens"] for row in rows):
        print_notes(["Lost: tokens outside the reduced vocabulary; the perplexity is that of the others."])
    if any(row["cut_tokens"] for row in rows):
        print_notes([f"Beyond max_context, not scored: {max(row['cut_tokens'] for row in rows)} tokens."])
    return 0


def _variants(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return (backend, quantization) of every variant that the options leave, in order."""
    from engine_core.formats.manifest import find_variants
    from engine_core.formats.signatures import read_trusted_keys

    variants = find_variants(options.engine_dir, read_trusted_keys(options.trusted_keys))
    found = [(manifest.backend, manifest.quantization) for _, manifest in variants]
    kept = sorted(
        (backend, quantization)
        for backend, quantization in found
        if options.backend in ("auto", backend) and options.quantization in ("auto", quantization)
    )
    return kept or [(options.backend, options.quantization)]  # opening it says what there is


def _evaluate(options: argparse.Namespace, backend: str, variant: str) -> dict:
    from engine_core.errors import BuildError
    from engine_core.measure.evaluation import measure_perplexity, sequences_of
    from engine_core.serving.engine import Engine

    config = dataclasses.replace(engine_config(options), backend=backend, quantization=variant)
    show = sys.stderr.isatty() and not options.json

    def report(done: int) -> None:
        if show:
            print(f"\r\033[K{variant}: {done} tokens", end="", file=sys.stderr, flush=True)

    engine = Engine.open(config, lambda line: None)
    try:
        sequences = (s for path in options.texts for s in sequences_of(path, engine.tokenizer))
        found = measure_perplexity(engine, sequences, report)
        if not found.scored_tokens:
            names = ", ".join(map(str, options.texts))
            raise BuildError(f"There is no token to score in {names}; give texts, or chats with answers.")
    finally:
        engine.close()
        if show:
            print("\r\033[K", end="", file=sys.stderr)
    return {
        "variant": engine.manifest.quantization,
        "backend": engine.backend_name,
        "kv_cache_type": engine.manifest.kv_cache_type if config.kv_cache_type == "auto" else config.kv_cache_type,
        "vocab_size": engine.reduced_vocab_size,
        **dataclasses.asdict(found),
    }
