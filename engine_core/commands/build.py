"""``edgellm build``: an engine from a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine_core.errors import BuildError


def add(commands) -> None:
    parser = commands.add_parser("build", help="make an engine from a Hugging Face checkpoint directory")
    parser.add_argument("checkpoint", type=Path, help="directory with config.json and safetensors")
    parser.add_argument("engine_dir", type=Path, help="where to write; several variants go to its subdirectories")
    parser.add_argument("--backend", choices=("onnxruntime", "cuda", "tensorrt"), default="onnxruntime")
    parser.add_argument(
        "--quantization",
        default="",
        help="fp32, int8, int4, int4_awq, fp8 or nvfp4 (cuda: fp16, int8, int4, int4_awq; tensorrt: fp16, fp32); "
        "several, with commas: one subdirectory each (default: what the checkpoint is quantized as, else int8; "
        "cuda: the same, else fp16; tensorrt: fp16)",
    )
    parser.add_argument(
        "--max-context", type=int, default=0, help="tokens, prompt and answer together (0: the model's, at most 4096)"
    )
    parser.add_argument(
        "--group-size", type=int, default=0, help="weights that share a scale, for int8 and int4 (default: 32)"
    )
    parser.add_argument(
        "--head-bits",
        type=int,
        default=0,
        choices=(0, 4, 8),
        help="of LM head and embedding in int8 and int4 (default: 8)",
    )
    parser.add_argument("--vocab-map", type=Path, help="safetensors file of the token ids a smaller LM head keeps")
    parser.add_argument(
        "--max-prefill", type=int, default=0, help="tokens of a prefill step, tensorrt only (default: 512)"
    )
    parser.add_argument(
        "--dialect",
        choices=("auto", "products", "plain", "native"),
        default="auto",
        help="tensorrt only: products leaves attention, norms and sampling to our own kernels, plain and native put "
        "the whole decoder into the plan (auto: products where our kernels take the model in fp16, else plain)",
    )
    parser.add_argument(
        "--kv-cache-type",
        choices=("auto", "fp32", "fp16", "int8"),
        default="auto",
        help="what the engine opens with; it holds fp32 and fp16 in any case, int8 with calibration text (auto: fp32)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        help="text for the int8 KV cache: plain, or JSON lines with 'messages' (default: the checkpoint's "
        "calibration.jsonl or .txt)",
    )
    parser.add_argument("--name", default="", help="the model's name in the manifest")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.max_prefill and options.backend != "tensorrt":
        raise BuildError("--max-prefill is fixed in the engine for tensorrt only; elsewhere set prefill_chunk.")
    if options.dialect != "auto" and options.backend != "tensorrt":
        raise BuildError("--dialect is a matter of tensorrt only; leave it out.")
    if options.backend != "onnxruntime":
        return {"cuda": _build_cuda, "tensorrt": _build_tensorrt}[options.backend](options)
    try:
        from engine_core.backends.onnxruntime.build import build_engine
        from engine_core.formats.detect import default_quantization
    except ImportError as error:
        raise BuildError(f"Building needs the Python package {error.name!r}: pip install it.") from error
    quantizations = options.quantization or default_quantization(options.checkpoint) or "int8"
    for kind, engine_dir in _variants(options, quantizations):
        is_rounded = kind.startswith("int")
        group = {"group_size": options.group_size, "head_bits": options.head_bits} if is_rounded else {}
        build_engine(
            options.checkpoint,
            engine_dir,
            quantization=kind,
            max_context=options.max_context,
            vocab_map=options.vocab_map,
            model_name=options.name,
            kv_cache_type=options.kv_cache_type,
            calibration=options.calibration,
            report=print,
            **group,
        )
    return 0


def _variants(options: argparse.Namespace, quantizations: str) -> list[tuple[str, Path]]:
    """(quantization, directory) of each; several have a subdirectory each."""
    kinds = [kind.strip() for kind in quantizations.split(",") if kind.strip()]
    return [(kind, options.engine_dir / kind if len(kinds) > 1 else options.engine_dir) for kind in kinds]


def _build_cuda(options: argparse.Namespace) -> int:
    from engine_core.backends.cuda.build import QUANTIZATIONS, build_cuda
    from engine_core.formats.detect import default_quantization

    if options.group_size not in (0, 128) or options.head_bits:
        raise BuildError(
            "The cuda backend's int4 and int8 have groups of 128 and a head of as many bits; leave both options out."
        )
    if options.calibration:
        raise BuildError("The cuda backend measures its int8 KV cache's scales as it runs; leave --calibration out.")
    found = "" if options.quantization else default_quantization(options.checkpoint)
    quantizations = options.quantization or (found if found in QUANTIZATIONS else "fp16")
    for kind, engine_dir in _variants(options, quantizations):
        build_cuda(
            options.checkpoint,
            engine_dir,
            quantization=kind,
            max_context=options.max_context,
            vocab_map=options.vocab_map,
            kv_cache_type=options.kv_cache_type,
            model_name=options.name,
        )
        print(f"Built {engine_dir} for the cuda backend with {kind} weights")
    return 0


def _build_tensorrt(options: argparse.Namespace) -> int:
    try:
        from engine_core.backends.tensorrt.build import build_tensorrt
    except ImportError as error:
        raise BuildError(f"Building needs the Python package {error.name!r}: pip install it.") from error
    if options.kv_cache_type != "auto" or options.calibration:
        raise BuildError(
            "A tensorrt engine takes its kv_cache_type when it is configured, and measures the scales "
            "of an int8 one as it runs; leave --kv-cache-type and --calibration out."
        )
    if options.group_size or options.head_bits:
        raise BuildError("group_size and head_bits belong to int8 and int4, which TensorRT engines are not built with.")
    for kind, engine_dir in _variants(options, options.quantization or "fp16"):
        build_tensorrt(
            options.checkpoint,
            engine_dir,
            quantization=kind,
            max_context=options.max_context,
            max_prefill=options.max_prefill,
            dialect=options.dialect,
            vocab_map=options.vocab_map,
            model_name=options.name,
            report=print,
        )
    return 0
