"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine_core.config import BACKENDS, KV_CACHE_TYPES, QUANTIZATIONS, EngineConfig


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="auto", help="which variant (default: auto)")


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
