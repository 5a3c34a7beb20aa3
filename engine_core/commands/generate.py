"""``edgellm generate``: one answer, streamed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from engine_core.commands.arguments import add_engine, add_opening, engine_config
from engine_core.errors import InvalidRequestError, InvalidTextError
from engine_core.request import SAMPLING_OPTIONS, THINKING_MODES, Piece, SamplingParams, Tool


def add(commands) -> None:
    parser = commands.add_parser("generate", help="answer one prompt, streamed to stdout")
    add_engine(parser)
    add_opening(parser)
    parser.add_argument("prompt", help="the user's message; - reads it from stdin")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--tools", type=Path, metavar="FILE", help="JSON list of tools, as OpenAI's API takes them")
    parser.add_argument("--thinking", choices=THINKING_MODES, default="model", help="reasoning before the answer")
    parser.add_argument("--adapter", default="", metavar="NAME", help="answer with this adapter of --lora")
    for option in SAMPLING_OPTIONS.values():
        flag = f"--{option.name.replace('_', '-')}"
        parser.add_argument(flag, type=option.kind, default=option.default, help=option.description)
    parser.add_argument("--stats", action="store_true", help="token counts and times on stderr")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from engine_core.request import ChatMessage, GenerationRequest
    from engine_core.serving.engine import Engine

    text = _read_stdin() if options.prompt == "-" else options.prompt
    system = (ChatMessage("system", options.system),) if options.system else ()
    content = {"prompt": text} if options.raw else {"messages": (*system, ChatMessage("user", text))}
    request = GenerationRequest(
        "cli",
        tools=_read_tools(options.tools) if options.tools else (),
        thinking=options.thinking,
        adapter=options.adapter,
        sampling=SamplingParams(**{name: getattr(options, name) for name in SAMPLING_OPTIONS}),
        **content,
    )
    request.validate()  # before the engine is loaded
    report = (lambda line: print(line, file=sys.stderr)) if options.stats else (lambda line: None)
    engine = Engine.open(engine_config(options), report)
    try:
        result = engine.answer(request, _show)
        calls = [f"{call.name} {call.arguments}" for call in result.tool_calls]
        print("\n".join([*([""] if result.text and calls else []), *calls]), flush=True)
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


def _show(piece: Piece) -> None:
    print(piece.reasoning, end="", file=sys.stderr, flush=True)
    print(piece.text, end="", flush=True)


def _read_tools(path: Path) -> tuple[Tool, ...]:
    """Raises InvalidRequestError if the file has no list of tools."""
    try:
        functions = [item.get("function", item) for item in json.loads(path.read_text(encoding="utf-8"))]
        return tuple(
            Tool(
                function["name"],
                function.get("description", ""),
                json.dumps(function["parameters"]) if "parameters" in function else "",
            )
            for function in functions
        )
    except OSError as error:
        raise InvalidRequestError(f"The tools in {path} cannot be read ({error.strerror}).") from None
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        raise InvalidRequestError(f"{path} has no JSON list of tools with names, as OpenAI's API takes them.") from None


def _read_stdin() -> str:
    """Raises InvalidTextError if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidTextError(
            f"The prompt from stdin is not valid UTF-8 (at byte {error.start}); send UTF-8."
        ) from None
