"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from engine_core.config import BACKENDS, KV_CACHE_TYPES, QUANTIZATIONS, EngineConfig

if TYPE_CHECKING:
    from engine_core.planning.devices import DeviceProfile


def add_command(commands, name: str, *, help: str, example: str, description: str = "") -> argparse.ArgumentParser:
    """Add the parser of ``edgellm NAME``, whose help ends with ``example``: lines as one types them."""
    lines = "\n".join(f"  {line}" for line in example.splitlines())
    return commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(description or f"{help[0].upper()}{help[1:]}.", 100),
        epilog=f"Example:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the example's lines whole
    )


def add_force(parser: argparse.ArgumentParser, what: str = "output directory") -> None:
    """Add ``--force``; see ``check_output``."""
    parser.add_argument("--force", action="store_true", help=f"replace what is in the {what}")


def port(text: str) -> int:
    """Return a TCP port to listen on, 0 for any that is free; a type of argparse."""
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; ports are 1 to 65535, and 0 is any that is free")
    return int(text)


def whole_number(least: int) -> Callable[[str], int]:
    """Return a type of argparse: a whole number of ``least`` or more."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r:.60} is no whole number of {least} or more")
        return value

    return parse


def check_output(path: Path, force: bool) -> None:
    """Raises BuildError if ``path`` is a file, or a directory with anything in it, that ``force`` does not give up."""
    from engine_core.errors import BuildError

    if force or not path.exists():
        return
    if not path.is_dir():
        raise BuildError(f"{path} is there already; name another one, or replace it with --force.")
    if any(path.iterdir()):
        raise BuildError(f"{path} is not empty; name another directory, or replace it with --force.")


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine_dir", type=Path, help="directory that 'edgellm build' has made")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="auto", help="which variant (default: auto)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a device to plan for; see ``device_of``."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--device", default="this", help="a Jetson by name, such as orin-nano-8gb, or this (default)")
    where.add_argument("--memory", help="what the engine may take, such as 16GB (10⁹ bytes each) or 14GiB")
    parser.add_argument("--reserve", help="what to hold back for all else on the device, such as 1.5GiB")


def device_of(options: argparse.Namespace, *, on_gpu: bool = True, measure: bool = False) -> DeviceProfile:
    """Return the device that the options of ``add_device`` name.

    ``on_gpu``: a GPU where there is a choice. ``measure``: see ``devices.this_machine``. Raises ConfigurationError.
    """
    from engine_core.planning import devices

    if options.memory:
        device = devices.of_memory(devices.parse_bytes(options.memory), gpu=on_gpu)
    elif options.device != "this":
        device = devices.named(options.device)
    else:
        device = devices.this_machine(measure=measure) if on_gpu else devices.this_cpu(measure=measure)
    return devices.with_reserve(device, devices.parse_bytes(options.reserve)) if options.reserve else device


def add_opening(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how the engine is opened; see ``engine_config``."""
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="auto: the fastest built that runs here")
    parser.add_argument("--max-context", type=int, default=0, help="tokens (0: what the engine was built for)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: the backend's choice)")
    parser.add_argument("--vocab-map", default="auto", help="auto, none or a safetensors file")
    parser.add_argument(
        "--kv-cache-type", choices=KV_CACHE_TYPES, default="auto", help="auto: what the engine was built for"
    )
    parser.add_argument(
        "--lora", action="append", default=[], metavar="NAME:DIR", help="a LoRA adapter to load; may be repeated"
    )
    parser.add_argument("--schema-dir", default="", metavar="DIR", help="JSON schemas that requests may name")
    add_trusted_keys(parser)
    parser.add_argument(
        "--max-image-tokens", type=int, default=0, metavar="N", help="of an image, which is scaled down to it (0: auto)"
    )


def add_trusted_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trusted-keys", default="", metavar="PATH",
        help="file or directory of Ed25519 public keys, one of which has to have signed the engine (default: none)",
    )  # fmt: skip


def refuse_trusted_keys(options: argparse.Namespace) -> None:
    """Raises ConfigurationError if ``--trusted-keys`` is given for a checkpoint."""
    from engine_core.errors import ConfigurationError

    if options.trusted_keys:
        raise ConfigurationError(
            f"{options.target} is a checkpoint, which is not signed; leave --trusted-keys out, or name an engine."
        )


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """Return the configuration that the options of ``add_engine`` and ``add_opening`` ask for."""
    return EngineConfig(
        engine_dir=options.engine_dir,
        backend=options.backend,
        quantization=options.quantization,
        max_context=options.max_context,
        num_threads=options.threads,
        vocab_map=options.vocab_map,
        kv_cache_type=options.kv_cache_type,
        lora_adapters=tuple(options.lora),
        schema_dir=options.schema_dir,
        max_image_tokens=options.max_image_tokens,
        trusted_keys=options.trusted_keys,
    )
