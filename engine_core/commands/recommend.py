"""``edgellm recommend``: known public models, what they take on a device, and the best one for it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine_core.commands.arguments import add_command, add_device, device_of, whole_number
from engine_core.commands.tables import print_notes, print_table, print_verdict

if TYPE_CHECKING:
    from engine_core.planning.recommend import Offer

_TASKS = ("chat", "tools", "vision")


def add(commands) -> None:
    parser = add_command(
        commands,
        "recommend",
        help="known public models, what each takes on a device, and which one to get",
        description="Marks the largest model that fits and is estimated to answer fluently. Nothing is downloaded. "
        "Exit status 1 if none fits.",
        example="edgellm recommend --device orin-nx-16gb --task tools",
    )
    add_device(parser)
    parser.add_argument("--bandwidth", type=_bandwidth, help="GB/s of the device's memory, for the rates")
    parser.add_argument(
        "--task",
        choices=_TASKS,
        default="chat",
        help="tools: models whose template has tool calls; vision: models that see images (default: chat)",
    )
    parser.add_argument(
        "--max-context", type=whole_number(0), default=0, help="tokens (default: 4096, or the model's if shorter)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document, bytes")
    parser.set_defaults(run=run)


def _bandwidth(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a number of GB/s above 0")
    return value


def run(options: argparse.Namespace) -> int:
    from engine_core.planning import devices, recommend

    device = device_of(options, measure=options.bandwidth is None)
    if options.bandwidth is not None:
        device = devices.with_bandwidth(device, options.bandwidth)
    found = recommend.offers(device, options.task, options.max_context)
    best = recommend.best_of(found)
    if options.json:
        document = {
            "device": {"name": device.name, "title": device.title, "free": device.free, "bandwidth": device.bandwidth},
            "best": best.model.id if best else None,
            "models": [_as_dict(offer) for offer in found],
        }
        print(json.dumps(document, indent=2))
    else:
        _print(found, best, device)
    return 0 if best else 1


def _as_dict(offer: Offer) -> dict:
    model, variant = offer.model, offer.variant
    return {
        "id": model.id,
        "revision": model.revision,
        "licence": model.licence,
        "gated": model.gated,
        "parameters": model.spec.num_parameters,
        "context": model.context,
        "template": model.template,
        "tools": model.tools,
        "thinking": model.thinking,
        "quantization": variant.quantization,
        "backend": variant.backend,
        "max_context": variant.max_context,
        "total": variant.plan.total if variant.plan else None,
        "fits": variant.fits,
        "why_not": variant.why_not,
        "tokens_per_second": round(variant.tokens_per_second, 1) or None,
    }


def _print(found: Sequence[Offer], best: Offer | None, device) -> None:
    from engine_core.memory import format_bytes
    from engine_core.planning import recommend

    reasons: dict[str, int] = {}
    header = ["", "model", "licence", "tools", "variant", "verdict", "parameters", "context", "memory", "tokens/s"]
    rows = [_row(offer, offer is best, device, reasons) for offer in found]
    if best is None:
        print_verdict(f"None of these models fits {device.title}; a shorter --max-context may help.", good=False)
    else:
        variant = best.variant
        rate = f", about {variant.tokens_per_second:.0f} tokens/s" if variant.tokens_per_second else ""
        print_verdict(
            f"{best.model.name} as {variant.quantization} is the best that fits {device.title}{rate}; "
            f"get it with: edgellm get {best.model.name}",
            warning=not variant.is_fluent,
        )
    print()
    title = f"{device.title}: {format_bytes(device.free)} for the engine ({device.note})"
    print_table(header, rows, title=title, left=6, marked="*")
    print()
    notes = [*recommend.notes(device, found), *(f"[{number}] {text}" for text, number in reasons.items())]
    if best is not None:
        notes.append(f"* {best.model.id}, recommended: the largest that fits and is estimated to answer fluently.")
    print_notes(notes)


def _row(offer: Offer, is_best: bool, device, reasons: dict[str, int]) -> list[str]:
    from engine_core.planning.recommend import is_for_cpu

    model, variant = offer.model, offer.variant
    verdict = "fits" if variant.fits else "too large"
    if variant.why_not:
        verdict = f"no [{reasons.setdefault(variant.why_not, len(reasons) + 1)}]"
    elif variant.fits and not variant.is_fluent:
        verdict = "slow"
    return [
        "*" if is_best else "",
        model.name,
        model.licence + (", gated" if model.gated else ""),
        model.tools or "-",
        variant.quantization + (" on CPU" if is_for_cpu(variant, device) else ""),
        verdict,
        _parameters(model.spec.num_parameters),
        str(model.context),
        f"{variant.plan.total / 2**30:.2f} GiB" if variant.plan else "-",
        f"{variant.tokens_per_second:.0f}" if variant.tokens_per_second else "-",
    ]


def _parameters(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 0.9995e9 else f"{count / 1e6:.0f} M"
