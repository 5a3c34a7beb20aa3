"""``edgellm inspect``: what an engine directory holds, and whether it is whole."""

from __future__ import annotations

import argparse
import dataclasses
import json

from engine_core.commands.arguments import add_engine
from engine_core.manifest import read_manifest, select_variant


def add(commands) -> None:
    parser = commands.add_parser("inspect", help="check an engine's files and print its manifest")
    add_engine(parser)
    parser.add_argument("--json", action="store_true", help="the manifest as it is")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    directory = select_variant(options.engine_dir, options.quantization)
    manifest = read_manifest(directory)
    if options.json:
        print(manifest.to_json(), end="")
        return 0
    values = dataclasses.asdict(manifest)
    files = values.pop("files")
    for section in (values.pop("geometry"), values):
        for name, value in section.items():
            print(f"{name:20} {json.dumps(value) if isinstance(value, (dict, list, tuple)) else value}")
    for name, record in files.items():
        print(f"{name:28} {record['size']:>14,} bytes  sha256 {record['sha256'][:12]}…  ok")
    return 0
