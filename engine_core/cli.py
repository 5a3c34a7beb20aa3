"""The ``edgellm`` command: build, inspect, plan, generate.

Exit codes: 0 done, 1 refused or failed (one sentence on stderr), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from engine_core.config import BACKENDS, QUANTIZATIONS, EngineConfig
from engine_core.errors import BuildError, EdgeLLMError
from engine_core.manifest import read_manifest, select_variant
from engine_core.request import ChatMessage, GenerationRequest, SamplingParams


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except EdgeLLMError as error:
        print(f"edgellm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgellm", description="Builds, inspects and tries engines without ROS.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="make an engine from a Hugging Face checkpoint directory")
    build.add_argument("checkpoint", type=Path, help="directory with config.json and safetensors")
    build.add_argument("engine_dir", type=Path, help="where to write; several variants go to its subdirectories")
    build.add_argument("--backend", choices=("onnxruntime", "cuda"), default="onnxruntime")
    build.add_argument(
        "--quantization",
        default="",
        help="fp32, int8 or int4 (cuda: fp16 or int4); several, with commas: one subdirectory each "
        "(default: int8, cuda: fp16)",
    )
    build.add_argument(
        "--max-context", type=int, default=0, help="tokens, prompt and answer together (0: the model's, at most 4096)"
    )
    build.add_argument(
        "--group-size", type=int, default=0, help="weights that share a scale, for int8 and int4 (default: 32)"
    )
    build.add_argument(
        "--head-bits",
        type=int,
        default=0,
        choices=(0, 4, 8),
        help="of LM head and embedding in int8 and int4 (default: 8)",
    )
    build.add_argument("--vocab-map", type=Path, help="safetensors file of the token ids a smaller LM head keeps")
    build.add_argument("--name", default="", help="the model's name in the manifest")
    build.set_defaults(run=_build)

    inspect = commands.add_parser("inspect", help="check an engine's files and print its manifest")
    _add_engine(inspect)
    inspect.add_argument("--json", action="store_true", help="the manifest as it is")
    inspect.set_defaults(run=_inspect)

    plan = commands.add_parser("plan", help="what memory an engine would take; loads nothing")
    _add_engine(plan)
    _add_memory(plan)
    plan.set_defaults(run=_plan)

    generate = commands.add_parser("generate", help="answer one prompt, streamed to stdout")
    _add_engine(generate)
    _add_memory(generate)
    generate.add_argument("prompt", help="the user's message; - reads it from stdin")
    generate.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    generate.add_argument("--system", default="", help="system prompt")
    generate.add_argument("--max-new-tokens", type=int, default=256)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--stats", action="store_true", help="token counts and times on stderr")
    generate.set_defaults(run=_generate)
    return parser


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="auto", help="which variant (default: auto)")


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--max-context", type=int, default=0, help="tokens (0: what the engine was built for)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: the backend's choice)")
    parser.add_argument("--vocab-map", default="auto", help="auto, none or a safetensors file")


def _config(options: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        engine_dir=options.engine_dir,
        backend=options.backend,
        quantization=options.quantization,
        max_context=options.max_context,
        num_threads=options.threads,
        vocab_map=options.vocab_map,
    )


def _build(options: argparse.Namespace) -> int:
    if options.backend == "cuda":
        return _build_cuda(options)
    try:
        from engine_core.build.build import build_engine
    except ImportError as error:
        raise BuildError(f"Building needs the Python package {error.name!r}: pip install it.") from error
    kinds = _kinds(options.quantization or "int8")
    for kind in kinds:
        group = {} if kind == "fp32" else {"group_size": options.group_size, "head_bits": options.head_bits}
        build_engine(
            options.checkpoint,
            options.engine_dir / kind if len(kinds) > 1 else options.engine_dir,
            quantization=kind,
            max_context=options.max_context,
            vocab_map=options.vocab_map,
            model_name=options.name,
            report=print,
            **group,
        )
    return 0


def _kinds(quantizations: str) -> list[str]:
    return [kind.strip() for kind in quantizations.split(",") if kind.strip()]


def _build_cuda(options: argparse.Namespace) -> int:
    from engine_core.build.cuda import build_cuda

    if options.group_size not in (0, 128) or options.head_bits:
        raise BuildError("The cuda backend's int4 has groups of 128 and a head in int4; leave both options out.")
    kinds = _kinds(options.quantization or "fp16")
    for kind in kinds:
        engine_dir = options.engine_dir / kind if len(kinds) > 1 else options.engine_dir
        build_cuda(
            options.checkpoint,
            engine_dir,
            quantization=kind,
            max_context=options.max_context,
            vocab_map=options.vocab_map,
            model_name=options.name,
        )
        print(f"Built {engine_dir} for the cuda backend with {kind} weights")
    return 0


def _inspect(options: argparse.Namespace) -> int:
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


def _plan(options: argparse.Namespace) -> int:
    from engine_core.backends import backend_class

    config = _config(options)
    directory = select_variant(config.engine_dir, config.quantization)
    manifest = read_manifest(directory, verify_hashes=False)
    plan = backend_class(manifest.backend).plan(directory, manifest, config)
    print(plan.table())
    plan.check()
    return 0


def _generate(options: argparse.Namespace) -> int:
    from engine_core.engine import CancelToken, Engine

    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    system = (ChatMessage("system", options.system),) if options.system else ()
    content = {"prompt": text} if options.raw else {"messages": (*system, ChatMessage("user", text))}
    request = GenerationRequest(
        "cli",
        sampling=SamplingParams(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
            max_new_tokens=options.max_new_tokens,
        ),
        **content,
    )
    request.validate()  # before the engine is loaded
    report = (lambda line: print(line, file=sys.stderr)) if options.stats else (lambda line: None)
    engine = Engine.open(_config(options), report)
    try:
        pieces = engine.generate(engine.prepare(request), CancelToken())
        while True:
            try:
                print(next(pieces).text, end="", flush=True)
            except StopIteration as end:
                result = end.value
                break
        print(flush=True)
    finally:
        engine.close()
    if options.stats:
        print(
            f"{result.prompt_tokens} prompt tokens, {result.generated_tokens} generated, first after "
            f"{result.time_to_first_token * 1e3:.1f} ms, then {result.tokens_per_second:.1f} tokens/s "
            f"({result.finish_reason.value})",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
