"""``edgellm generate``: one answer, streamed."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine_core.commands.arguments import add_command, add_engine, add_opening, engine_config
from engine_core.commands.progress import shown
from engine_core.errors import InvalidRequestError, InvalidTextError
from engine_core.request import SAMPLING_OPTIONS, THINKING_MODES, Piece, SamplingParams, Tool

if TYPE_CHECKING:
    from engine_core.vision.images import Image


def add(commands) -> None:
    parser = add_command(
        commands,
        "generate",
        help="answer one prompt, streamed to stdout",
        example='edgellm generate ~/engines/demo "bring me the red cup" --temperature 0',
    )
    add_engine(parser)
    add_opening(parser)
    parser.add_argument("prompt", help="the user's message; - reads it from stdin")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="JPEG or PNG; may be repeated"
    )
    parser.add_argument("--tools", type=Path, metavar="FILE", help="JSON list of tools, as OpenAI's API takes them")
    parser.add_argument("--thinking", choices=THINKING_MODES, default="model", help="reasoning before the answer")
    parser.add_argument("--adapter", default="", metavar="NAME", help="answer with this adapter of --lora")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE", help="the answer is a JSON value of this schema")
    form.add_argument("--schema-name", default="", metavar="NAME", help="as --json-schema, a schema of --schema-dir")
    form.add_argument("--regex", default="", help="the answer matches this regular expression as a whole")
    form.add_argument("--choice", action="append", default=[], metavar="TEXT", help="an answer; may be repeated")
    form.add_argument("--grammar", type=Path, metavar="FILE", help="the answer is a text of this Lark grammar")
    parser.add_argument("--compact-json", action="store_true", help="JSON on one line, as json.dumps writes it")
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
        images=tuple(map(_read_image, options.image)),
        tools=_read_tools(options.tools) if options.tools else (),
        thinking=options.thinking,
        adapter=options.adapter,
        json_schema=_read_text(options.json_schema),
        schema_name=options.schema_name,
        regex=options.regex,
        choices=tuple(options.choice),
        grammar=_read_text(options.grammar),
        compact_json=options.compact_json,
        sampling=SamplingParams(**{name: getattr(options, name) for name in SAMPLING_OPTIONS}),
        **content,
    )
    request.validate()  # before the engine is loaded
    report = (lambda line: print(line, file=sys.stderr)) if options.stats else (lambda line: None)
    with shown("Loading") as (_, progress):
        engine = Engine.open(engine_config(options), report, progress)
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
            f"({result.finish_reason.value})"
            + ("" if math.isnan(result.energy_joules) else f", {result.energy_joules:.2f} J"),
            file=sys.stderr,
        )
    return 0


def _show(piece: Piece) -> None:
    print(piece.reasoning, end="", file=sys.stderr, flush=True)
    print(piece.text, end="", flush=True)


def _read_text(path: Path | None) -> str:
    """Return the text of a file, "" without one. Raises InvalidRequestError."""
    try:
        return "" if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path} cannot be read ({error}).") from None


def _read_image(path: Path) -> Image:
    """Raises InvalidRequestError, InvalidImageError."""
    from engine_core.vision.pictures import decode_picture

    try:
        return decode_picture(path.read_bytes())
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read ({error}).") from None


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
