"""``edgellm sign``: sign an engine, so that robots can ask for engines of known origin alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine_core.commands.arguments import add_command
from engine_core.commands.tables import print_verdict


def add(commands) -> None:
    parser = add_command(
        commands,
        "sign",
        help="sign an engine, for nodes that ask for a trusted key",
        description="Signs the manifest of each variant, which has the SHA-256 of every other file. A node, serve and "
        "inspect refuse engines without such a signature when trusted_keys names the public key.",
        example="ssh-keygen -t ed25519 -f engine_key\n"
        "edgellm sign ~/engines/demo --key engine_key\n"
        "edgellm inspect ~/engines/demo --trusted-keys engine_key.pub",
    )
    parser.add_argument("engine_dir", type=Path, help="directory that 'edgellm build' has made")
    parser.add_argument(
        "--key", type=Path, required=True, metavar="FILE", help="Ed25519 private key, in PEM or of OpenSSH"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from engine_core.commands.progress import shown
    from engine_core.formats.manifest import sign_variant, variant_directories
    from engine_core.formats.signatures import read_signing_key
    from engine_core.progress import portion

    key = read_signing_key(options.key, lambda: _passphrase(options.key))
    variants = variant_directories(options.engine_dir)
    names = []
    with shown("Checking") as (_, progress):
        for index, directory in enumerate(variants):
            share = portion(progress, index / len(variants), (index + 1) / len(variants))
            names.append(sign_variant(directory, key, share).quantization)
    print_verdict(f"{options.engine_dir} is signed: {', '.join(names)}, with the key {key.fingerprint}.")
    return 0


def _passphrase(path: Path) -> str:
    """Ask on the terminal. Raises BuildError without one, and if none is given."""
    import getpass

    from engine_core.errors import BuildError

    if not sys.stdin.isatty():
        raise BuildError(f"{path} has a passphrase, which is asked for on a terminal; sign there.")
    try:
        return getpass.getpass(f"Passphrase of {path}: ")
    except EOFError:
        raise BuildError(f"{path} has a passphrase, and none was given; sign again.") from None
