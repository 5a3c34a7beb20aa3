"""``edgellm plan``: what fits a device, of a checkpoint or an engine; nothing is loaded."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from engine_core.backends.capabilities import all_capabilities, capabilities_of
from engine_core.commands.arguments import (
    add_command,
    add_device,
    add_trusted_keys,
    device_of,
    refuse_trusted_keys,
    whole_number,
)
from engine_core.commands.tables import print_notes, print_table, print_verdict
from engine_core.config import BACKENDS, KV_CACHE_TYPES, QUANTIZATIONS
from engine_core.memory import MemoryPlan, format_bytes


def add(commands) -> None:
    parser = add_command(
        commands,
        "plan",
        help="what memory the variants of a checkpoint or an engine take on a device, and what fits",
        example="edgellm plan CHECKPOINT --device orin-nx-16gb --max-context 4096 16384",
        description="Shows what memory the variants of a checkpoint or an engine take on a device, and what fits. "
        "Exit status 1 if what is asked for does not fit or does not run there: the variant of "
        "--quantization, or every variant.",
    )
    parser.add_argument(
        "target", type=Path, help="a checkpoint directory (config.json is enough), a GGUF file or an engine"
    )
    add_device(parser)
    count = whole_number(1)
    parser.add_argument("--max-context", type=count, nargs="+", default=[], help="tokens (default: 4096 or built)")
    parser.add_argument("--max-batch", type=count, nargs="+", default=[1], help="sequences at a time (default: 1)")
    parser.add_argument(
        "--kv-cache-type", choices=KV_CACHE_TYPES[1:], default="", help="number format (default: the backend's)"
    )
    parser.add_argument("--vocab-size", type=count, default=0, help="rows of a reduced LM head (a checkpoint's plan)")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="auto", help="the variant asked for")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="auto: the GPU's where there is one")
    add_trusted_keys(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document, bytes")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from engine_core.models.shapes import is_checkpoint
    from engine_core.planning.plan import advice, is_possible, opened_by_auto, verdict

    device = device_of(options, on_gpu=options.backend == "auto" or capabilities_of(options.backend).on_gpu)
    quantization = "" if options.quantization == "auto" else options.quantization
    if is_checkpoint(options.target):
        refuse_trusted_keys(options)
        name, rows, saved, recommended = _of_checkpoint(options, device, quantization)
    else:
        name, rows, saved = _of_engine(options, device)
        recommended = opened_by_auto(rows)
    possible = is_possible(rows, quantization)
    sentences = advice(rows, quantization, saved)
    if options.json:
        document = {
            "model": name,
            "device": {"name": device.name, "title": device.title, "total": device.total, "reserve": device.reserve},
            "possible": possible,
            "recommended": recommended,
            "advice": sentences,
            "variants": [row.as_dict() for row in rows],
        }
        print(json.dumps(document, indent=2))
    else:
        print_verdict(verdict(name, rows, device.title, quantization, recommended), good=possible)
        print()
        _print(name, rows, device, sentences, recommended)
    return 0 if possible else 1


def _of_checkpoint(options: argparse.Namespace, device, quantization: str):
    from engine_core.errors import BuildError, ConfigurationError
    from engine_core.planning.estimates import CheckpointEstimate, Size
    from engine_core.planning.plan import Asked, plan_checkpoint
    from engine_core.planning.recommend import choose_variant

    estimate = CheckpointEstimate(options.target)
    asked = Asked(
        contexts=tuple(options.max_context),
        batches=tuple(options.max_batch),
        kv_cache_type=options.kv_cache_type,
        quantization=quantization,
        head_rows=options.vocab_size,
        backend="" if options.backend == "auto" else options.backend,
    )
    vocab_size = estimate.spec.vocab_size
    if options.vocab_size > vocab_size:
        raise ConfigurationError(f"--vocab-size is {options.vocab_size}, but the model has {vocab_size} tokens.")
    try:
        rows = plan_checkpoint(estimate, device, asked)
    except ImportError as error:
        raise BuildError(f"This plan needs the Python package {error.name!r}: pip install it.") from error
    backends = {row.quantization: row.backend for row in rows if row.plan is not None}
    if quantization and quantization not in {row.quantization for row in rows}:
        raise ConfigurationError(_no_column(quantization, options.backend, device))

    def saved(kind: str) -> int:
        whole, quarter = (
            estimate.plan(kind, backends[kind], Size(64, head_rows=count), device).total
            for count in (0, vocab_size // 4)
        )
        return whole - quarter

    recommended = ""
    if rows and not quantization:
        chosen = choose_variant(estimate, device, rows[0].max_context, backend=asked.backend)
        usable = {row.quantization for row in rows if row.usable}
        recommended = chosen.quantization if chosen.quantization in usable else ""
    return estimate.name, rows, None if options.vocab_size or not rows else saved, recommended


def _no_column(quantization: str, backend: str, device) -> str:
    """Return the refusal of a format that neither the backend asked for nor any of the device can plan."""
    asked = [capabilities_of(backend)] if backend != "auto" else list(all_capabilities())
    reasons = (
        each.format_refusal(quantization) for each in asked if each.on_gpu == device.has_gpu or backend != "auto"
    )
    return " ".join(reason for reason in reasons if reason is not None)


def _of_engine(options: argparse.Namespace, device):
    from engine_core.config import EngineConfig
    from engine_core.errors import ConfigurationError
    from engine_core.formats.manifest import find_variants
    from engine_core.formats.signatures import read_trusted_keys
    from engine_core.planning.plan import plan_engine

    if options.vocab_size:
        raise ConfigurationError(
            "--vocab-size belongs to a checkpoint's plan; an engine has the head it was built with."
        )
    rows = []
    for batch in options.max_batch:
        for context in options.max_context or [0]:
            config = EngineConfig(
                engine_dir=options.target,
                quantization=options.quantization,
                max_context=context,
                max_batch=batch,
                kv_cache_type=options.kv_cache_type or "auto",
                trusted_keys=options.trusted_keys,
            )
            # What is free here is the backend's own matter: it knows which memory it takes.
            is_here = device.name == "this" and not options.reserve
            rows += plan_engine(options.target, config, None if is_here else device)
    _, first = find_variants(options.target, read_trusted_keys(options.trusted_keys))[0]
    return first.model_name, rows, None


# --- tables -----------------------------------------------------------------------------------------------


def _print(name: str, rows: list, device, sentences: list[str], recommended: str) -> None:
    marked = f"{recommended} *" if recommended else ""
    sizes = list(dict.fromkeys((row.max_context, row.max_batch, row.kv_cache_type) for row in rows))
    notes: dict[str, int] = {}
    for context, batch, kv in sizes:
        here = [row for row in rows if (row.max_context, row.max_batch, row.kv_cache_type) == (context, batch, kv)]
        unit, divisor, digits = _unit(here)
        title = f"{name}: max_context {context}, batch {batch}, {kv} KV cache ({unit})"
        header = ["", *(marked if row.quantization == recommended else row.quantization for row in here)]
        print_table(header, _lines(here, divisor, digits, notes), title=title, marked=marked)
        print()
    numbered = ["* recommended"] if recommended else []
    numbered += [f"[{number}] {text}" for text, number in notes.items()]
    if any(row.only_planned & {kv for _, kv in row.longest} for row in rows):
        numbered.append("(…): would fit, but this version's backend has no such KV cache for that variant.")
    plans = [row.plan for row in rows if row.plan is not None]
    if plans and device.reserve:
        numbered.append(
            f"free: {device.title} has {format_bytes(device.total)}, less {format_bytes(device.reserve)} "
            f"{device.note}; --reserve changes it."
        )
    elif plans:
        numbered.append(f"free: {plans[0].device}, {device.note}.")
    print_notes([*numbered, *sentences, *dict.fromkeys(note for row in rows for note in row.notes)])


def _unit(rows: list) -> tuple[str, int, int]:
    largest = max((row.plan.total for row in rows if row.plan is not None), default=0)
    return ("GiB", 1 << 30, 2) if largest >= 1 << 30 else ("MiB", 1 << 20, 1)


def _lines(rows: list, divisor: int, digits: int, notes: dict[str, int]) -> list[list[str]]:
    def amount(row, count: int | None) -> str:
        return "-" if row.plan is None or count is None else f"{count / divisor:.{digits}f}"

    lines = [["backend", *(row.backend for row in rows)]]
    names = MemoryPlan.names(row.plan for row in rows)
    lines += [[name, *(amount(row, row.plan and row.plan.item(name)) for row in rows)] for name in names]
    lines.append(["total", *(amount(row, row.plan and row.plan.total) for row in rows)])
    lines.append(["free", *(amount(row, row.plan and row.plan.available) for row in rows)])
    verdicts = []
    for row in rows:
        mark = f" [{notes.setdefault(row.why_not, len(notes) + 1)}]" if row.why_not else ""
        verdicts.append("no" + mark if mark else "yes" if row.fits else "too large")
    lines.append(["fits and runs", *verdicts])
    several = len({batch for row in rows for batch, _ in row.longest}) > 1
    for batch, kv in dict.fromkeys(key for row in rows for key in row.longest):
        label = f"longest, {kv} KV" + (f", batch {batch}" if several else "")
        lines.append([label, *(_longest(row, batch, kv) for row in rows)])
    return lines


def _longest(row, batch: int, kv: str) -> str:
    count = row.longest.get((batch, kv))
    if not count:
        return "-"
    return f"({count})" if kv in row.only_planned else str(count)
