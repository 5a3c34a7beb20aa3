"""``edgellm inspect``: what an engine directory or a checkpoint holds, whether it is whole, and what runs it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from engine_core.backends.capabilities import capabilities_of
from engine_core.commands.arguments import add_command, add_trusted_keys, refuse_trusted_keys
from engine_core.commands.tables import print_notes, print_table, print_verdict
from engine_core.config import QUANTIZATIONS
from engine_core.memory import MemoryPlan, format_bytes


def add(commands) -> None:
    parser = add_command(
        commands,
        "inspect",
        help="check an engine's files and say what it is; or say what a checkpoint is and what runs it",
        example="edgellm inspect ~/engines/demo",
    )
    parser.add_argument("target", type=Path, help="engine or checkpoint directory, or a GGUF file")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="auto", help="one variant (default: all)")
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True, help="check the SHA-256 of every file"
    )
    add_trusted_keys(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document, bytes")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from engine_core.models.shapes import is_checkpoint

    if is_checkpoint(options.target):
        refuse_trusted_keys(options)
        return _checkpoint(options)
    return _engine(options)


# --- engine -----------------------------------------------------------------------------------------------


def _engine(options: argparse.Namespace) -> int:
    from engine_core.config import EngineConfig
    from engine_core.formats.manifest import list_variants, read_manifest, select_variant
    from engine_core.formats.signatures import read_trusted_keys
    from engine_core.planning.describe import answer_format
    from engine_core.planning.plan import plan_engine

    config = EngineConfig(options.target, verify_files=options.verify, trusted_keys=options.trusted_keys)
    trusted = read_trusted_keys(config.trusted_keys)
    directories = list_variants(options.target, trusted)
    if options.quantization != "auto":
        directories = {options.quantization: select_variant(options.target, options.quantization, trusted)}
    manifests = {
        kind: read_manifest(path, verify_hashes=options.verify, trusted=trusted) for kind, path in directories.items()
    }
    rows = {
        kind: plan_engine(path, dataclasses.replace(config, engine_dir=path), None)[0]
        for kind, path in directories.items()
    }
    if options.json:
        variants = [
            {
                "path": str(directories[kind]),
                "manifest": dataclasses.asdict(manifest),
                "verified": options.verify,
                "signed_by_trusted_key": trusted is not None,
                "plan": rows[kind].as_dict(),
                **answer_format(directories[kind]),
            }
            for kind, manifest in manifests.items()
        ]
        print(json.dumps({"kind": "engine", "variants": variants}, indent=2))
        return 0
    model = next(iter(manifests.values())).model_name
    checked = "SHA-256" if options.verify else "size alone"
    whole = "whole" if trusted is None else "whole and signed by a trusted key"
    print_verdict(
        f"{options.target} is {whole}: {model} as {', '.join(manifests)}; every file has been checked ({checked}).",
        warning=not options.verify,
    )
    print()
    _print_variants(manifests, rows, answer_format(next(iter(directories.values()))))
    for kind, manifest in manifests.items():
        print()
        _print_files(f"Files of {directories[kind]}", manifest, options.verify)
    return 0


def _print_variants(manifests: dict, rows: dict, answers: dict[str, Any]) -> None:
    def line(label: str, values: list) -> list[str]:
        return [label, *(str(value) for value in values)]

    found = list(manifests.values())
    first = found[0]
    lines = [
        line("backend", [m.backend for m in found]),
        line("group size", [m.group_size or "-" for m in found]),
        line("max_context", [m.max_context for m in found]),
        line("max_batch", [m.max_batch for m in found]),
        line("KV cache", [m.kv_cache_type for m in found]),
        line("rows of the LM head", [m.reduced_vocab_size or m.model.vocab_size for m in found]),
        line("vocabulary map", ["yes" if m.reduced_vocab_size else "no" for m in found]),
        line("GPU", [m.gpu_arch or "any" if capabilities_of(m.backend).on_gpu else "-" for m in found]),
        line("on disk", [format_bytes(sum(record.size for record in m.files.values())) for m in found]),
    ]
    for name in MemoryPlan.names(row.plan for row in rows.values()):
        lines.append(line(f"memory: {name}", [_amount(rows[kind], name) for kind in manifests]))
    lines.append(line("memory: total", [_amount(rows[kind], "") for kind in manifests]))
    print_table([first.model_name, *manifests], lines)
    from engine_core.planning.describe import sizes

    print()
    values = {"architecture": first.model.architecture} | sizes(first.model) | _shown(answers)
    print_table(["Model", ""], [(name, _number(value)) for name, value in values.items() if value != ""])
    notes = [f"end-of-sequence ids: {', '.join(map(str, first.eos_token_ids)) or 'none'}"]
    notes.append(
        "built with " + (", ".join(f"{k} {v}" for k, v in sorted(first.builder.items())) or "unknown versions")
    )
    notes += [f"{kind}: no memory plan here: {row.why_not}" for kind, row in rows.items() if row.plan is None]
    notes += list(dict.fromkeys(note for m in found for note in m.notes))
    print()
    print_notes(notes)


def _amount(row, name: str) -> str:
    if row.plan is None:
        return "-"
    return format_bytes(row.plan.item(name) if name else row.plan.total)


def _print_files(title: str, manifest, verified: bool) -> None:
    verdict = "ok" if verified else "size ok"
    rows = [(name, format_bytes(r.size), r.sha256[:12], verdict) for name, r in manifest.files.items()]
    print_table(["file", "size", "SHA-256", "check"], rows, title=title)


# --- checkpoint -------------------------------------------------------------------------------------------


def _checkpoint(options: argparse.Namespace) -> int:
    from engine_core.planning.describe import describe_checkpoint

    found = describe_checkpoint(options.target)
    if options.json:
        print(json.dumps({"kind": "checkpoint", **found}, indent=2))
        return 0 if found["supported"] else 1
    backends, kv_cache_types = found.pop("backends"), found.pop("kv_cache_types")
    why_not = found.pop("why_not")
    print_verdict(_checkpoint_verdict(found, backends, why_not), good=found["supported"])
    print()
    shown = _shown(found)
    rows = [(name.replace("_", " "), _number(value)) for name, value in shown.items() if value not in ("", None)]
    print_table([str(options.target), ""], rows)
    print()
    if backends:
        lines = [line for name in backends for line in _backend_lines(name, kv_cache_types[name])]
        print_table(["backend", "quantization", "KV cache"], lines, left=3)
        print()
    print_notes([f"{name}: {reason}" for name, reason in why_not.items()])
    return 0 if found["supported"] else 1


def _checkpoint_verdict(found: dict, backends: dict, why_not: dict) -> str:
    if not found["supported"]:
        return f"{found['architecture']} cannot be built: {why_not['checkpoint']}"
    run = [name for name, kinds in backends.items() if kinds]
    can = "can be planned" if "weights" in why_not else "can be built"
    by = f"{can} for {', '.join(run)}" if run else "is run by no backend"
    return f"{found['architecture']} with {found['parameters']:,} parameters {by}."


def _backend_lines(name: str, kv_cache_types: dict[str, list[str]]) -> list[tuple[str, str, str]]:
    """Return a line for each set of KV cache types, with the weight formats that have it."""
    formats: dict[str, list[str]] = {}
    for kind, types in kv_cache_types.items():
        formats.setdefault(", ".join(types), []).append(kind)
    return [(name, ", ".join(kinds), types) for types, kinds in formats.items()] or [(name, "-", "-")]


def _shown(values: dict[str, Any]) -> dict[str, Any]:
    """Return ``values`` for a table: a model without tools has a tool format, too: none."""
    return values | ({"tool_format": values["tool_format"] or "none"} if "tool_format" in values else {})


def _number(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
