"""``edgellm bench``: how fast an engine is on this machine."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

from engine_core.backends.capabilities import capabilities_of
from engine_core.commands.arguments import add_command, add_engine, add_opening, engine_config
from engine_core.commands.tables import print_notes, print_table, print_verdict
from engine_core.memory import format_bytes

_ENERGY = (("joules_per_token", 3), ("watts", 1))  # figures and their decimals


def add(commands) -> None:
    parser = add_command(
        commands,
        "bench",
        help="measure time to first token and tokens per second",
        description="Measures time to first token and tokens per second, of random prompts and greedy sampling.",
        example="edgellm bench ~/engines/demo --prompt-tokens 32 512",
    )
    add_engine(parser)
    add_opening(parser)
    parser.add_argument(
        "--prompt-tokens", type=int, nargs="+", default=[32, 128, 512], help="lengths of prompts (default: 32 128 512)"
    )
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of each answer (default: 128)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs of each length; their median is printed (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, and nothing else")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from engine_core.errors import ConfigurationError
    from engine_core.measure.bench import MAX_REPEATS, Benchmark

    if min(options.prompt_tokens) < 1 or options.new_tokens < 3 or options.repeats < 1:
        raise ConfigurationError("bench needs at least 1 prompt token, 3 new tokens and 1 repeat.")
    if options.repeats > MAX_REPEATS:
        raise ConfigurationError(f"bench was asked for {options.repeats} repeats, but it runs at most {MAX_REPEATS}.")
    show = sys.stderr.isatty() and not options.json

    def report(line: str) -> None:
        if show:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    with Benchmark(engine_config(options)) as bench:
        bench.check(options.prompt_tokens, options.new_tokens)
        timings = []
        for count in options.prompt_tokens:
            timings.append(bench.measure(count, options.new_tokens, options.repeats, report))
        report("energy")
        energies = [bench.measure_energy(count, options.new_tokens) for count in options.prompt_tokens]
        report("")
        lines = [_line(options, bench, timing, energy) for timing, energy in zip(timings, energies)]
    if options.json:
        print(json.dumps({"kind": "bench", "results": lines}, indent=2))
        return 0
    _print(bench, lines)
    return 0


def _line(options: argparse.Namespace, bench, timing, energy) -> dict:
    from engine_core.measure.bench import figures

    manifest = bench.manifest
    return {
        "date": datetime.date.today().isoformat(),
        "versions": _versions(manifest.backend),
        "device": bench.plan.device if capabilities_of(manifest.backend).on_gpu else _cpu_name(),
        "shape": manifest.model_name,
        "kv_cache_type": options.kv_cache_type if options.kv_cache_type != "auto" else manifest.kv_cache_type,
        "repeats": options.repeats,
        **figures(bench, timing, energy),
    }


def _print(bench, lines: list[dict]) -> None:
    first = lines[0]
    print_verdict(
        f"{first['shape']}, {first['weights']} on {first['engine']}: {first['tok_s']:.1f} tokens/s, first token after "
        f"{first['ttft_ms']:.1f} ms ({first['prompt_tokens']} prompt tokens)."
    )
    print()
    header = ["prompt", "first token ms", "ms/token", "p95", "tokens/s", "GB/s", "J/token", "W"]
    rows = [
        [
            str(line["prompt_tokens"]),
            f"{line['ttft_ms']:.1f}",
            f"{line['ms_per_token']:.3f}",
            f"{line['p95_ms_per_token']:.3f}",
            f"{line['tok_s']:.1f}",
            f"{line['gb_s']:.1f}",
            *("–" if line[name] is None else f"{line[name]:.{digits}f}" for name, digits in _ENERGY),
        ]
        for line in lines
    ]
    print_table(
        header,
        rows,
        title=f"{first['shape']}: {first['engine']}, {first['weights']}, {first['generated_tokens']} new tokens",
        left=0,
    )
    print()
    print_notes(
        [
            bench.reason,
            f"Energy of decoding: {first['energy_source'] or 'it cannot be read here'}.",
            f"A step reads {format_bytes(first['bytes_per_step'])} of weights; GB/s is that over the time of a step.",
            f"Loaded in {first['load_s']:.2f} s. Memory: {format_bytes(first['planned_bytes'])} planned, the process "
            f"grew by {format_bytes(bench.peak_resident)}.",
        ]
    )


def _versions(backend: str) -> dict[str, str]:
    import importlib.metadata

    found = {}
    for package in ("edgellm", *capabilities_of(backend).packages, "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return "CPU"
