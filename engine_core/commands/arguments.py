"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from engine_core.config import BACKENDS, KV_CACHE_TYPES, QUANTIZATIONS, EngineConfig

if TYPE_CHECKING:
    from engine_core.planning.devices import DeviceProfile


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine_dir", type=Path)
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
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--max-context", type=int, default=0, help="tokens (0: what the engine was built for)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: the backend's choice)")
    parser.add_argument("--vocab-map", default="auto", help="auto, none or a safetensors file")
    parser.add_argument("--kv-cache-type", choices=KV_CACHE_TYPES, default="auto")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="NAME:DIR", help="a LoRA adapter to load; may be repeated"
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
    )
