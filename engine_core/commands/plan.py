"""``edgellm plan``: what memory an engine takes."""

from __future__ import annotations

import argparse

from engine_core.commands.arguments import add_engine, add_opening, engine_config
from engine_core.manifest import read_manifest, select_variant


def add(commands) -> None:
    parser = commands.add_parser("plan", help="what memory an engine would take; loads nothing")
    add_engine(parser)
    add_opening(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from engine_core.backends import backend_class

    config = engine_config(options)
    directory = select_variant(config.engine_dir, config.quantization)
    manifest = read_manifest(directory, verify_hashes=False)
    plan = backend_class(manifest.backend).plan(directory, manifest, config)
    print(plan.table())
    plan.check()
    return 0
