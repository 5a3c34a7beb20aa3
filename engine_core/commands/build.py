"""``edgellm build``: an engine from a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine_core.backends.capabilities import all_capabilities, capabilities_of
from engine_core.backends.registry import backend_names
from engine_core.backends.toolkit import BuildRequest, toolkit_of
from engine_core.commands.arguments import add_command, add_force, check_output, whole_number
from engine_core.commands.progress import shown
from engine_core.commands.tables import print_verdict
from engine_core.config import KV_CACHE_TYPES, QUANTIZATIONS
from engine_core.errors import BuildError
from engine_core.memory import format_bytes

if TYPE_CHECKING:
    from engine_core.formats.manifest import Manifest


def add(commands) -> None:
    parser = add_command(
        commands,
        "build",
        help="make an engine from a Hugging Face checkpoint or a GGUF file",
        example="edgellm build models/demo ~/engines/demo --quantization int4 --max-context 2048",
    )
    parser.add_argument("checkpoint", type=Path, help="directory with config.json and safetensors, or a GGUF file")
    parser.add_argument("engine_dir", type=Path, help="where to write; several variants go to its subdirectories")
    parser.add_argument(
        "--backend",
        choices=backend_names(),
        default="onnxruntime",
        help="which backend is to run it (default: onnxruntime)",
    )
    parser.add_argument(
        "--quantization",
        default="",
        help=f"one of {', '.join(QUANTIZATIONS[1:])}; a backend that lacks it says which it has; several, with "
        f"commas: one subdirectory each (default: what the checkpoint is quantized as, else {_defaults()})",
    )
    parser.add_argument(
        "--max-context",
        type=int,
        default=0,
        help=f"tokens, prompt and answer together (0: the model's, at most {_contexts()})",
    )
    parser.add_argument(
        "--group-size", type=int, default=0, help=f"weights that share a scale, for integers: {_group_sizes()}"
    )
    parser.add_argument(
        "--head-bits",
        type=int,
        default=0,
        choices=(0, 4, 8),
        help="of LM head and embedding beside weights that are integers (default: 8)",
    )
    parser.add_argument("--vocab-map", type=Path, help="safetensors file of the token ids a smaller LM head keeps")
    parser.add_argument(
        "--max-prefill", type=whole_number(0), default=0, help="tokens of a prefill step, tensorrt only (default: 512)"
    )
    parser.add_argument(
        "--exporter",
        choices=("auto", "gemm", "plain", "native"),
        default="auto",
        help="tensorrt only, the exporter: gemm leaves all but GEMMs to our own kernels, plain and native put "
        "the whole decoder into the plan (auto: gemm where our kernels take the model in fp16, else plain)",
    )
    parser.add_argument(
        "--kv-cache-type",
        choices=KV_CACHE_TYPES,
        default="auto",
        help="what the engine opens with unless told otherwise (auto: the weights' 16 bits, fp32 on the CPU); on the "
        "CPU it holds fp32 and fp16 in any case, int8 with calibration text",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        help="text for the int8 KV cache: plain, or JSON lines with 'messages' (default: the checkpoint's "
        "calibration.jsonl or .txt)",
    )
    parser.add_argument("--name", default="", help="the model's name in the manifest")
    add_force(parser, "engine directory")
    parser.set_defaults(run=run)


def _defaults() -> str:
    return ", ".join(f"{each.default_format} for {each.backend}" for each in all_capabilities())


def _contexts() -> str:
    return ", ".join(f"{each.longest_default} for {each.backend}" for each in all_capabilities())


def _group_sizes() -> str:
    """Return the sizes of each backend that has any."""
    return "; ".join(
        f"{', '.join(map(str, each.group_sizes))} for {each.backend}" for each in all_capabilities() if each.group_sizes
    )


def run(options: argparse.Namespace) -> int:
    from engine_core.formats.detect import default_quantization

    capabilities = capabilities_of(options.backend)
    for name, why_not in capabilities.declined_options.items():
        if getattr(options, name) not in (None, 0, "auto"):
            raise BuildError(why_not)
    if (reason := capabilities.group_refusal(options.group_size)) is not None:
        raise BuildError(reason)
    try:
        toolkit = toolkit_of(options.backend)
    except ImportError as error:
        raise BuildError(f"Building needs the Python package {error.name!r}: pip install it.") from error
    kinds = [kind.strip() for kind in options.quantization.split(",") if kind.strip()]
    if not kinds:
        found = default_quantization(options.checkpoint, capabilities.keeps_order)
        kinds = [capabilities.format_for(found)]
        if (notice := capabilities.rounding_notice(found)) is not None:
            print(notice, file=sys.stderr)
    directories = {kind: options.engine_dir / kind if len(kinds) > 1 else options.engine_dir for kind in kinds}
    for directory in directories.values():
        check_output(directory, options.force)
    for kind, directory in directories.items():
        request = BuildRequest(
            checkpoint=options.checkpoint,
            engine_dir=directory,
            weight_format=kind,
            max_context=options.max_context,
            kv_cache_type=options.kv_cache_type,
            vocab_map=options.vocab_map,
            model_name=options.name,
            group_size=options.group_size,
            head_bits=options.head_bits,
            calibration=options.calibration,
            max_prefill=options.max_prefill,
            exporter=options.exporter,
        )
        try:
            with shown(f"Building {kind}") as (report, progress):
                manifest = toolkit.build(request, report, progress)
        except ImportError as error:
            raise BuildError(f"Building needs the Python package {error.name!r}: pip install it.") from error
        print_verdict(built(directory, manifest))
    return 0


def built(directory: Path, manifest: Manifest) -> str:
    """Return the verdict on an engine that has been built."""
    size = format_bytes(sum(record.size for record in manifest.files.values()))
    return (
        f"Built {directory}: {manifest.model_name} as {manifest.quantization} for {manifest.backend}, {size}, "
        f"max_context {manifest.max_context}."
    )
